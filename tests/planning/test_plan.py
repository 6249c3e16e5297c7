"""The plan of a run: figures of its training step, for devices of this machine."""

import dataclasses
import json

import jax
import pytest

from jaxdiff.distributed.chips import find_chip
from jaxdiff.distributed.mesh import AXES, MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models import attention
from jaxdiff.planning import plan as plan_module
from jaxdiff.planning.plan import (
    ORIGINS,
    UTILISATION,
    Plan,
    make_plan,
    state_bytes_per_device,
)
from jaxdiff.planning.table import plan_table, summary_table
from jaxdiff.planning.topology import Topology, find_topology
from jaxdiff.training.abstract import abstract_batch, abstract_frozen, abstract_state
from jaxdiff.training.loop import compile_step
from jaxdiff.training.tasks.diffusion import Trainable


def with_denoiser(task, **changes):
    """The task with another size of its denoiser."""
    denoiser = dataclasses.replace(task.model.denoiser, **changes)
    return dataclasses.replace(task, model=dataclasses.replace(task.model, denoiser=denoiser))


@pytest.fixture(scope="module")
def config(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(steps=100), mesh=MeshConfig(data=2, fsdp=4))
    task = dataclasses.replace(config.task, trainable=Trainable())
    return dataclasses.replace(config, task=with_denoiser(task, depth=1, width=64))


@pytest.fixture(scope="module")
def plan(config) -> Plan:
    return make_plan(config, find_topology("cpu:8"))


