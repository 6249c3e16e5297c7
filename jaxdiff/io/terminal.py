"""Write to standard output and standard error: one writer, whose failures never end the work.

Either may be closed from the start (`>&-`), closed by its reader (`| head -1`), full, or of an
encoding that lacks a character. Text comes from captions, prompts and file names, which may hold
control characters: a terminal shows them escaped and does not obey them.
"""

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console

# Control characters, Unicode's line separators, marks that reorder text, and bytes without a
# character, which Python reads as surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_broken: list[Any] = []  # streams that failed


def printable(text: object, keep: str = "\t") -> str:
    r"""Return text with control characters escaped, ESC as `\x1b`, except those to `keep`."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return repr(character)[1:-1]

    return _CONTROLS.sub(escaped, str(text))


def write_line(text: object, *, stderr: bool = False) -> None:
    """Write one line: to standard output what a command returns, to standard error notes."""
    _write(sys.stderr if stderr else sys.stdout, printable(text) + "\n")


def write_text(text: object) -> None:
    """Write lines of text to standard output."""
    _write(sys.stdout, printable(text, keep="\t\n") + "\n")


def console(*, stderr: bool = False) -> "Console":
    """Return a console of rich for tables and live lines; `printable` is its callers' part."""
    from rich.console import Console  # after `jaxdiff --help`

    stream = sys.stderr if stderr else sys.stdout
    stream = getattr(stream, "rich_proxied_file", stream)  # below another live line
    return Console(file=cast(IO[str], Output(stream)))


@contextlib.contextmanager
def unfailing_output() -> Iterator["Output"]:
    """Make all writes to standard output and error harmless within the context.

    This holds for those of other libraries too.

    Yields:
      Standard output, which knows whether it lost lines.
    """
    _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    out = Output(before[0])
    sys.stdout, sys.stderr = cast(IO[str], out), cast(IO[str], Output(before[1]))
    try:
        yield out
    finally:
        flush_output()
        sys.stdout, sys.stderr = before


def flush_output() -> None:
    """Write what standard output and error still hold."""
    for stream in (sys.stdout, sys.stderr):
        _attempt(stream, lambda stream: stream.flush())


class Output:
    """A stream that drops what it cannot write, and escapes what it cannot encode.

    Attributes:
      lost: why text was dropped; "" where none was, or where its reader or the user closed it.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost = ""

    def __getattr__(self, name: str) -> Any:
        """Return what the stream has under any other name."""
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text, whole lines at once; return its length."""
        self._note(_write(self._stream, text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write what the stream still holds."""
        self._note(_attempt(self._stream, lambda stream: stream.flush()))

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def _note(self, error: Exception | None) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.lost = self.lost or error.strerror or str(error)


def _write(stream: Any, text: str) -> Exception | None:
    """Write text; return the exception where that failed."""

    def attempt(stream: Any) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            codec = stream.encoding or "ascii"
            stream.write(text.encode(codec, "backslashreplace").decode(codec))
        if "\n" in text:
            stream.flush()  # a reader of a pipe gets whole lines at once

    return _attempt(stream, attempt)


def _attempt(stream: Any, action: Any) -> Exception | None:
    if stream is None:  # closed before Python started
        return None
    try:
        action(stream)
    except BlockingIOError:  # the stream keeps the text for the next flush
        return None
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: closed by Python. RuntimeError: within a signal's handler, amid another write.
        if not any(stream is one for one in _broken):
            _broken.append(stream)
            atexit.register(_discard, stream)
        return error
    return None


def _discard(stream: Any) -> None:
    """Drop what a broken stream holds, which Python would otherwise fail to flush when it ends."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _open_missing_descriptors() -> None:
    """Open closed standard descriptors: the next file opened would take the number of one.

    What C++ libraries log would then go into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
