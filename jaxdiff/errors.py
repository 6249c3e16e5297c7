"""What ends a command: a user's mistake, or a signal."""

import signal
from typing import Any


class UserError(Exception):
    """A mistake of the user's, in one sentence: what is wrong, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class FieldError(UserError):
    """A value that a field of a `checked` dataclass does not allow.

    Attributes:
      cls: the dataclass.
      field: name of the field.
      value: what was given.
    """

    def __init__(self, cls: type, field: str, value: Any, message: str):
        super().__init__(f"{cls.__name__}.{field}{message}")
        self.cls, self.field, self.value, self._message = cls, field, value, message

    def called(self, name: str) -> UserError:
        """Return the error under the name that the user knows the field by."""
        return UserError(f"{name}{self._message}")


class Stopped(KeyboardInterrupt):
    """A signal that ends a command; `number` says which, the text is the line to print."""

    def __init__(self, number: signal.Signals = signal.SIGINT):
        super().__init__(f"{number.name}: stopped; finished files are kept.")
        self.number = number
