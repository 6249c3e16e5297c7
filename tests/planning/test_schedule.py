"""The time of a step: what overlaps, what waits, counted by hand on a chip of round figures."""

from dataclasses import astuple

import pytest

from jaxdiff.distributed.chips import Chip
from jaxdiff.planning.collectives import Links
from jaxdiff.planning.hlo import read_program
from jaxdiff.planning.schedule import Times, program_times

# 2 FLOP/s for each multiplication and addition of 64 x 64 x 64; 1 array of 64 x 64 takes 16 KiB.
ARRAY = 64 * 64 * 4
CHIP = Chip(
    kind="test",
    flops=2.0 * 64**3,
    memory=1e9,
    bandwidth=ARRAY * 30.0,
    interconnect=ARRAY * 1.5,
    matrix_side=1,
    source="made up",
)
PRODUCT = "f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def times(*lines: str, others: str = "") -> Times:
    text = f"{others}\nENTRY %main (a: f32[64,64]) -> f32[64,64] {{\n"
    text += "\n".join(f"  {line}" for line in ("%a = f32[64,64]{1,0} parameter(0)", *lines))
    return program_times(read_program(text + "\n}\n"), CHIP, Links(CHIP.interconnect, CHIP.network))


GATHER = "replica_groups=[1,4]<=[4], dimensions={0}"
# A quarter of 2 arrays from each of four devices: sends 1.5 arrays, in 1 s.
SYNC = f"%g = f32[128,64]{{1,0}} all-gather(%s), {GATHER}"
START = f"%g = (f32[32,64]{{1,0}}, f32[128,64]{{1,0}}) all-gather-start(%s), {GATHER}"
DONE = "%d = f32[128,64]{1,0} all-gather-done(%g)"


def test_a_product_takes_a_second_and_its_traffic_is_hidden():
    got = times(f"ROOT %y = {PRODUCT}")
    assert astuple(got) == pytest.approx((1.0, 1.0, 3 / 30, 0.0, 0.0, 0.0))


def test_an_instruction_without_a_product_takes_its_traffic():
    got = times("ROOT %y = f32[64,64]{1,0} add(%a, %a)")
    assert astuple(got) == pytest.approx((0.1, 0.0, 0.1, 0.0, 0.0, 0.0))


def test_a_collective_without_a_start_is_waited_for():
    got = times(SYNC, f"ROOT %y = {PRODUCT}")
    assert (got.step, got.exposed, got.links) == pytest.approx((2.0, 1.0, 1.0))


def test_a_collective_with_a_start_is_hidden_by_what_lies_between():
    got = times(START, f"%y = {PRODUCT}", DONE)
    assert (got.step, got.exposed, got.links) == pytest.approx((1.0, 0.0, 1.0))


def test_what_the_hosts_reduce_over_slices_is_hidden_by_what_lies_between():
    """An array that each of two slices sends, in 2 s; without it a product, in 1 s."""
    between = (
        "channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="
        '"{1,2}x{0:0}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    result = "(f32[64,64]{1,0}, u32[], token[])"
    lines = (
        "%a = f32[64,64]{1,0} parameter(0)",
        f"%s = {result} send(%a, %t), {between}",
        f"%r = {result} recv(%t), {between}",
        f"%y = {PRODUCT}",
        "%rd = (f32[64,64]{1,0}, token[]) recv-done(%r)",
    )
    text = "ENTRY %main (a: f32[64,64]) -> f32[64,64] {\n" + "\n".join(f"  {x}" for x in lines)
    links = Links(CHIP.interconnect, ARRAY / 2, slices=(0, 1))
    got = program_times(read_program(text + "\n}\n"), CHIP, links)
    assert got.network == got.links == pytest.approx(2.0)
    assert got.exposed == pytest.approx(1.0)
    assert got.step >= 2.0


def test_what_is_too_short_leaves_the_remainder_exposed():
    got = times(START, "%y = f32[64,64]{1,0} add(%a, %a)", DONE, f"ROOT %z = {PRODUCT}")
    assert (got.step, got.exposed) == pytest.approx((2.0, 0.9))


def test_collectives_share_the_links():
    again = [line.replace("%g", "%h").replace("%d", "%e") for line in (START, DONE)]
    got = times(START, again[0], f"%y = {PRODUCT}", DONE, again[1])
    assert (got.step, got.exposed, got.links) == pytest.approx((2.0, 1.0, 2.0))


def test_a_loop_runs_its_body_as_often_as_its_trips():
    body = f"""
%body (p: f32[64,64]) -> f32[64,64] {{
  %a = f32[64,64]{{1,0}} parameter(0)
  {START}
  %y = {PRODUCT}
  {DONE}
  {SYNC.replace("%g", "%h")}
}}
"""
    loop = 'backend_config={"known_trip_count":{"n":"5"}}'
    got = times(f"ROOT %w = f32[64,64] while(%a), condition=%c, body=%body, {loop}", others=body)
    assert (got.step, got.exposed, got.products) == pytest.approx((10.0, 5.0, 5.0))


def test_a_chain_of_fusions_hides_its_collective_from_the_first_to_the_last():
    """As libtpu prints a gather beside two products, and one within a single product."""

    def fused(name: str, chain: int) -> str:
        return f"""
%{name} (a: f32[64,64], s: f32[32,64]) -> f32[64,64] {{
  %a = f32[64,64]{{1,0}} parameter(0)
  %s = f32[32,64]{{1,0}} parameter(1)
  %ag = f32[128,64]{{1,0}} all-gather(%s), {GATHER}, frontend_attributes={{chain_id="{chain}"}}
  ROOT %y = {PRODUCT}
}}
"""

    others = fused("one", 1) + fused("two", 1) + fused("three", 2)
    calls = [
        f"%{name} = f32[64,64]{{1,0}} fusion(%a, %s), kind=kOutput, calls=%{name}"
        for name in ("one", "two", "three")
    ]
    got = times(*calls, others=others)
    assert (got.step, got.exposed, got.links) == pytest.approx((3.0, 0.0, 2.0))


def test_copies_to_fast_memory_use_what_others_leave_of_the_bandwidth():
    fast = "f32[64,64]{1,0:T(8,128)S(1)}"
    slow = "f32[960,64]{1,0}"
    copy = f"({fast.replace('64,64', '960,64')}, {slow}, u32[]) copy-start(%big)"
    done = "%e = f32[960,64]{1,0} copy-done(%c)"
    # 15 arrays, padded from 64 to 128 columns in fast memory: 15 / 30 of a second each way.
    hidden = times(f"%c = {copy}", f"%y = {PRODUCT}", done)
    assert hidden.step == pytest.approx(1.0)
    waited = times(f"%c = {copy}", done, f"%y = {PRODUCT}")
    assert waited.step == pytest.approx(1.5)
