"""Start-up of worker processes that read data."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What reaches all processes of a terminal or a job."""


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` in this thread, and in the threads and processes that start in the context.

    A worker that is still importing then prints no traceback. It inherits the blocked signals, and
    starts with `ignore_signals` or unblocks them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()  # also a process; unblocks two of the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(*numbers: signal.Signals) -> None:
    """Ignore some of `SIGNALS`, by default all, and unblock them."""
    for number in numbers or SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with_parent() -> None:
    """End this process within half a second of its parent's end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
