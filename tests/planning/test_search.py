"""The search for a mesh: its candidates and their ranking."""

import dataclasses
from dataclasses import dataclass

import jax
import pytest

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.planning import search as plan_search
from jaxdiff.planning.plan import state_bytes_per_device
from jaxdiff.planning.search import candidates, search
from jaxdiff.planning.topology import Topology

EIGHT = Topology(name="cpu:8", devices=tuple(jax.devices()[:8]), chip=None)


def test_all_meshes_policies_and_batches_are_tried(tiny_recipe):
    tried = list(candidates(tiny_recipe(batch_size=16), 8))
    meshes = {(c.mesh.data, c.mesh.fsdp) for c in tried}
    assert meshes == {(8, 1), (2, 4), (1, 8)}
    assert {c.task.model.denoiser.remat for c in tried} == {"none", "dots", "full"}
    assert {c.train.batch_size for c in tried} == {8, 16, 32}
    assert len(tried) == 3 * 3 * 3


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
    tried = list(candidates(config, 8))
    assert len(tried) == 3 * 3
    assert {c.task for c in tried} == {config.task}


@pytest.fixture
def quick(some_plan, monkeypatch):
    """As if gathering took time, keeping more took memory, and recomputing took time."""

    def planned(candidate, _topology, **_):
        fsdp, remat = candidate.mesh.fsdp, candidate.task.model.denoiser.remat
        batch_size = candidate.train.batch_size
        needed = {"none": 40.0, "dots": 20.0, "full": 10.0}[remat] * batch_size / 16 + 16 / fsdp
        seconds = {"none": 1.0, "dots": 1.1, "full": 1.4}[remat] * batch_size + fsdp
        return dataclasses.replace(
            some_plan, memory_needed=needed, compute_s=seconds, batch_size=batch_size, remat=remat
        )

    monkeypatch.setattr(plan_search, "make_plan", planned)


@pytest.mark.usefixtures("quick")
def test_the_fastest_that_fits_comes_first(tiny_recipe):
    planned_so_far = []
    plans = search(tiny_recipe(batch_size=16), EIGHT, most=99, log=planned_so_far.append)
    assert planned_so_far[0].fits is False  # 40 and 2 of 30, with all devices sharing
    assert len(planned_so_far) == len(plans) == 21
    fitting = [plan for plan in plans if plan.fits]
    assert plans[: len(fitting)] == fitting
    times = [plan.roofline_s / plan.batch_size for plan in fitting]
    assert times == sorted(times)


@pytest.mark.usefixtures("quick")
def test_no_more_plans_than_asked_for_are_made(tiny_recipe):
    assert len(search(tiny_recipe(batch_size=16), EIGHT, most=5, log=lambda _: None)) == 5


def test_a_batch_that_does_not_divide_is_refused(tiny_recipe):
    config = tiny_recipe(batch_size=3)
    with pytest.raises(UserError, match=r"No plan of tiny fits cpu:8.*batch_size \(3\)"):
        search(config, EIGHT, most=5, log=lambda _: None)


def test_state_bytes_per_device_fall_with_fsdp(tiny_recipe):
    wide = tiny_recipe()
    denoiser = dataclasses.replace(wide.task.model.denoiser, width=256)
    model = dataclasses.replace(wide.task.model, denoiser=denoiser)
    wide = dataclasses.replace(wide, task=dataclasses.replace(wide.task, model=model))
    meshes = [make_mesh(MeshConfig(data=8 // n, fsdp=n), EIGHT.devices) for n in (1, 4, 8)]
    sizes = [state_bytes_per_device(wide, mesh) for mesh in meshes]
    assert sizes[0] / 4 < sizes[1] < sizes[0] / 3.8
    assert sizes[0] / 8 < sizes[2] < sizes[0] / 7
