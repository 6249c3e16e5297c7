"""`jaxdiff plan`: memory and time of a recipe on a TPU slice or GPUs, compiled ahead of time."""

import dataclasses
import os
import re
from typing import Annotated

import jax
import tyro

from jaxdiff.cli.parsing import NO_PREFIX
from jaxdiff.cli.recipe_flags import parse_recipe_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.distributed.mesh import AXES, MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import console, printable, write_text
from jaxdiff.io.text import format_json
from jaxdiff.planning.plan import Plan, make_plan
from jaxdiff.planning.search import SearchProgress, search
from jaxdiff.planning.table import plan_table, summary_table
from jaxdiff.planning.topology import Topology, find_topology
from jaxdiff.training.recipe import Config


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compile a recipe's training step for any devices, attached or not; print memory and time.

    The recipe comes first, then keys of it to change. Without --topology the recipe is planned for
    each slice that it names.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    topology: str | None = None
    """v5e:16x16, v6e:16x16, v5p:4x4x4, tpu7x:2x2x1 ...; 2xv5e:16x16, two slices; h100:8; cpu:8,
    simulated; or local, the devices of this machine."""
    shape: Annotated[str | None, tyro.conf.arg(name="mesh")] = None
    """The mesh, such as data=16,fsdp=16; by default the recipe's mesh for the topology."""
    json: bool = False
    """Print all figures as JSON, in bytes, seconds and FLOPs, with the origin of each."""
    quick: bool = False
    """Compile with XLA's least effort: minutes for a U-Net, with memory slightly overestimated and
    no memory traffic, which a search then ranks without."""
    search: bool = False
    """Try meshes, remat policies, micro-batches and batch sizes, and rank those that fit."""
    most: Count = 12
    """Plans that a search makes at most."""


def plan_command(arguments: list[str]) -> None:
    """Run `jaxdiff plan RECIPE [--topology NAME] [--mesh data=N] [--search] [--quick] [--json]`."""
    prog = "jaxdiff plan"
    options = parse_recipe_flags(PlanOptions, arguments, prog=prog)
    every = [options]
    if options.topology is None:
        every = [
            parse_recipe_flags(PlanOptions, [*arguments, "--topology", planned.topology], prog=prog)
            for planned in options.config.slices
        ]
    if not every:
        raise UserError(
            f"{options.config.name} names no slices: give --topology, such as v5e:16x16 or cpu:8."
        )
    _print([plan for one in every for plan in _plans(one)], options)


def _plans(options: PlanOptions) -> list[Plan]:
    """Make the plans of one topology."""
    config, name, notes = options.config, options.topology or "", console(stderr=True)
    if options.shape:
        mesh = parse_mesh(options.shape)
        if mesh.slices == 1:  # those of the topology, as 2xv5e:16x16
            mesh = dataclasses.replace(mesh, slices=config.mesh.slices)
        config = dataclasses.replace(config, mesh=mesh)
    with notes.status(printable(f"Compiling {config.name} for {name}")):
        topology = _topology(name)
        if not options.search:
            return [make_plan(config, topology, quick=options.quick)]
        return search(
            config,
            topology,
            most=options.most,
            log=lambda progress: notes.print(printable(_line(progress))),
            quick=options.quick,
        )


def _print(plans: list[Plan], options: PlanOptions) -> None:
    if options.json:
        found = [plan.to_json() for plan in plans]
        write_text(format_json(found[0] if len(found) == 1 else found, indent=2))
        return
    tables = console()
    for plan in plans if not options.search else plans[:1]:
        tables.print(plan_table(plan))
    if len(plans) > 1:
        tables.print(summary_table(plans))


def _line(progress: SearchProgress) -> str:
    plan = progress.plan
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    parts = f" in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    verdict = f"{1e3 * plan.step_s:.4g} ms" if plan.fits and plan.step_s else "does not fit"
    left = f"{progress.made} of at most {progress.most}"
    if progress.seconds_left >= 60:
        left += f", up to {progress.seconds_left / 60:.0f} minutes left"
    return f"{mesh}, batch {plan.batch_size}{parts}, remat {plan.remat}: {verdict} ({left})"


def _topology(name: str) -> Topology:
    """Find the devices; start only JAX's CPU backend unless the devices are this machine's."""
    if name not in ("local", "gpu") and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    return find_topology(name)


def parse_mesh(text: str) -> MeshConfig:
    """Parse a mesh such as `data=16,fsdp=16`; axes that are not named have one device.

    Raises:
      UserError: an axis is unknown, or a size is not an integer.
    """
    sizes: dict[str, int] = {"data": 1}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch("-?[0-9]+", size):
            raise UserError(
                f"--mesh {text}: {part.strip()!r} is not an axis and its size: expected some of "
                f"{', '.join(AXES)}, such as data=16,fsdp=16."
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
