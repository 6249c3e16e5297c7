"""Run the command line: `python -m jaxdiff`."""

import signal
import sys

from jaxdiff.errors import Stopped


def start() -> int:
    """Run one command; return its exit status, also for Ctrl-C while Python still imports."""
    try:
        from jaxdiff.cli.main import main
    except KeyboardInterrupt:
        stopped = Stopped()
        print(f"jaxdiff: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    status = main()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python that ends prints no traceback
    return status


if __name__ == "__main__":
    sys.exit(start())
