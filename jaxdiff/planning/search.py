"""Looking for the mesh, the batch and the remat policy that suit a topology best."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.layers import Remat
from jaxdiff.planning.plan import Plan, held, make_plan
from jaxdiff.planning.topology import Topology
from jaxdiff.training.abstract import check_axes
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

_POLICIES: tuple[Remat, ...] = ("none", "dots", "full")


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Recipes to try on so many devices.

    Meshes of `data` and `fsdp`, those that take least memory first; the recipe's batch, twice and
    half of it; every remat policy of a denoiser, those that recompute least first.
    """
    fsdp = [4**i for i in range(10) if devices % 4**i == 0]
    if devices not in fsdp:
        fsdp.append(devices)
    for scale in (1.0, 2.0, 0.5):
        batch_size = int(config.train.batch_size * scale)
        if batch_size % (devices * config.train.accumulate):
            continue
        train = dataclasses.replace(config.train, batch_size=batch_size)
        for task in _tasks(config.task):
            for size in reversed(fsdp):
                mesh = MeshConfig(data=devices // size, fsdp=size)
                yield dataclasses.replace(config, train=train, mesh=mesh, task=task)


def _tasks(task: Any) -> list[Any]:
    """Return the task with each of its denoiser's remat policies, if it has any."""
    if not isinstance(task, DiffusionTask):
        return [task]
    model, denoiser = task.model, cast(Any, task.model.denoiser)
    if "remat" not in {field.name for field in dataclasses.fields(denoiser)}:
        return [task]
    denoisers = [dataclasses.replace(denoiser, remat=remat) for remat in _POLICIES]
    models = [dataclasses.replace(model, denoiser=denoiser) for denoiser in denoisers]
    return [dataclasses.replace(task, model=changed) for changed in models]


def search(
    config: Config,
    topology: Topology,
    *,
    most: int,
    say: Callable[[Plan], None],
    quick: bool = False,
) -> list[Plan]:
    """At most so many plans: what fits first, and of it what takes least time for an image.

    What cannot fit is not compiled: where the state alone is too large, or where a batch does not
    fit with more devices to share the weights.

    Raises:
      UserError: no batch that is tried divides among the devices, or none of them can fit.
    """
    plans: list[Plan] = []
    too_large: set[tuple[Any, int]] = set()
    for candidate in candidates(config, len(topology.devices)):
        kind = candidate.task, candidate.train.batch_size
        if len(plans) == most or kind in too_large:
            continue
        mesh = make_mesh(candidate.mesh, topology.devices)
        if topology.chip and held(candidate, mesh) > topology.chip.memory:
            continue
        try:
            check_axes(candidate, mesh)
        except UserError:  # more devices than an axis of any parameter can be split over
            continue
        plan = make_plan(candidate, topology, quick=quick)
        say(plan)
        plans.append(plan)
        if not plan.fits:
            too_large.add(kind)
    if not plans:
        raise UserError(
            f"Nothing of {config.name} fits {topology.name}: its train state is too large for "
            f"{len(topology.devices)} devices, or train.batch_size {config.train.batch_size} is no "
            "multiple of their number."
        )
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float]:
    """What does not fit comes last, what comes nearest to it first."""
    if not plan.fits:
        return True, plan.memory_needed
    return False, (plan.roofline_s or 0.0) / plan.batch_size
