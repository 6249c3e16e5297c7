"""The plan of a run: its very training step, compiled for devices that need not be there.

Nothing is allocated and nothing runs: shapes -> shardings -> lowered -> compiled. What comes of it
is of three kinds, and `ORIGINS` says of each figure which:

  XLA's     of the compiled program: memory, collectives, traffic, time to compile
  computed  from shapes: parameters, FLOPs; and from these and the chip's data sheet: times
  assumed   how much of the chip's speed a run reaches

The roofline (Williams et al. 2009): a step takes no less time than its products at the chip's
highest rate, its traffic at the memory's, or what a chip sends at that of all its links together.

A quick plan has XLA optimize the program as little as it can: U-Nets, whose hundreds of
convolutions of different shapes take it more than half an hour each otherwise, in minutes. Of
DiT-XL/2 on 256 chips the collectives are the same then and memory is 4 % more; of the traffic, five
times too much for want of fusion, nothing is told.
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
from jaxdiff.distributed.mesh import MeshConfig, PlannedTopology, check_batch, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.distributed.xla_flags import refused_flags_as_user_errors
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
"""Model FLOP utilisation that days and images per second are stated for."""

_O0 = 9  # XLA's number for its least effort, https://openxla.org/xla/effort_levels

_SIZE = r"\(?([\d.]+)([KMG])\)?"
_TOO_LARGE = re.compile(rf"(?:Used|HLO temporaries) {_SIZE} (?:of|exceeds available HBM) {_SIZE}")
"""What XLA says of a program that does not fit, or of its temporaries, if these alone do not."""

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
    """Bytes of one device while a step runs, as XLA has laid them out.

    `state` is what the step is given (train state, frozen weights, batch), most of which it updates
    in place; `temporary` the most that activations, gradients and gathered weights take at a time.
    """

    state: float
    temporary: float
    program: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.temporary + self.program


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs on some devices, and how fast it can be there.

    Memory, traffic and collectives are those of one device; FLOPs those of all of them. Times are
    None where nothing is known of the devices, and all of XLA's figures where the program does not
    fit, for XLA then gives none but `memory_needed`.
    """

    recipe: str
    topology: str
    quick: bool
    stands_in_for: str | None
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
        """The least time of a step, its collectives behind its products."""
        times = [t for t in (self.compute_s, self.memory_s, self.interconnect_s) if t is not None]
        return max(times, default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and FLOPs, with the origin of each figure."""
        collectives = [exchange._asdict() for exchange in self.collectives]
        return {
            **dataclasses.asdict(self),
            "collectives": collectives,
            "fits": self.fits,
            "roofline_s": self.roofline_s,
            "origins": ORIGINS,
        }


def on_slice(config: Config, topology: str, mesh: MeshConfig | None = None) -> Config:
    """The recipe as it is run on a topology: with what it names for it, or with this mesh."""
    named = next((s for s in config.slices if s.topology == topology), None)
    if mesh is None:
        chosen = named or PlannedTopology(
            topology=topology, mesh=config.mesh, accumulate=config.train.accumulate
        )
    else:
        chosen = PlannedTopology(topology=topology, mesh=mesh, accumulate=config.train.accumulate)
    train = dataclasses.replace(config.train, accumulate=chosen.accumulate)
    return dataclasses.replace(config, mesh=chosen.mesh, train=train)


def make_plan(config: Config, topology: Topology, *, quick: bool = False) -> Plan:
    """Compiles the step of a recipe for a topology, on the recipe's own mesh.

    Args:
      config: the recipe.
      topology: the devices.
      quick: have XLA optimize as little as it can.

    Raises:
      UserError: a mesh or a batch that does not divide.
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
    images_per_s = UTILISATION * peak * devices / per_image if peak else None
    return Plan(
        recipe=config.name,
        topology=topology.name,
        quick=quick,
        stands_in_for=topology.stands_in_for,
        chip=chip.kind if chip else topology.devices[0].device_kind,
        chips=devices,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        accumulate=config.train.accumulate,
        remat=remat_of(config),
        steps=config.train.steps,
        flags=config.compiler.flags(topology.devices[0]),
        parameters=_count(abstract_state(config).params),
        frozen_parameters=_count(abstract_frozen(config)),
        flops_per_image=per_image,
        flops_per_step=per_image * batch_size,
        memory=memory,
        memory_needed=needed,
        memory_limit=chip.memory if chip else limit or _share_of_memory(devices),
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


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def held(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Bytes that each device holds of train state and frozen weights."""
    trees = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    shardings = [state_shardings(tree, mesh, axes) for tree in trees]

    def size(leaf, sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, list(trees), shardings)))


def _share_of_memory(devices: int) -> float:
    """Of this machine's, for each of its simulated devices."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / devices


def remat_of(config: Config) -> str | None:
    """Return what the denoiser's blocks keep for the backward pass; None where there is none."""
    task = config.task
    return task.model.denoiser.remat if isinstance(task, DiffusionTask) else None


def _compile(
    config: Config, mesh: Mesh, quick: bool
) -> tuple[Memory | None, float, float | None, str | None]:
    """Memory, its sum, the compiler's own limit, and the program's text.

    Of a program that does not fit there are the sum and the limit alone; where XLA tells that of
    its temporaries only, the sum is theirs and what a device holds.
    """
    state, frozen = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    shardings = [state_shardings(tree, mesh, axes) for tree in (state, frozen)]
    step = compile_step(config, mesh, *shardings)
    lowered = step.lower(state, frozen, abstract_batch(config))  # type: ignore[attr-defined]
    try:
        with refused_flags_as_user_errors():
            compiled = lowered.compile({"optimization_level": _O0} if quick else None)
    except jax.errors.JaxRuntimeError as error:
        used = _TOO_LARGE.search(str(error))
        if used is None:
            raise
        unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}
        needed, limit = float(used[1]) * unit[used[2]], float(used[3]) * unit[used[4]]
        if "temporaries" in used[0]:
            needed += held(config, mesh)
        return None, needed, limit, None
    stats = compiled.memory_analysis()
    if stats is None:
        raise UserError("This backend's compiler tells nothing of memory: plan for another one.")
    memory = Memory(
        state=float(
            stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        ),
        temporary=float(stats.temp_size_in_bytes),
        program=float(stats.generated_code_size_in_bytes),
    )
    return memory, memory.total, None, compiled.as_text()
