"""`jaxdiff plan`: what a recipe needs on a slice of chips, before any of them is rented."""

import dataclasses
import json
import os
import sys
from typing import Annotated

import jax
import tyro
from rich.console import Console

from jaxdiff.cli.parsing import NO_PREFIX, parse, read_recipe
from jaxdiff.distributed.mesh import AXES, MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.planning.plan import Plan, make_plan, on_slice
from jaxdiff.planning.search import search
from jaxdiff.planning.table import plan_table, summary_table
from jaxdiff.planning.topology import Topology, find_topology
from jaxdiff.training.recipe import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compiles a recipe's training step for devices that need not be there; tells what it takes.

    The recipe's file comes first, then keys of it to change. Without --topology the recipe is
    planned for each slice that it names.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    topology: str | None = None
    """v5e:16x16, v6e:16x16, v5p:4x4x4, tpu7x:2x2x1 ...; h100:8; cpu:8, simulated; local: here."""
    shape: Annotated[str | None, tyro.conf.arg(name="mesh")] = None
    """The mesh, such as data=16,fsdp=16; by default what the recipe names for the topology."""
    json: bool = False
    """Print JSON: all figures, in bytes, seconds and FLOPs, and the origin of each."""
    quick: bool = False
    """Have XLA optimize as little as it can: minutes for a U-Net, memory a little too high, and
    nothing of the memory's traffic, so that a search ranks without it."""
    search: bool = False
    """Try meshes, batch sizes and remat policies, and rank what fits."""
    most: int = 12
    """Plans that a search makes."""


def plan(arguments: list[str]) -> None:
    """`jaxdiff plan RECIPE [--topology NAME] [--mesh data=N] [--search] [--quick] [--json]`."""
    config, arguments = read_recipe(arguments)
    options = parse(PlanOptions, arguments, prog="jaxdiff plan", default=PlanOptions(config=config))
    config = options.config
    names = [options.topology] if options.topology else [s.topology for s in config.slices]
    if not names:
        raise UserError(
            f"{config.name} names no slices: give --topology, such as v5e:16x16 or cpu:8."
        )
    mesh = parse_mesh(options.shape) if options.shape else None
    console = Console(stderr=True)
    plans = []
    for name in names:
        with console.status(f"Compiling {config.name} for {name}"):
            topology = _topology(name)
            if options.search:
                plans += search(
                    config,
                    topology,
                    most=options.most,
                    say=lambda p: console.print(_line(p)),
                    quick=options.quick,
                )
            else:
                planned = on_slice(config, name, mesh)
                plans.append(make_plan(planned, topology, quick=options.quick))
    _print(plans, options)


def _print(plans: list[Plan], options: PlanOptions) -> None:
    if options.json:
        told = [plan.to_json() for plan in plans]
        print(json.dumps(told[0] if len(told) == 1 else told, indent=2))
        return
    console = Console(file=sys.stdout)
    for plan in plans if not options.search else plans[:1]:
        console.print(plan_table(plan))
    if len(plans) > 1:
        console.print(summary_table(plans))


def _line(plan: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    verdict = "fits" if plan.fits else "does not fit"
    return f"{mesh}, batch {plan.batch_size}, remat {plan.remat}: {verdict}"


def _topology(name: str) -> Topology:
    """Found while nothing but the processor need be started, where the chips are not those here."""
    if name not in ("local", "gpu") and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    return find_topology(name)


def parse_mesh(text: str) -> MeshConfig:
    """`data=16,fsdp=16` as a mesh; axes that are not named have one device.

    Raises:
      UserError: for another axis, or what is no number.
    """
    sizes: dict[str, int] = {"data": 1}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise UserError(
                f"--mesh {text}: {part.strip()!r} is no axis and its size: expected some of "
                f"{', '.join(AXES)}, such as data=16,fsdp=16."
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
