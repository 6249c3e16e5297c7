"""Mutated inputs, and what may come of them: it works, or one sentence.

A traceback, a hang, much memory, a file outside of the test's folder or a started process fails.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxdiff.data.bad_records import RecordError
from jaxdiff.errors import UserError

SECONDS, CORES = 10.0, 2  # for a call on an idle machine
BYTES = 2 * 2**30

PROMPT_FILES = {
    "txt": b'a red pea\r\n(a green:1.2) pod\n\n"a":1 "b":-0.5\n',
    "jsonl": b'{"prompt": "a pea", "seed": 7, "size": "64x64", "guidance_scale": 2.5}\n'
    b'{"prompt": "a pod", "init_image": "a/b.png", "strength": 0.5, "size": "1:1"}\n',
    "csv": b'prompt,seed,num_steps\n"a ""red"" pea, ripe",7,4\na pod,,\n',
}
"""A file of prompts in each format."""

_TOKENS = (
    [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b"\t", b" ", b'"', b"\\"]
    + [b"{", b"}", b"[", b"]", b"(", b")", b":", b",", b"..", b"/", b"../../", b"://", b"~", b"%s"]
    + [b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 400, b"2147483648"]
    + [b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\\u0000", b"\\ud800", b"[" * 1000, b'{"a":' * 1000]
    + [(1 << k).to_bytes(8, "little") for k in (0, 8, 16, 31, 32, 62, 63)]
)


def counts(quick: int, nightly: int) -> pytest.MarkDecorator:
    """Parametrize a test by the number of inputs: some in every run, all of them at night."""
    return pytest.mark.parametrize(
        "count", [quick, pytest.param(nightly, marks=pytest.mark.nightly)]
    )


def mutations(corpus: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield the corpus, then `count` inputs with one to five random changes each."""
    yield from corpus
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randint(1, 5)):
            _change(data, corpus, rng)
        yield bytes(data)


_VALUES = [None, True, False, -1, 0, 1, 3, 2**31, 2**70, 0.5, -0.0, 1e30, "", "x", "../x", "1"]
_VALUES += [[], {}, [1, 2], ["a"], [[]], {"type": "x"}, {"a": 1}]


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """Return a JSON document with one value replaced or removed, or a key renamed."""
    root = json.loads(data)
    at, keys = root, list(_keys(root))
    while keys:
        key = rng.choice(keys)
        below = list(_keys(at[key]))
        if not below or rng.random() < 0.3:
            break
        at, keys = at[key], below
    if not keys:
        return json.dumps(rng.choice(_VALUES)).encode()
    match rng.randrange(4):
        case 0:
            del at[key]
        case 1 if isinstance(at, dict):
            at["x"] = at.pop(key)
        case _:
            at[key] = rng.choice(_VALUES)
    return json.dumps(root).encode()


def _keys(value: object) -> Iterable[Any]:
    return value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)


def _change(data: bytearray, corpus: Sequence[bytes], rng: random.Random) -> None:
    place = rng.randint(0, len(data))
    span = slice(place, place + rng.choice((1, 2, 4, 8, 64)))
    match rng.randrange(6):
        case 0:
            data[span] = rng.randbytes(len(data[span]))
        case 1:
            del data[span]
        case 2:
            data[place:place] = rng.choice(_TOKENS)
        case 3:
            data[span] = rng.choice(_TOKENS)
        case 4:
            other = rng.choice(corpus)
            data[place:] = other[rng.randint(0, len(other)) :]
        case 5:
            data[place:place] = data[span] * rng.choice((1, 2, 100))


class SpoiltFolder:
    """A folder of a model, with one file at a time spoilt.

    Its contents are changed, or it is removed, made a folder, a link that leads nowhere, or empty;
    or the top folder that it is in is removed.
    """

    def __init__(self, path: Path, source: Path | None = None, seed: int = 0):
        """Copy `source` to `path`, or take what is there."""
        if source is not None:
            shutil.copytree(source, path)
        self.path, self._rng = path, random.Random(seed)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        self._contents = {file: file.read_bytes() for file in files}

    @contextlib.contextmanager
    def spoilt(self) -> Iterator[tuple[str, bytes]]:
        """Spoil a file within the context; yield its name and the first of its new bytes."""
        rng = self._rng
        file = rng.choice(list(self._contents))
        data = self._contents[file]
        if file.suffix == ".json" and rng.random() < 0.7:
            data = changed_json(data, rng)
        else:
            *_, data = mutations([data], 1, seed=rng.randrange(2**31))
        how = rng.choice(("change",) * 6 + ("remove", "folder", "loop", "empty", "prune"))
        file.unlink()
        match how:
            case "change":
                file.write_bytes(data)
            case "folder":
                file.mkdir()
            case "loop":
                file.symlink_to(file.name)
            case "empty":
                file.touch()
            case "prune":
                top = self.path / file.relative_to(self.path).parts[0]
                shutil.rmtree(top, ignore_errors=True)
        try:
            yield f"{file.name}, {how}", data[:1000]
        finally:
            for path in self.path.rglob("*"):  # also what a command added
                if path.is_symlink() or (path.is_file() and path not in self._contents):
                    path.unlink()
            if file.is_dir():
                shutil.rmtree(file)
            for path, whole in self._contents.items():
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(whole)
            file.write_bytes(self._contents[file])


_started: list[str] = []
_watching = False


def _audit(event: str, _arguments: object) -> None:
    if _watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        _started.append(event)


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(folder: Path, *, processes: bool = False) -> Iterator[None]:
    """Fail if files appear beside `folder`, processes start or much memory is taken.

    Args:
      folder: the only one in its parent that may change.
      processes: whether to allow processes.
    """
    global _watching
    before, memory = sorted(os.listdir(folder.parent)), _peak()
    _started.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert processes or not _started, _started
    assert sorted(os.listdir(folder.parent)) == before
    assert _peak() - memory < BYTES


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Finds calls that hang, however loaded the machine: by work, or by ten times as much time."""

    def __init__(self):
        self._start = time.process_time(), time.monotonic()

    def check(self, what: object) -> None:
        """Fail if more time has passed since the start than a call may take."""
        work, wall = time.process_time() - self._start[0], time.monotonic() - self._start[1]
        assert work < CORES * SECONDS, (work, what)
        assert wall < 10 * CORES * SECONDS, (wall, what)


def survives(call: Callable[[], object], data: object) -> None:
    """Call; fail on anything but success and the two exceptions that are one sentence."""
    watch = Stopwatch()
    try:
        call()
    except (UserError, RecordError) as error:
        if not str(error).strip():
            raise AssertionError(f"an empty message for {data!r}"[:2000]) from error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {data!r}"[:2000]) from error
    watch.check(data)
