"""Plan a run: compile its training step for devices that need not be attached.

Nothing is allocated or run: shapes -> shardings -> lowered -> compiled. `ORIGINS` states the origin
of each figure:

  XLA's     of the compiled program: memory, collectives, traffic, time to compile
  computed  from shapes: parameters, FLOPs
  modelled  times, from the compiled program and the chip's data sheet: see `schedule`
  assumed   the model FLOP utilisation that a run reaches, if the modelled step allows it

A quick plan compiles with XLA's least effort: a U-Net takes minutes rather than half an hour. For
DiT-XL/2 on 256 chips collectives are the same and memory is 4 % larger. Traffic and the order of
instructions are left out, since without fusion traffic is five times too large: the time of a step
is the larger of products and collectives.
"""

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxdiff.distributed.mesh import check_batch, make_mesh
from jaxdiff.distributed.sharding import bytes_per_device, state_shardings
from jaxdiff.errors import UserError
from jaxdiff.planning.collectives import Exchange, exchanges
from jaxdiff.planning.hlo import Program, read_program
from jaxdiff.planning.plan_cache import keep_plan, plan_file, read_plan
from jaxdiff.planning.schedule import Times, program_times
from jaxdiff.planning.topology import Topology
from jaxdiff.planning.traffic import total_traffic
from jaxdiff.training.abstract import (
    abstract_batch,
    abstract_frozen,
    abstract_state,
    check_axes,
    flops_per_image,
)
from jaxdiff.training.loop import compile_step
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

UTILISATION = 0.4
"""Model FLOP utilisation that days and images per second assume, if the step is not slower."""

_LEAST_EFFORT = 9  # https://openxla.org/xla/effort_levels

_SIZE = r"\(?([\d.]+)([KMG])\)?"
_TOO_LARGE = re.compile(rf"(?:Used|HLO temporaries) {_SIZE} (?:of|exceeds available HBM) {_SIZE}")
"""XLA's error for a program, or for its temporaries, that exceed the memory."""

