"""What ends a command: a user's mistake, or a signal."""

import signal


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal that ends a command; `number` says which, the text is the line to print."""

    def __init__(self, number: signal.Signals = signal.SIGINT):
        super().__init__(f"{number.name}: stopped; finished files are kept.")
        self.number = number
