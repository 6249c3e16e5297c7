"""Count the runs, memory traffic and collectives of an optimized XLA program.

XLA prints a program as computations, each a list of instructions, and the body of a loop once.
Unlike `cost_analysis`, the counts here multiply a body by its trips. All figures are per device.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Opcodes that neither read nor write memory.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "while",
    "conditional",
    "call",
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type, as printed
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Exchange(NamedTuple):
    """Collectives of one kind between groups of one size, over one run of the program."""

    kind: str
    group: int  # devices per group
    count: int
    payload: float  # bytes of the whole arrays that are gathered, reduced or moved
    sent: float  # bytes that each device sends in a ring, the minimum


@dataclass(frozen=True)
class Program:
    """The computations of an optimized program by name, and the name of its entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    def runs(self) -> dict[str, int]:
        """Return how often each computation runs; a fusion counts, its computation does not."""
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name]:
                called = dict(_CALLED.findall(instruction.attributes))
                match instruction.opcode:
                    case "while":
                        trips = self._trips(instruction, called)
                        visit(_bare(called["body"]), count * trips)
                    case "conditional":  # an upper bound: every branch counts
                        for names in called.values():
                            for branch in names.strip("{}").split(","):
                                visit(_bare(branch), count)
                    case "call" | "async-start":
                        for key in ("to_apply", "calls", "called_computations"):
                            if key in called:
                                visit(_bare(called[key].strip("{}")), count)

        visit(self.entry, 1)
        return dict(times)

    def _trips(self, loop: Instruction, called: dict[str, str]) -> int:
        """Return the trip count of a loop: XLA's own, or the bound in its condition."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        bounds = [
            int(i.operands[0])
            for i in self.computations[_bare(called["condition"])]
            if i.opcode == "constant" and i.operands and i.operands[0].isdigit()
        ]
        return max(bounds, default=1)

    def exchanges(self) -> list[Exchange]:
        """Return all collectives, those that send most first."""
        found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for name, times in self.runs().items():
            for kind, instruction in self._collectives(name):
                group = _group_size(instruction.attributes)
                payload = self._payload(kind, instruction, group)
                total = found[kind, group]
                total[0] += times
                total[1] += times * payload
                total[2] += times * payload * _sent_fraction(kind, group)
        exchanges = [Exchange(*key, int(n), size, sent) for key, (n, size, sent) in found.items()]
        return sorted(exchanges, key=lambda exchange: -exchange.sent)

    def _collectives(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """Yield the collectives of a computation and of its fusions, with their kinds.

        On TPUs a collective that overlaps several products is printed in the fusion of each, with
        one chain id, and a reduce-scatter as a fusion of an `all-reduce` and a slice.
        """
        chains = set()
        for outer in self.computations[name]:
            called = ""
            if outer.opcode == "fusion":
                called = _bare(dict(_CALLED.findall(outer.attributes)).get("calls", ""))
            for instruction in self.computations.get(called, [outer]):
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
                if chain and (chain[1], instruction.result.split("{")[0]) in chains:
                    continue
                if chain:
                    chains.add((chain[1], instruction.result.split("{")[0]))
                is_scatter = called.startswith("all-reduce-scatter")
                yield "reduce-scatter" if is_scatter else kind, instruction

    def _payload(self, kind: str, instruction: Instruction, group: int) -> float:
        arrays = [_bytes(a) for a in _ARRAY.finditer(instruction.result)]
        if instruction.opcode.endswith("-start") and instruction.result.startswith("(("):
            arrays = [_bytes(a) for a in _ARRAY.finditer(instruction.result.split("), ", 1)[1])]
        elif instruction.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[len(arrays) // 2 :][:1]  # operand, result, and counters
        total = float(sum(arrays))
        # The result of a `reduce-scatter` is the part that each device keeps.
        return total * group if instruction.opcode.startswith("reduce-scatter") else total

    def traffic(self) -> float:
        """Return the bytes read from and written to main memory in one run of the program.

        An instruction, or a fusion as a whole, reads its operands and writes its result; slices
        count by their own size. Arrays in a chip's fast memory do not count.
        """
        total = 0.0
        for name, times in self.runs().items():
            types = {i.name: i.result for i in self.computations[name]}
            for instruction in self.computations[name]:
                if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                    continue
                total += times * self._instruction_traffic(instruction, types)
        return total

    def _instruction_traffic(self, instruction: Instruction, types: dict[str, str]) -> float:
        operands = [_main_memory(types.get(name, "")) for name in instruction.operands]
        result = _main_memory(instruction.result)
        match instruction.opcode:
            case "dynamic-slice" | "slice" | "gather":
                return 2 * result
            case "dynamic-update-slice":
                return 2 * operands[1] if len(operands) > 1 else result
            case "fusion":
                called = dict(_CALLED.findall(instruction.attributes)).get("calls", "")
                return self._fusion_traffic(_bare(called), operands, result)
        if instruction.opcode in ("copy-start", "slice-start"):  # to fast memory, or back
            return float(min(_bytes(a) for a in _ARRAY.finditer(instruction.result) if a[2]))
        if instruction.opcode.endswith("-start"):
            return result
        return sum(operands) + result

    def _fusion_traffic(self, name: str, operands: list[float], result: float) -> float:
        inside = self.computations.get(name, [])
        types = {i.name: i.result for i in inside}
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in inside:
            for operand in instruction.operands:
                users[operand].append(instruction)
        for i in inside:
            if i.opcode == "dynamic-update-slice" and i.is_root:
                result = _main_memory(types.get(i.operands[1], ""))
        for i in inside:
            if i.opcode != "parameter" or not i.operands or not i.operands[0].isdigit():
                continue
            place, read_by = int(i.operands[0]), users[i.name]
            if place >= len(operands) or not read_by:
                continue
            if all(u.opcode in ("dynamic-slice", "slice", "gather") for u in read_by):
                sliced = float(sum(_main_memory(u.result) for u in read_by))
                operands[place] = min(operands[place], sliced)
            elif all(u.opcode == "dynamic-update-slice" for u in read_by):
                operands[place] = 0.0 if read_by[0].operands[0] == i.name else operands[place]
        return sum(operands) + result


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
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text) - 1


def _bare(name: str) -> str:
    return name.strip().lstrip("%")


def _bytes(array: re.Match[str]) -> int:
    kind, sizes = array[1], array[2]
    if kind in BYTES:
        size = BYTES[kind]
    else:
        bits = re.search(r"\d+", kind)
        size = max(int(bits[0]) // 8, 1) if bits else 0
    return size * math.prod(int(n.lstrip("<=")) for n in sizes.split(",") if n)


def _main_memory(result: str) -> float:
    """Return the bytes of a type, without arrays in other memory spaces."""
    return float(sum(_bytes(a) for a in _ARRAY.finditer(result) if "S(" not in (a[3] or "")))


def _group_size(attributes: str) -> int:
    """Parse `replica_groups={{0,1},{2,3}}`, `=[2,2]<=[4]` or `=mesh['a'=2,'b'=2] ... {'b'}`."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if shaped:
        return int(shaped[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"('[\w.]+')=(\d+)", named[1])}
        return math.prod(sizes.get(axis.split(":")[0], 1) for axis in named[2].split(","))
    return 2  # a permutation exchanges between pairs


def _sent_fraction(kind: str, group: int) -> float:
    """Return the fraction of the payload that each device of a ring sends (Thakur et al. 2005)."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    once = (group - 1) / group
    return 2 * once if kind == "all-reduce" else once
