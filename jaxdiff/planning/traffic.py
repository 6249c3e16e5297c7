"""Count the bytes that an optimized XLA program reads from and writes to main memory.

An instruction, or a fusion as a whole, reads its operands and writes its results. Slices count by
their own size, and a slice that is written into a larger array by the size of the slice, wherever
in a fusion they are. Arrays in a chip's fast memory, and results that alias operands, do not count.
"""

import re
from collections.abc import Mapping

from jaxdiff.planning.hlo import Array, Instruction, Program, arrays

# Opcodes that neither read nor write memory themselves.
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
_FREE_CALLS = re.compile(r'custom_call_target="(AsyncCollectiveDone|ConcatBitcast|AllocateBuffer)"')
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_ALIASED = re.compile(
    r"output_to_operand_aliasing=\{((?:[^{}]|\{[^{}]*\}|\{[^{}]*\{[^{}]*\}[^{}]*\})*)\}"
)
_SLICES = ("dynamic-slice", "slice", "gather")


def total_traffic(program: Program) -> float:
    """Return the bytes of one run of the program."""
    total = 0.0
    for name, times in program.runs().items():
        types = {i.name: i.result for i in program.computations[name]}
        total += times * sum(traffic(program, i, types) for i in program.computations[name])
    return total


def traffic(program: Program, instruction: Instruction, types: Mapping[str, str]) -> float:
    """Return the bytes of one instruction; `types` are those of its operands, by name."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and _FREE_CALLS.search(instruction.attributes):
        return 0.0
    if opcode in ("copy-start", "slice-start"):  # to fast memory, or back
        ends = arrays(instruction.result)[:2]
        return float(min(a.stored for a in ends) * sum(not a.is_fast for a in ends))
    if opcode.endswith("-start"):  # the result repeats the operands
        return float(sum(_stored(a) for a in arrays(instruction.result)))
    inside = program.inside(instruction)
    starts = any(_STARTS in i.attributes for i in inside)
    read = 0.0
    for place, name in enumerate(instruction.operands):
        whole = float(sum(_stored(a) for a in arrays(types.get(name, ""))))
        part = whole if starts or not whole else _read(program, instruction, place)
        read += whole if part is None else min(part, whole)
    return read + _written(program, instruction, inside, types)


def _stored(array: Array) -> int:
    return 0 if array.is_fast else array.stored


def _read(program: Program, user: Instruction, place: int) -> float | None:
    """Return the bytes that `user` reads of its operand at `place`; None for all of it."""
    if user.opcode in _SLICES and place == 0:
        return float(sum(a.stored for a in arrays(user.result)))
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0.0
    if user.opcode == "tuple" or "chain_id=" in user.attributes:
        return 0.0  # passed on, or read where its collective starts
    if user.opcode == "custom-call" and _FREE_CALLS.search(user.attributes):
        return 0.0
    if user.opcode != "fusion":
        return None
    inside = program.inside(user)
    names = {i.name for i in inside if i.opcode == "parameter" and i.operands == (str(place),)}
    total = 0.0
    for instruction in inside:
        if instruction.opcode == "bitcast" and names & set(instruction.operands):
            names.add(instruction.name)
            continue
        for at, name in enumerate(instruction.operands):
            if name in names and instruction.opcode != "parameter":
                part = _read(program, instruction, at)
                if part is None:
                    return None
                total += part
    return total


def _written(
    program: Program,
    instruction: Instruction,
    inside: list[Instruction],
    types: Mapping[str, str],
) -> float:
    results = arrays(instruction.result)
    if instruction.opcode == "dynamic-update-slice":
        return float(sum(_stored(a) for a in arrays(types.get(instruction.operands[1], ""))))
    if not inside:
        return float(sum(_stored(a) for a in results))
    by_name = {i.name: i for i in inside}
    root = next(i for i in inside if i.is_root)
    made = root.operands if root.opcode == "tuple" else (root.name,) * len(results)
    aliased = _ALIASED.search(instruction.attributes)
    passed = {int(n or 0) for n in re.findall(r"\{(\d*)\}: \(", aliased[1])} if aliased else set()
    total = 0.0
    for place, (array, name) in enumerate(zip(results, made, strict=False)):
        part = _update(program, by_name, name)
        if place not in passed or part is not None:
            total += _stored(array) if part is None else min(part, _stored(array))
    return total


def _update(program: Program, by_name: Mapping[str, Instruction], name: str) -> float | None:
    """Return the bytes of the slice that a result of a fusion updates; None if it is written whole.

    A parameter that is passed on is not written.
    """
    maker = by_name[name]
    while maker.opcode == "bitcast":
        maker = by_name[maker.operands[0]]
    if maker.opcode == "parameter":
        return 0.0
    if maker.opcode == "dynamic-update-slice":
        return float(sum(a.stored for a in arrays(by_name[maker.operands[1]].result)))
    inside = program.inside(maker)
    root = next((i for i in inside if i.is_root), None)
    if root is None or root.opcode == "tuple":
        return None
    return _update(program, {i.name: i for i in inside}, root.name)