ORIGINS = {
    "parameters": "computed",
    "frozen_parameters": "computed",
    "flops_per_image": "computed",
    "flops_per_step": "computed",
    "memory": "XLA's",
    "memory_limit": "data sheet",
    "collectives": "XLA's",
    "traffic": "XLA's",
    "compute_s": "modelled",
    "memory_s": "modelled",
    "interconnect_s": "modelled",
    "network": "XLA's",
    "network_s": "modelled",
    "exposed_s": "modelled",
    "step_s": "modelled",
    "utilisation": "assumed",
    "images_per_s": "assumed",
    "days": "assumed",
    "compile_s": "measured",
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per device during a step, in XLA's layout.

    Attributes:
      state: arguments and results: train state, frozen weights, batch.
      temporary: peak of activations, gradients and gathered weights.
      program: the code.
    """

    state: float
    temporary: float
    program: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.state + self.temporary + self.program


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Requirements and speed of a recipe on a topology.

    Memory, traffic and collectives are per device; FLOPs are over all devices. Where the program
    does not fit, XLA states `memory_needed` alone, and there are no times.

    Attributes:
      compute_s: all products at the chip's peak, with those that remat repeats, on whole tiles.
      memory_s: all traffic at the memory's bandwidth; None for a quick plan.
      interconnect_s: all collectives on their links.
      network: bytes that each device sends to other slices, over the data center's network.
      network_s: the part of `interconnect_s` that these take.
      exposed_s: the part of the step that waits for collectives; None for a quick plan.
      step_s: the step, its collectives included.
    """

    recipe: str
    topology: str
    quick: bool
    proxy_topology: str | None
    chip: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str | None
    steps: int
    flags: tuple[str, ...]
    parameters: int
    frozen_parameters: int
    flops_per_image: float
    flops_per_step: float
    memory: Memory | None
    memory_needed: float
    memory_limit: float
    collectives: tuple[Exchange, ...]
    traffic: float | None
    compute_s: float | None
    memory_s: float | None
    interconnect_s: float | None
    network: float
    network_s: float
    exposed_s: float | None
    step_s: float | None
    utilisation: float
    images_per_s: float
    days: float
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory of each device."""
        return self.memory is not None and self.memory_needed <= self.memory_limit

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> "Plan":
        """Return the plan whose figures `to_json` stated."""
        values = {field.name: stated[field.name] for field in dataclasses.fields(cls)}
        memory = values["memory"]
        return cls(
            **values
            | {
                "memory": memory and Memory(**memory),
                "collectives": tuple(Exchange(**exchange) for exchange in values["collectives"]),
                "flags": tuple(values["flags"]),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures in bytes, seconds and FLOPs, with the origin of each."""
        return {
            **dataclasses.asdict(self),
            "collectives": [exchange._asdict() for exchange in self.collectives],
            "fits": self.fits,
            "origins": ORIGINS,
        }


def make_plan(config: Config, topology: Topology, *, quick: bool = False) -> Plan:
    """Compile a recipe's step for a topology, on the recipe's mesh; `quick` with least effort.

    A plan for devices with a data sheet is kept, and made once.

    Raises:
      UserError: the mesh or the batch does not divide.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    flags = config.compiler.flags(topology.devices[0])
    measured = topology.chip.kind == "cpu"
    file = None if measured else plan_file(config, topology, flags, quick)
    kept = read_plan(file)
    if kept is not None:
        return Plan.from_json(kept)
    check_axes(config, mesh)
    plan = _compiled_plan(config, topology, mesh, quick)
    keep_plan(file, plan.to_json())
    return plan


def _compiled_plan(config: Config, topology: Topology, mesh: Mesh, quick: bool) -> Plan:
    start = time.perf_counter()
    memory, needed, limit, text = _compile(config, mesh, quick)
    compile_s = time.perf_counter() - start
    program = read_program(text) if text else None
    times = _times(program, topology, mesh, quick) if program else None
    chip, devices, batch_size = topology.chip, len(topology.devices), config.train.batch_size
    per_image = flops_per_image(config)
    peak_s = per_image * batch_size / devices / chip.flops
    utilisation = min(UTILISATION, peak_s / times.step) if times else UTILISATION
    images_per_s = utilisation * batch_size / peak_s
    return Plan(
        recipe=config.name,
        topology=topology.name,
        quick=quick,
        proxy_topology=topology.proxy_topology,
        chip=chip.kind,
        chips=devices,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        accumulate=config.train.accumulate,
        remat=remat_of(config),
        steps=config.train.steps,
        flags=config.compiler.known_flags(mesh),
        parameters=count_params(abstract_state(config).params),
        frozen_parameters=count_params(abstract_frozen(config)),
        flops_per_image=per_image,
        flops_per_step=per_image * batch_size,
        memory=memory,
        memory_needed=needed,
        memory_limit=limit or chip.memory,
        collectives=tuple(exchanges(program)) if program else (),
        traffic=total_traffic(program) if program and not quick else None,
        compute_s=times and times.products,
        memory_s=times.memory if times and not quick else None,
        interconnect_s=times and times.links,
        network=times.network * topology.chip.network if times else 0.0,
        network_s=times.network if times else 0.0,
        exposed_s=times.exposed if times and not quick else None,
        step_s=times and times.step,
        utilisation=utilisation,
        images_per_s=images_per_s,
        days=config.train.steps * batch_size / images_per_s / 86_400,
        compile_s=compile_s,
    )


def _times(program: Program, topology: Topology, mesh: Mesh, quick: bool) -> Times:
    times = program_times(program, topology.chip, topology.links(mesh))
    if quick:
        return dataclasses.replace(times, step=max(times.products, times.links))
    return times


def count_params(tree: Any) -> int:
    """Return the number of elements of all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def state_bytes_per_device(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes of train state and frozen weights on each device."""
    axes = config.task.param_axes()
    trees = abstract_state(config), abstract_frozen(config)
    return sum(bytes_per_device(tree, mesh, axes) for tree in trees)


def remat_of(config: Config) -> str | None:
    """Return the remat policy of the denoiser; None for a task without one."""
    task = config.task
    return task.model.denoiser.remat if isinstance(task, DiffusionTask) else None


def _compile(
    config: Config, mesh: Mesh, quick: bool
) -> tuple[Memory | None, float, float | None, str | None]:
    """Return memory, bytes needed, the compiler's limit, and the program's text.

    For a program that does not fit, bytes needed and limit are those of XLA's error. If that states
    the temporaries only, the bytes of the state are added.
    """
    state, frozen = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    shardings = [state_shardings(tree, mesh, axes) for tree in (state, frozen)]
    step = compile_step(config, mesh, *shardings)
    lowered = step.lower(state, frozen, abstract_batch(config))  # type: ignore[attr-defined]
    try:
        compiled = lowered.compile({"optimization_level": _LEAST_EFFORT} if quick else None)
    except jax.errors.JaxRuntimeError as error:
        used = _TOO_LARGE.search(str(error))
        if used is None:
            raise
        unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}
        needed, limit = float(used[1]) * unit[used[2]], float(used[3]) * unit[used[4]]
        if "temporaries" in used[0]:
            needed += state_bytes_per_device(config, mesh)
        return None, needed, limit, None
    stats = compiled.memory_analysis()
    if stats is None:
        raise UserError(
            "The compiler of this backend reports no memory: expected one that does; choose "
            "another --topology."
        )
    memory = Memory(
        state=float(
            stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        ),
        temporary=float(stats.temp_size_in_bytes),
        program=float(stats.generated_code_size_in_bytes),
    )
    return memory, memory.total, None, compiled.as_text()
