"""Search for the fastest mesh, batch size and remat policy on a topology."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.layers import Remat
from jaxdiff.planning.plan import Plan, make_plan, state_bytes_per_device
from jaxdiff.planning.topology import Topology
from jaxdiff.training.abstract import check_axes
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

_POLICIES: tuple[Remat, ...] = ("none", "dots", "full")


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Yield recipes to try on a number of devices.

    Batches are the recipe's, twice and half of it; remat policies come in order of recomputation,
    meshes of `data` and `fsdp` in order of memory, the least first.
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
    """Return the task with each remat policy of its denoiser."""
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
    log: Callable[[Plan], None],
    quick: bool = False,
) -> list[Plan]:
    """Return at most `most` plans: those that fit first, ranked by time per image.

    Candidates that cannot fit are not compiled: their state is too large, or their batch did not
    fit on a mesh that shards the weights further. `log` receives each plan.

    Raises:
      UserError: no candidate's batch divides among the devices, or none can fit.
    """
    plans: list[Plan] = []
    too_large: set[tuple[Any, int]] = set()
    for candidate in candidates(config, len(topology.devices)):
        kind = candidate.task, candidate.train.batch_size
        if len(plans) == most or kind in too_large:
            continue
        mesh = make_mesh(candidate.mesh, topology.devices)
        if topology.chip and state_bytes_per_device(candidate, mesh) > topology.chip.memory:
            continue
        try:
            check_axes(candidate, mesh)
        except UserError:  # more devices than an axis of any parameter can be split over
            continue
        plan = make_plan(candidate, topology, quick=quick)
        log(plan)
        plans.append(plan)
        if not plan.fits:
            too_large.add(kind)
    if not plans:
        raise UserError(
            f"No plan of {config.name} fits {topology.name}: expected a train state that fits "
            f"{len(topology.devices)} devices and a train.batch_size ({config.train.batch_size}) "
            "that is a multiple of their number; choose more devices or another batch size."
        )
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float]:
    """Sort key: plans that fit by time per image, then the others by memory."""
    if not plan.fits:
        return True, plan.memory_needed
    return False, (plan.roofline_s or 0.0) / plan.batch_size
