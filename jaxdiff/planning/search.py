"""Search for the fastest mesh, remat policy, micro-batches and batch size on a topology.

All combinations are estimated by formulas. The recipe's own setting is compiled first, then those
that promise most; each plan corrects the formulas for its kind, such as remat "dots" with
micro-batches. The formulas order candidates and exclude only what cannot win: states that are
larger than the memory, programs that keep more than one that did not fit, more micro-batches than a
program that fits otherwise has, and products that alone take longer than the best step so far.
"""

import collections
import dataclasses
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.layers import Remat
from jaxdiff.planning.collectives import Collective, Links
from jaxdiff.planning.plan import Plan, count_params, make_plan, remat_of, state_bytes_per_device
from jaxdiff.planning.topology import Topology
from jaxdiff.training.abstract import abstract_state, check_axes, flops_per_image
from jaxdiff.training.recipe import Config, with_remat
from jaxdiff.training.tasks.diffusion import DiffusionTask

# Policies by what they keep, the most first, and the share of the forward pass that they repeat:
# "dots" that of attention.
_POLICIES: tuple[Remat, ...] = ("none", "dots", "full")
_REPEATED = {None: 0.0, "none": 0.0, "dots": 0.15, "full": 1.0}
_MOST_SPLITS = 8  # devices that share an image, along `tensor` and `context`
_MOST_PARTS = 32  # micro-batches
_STATE_BYTES = 36.0  # of a parameter, moved by an update: weights, average, two moments, gradient


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Yield the recipes to try on a number of devices, of the recipe's own batch size.

    Meshes are powers of two along all four axes, and the recipe's own; micro-batches powers of two.
    """
    total, devices = devices, devices // config.mesh.slices
    powers = [2**i for i in range(devices.bit_length())]
    own = dataclasses.astuple(config.mesh)
    meshes = [config.mesh] if min(own) > 0 and math.prod(own) == total else []
    for tensor, context in itertools.product(powers, powers):
        if tensor * context > _MOST_SPLITS or devices % (tensor * context):
            continue
        rest = devices // (tensor * context)
        for fsdp in dict.fromkeys([*(n for n in powers if rest % n == 0), rest]):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
            meshes.append(dataclasses.replace(config.mesh, **sizes))
    parts = sorted({config.train.accumulate, *(2**i for i in range(_MOST_PARTS.bit_length()))})
    for mesh, count in itertools.product(dict.fromkeys(meshes), parts):
        if not config.train.batch_size % (mesh.slices * mesh.data * mesh.fsdp * count):
            train = dataclasses.replace(config.train, accumulate=count)
            changed = dataclasses.replace(config, mesh=mesh, train=train)
            if _has_remat(config):
                yield from (with_remat(changed, remat) for remat in _POLICIES)
            else:
                yield changed


def _has_remat(config: Config) -> bool:
    if not isinstance(config.task, DiffusionTask):
        return False
    denoiser: Any = config.task.model.denoiser
    return "remat" in {field.name for field in dataclasses.fields(denoiser)}


class _Estimate:
    """Formulas for the time of a recipe's step on a topology, in seconds."""

    def __init__(self, config: Config, topology: Topology):
        self.topology = topology
        self.parameters = count_params(abstract_state(config).params)
        self.per_image = flops_per_image(config)
        self._links: dict[MeshConfig, tuple[Links, dict[str, tuple[int, ...]]]] = {}

    def products(self, config: Config) -> float:
        """Return the time of all products at the chips' peak."""
        forward = _REPEATED[remat_of(config)] / 3  # a step is three of them
        total = self.per_image * (1 + forward) * config.train.batch_size
        return total / self.topology.chip.flops / len(self.topology.devices)

    def step(self, config: Config) -> float:
        """Return the time of a step in bfloat16; half of the collectives' time is hidden."""
        mesh, parts = config.mesh, config.train.accumulate
        held = self.parameters / mesh.tensor
        gathers = parts * (1 if remat_of(config) in (None, "none") else 2)
        summed, exchanged = self._activations(config)
        links = (
            gathers * self._seconds(mesh, "all-gather", "fsdp", 2 * held)
            + self._seconds(mesh, "reduce-scatter", "fsdp", 2 * held)
            + self._seconds(mesh, "all-reduce", "data", 2 * held / mesh.fsdp)
            + self._seconds(mesh, "all-reduce", "slices", 2 * held / mesh.fsdp / mesh.data)
            + self._seconds(mesh, "all-reduce", "tensor", summed)
            + self._seconds(mesh, "all-to-all", "context", exchanged)
        )
        update = _STATE_BYTES * held / mesh.fsdp / self.topology.chip.bandwidth
        return self.products(config) + update + links / 2

    def _activations(self, config: Config) -> tuple[float, float]:
        """Return the bytes of activations summed over `tensor`, and exchanged over `context`.

        A transformer of 24 layers of width d has about 24 x 12 d^2 parameters, and takes 6 FLOPs a
        token for each in a step. Each layer sums its activations four times in a step; it exchanges
        queries, keys, values and results, again in the backward pass, and their gradients.
        """
        mesh = config.mesh
        tokens = self.per_image / 6 / self.parameters * config.train.batch_size
        width = math.sqrt(self.parameters / 24 / 12)
        layers = 24 * 2 * width * tokens / mesh.slices / mesh.data / mesh.fsdp
        return 4 * layers / mesh.context, 12 * layers / mesh.tensor / mesh.context

    def _seconds(self, mesh: MeshConfig, kind: str, axis: str, payload: float) -> float:
        """Return the time of a collective along an axis of a mesh."""
        if mesh not in self._links:
            made = make_mesh(mesh, self.topology.devices)
            numbers = np.arange(made.size).reshape(made.devices.shape)
            lines = {
                name: tuple(int(n) for n in np.moveaxis(numbers, place, -1).reshape(-1, size)[0])
                for place, (name, size) in enumerate(made.shape.items())
            }
            self._links[mesh] = self.topology.links(made), lines
        links, lines = self._links[mesh]
        if len(lines[axis]) == 1:
            return 0.0
        return links.seconds(Collective(kind, lines[axis], payload, ""))


