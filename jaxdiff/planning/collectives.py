"""Count the collectives of an optimized XLA program, and the time that they take on the links."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxdiff.planning.hlo import Instruction, Program, arrays

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The host's runtime reduces over TPU slices what each has reduced within: a `send` to the host, and
# a `recv` that lasts until it is done. The target is slices x devices of each, `{1,2}x{0:255}`.
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([^}]*)\}x\{([^}]*)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_CHAIN = re.compile(r'chain_id="(\d+)"')


class Exchange(NamedTuple):
    """Collectives of one kind between groups of one size, over one run of the program."""

    kind: str
    group: int  # devices per group
    count: int
    payload: float  # bytes of the whole arrays that are gathered, reduced or moved
    sent: float  # bytes that each device sends in a ring, the minimum


class Collective(NamedTuple):
    """One collective of a program, and the devices of its first group.

    `chain` links the parts of one collective that the compiler spreads over several fusions.
    """

    kind: str
    group: tuple[int, ...]
    payload: float
    chain: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring (Thakur et al. 2005)."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload
        once = (len(self.group) - 1) / len(self.group)
        return self.payload * (2 * once if self.kind == "all-reduce" else once)


def collectives_of(program: Program, outer: Instruction) -> Iterator[Collective]:
    """Yield the collectives of an instruction, or of its fusion.

    On TPUs a collective that overlaps several products is printed in the fusion of each, with one
    chain id, and a reduce-scatter as a fusion of an `all-reduce` and a slice.
    """
    found = _BETWEEN_SLICES.search(outer.attributes) if outer.opcode == "recv" else None
    if found:
        group = tuple(slice_ * _count(found[2]) for slice_ in range(_count(found[1])))
        kind = found[3].lower().replace("_", "-")
        yield Collective(kind, group, float(arrays(outer.result)[0].bytes), "")
    is_scatter = any(
        name.startswith("all-reduce-scatter") for name in outer.called.get("calls", ())
    )
    for instruction in program.inside(outer) or [outer]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            group = _group(instruction.attributes)
            chain = _CHAIN.search(instruction.attributes)
            yield Collective(
                "reduce-scatter" if is_scatter else kind,
                group,
                _payload(kind, instruction, len(group)),
                f"{chain[1]} {instruction.result.split('{')[0]}" if chain else "",
            )


def exchanges(program: Program) -> list[Exchange]:
    """Return all collectives of a program, those that send most first."""
    found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, times in program.runs().items():
        chains = set()
        for instruction in program.computations[name]:
            for one in collectives_of(program, instruction):
                if one.chain and one.chain in chains:
                    continue
                chains.add(one.chain)
                total = found[one.kind, len(one.group)]
                total[0] += times
                total[1] += times * one.payload
                total[2] += times * one.sent
    counted = [Exchange(*key, int(n), size, sent) for key, (n, size, sent) in found.items()]
    return sorted(counted, key=lambda exchange: -exchange.sent)


def _payload(kind: str, instruction: Instruction, group: int) -> float:
    sizes = [array.bytes for array in arrays(instruction.result) if array.shape]
    if instruction.opcode.endswith("-start") and instruction.result.startswith("(("):
        sizes = [array.bytes for array in arrays(instruction.result.split("), ", 1)[1])]
    elif instruction.opcode.endswith("-start") and kind != "all-reduce" and len(sizes) > 1:
        sizes = sizes[1:2]  # operand, result, and of a permutation two counters
    # The result of a `reduce-scatter` is the part that each device keeps.
    is_scatter = instruction.opcode.startswith("reduce-scatter")
    return float(sum(sizes)) * (group if is_scatter else 1)


def _group(attributes: str) -> tuple[int, ...]:
    """Parse the first of the groups, which all have one size; those of a permutation are pairs."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if shaped:
        return tuple(_iota(shaped[2])[: int(shaped[1])].tolist())
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))?"
        r" *\{([^}]*)\}",
        attributes,
    )
    if named is None:
        return (0, 1)
    sizes = {axis: int(size) for axis, size in re.findall(r"'([\w.]+)'=(\d+)", named[1])}
    ids = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
    return _along(ids.reshape(*sizes.values()), list(sizes), named[3])


