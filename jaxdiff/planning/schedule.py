"""Model the time of one run of an optimized XLA program from the order of its instructions.

Each instruction takes the longer of its products at the chip's peak and its traffic at the memory's
bandwidth (the roofline of Williams et al. 2009, per instruction). Copies between memories and
collectives that have a start and an end go on beside the instructions between; the program waits at
the end for what remains. A collective without a start is waited for as a whole. The work of vector
units, the launch of instructions and the latency of links are left out, so that the time is that of
a chip which does all else for nothing.
"""

from collections import defaultdict
from dataclasses import astuple, dataclass

from jaxdiff.distributed.chips import Chip
from jaxdiff.planning.collectives import Collective, Links, collectives_of
from jaxdiff.planning.hlo import Instruction, Program
from jaxdiff.planning.products import padded_flops
from jaxdiff.planning.traffic import traffic


@dataclass(frozen=True)
class Times:
    """Seconds of one run.

    Attributes:
      step: from the first instruction to the last.
      products: of matrix products and convolutions alone, on whole tiles of the chip's units.
      memory: of all traffic alone.
      links: of all collectives alone.
      network: of those between slices.
      exposed: of `step`, waited for collectives.
    """

    step: float = 0.0
    products: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    network: float = 0.0
    exposed: float = 0.0


def program_times(program: Program, chip: Chip, links: Links) -> Times:
    """Return the times of one run of a program on each device of a mesh."""
    done: dict[str, Times] = {}

    def visit(name: str) -> Times:
        if name not in done:
            clock = _Clock(program, name, chip, links)
            for instruction in program.computations[name]:
                for called, trips in program.calls(instruction):
                    clock.add(visit(called), trips)
                clock.run(instruction)
            done[name] = clock.times
        return done[name]

    return visit(program.entry)


class _Clock:
    """Time within one computation, while its instructions run one after another."""

    def __init__(self, program: Program, name: str, chip: Chip, links: Links):
        self.program, self.chip, self.links = program, chip, links
        self.named = {i.name: i for i in program.computations[name]}
        self.collectives = {n: list(collectives_of(program, i)) for n, i in self.named.items()}
        last = {one.chain: n for n, found in self.collectives.items() for one in found if one.chain}
        self.lasts: dict[str, list[str]] = defaultdict(list)  # chains that end with an instruction
        for chain, n in last.items():
            self.lasts[n].append(chain)
        self.times = Times()
        self.free: dict[int, float] = {}  # when the links of each dimension are free again
        self.ends: dict[str, float] = {}  # when each collective that has started ends
        self.copied = self.queued = 0.0  # seconds of started copies: done, and in all
        self.copies: dict[str, float] = {}  # `queued` with each copy that has started

    def add(self, times: Times, trips: int = 1) -> None:
        """Advance by `times`, `trips` times."""
        both = zip(astuple(self.times), astuple(times), strict=True)
        self.times = Times(*(now + trips * more for now, more in both))

    def run(self, instruction: Instruction) -> None:
        """Advance by one instruction, without the computations that it calls as its own steps."""
        types = {
            name: self.named[name].result
            for name in instruction.operands
            if name in self.named and instruction.opcode not in ("parameter", "constant")
        }
        moved = traffic(self.program, instruction, types) / self.chip.bandwidth
        if instruction.opcode in ("copy-start", "slice-start"):
            self.queued += moved
            self.copies[instruction.name] = self.queued
            self.add(Times(memory=moved))
        elif instruction.opcode in ("copy-done", "slice-done"):
            self._work(max(self.copies.pop(instruction.operands[0], 0.0) - self.copied, 0.0))
        elif instruction.opcode.endswith("-done"):
            self._wait(instruction.operands[0])
        else:
            flops = padded_flops(self.program, instruction, types, self.chip.matrix_side)
            products = flops / self.chip.flops
            self.add(Times(products=products, memory=moved))
            if not self._starts(instruction) or products:
                self._work(max(products, moved), moved)
            for chain in self.lasts.get(instruction.name, ()):
                self._wait(chain)

    def _work(self, seconds: float, moved: float = 0.0) -> None:
        """Advance by `seconds`; copies use the memory while the instruction itself does not."""
        self.add(Times(step=seconds))
        self.copied = min(self.copied + seconds - moved, self.queued)

    def _starts(self, instruction: Instruction) -> bool:
        """Start the collectives of an instruction; wait for those that do not go on after it."""
        found = self.collectives[instruction.name]
        for place, one in enumerate(found):
            name = one.chain or (instruction.name if not place else f"{instruction.name} {place}")
            if name in self.ends:
                continue
            self._start(name, one)
            if not one.chain and not instruction.opcode.endswith(("-start", "recv")):
                self._wait(name)
        return bool(found)

    def _start(self, name: str, one: Collective) -> None:
        seconds = self.links.seconds(one)
        dimensions = self.links.dimensions(one.group) or (0,)
        begin = max(self.times.step, *(self.free.get(d, 0.0) for d in dimensions))
        for dimension in dimensions:
            self.free[dimension] = begin + seconds
        self.ends[name] = max(self.ends.get(name, 0.0), begin + seconds)
        self.add(Times(links=seconds, network=seconds if self.links.crosses(one.group) else 0.0))

    def _wait(self, name: str) -> None:
        waited = max(self.ends.pop(name, 0.0) - self.times.step, 0.0)
        self.add(Times(exposed=waited))
        self._work(waited)