@dataclass(frozen=True)
class SearchProgress:
    """A plan of a search, and about how long the remaining ones take."""

    plan: Plan
    made: int
    most: int
    seconds_left: float


def search(
    config: Config,
    topology: Topology,
    *,
    most: int,
    log: Callable[[SearchProgress], None],
    quick: bool = False,
) -> list[Plan]:
    """Return at most `most` plans: those that fit first, ranked by time per image.

    The recipe's batch size is searched; the best setting is then tried with twice and half of it.
    `log` receives each plan.

    Raises:
      UserError: no candidate's batch divides among the devices, or none can fit.
    """
    estimate = _Estimate(config, topology)
    made = _Made(topology, most, log, quick, estimate)
    tried = candidates(config, len(topology.devices))
    pool = [(not _is_own(one, config), estimate.step(one), one) for one in tried]

    def promise(entry: tuple[bool, float, Config]) -> tuple[bool, float]:
        is_other, seconds, candidate = entry
        return is_other, seconds * made.correction(candidate)

    def fill(count: int) -> None:
        while pool and len(made.plans) < count:
            _, _, candidate = pool.pop(pool.index(min(pool, key=promise)))
            best = made.best
            least = estimate.products(candidate) / candidate.train.batch_size
            if best is None or least < _seconds_per_image(best[0]):
                made.make(candidate)

    fill(max(most - 2, 1))
    if made.best is not None:
        best = made.best[1]
        for scale in (2.0, 0.5):
            size = int(best.train.batch_size * scale)
            train = dataclasses.replace(best.train, batch_size=size)
            mesh = best.mesh
            if size and not size % (mesh.slices * mesh.data * mesh.fsdp * train.accumulate):
                made.make(dataclasses.replace(best, train=train))
    fill(most)
    if not made.plans:
        raise UserError(
            f"No plan of {config.name} fits {topology.name}: expected a train state that fits "
            f"{len(topology.devices)} devices and a train.batch_size ({config.train.batch_size}) "
            "that is a multiple of their number; choose more devices or another batch size."
        )
    return sorted((plan for plan, _ in made.plans), key=_rank)


