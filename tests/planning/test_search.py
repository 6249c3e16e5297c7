"""The search for a mesh: its candidates and their ranking."""

import collections
import dataclasses
import math
from dataclasses import dataclass

import jax
import pytest

from jaxdiff.distributed.chips import Chip
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.planning import search as plan_search
from jaxdiff.planning.plan import state_bytes_per_device
from jaxdiff.planning.search import candidates, search
from jaxdiff.planning.topology import Topology

EIGHT = Topology(
    name="cpu:8",
    devices=tuple(jax.devices()[:8]),
    chip=Chip(
        kind="cpu",
        flops=1e6,
        memory=1e9,
        bandwidth=1e9,
        interconnect=1e9,
        matrix_side=1,
        source="made up",
    ),
)


def test_all_meshes_policies_and_micro_batches_are_tried(tiny_recipe):
    tried = list(candidates(tiny_recipe(batch_size=16), 8))
    meshes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context) for c in tried}
    assert {c.mesh.slices for c in tried} == {1}
    assert {(8, 1, 1, 1), (2, 4, 1, 1), (1, 2, 4, 1), (2, 1, 2, 2), (1, 1, 1, 8)} <= meshes
    assert all(math.prod(mesh) == 8 for mesh in meshes)
    assert {c.task.model.denoiser.remat for c in tried} == {"none", "dots", "full"}
    assert {c.train.accumulate for c in tried} == {1, 2, 4, 8, 16}
    assert {c.train.batch_size for c in tried} == {16}
    assert all(16 % (c.mesh.data * c.mesh.fsdp * c.train.accumulate) == 0 for c in tried)


def test_micro_batches_are_tried_on_few_devices_too(tiny_recipe):
    tried = list(candidates(tiny_recipe(batch_size=64), 1))
    assert {c.train.accumulate for c in tried} == {1, 2, 4, 8, 16, 32}


def test_the_mesh_of_the_recipe_is_tried(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(batch_size=12), mesh=MeshConfig(data=2, fsdp=3))
    assert config.mesh in [c.mesh for c in candidates(config, 6)]


def test_a_mesh_of_other_devices_is_not_tried(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(batch_size=16), mesh=MeshConfig(data=2, fsdp=4))
    assert {math.prod(dataclasses.astuple(c.mesh)) for c in candidates(config, 4)} == {4}


@dataclass(frozen=True, kw_only=True)
class Plain(Denoiser):
    """A denoiser without remat policies."""

    channels: int = 3

    def build(self, *, rngs):
        raise NotImplementedError

    def flops(self, *, height, width, text_length):
        return 1.0


def test_a_denoiser_without_policies_is_tried_as_it_is(tiny_recipe):
    config = tiny_recipe(batch_size=16)
    model = dataclasses.replace(config.task.model, denoiser=Plain())
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))
    assert {c.task for c in candidates(config, 8)} == {config.task}


@pytest.fixture
def quick(some_plan, monkeypatch):
    """As if gathering took time, keeping more took memory, and recomputing took time.

    Except for "full" on eight devices that share the weights: it is the fastest of all.
    """

    def planned(candidate, _topology, **_):
        mesh, remat = candidate.mesh, candidate.task.model.denoiser.remat
        batch_size, parts = candidate.train.batch_size, candidate.train.accumulate
        images = batch_size / 16 / parts
        needed = {"none": 40.0, "dots": 20.0, "full": 10.0}[remat] * images + 16 / mesh.fsdp
        seconds = {"none": 1.0, "dots": 1.1, "full": 1.4}[remat] * batch_size
        seconds += mesh.fsdp * parts + 9 * mesh.tensor + 9 * mesh.context
        if (mesh.fsdp, remat) == (8, "full"):
            seconds = 0.1 * batch_size
        return dataclasses.replace(
            some_plan,
            memory_needed=needed,
            step_s=seconds,
            batch_size=batch_size,
            remat=remat,
            accumulate=parts,
            mesh=vars(mesh),
            compile_s=0.0,
        )

    monkeypatch.setattr(plan_search, "make_plan", planned)
    monkeypatch.setattr(plan_search, "check_axes", lambda *_: None)
    monkeypatch.setattr(plan_search, "state_bytes_per_device", lambda *_: 1)


@pytest.mark.usefixtures("quick")
def test_the_fastest_that_fits_comes_first(tiny_recipe):
    made = []
    plans = search(tiny_recipe(batch_size=16), EIGHT, most=999, log=made.append)
    assert [progress.plan for progress in made] != plans
    assert {id(progress.plan) for progress in made} == {id(plan) for plan in plans}
    fitting = [plan for plan in plans if plan.fits]
    assert plans[: len(fitting)] == fitting
    assert 0 < len(fitting) < len(plans)
    times = [plan.step_s / plan.batch_size for plan in fitting]
    assert times == sorted(times)
    assert (plans[0].remat, plans[0].mesh["fsdp"]) == ("full", 8)  # not pruned
    assert {plan.batch_size for plan in plans} == {8, 16, 32}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fsdp", [4, -1])
def test_the_recipes_own_setting_is_planned_first(fsdp, tiny_recipe):
    config = dataclasses.replace(tiny_recipe(batch_size=16), mesh=MeshConfig(data=2, fsdp=fsdp))
    made = []
    search(config, EIGHT, most=3, log=made.append)
    first = made[0].plan
    assert (first.mesh["data"], first.mesh["fsdp"], first.accumulate) == (2, 4, 1)
    assert first.remat == config.task.model.denoiser.remat


