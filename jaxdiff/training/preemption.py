"""Stop a run on a signal, after the same step on all hosts."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from jaxdiff.distributed.multihost import AnyHost


class Preemption:
    """Agreement of all hosts on the step after which to stop.

    A signal reaches hosts at different moments, or a single host, but all must take the same steps.
    They vote with every step and read the result once the next step is dispatched.
    """

    def __init__(self, mesh: Mesh, log: Callable[[str], None]):
        self.requested = False
        self.signal = signal.SIGTERM  # what another host got
        self._log = log
        self._ballot = AnyHost(mesh) if jax.process_count() > 1 else None
        self._votes: list[jax.Array] = []
        self._agreed = False

    @property
    def should_stop(self) -> bool:
        """Whether to stop now: equal on all hosts at the same step."""
        return self._agreed if self._ballot else self.requested

    def vote(self) -> None:
        """Vote, after a step was dispatched."""
        if self._ballot:
            self._votes.append(self._ballot(self.requested))

    def poll(self) -> None:
        """Read the result of the oldest vote."""
        if self._votes:
            self._agreed = bool(self._votes.pop(0))
            if self._agreed and not self.requested:
                self._log("Another host was asked to stop: saving, then stopping.")


@contextmanager
def stop_on_signal(mesh: Mesh, log: Callable[[str], None]) -> Iterator[Preemption]:
    """Turn the first SIGTERM or SIGINT into a stop request; a second one has its usual effect."""
    stop, before = Preemption(mesh, log), {}

    def request(number, _frame):
        stop.requested, stop.signal = True, signal.Signals(number)
        name = signal.Signals(number).name
        log(f"{name}: saving, then stopping; send it again to stop at once.")
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # under nohup
            continue
        before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
