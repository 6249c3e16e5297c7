"""Plan a run: compile its training step for devices that need not be attached.

Nothing is allocated or run: shapes -> shardings -> lowered -> compiled. `ORIGINS` states the origin
of each figure:

  XLA's     of the compiled program: memory, collectives, traffic, time to compile
  computed  from shapes: parameters, FLOPs; and from these and the chip's data sheet: times
  assumed   the model FLOP utilisation that a run reaches

The roofline (Williams et al. 2009) is the largest of three times: FLOPs at the chip's peak, traffic
at its memory bandwidth, and bytes sent at the bandwidth of all its links together.

A quick plan compiles with XLA's least effort: a U-Net takes minutes rather than half an hour. For
DiT-XL/2 on 256 chips collectives are the same and memory is 4 % larger. Traffic is left out, since
without fusion it is five times too large.
"""

import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxdiff.distributed.chips import peak_flops
from jaxdiff.distributed.mesh import MeshConfig, check_batch, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.errors import UserError
from jaxdiff.planning.hlo import Exchange, read_program
from jaxdiff.planning.topology import Topology
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
"""Model FLOP utilisation that days and images per second assume."""

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
    "compute_s": "computed",
    "memory_s": "computed",
    "interconnect_s": "computed",
    "roofline_s": "computed",
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

    Memory, traffic and collectives are per device; FLOPs are over all devices. Times are None for
    devices without a data sheet. Where the program does not fit, XLA states `memory_needed` alone.
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
    utilisation: float
    images_per_s: float | None
    days: float | None
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory of each device."""
        return self.memory is not None and self.memory_needed <= self.memory_limit

    @property
    def roofline_s(self) -> float | None:
        """Lower bound on the time of a step, with collectives overlapped."""
        times = [t for t in (self.compute_s, self.memory_s, self.interconnect_s) if t is not None]
        return max(times, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return all figures in bytes, seconds and FLOPs, with the origin of each."""
        return {
            **dataclasses.asdict(self),
            "collectives": [exchange._asdict() for exchange in self.collectives],
            "fits": self.fits,
            "roofline_s": self.roofline_s,
            "origins": ORIGINS,
        }


def on_slice(config: Config, topology: str, mesh: MeshConfig | None = None) -> Config:
    """Return a recipe with the given mesh, or with its own settings for a topology."""
    planned = next((s for s in config.slices if s.topology == topology), None)
    if mesh is not None or planned is None:
        return dataclasses.replace(config, mesh=mesh or config.mesh)
    train = dataclasses.replace(config.train, accumulate=planned.accumulate)
    return dataclasses.replace(config, mesh=planned.mesh, train=train)


def make_plan(config: Config, topology: Topology, *, quick: bool = False) -> Plan:
    """Compile a recipe's step for a topology, on the recipe's mesh; `quick` with least effort.

    Raises:
      UserError: the mesh or the batch does not divide.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    check_axes(config, mesh)
    start = time.perf_counter()
    memory, needed, limit, text = _compile(config, mesh, quick)
    compile_s = time.perf_counter() - start
    program = read_program(text) if text else None
    chip, devices = topology.chip, len(topology.devices)
    size, batch_size = config.data.transforms.size, config.train.batch_size
    per_image = flops_per_image(config)
    executed = (per_image + config.task.recomputed_flops(size)) * batch_size
    peak = chip.flops if chip else peak_flops(topology.devices[0]) or 0.0
    traffic = program.traffic() if program and not quick else None
    exchanges = tuple(program.exchanges()) if program else ()
    host_memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    images_per_s = UTILISATION * peak * devices / per_image if peak else None
    return Plan(
        recipe=config.name,
        topology=topology.name,
        quick=quick,
        proxy_topology=topology.proxy_topology,
        chip=chip.kind if chip else topology.devices[0].device_kind,
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
        memory_limit=chip.memory if chip else limit or host_memory / devices,
        collectives=exchanges,
        traffic=traffic,
        compute_s=executed / devices / peak if peak else None,
        memory_s=traffic / chip.bandwidth if chip and traffic is not None else None,
        interconnect_s=sum(e.sent for e in exchanges) / chip.interconnect if chip else None,
        utilisation=UTILISATION,
        images_per_s=images_per_s,
        days=images_per_s and config.train.steps * batch_size / images_per_s / 86_400,
        compile_s=compile_s,
    )


def count_params(tree: Any) -> int:
    """Return the number of elements of all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def state_bytes_per_device(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes of train state and frozen weights on each device."""
    trees = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    shardings = [state_shardings(tree, mesh, axes) for tree in trees]

    def size(leaf, sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, list(trees), shardings)))


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
