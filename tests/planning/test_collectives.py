"""Collectives of a compiled program, with loop bodies multiplied by their trips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.planning.collectives import Collective, Exchange, Links, collectives_of, exchanges
from jaxdiff.planning.hlo import read_program

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
    assert exchanges(program) == [Exchange("all-reduce", 4, 5, payload, payload * 2 * 3 / 4)]


def test_overlapped_collectives_of_a_tpu_count_once():
    gathered, summed = 3 * 128 * 2.0, 3 * 64 * 8 * 2.0
    assert exchanges(read_program(TPU)) == [
        Exchange("reduce-scatter", 4, 3, summed, summed * 3 / 4),
        Exchange("all-gather", 4, 3, gathered, gathered * 3 / 4),
    ]


def test_a_permutation_moves_its_operand():
    """As libtpu prints its start: the result is followed by two counters."""
    rows = "bf16[4,8]{1,0}"
    program = read_program(
        f"ENTRY %main (a: {rows}) -> {rows} {{\n  %a = {rows} parameter(0)\n"
        f"  %s = ({rows}, {rows}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%a), "
        "channel_id=1, source_target_pairs={{0,1},{1,0}}\n"
        f"  ROOT %r = {rows} collective-permute-done(%s)\n}}\n"
    )
    assert exchanges(program) == [Exchange("collective-permute", 2, 1, 64.0, 64.0)]


def test_a_program_without_collectives_has_none():
    assert exchanges(compiled(jnp.sin, (8,))) == []


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ],
)
def test_the_devices_of_the_first_group_are_parsed(groups, first):
    program = read_program(
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, "
        "to_apply=%add\n}\n"
    )
    (one,) = collectives_of(program, program.computations["main"][1])
    assert one.group == first


def test_a_collective_uses_the_links_of_the_dimensions_that_it_spans():
    """4 x 4 chips on a torus that wraps around in one dimension: four links of 1 byte/s each."""
    places = tuple((x, y) for x in range(4) for y in range(4))
    links = Links(4.0, 1.0, places, (True, False))

    def seconds(*group):
        return links.seconds(Collective("all-gather", group, 64.0, ""))

    assert seconds(0, 4, 8, 12) == 48 / 2  # a ring: 3/4 of 64 bytes, in both directions
    assert seconds(0, 1, 2, 3) == 48 / 1  # a line
    assert seconds(0, 1) == 32 / 1
    assert seconds(0, 8) == 32 / 1  # two groups share the ring's two links
    assert seconds(0, 12) == 32 / 1  # neighbours around the ring
    assert seconds(0, 3) == 32 * 3  # the ends of a line
    assert seconds(*range(16)) == 60 / 3
    assert Links(4.0, 1.0).seconds(Collective("all-gather", (0, 1, 2, 3), 64.0, "")) == 48 / 4


def test_parts_of_an_all_to_all_pass_the_devices_between_their_ends():
    """Counted by hand on rings and lines of four links of 1 byte/s each: 64 bytes a device."""
    places = tuple((x, y) for x in range(4) for y in range(8))
    links = Links(4.0, 1.0, places, (True, False))

    def seconds(*group):
        return links.seconds(Collective("all-to-all", group, 64.0, ""))

    column, row = range(0, 32, 8), range(8)
    assert seconds(*column) == 16 * (1 + 1 + 2) / 2  # distances on a ring, in both directions
    assert seconds(*row) == 8 * 4 * 4  # four devices send to four others over one link
    assert seconds(*row[:3]) == 64 / 3 * 2
    assert seconds(0, 1) == 32
    assert seconds(*range(32)) == 8 * 4 * 4  # the ring is done by then
    assert Links(4.0, 1.0).seconds(Collective("all-to-all", (0, 1, 2, 3), 64.0, "")) == 48 / 4


@pytest.mark.parametrize(("target", "slices"), [("1,2", 2), ("1:4", 4)])
def test_what_the_hosts_reduce_over_slices_is_counted_once(target, slices):
    """1 KiB that a chip sends and receives, printed twice."""
    attributes = (
        "channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="
        f'"{{{target}}}x{{0:7}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    program = read_program(
        "ENTRY %main (a: bf16[512]) -> bf16[512] {\n  %a = bf16[512]{0} parameter(0)\n"
        f"  %s = (bf16[512]{{0}}, u32[], token[]) send(%a, %t), {attributes}\n"
        f"  %r = (bf16[512]{{0}}, u32[], token[]) recv(%t), {attributes}\n"
        "  ROOT %rd = (bf16[512]{0}, token[]) recv-done(%r)\n}\n"
    )
    (one,) = collectives_of(program, program.computations["main"][2])
    assert one.group == tuple(range(0, 8 * slices, 8))
    sent = 2 * 1024 * (slices - 1) / slices
    assert exchanges(program) == [Exchange("all-reduce", slices, 1, 1024, sent)]


def test_groups_across_slices_use_the_network():
    """Two slices of a line of two chips: what each chip holds after a sum within its slice."""
    links = Links(4.0, 0.5, ((0,), (1,)) * 2, (False,), (0, 0, 1, 1))
    assert links.seconds(Collective("all-reduce", (0, 2), 64.0, "")) == 64 / 0.5
    assert links.seconds(Collective("all-reduce", (0, 1, 2, 3), 64.0, "")) == 32 / 0.5
    assert links.seconds(Collective("all-gather", (2, 3), 64.0, "")) == 32 / 2
    assert (links.crosses((0, 2)), links.crosses((2, 3))) == (True, False)