def test_it_is_of_the_recipe_and_the_mesh(plan, config):
    assert (plan.recipe, plan.chips, plan.steps) == ("tiny", 8, 100)
    assert plan.mesh == {"slices": 1, "data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    state = abstract_state(config)
    assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert plan.flops_per_step == 8 * config.task.flops_per_image(32)


def test_memory_is_that_of_one_device(plan):
    """What it holds of the state is a quarter of most of it, and the whole of small arrays."""
    whole = 4 * plan.parameters * 4  # bytes of weights, average and two moments
    assert plan.fits
    assert plan.memory is not None
    assert whole / 4 < plan.memory.state < 0.75 * whole
    assert plan.memory.temporary > 0
    assert plan.memory_needed == plan.memory.total


def test_weights_are_gathered_and_gradients_summed(plan):
    kinds = {exchange.kind for exchange in plan.collectives}
    assert "all-gather" in kinds
    assert kinds & {"all-reduce", "reduce-scatter"}
    assert {exchange.group for exchange in plan.collectives} <= {2, 4, 8}


def test_days_are_those_of_the_steps_at_the_assumed_utilisation(plan):
    """Or at that of the modelled step, which is slower here."""
    assert plan.days == pytest.approx(100 * 8 / plan.images_per_s / 86_400)
    assert plan.utilisation < UTILISATION
    assert plan.images_per_s == pytest.approx(8 / plan.step_s)


def test_the_step_contains_its_products_and_its_exposed_collectives(plan):
    """All collectives of a CPU are exposed, for it starts none early."""
    assert 0 < plan.compute_s + plan.exposed_s <= plan.step_s
    assert plan.exposed_s == pytest.approx(plan.interconnect_s)
    assert plan.step_s <= plan.compute_s + plan.memory_s + plan.interconnect_s


def test_all_of_it_is_json_and_every_figure_has_an_origin(plan):
    stated = json.loads(json.dumps(plan.to_json()))
    assert stated["memory"]["temporary"] == plan.memory.temporary
    assert stated["collectives"][0]["kind"] == plan.collectives[0].kind
    assert set(stated["origins"].values()) >= {"XLA's", "computed", "assumed"}
    assert set(ORIGINS) <= set(stated)


def test_the_table_shows_the_origins(plan):
    table = plan_table(plan)
    origins = list(table.columns[2].cells)
    assert {"XLA's", "computed", "modelled", "assumed", "measured"} <= set(origins)


def test_a_table_of_several_states_what_they_share_once(plan):
    table = summary_table([plan, dataclasses.replace(plan, batch_size=16, remat="dots")])
    assert [column.header for column in table.columns] == ["batch", "remat"]
    assert len(table.rows) == 2
    assert table.title.startswith("recipe tiny, topology cpu:8, mesh data=2 fsdp=4")


def test_a_quick_plan_is_of_the_same_step_and_has_no_traffic(plan, config):
    quick = make_plan(config, find_topology("cpu:8"), quick=True)
    same = ("parameters", "flops_per_step", "mesh")
    assert [getattr(quick, name) for name in same] == [getattr(plan, name) for name in same]
    assert quick.memory.state == plan.memory.state
    assert quick.memory_needed == pytest.approx(plan.memory_needed, rel=0.3)
    sent = [sum(e.sent for e in one.collectives) for one in (quick, plan)]
    assert sent[0] == pytest.approx(sent[1], rel=0.05)
    assert (plan.quick, quick.quick) == (False, True)
    assert quick.traffic is quick.memory_s is quick.exposed_s is None
    assert quick.step_s == max(quick.compute_s, quick.interconnect_s)
    assert "Compiled with --quick" in plan_table(quick).caption
    assert plan_table(plan).caption is None


def test_a_plan_that_is_too_large_does_not_fit(plan):
    small = dataclasses.replace(plan, memory_limit=1.0)
    assert not small.fits
    assert any("DOES NOT FIT" in str(cell) for cell in plan_table(small).columns[1].cells)


@pytest.mark.parametrize(
    "error",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_exceeds_the_memory_is_still_planned(error, config, monkeypatch):
    def compile_(*_):
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    plan = make_plan(config, find_topology("cpu:8"))
    assert not plan.fits
    state = state_bytes_per_device(config, make_mesh(config.mesh, find_topology("cpu:8").devices))
    needed = 17.5 * 2**30 + ("temporaries" in error) * state
    assert (plan.memory_needed, plan.memory_limit) == (needed, 15.75 * 2**30)
    assert plan.memory is None
    assert "DOES NOT FIT" in str(list(plan_table(plan).columns[1].cells))


def test_flops_agree_with_those_that_xla_counts_of_the_whole_step(tiny_recipe, monkeypatch):
    """Of one block, for XLA counts the body of a scan once; lowered for one device."""
    monkeypatch.setattr(attention, "_MIN_CPU_LOGITS", 2**30)
    base = tiny_recipe()
    frozen_text = dataclasses.replace(base.task, trainable=Trainable())
    task = with_denoiser(frozen_text, width=256, depth=1, patch_size=2)
    config = dataclasses.replace(base, task=task)
    mesh = jax.make_mesh((1,) * 5, AXES)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state, frozen = abstract_state(config), abstract_frozen(config)
    step = compile_step(
        config, mesh, jax.tree.map(lambda _: one, state), jax.tree.map(lambda _: one, frozen)
    )
    batch = abstract_batch(config)
    xla = step.lower(state, frozen, batch).cost_analysis()["flops"]
    assert task.flops_per_image(32) * 8 == pytest.approx(xla, rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "does not fit the 8 devices"),
        (MeshConfig(data=-1, fsdp=16), "does not fit the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(config, mesh, message):
    with pytest.raises(UserError, match=message):
        make_plan(dataclasses.replace(config, mesh=mesh), find_topology("cpu:8"))


@pytest.fixture
def slice_of(monkeypatch, tmp_path):
    """A topology of this machine's devices with a data sheet, whose plans are kept."""
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path))
    chip = find_chip("TPU v5e")
    return Topology(name="v9:8", devices=tuple(jax.devices()[:8]), chip=chip)


def test_a_plan_is_made_once(config, slice_of, monkeypatch, tmp_path):
    first = make_plan(config, slice_of, quick=True)
    assert len(list(tmp_path.glob("plans/*.json"))) == 1
    monkeypatch.setattr(plan_module, "_compile", None)
    assert make_plan(config, slice_of, quick=True) == first
    with pytest.raises(TypeError):  # another recipe is compiled
        make_plan(dataclasses.replace(config, name="other"), slice_of, quick=True)


def test_a_damaged_plan_is_made_again(config, slice_of, tmp_path):
    first = make_plan(config, slice_of, quick=True)
    (file,) = tmp_path.glob("plans/*.json")
    file.write_text("{")
    again = make_plan(config, slice_of, quick=True)
    assert again == dataclasses.replace(first, compile_s=again.compile_s)


def test_no_plan_is_kept_without_a_cache(config, slice_of, some_plan, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXDIFF_CACHE", "off")
    monkeypatch.setattr(plan_module, "_compiled_plan", lambda *_: some_plan)
    make_plan(config, slice_of, quick=True)
    assert not list(tmp_path.iterdir())
