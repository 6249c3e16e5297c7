"""Read an optimized XLA program: its computations, their instructions, and how often each runs.

XLA prints a program as computations, each a list of instructions, and the body of a loop once.
Unlike `cost_analysis`, the counts of this package multiply a body by its trips. All figures are per
device.
"""

import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::((?:[A-Z]*\([^)]*\))*))?\})?")
_PARENTHESIS = re.compile(r"[()]")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Array(NamedTuple):
    """One array of an instruction's type.

    Attributes:
      shape: number of elements along each dimension.
      bytes: of its elements.
      stored: bytes in memory, where the last dimensions fill whole tiles.
      is_fast: whether it lies in another memory than the chip's main memory.
    """

    shape: tuple[int, ...]
    bytes: int
    stored: int
    is_fast: bool


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type, as printed
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it calls, by the attribute that names them."""
        return {
            key: [name.strip().lstrip("%") for name in names.strip("{}").split(",")]
            for key, names in _CALLED.findall(self.attributes)
        }


@dataclass(frozen=True)
class Program:
    """The computations of an optimized program by name, and the name of its entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions of a fusion or of an asynchronous call; otherwise none."""
        if instruction.opcode not in ("fusion", "async-start"):
            return []
        called = instruction.called
        return self.computations[(called.get("calls") or called["called_computations"])[0]]

    def calls(self, instruction: Instruction) -> list[tuple[str, int]]:
        """Return the computations that an instruction runs as its own steps, and how often."""
        called = instruction.called
        match instruction.opcode:
            case "while":
                return [(called["body"][0], self._trips(instruction, called["condition"][0]))]
            case "conditional":
                return [(name, 1) for names in called.values() for name in names]
            case "call":
                return [(called["to_apply"][0], 1)]
        return []

    def runs(self) -> dict[str, int]:
        """Return how often each computation runs; a fusion counts, its computation does not.

        All branches of a conditional count, an upper bound.
        """
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name]:
                for called, trips in self.calls(instruction):
                    visit(called, count * trips)

        visit(self.entry, 1)
        return dict(times)

    def _trips(self, loop: Instruction, condition: str) -> int:
        """Return the trip count of a loop: XLA's own, or the bound in its condition."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        bounds = [
            int(i.operands[0])
            for i in self.computations[condition]
            if i.opcode == "constant" and i.operands and i.operands[0].isdigit()
        ]
        return max(bounds, default=1)


def read_program(text: str) -> Program:
    """Parse the text that `jax.stages.Compiled.as_text` returns."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start and " = " not in line.split("(")[0]:
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.rstrip() == "}":  # lines of a kernel's own description may follow
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[2], found[3], found[1] is not None))
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parse `f32[2,3]{1,0} add(%a, %b), metadata={...}`; the result may be a tuple of types."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    if opcode in ("parameter", "constant"):
        operands = (inside.strip(),)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, result, operands, attributes, is_root)


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text) - 1


@functools.lru_cache(maxsize=1 << 16)
def arrays(result: str) -> tuple[Array, ...]:
    """Parse the arrays of a type, such as `(bf16[8,72]{1,0:T(8,128)(2,1)S(1)}, s32[])`."""
    return tuple(_array(found) for found in _ARRAY.finditer(result))


def _array(found: re.Match[str]) -> Array:
    kind, sizes, order, layout = found.groups()
    shape = tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)
    if kind in BYTES:
        size = BYTES[kind]
    else:
        bits = re.search(r"\d+", kind)
        size = max(int(bits[0]) // 8, 1) if bits else 0
    stored = [shape[int(i)] for i in (order or "").split(",") if i] or list(shape)
    tile = re.match(r"T\(([\d,]+)\)", layout or "")
    if tile and shape:  # the first dimensions in `order` are the last in memory
        for place, side in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if place < len(stored):
                stored[place] = -(-stored[place] // side) * side
    return Array(shape, size * math.prod(shape), size * math.prod(stored), "S(" in (layout or ""))
