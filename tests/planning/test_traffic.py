"""Bytes that a compiled program moves: slices by their size, wherever they are in a fusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.planning.hlo import arrays, read_program
from jaxdiff.planning.traffic import total_traffic

KIB = 1024

# As libtpu prints a scan that keeps activations: one fusion computes a product, writes it into the
# stack of all layers and returns it too, while a gather goes on. Another reads a slice of the stack
# inside a nested fusion.
STACK = """
HloModule jit_step, is_scheduled=true

%slice.1 (p.1: bf16[28,64,128], i.1: s32[]) -> bf16[64,128] {
  %p.1 = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %ds.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.1, %i.1, %zero.1, %zero.1), \
dynamic_slice_sizes={1,64,128}
  ROOT %b.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} bitcast(%ds.1)
}

%write (p: bf16[28,64,128], i: s32[], x: bf16[64,32], w: bf16[32,128], s: bf16[16,128], \
g: bf16[64,128]) -> (bf16[28,64,128], bf16[64,128], bf16[64,128]) {
  %p = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(2)
  %w = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %s = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(4)
  %g = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(5)
  %ag = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%s), replica_groups=[2,4]<=[8], \
frontend_attributes={chain_id="5"}
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %row = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} bitcast(%y)
  %zero = s32[]{:T(128)} constant(0)
  %dus = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p, %row, %i, %zero, %zero)
  ROOT %out = (bf16[28,64,128]{2,1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%dus, %y, %ag)
}

%read (q: bf16[28,64,128], j: s32[]) -> bf16[64,128] {
  %q = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %j = s32[]{:T(128)} parameter(1)
  %one = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%q, %j), kind=kLoop, calls=%slice.1
  ROOT %sine = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} sine(%one)
}

ENTRY %main (a: bf16[28,64,128], k: s32[], x.2: bf16[64,32], w.2: bf16[32,128], \
s.2: bf16[16,128], g.2: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = s32[]{:T(128)S(6)} parameter(1)
  %x.2 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(2)
  %w.2 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %s.2 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(4)
  %g.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(5)
  %f = (bf16[28,64,128]{2,1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)S(1)}) fusion(%a, %k, %x.2, %w.2, %s.2, /*index=5*/%g.2), \
kind=kOutput, output_to_operand_aliasing={{2}: (5, {})}, calls=%write
  %stack = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%f), index=0
  ROOT %r = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %k), kind=kLoop, calls=%read
}
"""


def compiled(function, *shapes, **options):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function, **options).lower(*shapes).compile().as_text())


def test_of_a_stack_in_a_fusion_only_the_slice_counts():
    """x, 64 rows of 32 padded to 128; the slice written and returned; the slice read again."""
    slice_ = 64 * 128 * 2
    assert total_traffic(read_program(STACK)) == 64 * 128 * 2 + 2 * slice_ + slice_


def test_traffic_is_what_is_read_and_written():
    program = compiled(lambda x, y: jnp.sin(x) + y, (256, KIB), (256, KIB))
    assert total_traffic(program) == pytest.approx(3 * 256 * KIB * 4, rel=0.01)


def test_of_stacked_weights_each_step_reads_its_own():
    """A loop over 16 matrices reads each of them once, not all of them 16 times."""

    def step(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x * w), None), x, weights)[0]

    program = compiled(step, (64, KIB), (16, 64, KIB))
    one = 64 * KIB * 4
    assert total_traffic(program) == pytest.approx(16 * 3 * one, rel=0.15)


def test_of_stacked_outputs_each_step_writes_its_own():
    def step(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.cos(x)), x, length=16)[1]

    one = 64 * KIB * 4
    # Zeros in the stack, a copy of x, and two fusions that read x and write one result each.
    assert total_traffic(compiled(step, (64, KIB))) == pytest.approx(16 * 7 * one, rel=0.1)


def test_a_program_without_arrays_moves_nothing_infinite():
    assert np.isfinite(total_traffic(compiled(jnp.sin, (8,))))


@pytest.mark.parametrize(
    ("type_", "stored"),
    [
        ("f32[3,5]", 3 * 5 * 4),
        ("bf16[8,256,16,72]{3,2,1,0:T(8,128)(2,1)}", 8 * 256 * 16 * 128 * 2),
        ("bf16[8,256,16,72]{1,3,2,0:T(8,128)(2,1)}", 8 * 16 * 72 * 256 * 2),
        ("bf16[1152]{0:T(1024)(128)(2,1)}", 2048 * 2),
        ("f32[]{:T(128)}", 4),
    ],
)
def test_the_last_dimensions_in_memory_fill_whole_tiles(type_, stored):
    assert arrays(type_)[0].stored == stored