def _count(text: str) -> int:
    """Count `1,2` or `0:255`, the last included."""
    spans = [[int(n) for n in span.split(":")] for span in text.split(",")]
    return sum(span[-1] - span[0] + 1 for span in spans)


def _iota(text: str) -> np.ndarray:
    """Return the devices of `[16,16]T(1,0)`: counted, in this shape, with axes exchanged."""
    shape = re.search(r"\[([\d,]+)\]", text)
    assert shape is not None
    sizes = [int(n) for n in shape[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(n) for n in order[1].split(",")]) if order else ids).reshape(-1)


def _along(ids: np.ndarray, axes: list[str], named: str) -> tuple[int, ...]:
    """Return the devices along `'a','b':(m)k`: whole axes, or k of one after m larger parts."""
    split: list[int] = []
    kept: list[bool] = []
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", named)
    }
    for axis, size in zip(axes, ids.shape, strict=True):
        before, taken = parts.get(axis, (1, 1))
        taken = taken or size
        split += [before, taken, size // (before * taken)]
        kept += [False, axis in parts, False]
    index = tuple(slice(None) if keep else 0 for keep in kept)
    return tuple(int(n) for n in ids.reshape(split)[index].reshape(-1))


@dataclass(frozen=True)
class Links:
    """The links between the devices of a mesh.

    On a torus, devices of a group use the links of the dimensions that the group spans: both of a
    dimension that wraps around, one of a line. Otherwise each device reaches all others at once.
    Groups across slices exchange over the data center's network what their parts within a slice
    have reduced, or have yet to gather.

    Attributes:
      bandwidth: bytes/s that a device sends over all its links together.
      network: bytes/s that a device sends to other slices.
      coordinates: of each device on the torus, in the order of the mesh; none without a torus.
      wraps: whether each dimension of the torus wraps around.
      slices: the index of each device's slice.
    """

    bandwidth: float
    network: float
    coordinates: tuple[tuple[int, ...], ...] = ()
    wraps: tuple[bool, ...] = ()
    slices: tuple[int, ...] = ()

    def crosses(self, group: Sequence[int]) -> bool:
        """Return whether a group spans several slices."""
        return len(self._slices(group)) > 1

    def _slices(self, group: Sequence[int]) -> set[int]:
        return {self.slices[device] for device in group if device < len(self.slices)}

    def dimensions(self, group: Sequence[int]) -> tuple[int, ...]:
        """Return the dimensions of the torus that a group spans; -1 for the network."""
        if self.crosses(group):
            return (-1,)
        if not self.coordinates or max(group) >= len(self.coordinates):
            return ()
        places = np.array([self.coordinates[device] for device in group])
        return tuple(int(d) for d in np.flatnonzero(np.ptp(places, axis=0)))

    def seconds(self, collective: Collective) -> float:
        """Return the time that a collective keeps its links busy."""
        count = len(self._slices(collective.group))
        if count > 1:
            each = len(collective.group) // count
            payload = collective.payload / each
            return collective._replace(group=(0,) * count, payload=payload).sent / self.network
        spanned = self.dimensions(collective.group)
        if not spanned:
            return collective.sent / self.bandwidth
        link = self.bandwidth / 2 / len(self.wraps)
        links = {d: self._links(d, collective.group) for d in spanned}
        if collective.kind == "all-to-all":
            # A part passes the devices between its ends; each dimension has links of its own.
            sides = {d: len({self.coordinates[i][d] for i in collective.group}) for d in spanned}
            hops = [sides[d] ** 2 // 4 / sides[d] / links[d] for d in spanned]
            return collective.payload * max(hops) / link
        return collective.sent / link / sum(links.values())

    def _links(self, dimension: int, group: Sequence[int]) -> float:
        """Return how many links of a dimension each device of a group has to itself.

        Groups whose devices lie `stride` apart share the links between them.
        """
        side = 1 + max(place[dimension] for place in self.coordinates)
        places = sorted({self.coordinates[device][dimension] for device in group})
        stride = places[1] - places[0]
        if self.wraps[dimension]:
            stride = min(stride, side - stride)
        is_ring = self.wraps[dimension] and len(places) * stride == side
        return (2 if is_ring else 1) / stride