def test_plans_correct_the_estimates_of_their_kind(tiny_recipe, some_plan, monkeypatch):
    """The formulas put "none" first; XLA needs a thousand times as long for it."""

    def planned(candidate, _topology, **_):
        remat = candidate.task.model.denoiser.remat
        seconds = plan_search._Estimate(candidate, EIGHT).step(candidate)
        return dataclasses.replace(
            some_plan,
            memory_needed=1.0,
            step_s=seconds * (1000 if remat == "none" else 1),
            batch_size=candidate.train.batch_size,
            remat=remat,
            accumulate=candidate.train.accumulate,
            compile_s=0.0,
        )

    monkeypatch.setattr(plan_search, "make_plan", planned)
    monkeypatch.setattr(plan_search, "check_axes", lambda *_: None)
    monkeypatch.setattr(plan_search, "state_bytes_per_device", lambda *_: 1)
    made = []
    search(tiny_recipe(batch_size=16), EIGHT, most=30, log=made.append)
    policies = [m.plan.remat for m in made if m.plan.batch_size == 16]
    # One of each kind, with micro-batches or without, with `tensor`, `context`, both or none.
    assert policies.count("none") <= 8
    assert policies.count("dots") > 8


@pytest.mark.usefixtures("quick")
def test_what_needs_more_than_a_plan_that_did_not_fit_is_not_made(tiny_recipe):
    plans = search(tiny_recipe(batch_size=16), EIGHT, most=999, log=lambda _: None)
    too_large = [plan for plan in plans if not plan.fits and plan.remat == "none"]
    assert too_large
    shapes = [
        (plan.accumulate, plan.mesh["data"] * plan.mesh["fsdp"], plan.mesh["fsdp"])
        for plan in too_large
        if plan.mesh["tensor"] == plan.mesh["context"] == 1
    ]
    assert not any(
        all(a >= b for a, b in zip(one, other, strict=True))
        for place, other in enumerate(shapes)
        for one in shapes[:place]
    )


@pytest.mark.usefixtures("quick")
def test_no_more_micro_batches_than_fit_are_planned(tiny_recipe):
    plans = search(tiny_recipe(batch_size=16), EIGHT, most=999, log=lambda _: None)
    parts = collections.defaultdict(list)
    for plan in plans:
        if plan.fits:
            kind = plan.remat, plan.batch_size, tuple(plan.mesh.values())
            parts[kind].append(plan.accumulate)
    # One micro-batch is another program than several.
    assert all(len([n for n in counts if n > 1]) <= 1 for counts in parts.values())
    assert [1, 2] in map(sorted, parts.values())


def test_a_batch_of_half_the_size_does_not_end_the_search(tiny_recipe, some_plan, monkeypatch):
    config = tiny_recipe(batch_size=16)
    products = plan_search._Estimate(config, EIGHT).products(config)

    def planned(candidate, _topology, **_):
        size = candidate.train.batch_size
        step = {16: 2.5, 8: 1.2}[size] * products  # per image half of the batch is the fastest
        return dataclasses.replace(some_plan, memory_needed=1.0, step_s=step, batch_size=size)

    monkeypatch.setattr(plan_search, "make_plan", planned)
    monkeypatch.setattr(
        plan_search._Made, "_may_fit", lambda _, config: config.train.batch_size <= 16
    )
    assert len(search(config, EIGHT, most=5, log=lambda _: None)) == 5


@pytest.mark.usefixtures("quick")
def test_plans_that_were_kept_do_not_shorten_the_estimate(tiny_recipe, monkeypatch):
    made, planned = [], plan_search.make_plan
    kept = iter([False, True, True, True, True])

    def of_cache(*arguments, **options):
        plan = planned(*arguments, **options)
        return dataclasses.replace(plan, compile_s=1e9 if next(kept) else 0.0)

    monkeypatch.setattr(plan_search, "make_plan", of_cache)
    search(tiny_recipe(batch_size=16), EIGHT, most=5, log=made.append)
    times = [progress.seconds_left / (5 - progress.made) for progress in made[:4]]
    assert times == pytest.approx(4 * times[:1])
    assert times[0] > 0


@pytest.mark.usefixtures("quick")
def test_no_more_plans_than_asked_for_are_made(tiny_recipe):
    made = []
    plans = search(tiny_recipe(batch_size=16), EIGHT, most=5, log=made.append)
    assert len(plans) == 5
    assert [(progress.made, progress.most) for progress in made] == [(n, 5) for n in range(1, 6)]
    assert made[-1].seconds_left == 0 < made[0].seconds_left
    assert len({plan.batch_size for plan in plans}) > 1


def test_a_state_that_is_too_large_on_all_meshes_is_refused(tiny_recipe):
    small = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, memory=1.0))
    with pytest.raises(UserError, match=r"No plan of tiny fits cpu:8.*batch_size \(4\)"):
        search(tiny_recipe(batch_size=4), small, most=5, log=lambda _: None)


def test_state_bytes_per_device_fall_with_fsdp(tiny_recipe):
    wide = tiny_recipe()
    denoiser = dataclasses.replace(wide.task.model.denoiser, width=256)
    model = dataclasses.replace(wide.task.model, denoiser=denoiser)
    wide = dataclasses.replace(wide, task=dataclasses.replace(wide.task, model=model))
    meshes = [make_mesh(MeshConfig(data=8 // n, fsdp=n), EIGHT.devices) for n in (1, 4, 8)]
    sizes = [state_bytes_per_device(wide, mesh) for mesh in meshes]
    assert sizes[0] / 4 < sizes[1] < sizes[0] / 3.8
    assert sizes[0] / 8 < sizes[2] < sizes[0] / 7