@dataclass
class _Made:
    """The plans that a search has made."""

    topology: Topology
    most: int
    log: Callable[[SearchProgress], None]
    quick: bool
    estimate: _Estimate
    plans: list[tuple[Plan, Config]] = dataclasses.field(default_factory=list)
    too_large: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    states: dict[MeshConfig, bool] = dataclasses.field(default_factory=dict)
    compiled: list[float] = dataclasses.field(default_factory=list)  # seconds
    errors: dict[tuple[Any, ...], list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )  # logarithms of plan over estimate, by kind

    @property
    def best(self) -> tuple[Plan, Config] | None:
        """The fastest plan that fits, with its recipe."""
        fitting = [made for made in self.plans if made[0].fits]
        return min(fitting, key=lambda made: _rank(made[0]), default=None)

    def correction(self, config: Config) -> float:
        """Return the geometric mean of plan over estimate, of the plans of its kind."""
        errors = self.errors[_kind(config)]
        return math.exp(sum(errors) / max(len(errors), 1))

    def make(self, config: Config) -> None:
        """Compile a recipe unless it cannot win, or the search has made all its plans."""
        if len(self.plans) >= self.most or self._is_slower(config) or not self._may_fit(config):
            return
        start = time.perf_counter()
        plan = make_plan(config, self.topology, quick=self.quick)
        seconds = time.perf_counter() - start
        if seconds >= plan.compile_s:  # otherwise it was kept
            self.compiled.append(seconds)
        self.plans.append((plan, config))
        if plan.step_s:
            self.errors[_kind(config)].append(math.log(plan.step_s / self.estimate.step(config)))
        if not plan.fits:
            self.too_large.append(_kept(config))
        count = len(self.plans)
        each = sum(self.compiled) / max(len(self.compiled), 1)
        self.log(SearchProgress(plan, count, self.most, each * (self.most - count)))

    def _is_slower(self, config: Config) -> bool:
        """Whether a recipe that fits has fewer micro-batches, and is the same otherwise.

        One micro-batch is another program: its gradients are reduced as they are computed.
        """
        parts = config.train.accumulate
        for plan, made in self.plans:
            train = dataclasses.replace(made.train, accumulate=parts)
            same = dataclasses.replace(made, train=train) == config
            if plan.fits and 1 < made.train.accumulate < parts and same:
                return True
        return False

    def _may_fit(self, config: Config) -> bool:
        kept = _kept(config)
        if any(all(map(operator.ge, kept, other)) for other in self.too_large):
            return False
        if config.mesh not in self.states:
            mesh = make_mesh(config.mesh, self.topology.devices)
            try:
                check_axes(config, mesh)
            except UserError:  # more devices than an axis of any parameter can be split over
                self.states[config.mesh] = False
            else:
                size = state_bytes_per_device(config, mesh)
                self.states[config.mesh] = size <= self.topology.chip.memory
        return self.states[config.mesh]


def _is_own(candidate: Config, config: Config) -> bool:
    """Whether a candidate is the recipe's own setting; -1 is any number of devices."""
    sizes = zip(dataclasses.astuple(candidate.mesh), dataclasses.astuple(config.mesh), strict=True)
    same_mesh = all(size in (-1, found) for found, size in sizes)
    return same_mesh and dataclasses.replace(candidate, mesh=config.mesh) == config


def _kind(config: Config) -> tuple[Any, ...]:
    """Return what the formulas' errors depend on most."""
    mesh = config.mesh
    return remat_of(config), config.train.accumulate > 1, mesh.tensor > 1, mesh.context > 1


def _kept(config: Config) -> tuple[float, ...]:
    """Return all that decides on the memory of a recipe; more of each needs more."""
    mesh = config.mesh
    images = config.train.batch_size / config.train.accumulate / mesh.slices / mesh.data / mesh.fsdp
    policy = -list(_REPEATED).index(remat_of(config))
    return images, policy, 1 / mesh.fsdp, 1 / mesh.tensor, 1 / mesh.context


def _rank(plan: Plan) -> tuple[bool, float]:
    """Sort key: plans that fit by time per image, then the others by memory."""
    if not plan.fits:
        return True, plan.memory_needed
    return False, _seconds_per_image(plan)


def _seconds_per_image(plan: Plan) -> float:
    return math.inf if plan.step_s is None else plan.step_s / plan.batch_size
