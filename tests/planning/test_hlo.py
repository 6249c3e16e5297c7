"""Traffic and collectives of a compiled program, with loop bodies multiplied by their trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.planning.hlo import Exchange, read_program

KIB = 1024

# As libtpu prints them: a gather that goes on beside two products, a sum that is dealt out, groups
# by the axes of a mesh, and arrays in the chip's fast memory, S(1).
TPU = """
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input.1: bf16[64,8]) -> bf16[16,8] {
  %input.1 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %dynamic-slice.9 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,8}
}

%fused.1 (p: bf16[32]) -> bf16[128] {
  %p = bf16[32]{0} parameter(0)
  ROOT %all-gather.1 = bf16[128]{0} all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4], \
device_ids=([2,4]T(1,0)) {'axis_1'}, frontend_attributes={chain_id="5"}
}

%fused.2 (p.2: bf16[32]) -> bf16[128] {
  %p.2 = bf16[32]{0} parameter(0)
  ROOT %all-gather.2 = bf16[128]{0:T(256)S(1)} all-gather(%p.2), replica_groups=[2,4]<=[8], \
frontend_attributes={chain_id="5"}
}

%body (state: (s32[], bf16[32], bf16[64,8])) -> (s32[], bf16[32], bf16[64,8]) {
  %state = (s32[], bf16[32]{0}, bf16[64,8]{1,0}) parameter(0)
  %a = bf16[32]{0} get-tuple-element(%state), index=1
  %b = bf16[64,8]{1,0} get-tuple-element(%state), index=2
  %kernel = () custom-call(), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={"splash"
}}, metadata={op_name="kernel"}
  %fusion.1 = bf16[128]{0} fusion(%a), kind=kLoop, calls=%fused.1
  %fusion.2 = bf16[128]{0:T(256)S(1)} fusion(%a), kind=kLoop, calls=%fused.2
  %fusion.3 = bf16[16,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple = (s32[], bf16[32]{0}, bf16[64,8]{1,0}) tuple(%i, %a, %b)
}

%condition (state.1: (s32[], bf16[32], bf16[64,8])) -> pred[] {
  %state.1 = (s32[], bf16[32]{0}, bf16[64,8]{1,0}) parameter(0)
  %bound = s32[] constant(3)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main_spmd (x: (s32[], bf16[32], bf16[64,8])) -> (s32[], bf16[32], bf16[64,8]) {
  %x = (s32[], bf16[32]{0}, bf16[64,8]{1,0}) parameter(0)
  ROOT %while = (s32[], bf16[32]{0}, bf16[64,8]{1,0}) while(%x), condition=%condition, body=%body
}
"""


def compiled(function, *shapes, **options):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function, **options).lower(*shapes).compile().as_text())


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def step(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "fsdp")), None

        return jax.lax.scan(body, x, length=5)[0]

    spec = PartitionSpec("data", "fsdp")
    program = compiled(
        jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), (64, 256)
    )
    payload = 5 * 32 * 64 * 4.0
    assert program.exchanges() == [Exchange("all-reduce", 4, 5, payload, payload * 2 * 3 / 4)]


def test_overlapped_collectives_of_a_tpu_count_once():
    gathered, summed = 3 * 128 * 2.0, 3 * 64 * 8 * 2.0
    assert read_program(TPU).exchanges() == [
        Exchange("reduce-scatter", 4, 3, summed, summed * 3 / 4),
        Exchange("all-gather", 4, 3, gathered, gathered * 3 / 4),
    ]


def test_arrays_in_fast_memory_are_not_traffic():
    outside = 64 + 256, 64, 64 * 8 * 2 + 16 * 8 * 2  # of the three fusions
    assert read_program(TPU).traffic() == 3 * sum(outside)


def test_traffic_is_what_is_read_and_written():
    program = compiled(lambda x, y: jnp.sin(x) + y, (256, KIB), (256, KIB))
    assert program.traffic() == pytest.approx(3 * 256 * KIB * 4, rel=0.01)


def test_of_stacked_weights_each_step_reads_its_own():
    """A loop over 16 matrices reads each of them once, not all of them 16 times."""

    def step(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x * w), None), x, weights)[0]

    program = compiled(step, (64, KIB), (16, 64, KIB))
    one = 64 * KIB * 4
    assert program.traffic() == pytest.approx(16 * 3 * one, rel=0.15)


def test_a_program_without_collectives_has_none():
    assert compiled(jnp.sin, (8,)).exchanges() == []
    assert np.isfinite(compiled(jnp.sin, (8,)).traffic())
