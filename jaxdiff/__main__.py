"""Run the command line: `python -m jaxdiff`."""

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
    return main()


if __name__ == "__main__":
    sys.exit(start())
