"""Checkpoints on disk: when one is complete, whether it is damaged, what a killed save left.

A checkpoint is a folder named by its step:

    checkpoints/30/params, ema, training    by Orbax: parameters, their average, all the rest
    checkpoints/30/arrays.json              type and shape of every array, by its path
    checkpoints/30/SHA256SUMS               of all these files, in the format of `sha256sum -c`

The place in the data needs no file: it is the step (`jaxdiff.data.loader`).

All of it is written to `30.saving`, the checksums last, and a rename makes it `30`. So a folder
with a step's name was complete once, and what is missing or differs now is damage, which is told;
a save that was killed leaves a `30.saving`, which counts for nothing and goes with the next save.
Object stores cannot rename a folder. There the checksums, written last, complete it, and a folder
without them is a save that was killed.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local

ARRAYS = "arrays.json"
CHECKSUMS = "SHA256SUMS"

Report = Callable[[str], None]


def absolute(folder: epath.PathLike) -> epath.Path:
    """The folder as Orbax wants it. (etils resolves `gs://` to a folder of that name here.)"""
    path = epath.Path(folder).expanduser()
    return path.resolve() if is_local(folder) else path


def steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not folder.exists():
        return []
    named = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(p.name) for p in named if is_local(folder) or (p / CHECKSUMS).exists())


def newest_undamaged(folder: epath.Path, report: Report, part: str | None = None) -> int | None:
    """Step of the newest checkpoint whose files, or those of one part, are as they were written.

    Process 0 looks and all processes learn. None if there is no checkpoint; `UserError` if there
    are some and all are damaged.
    """
    none, all_damaged = -1, -2
    found = none
    if jax.process_index() == 0:
        for step in reversed(steps(folder)):
            damage = _damage(folder / str(step), part)
            if damage is None:
                found = step
                break
            report(f"The checkpoint {folder / str(step)} is damaged and not used: {damage}.")
            found = all_damaged
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == all_damaged:
        raise UserError(
            f"Every checkpoint in {folder} is damaged: bring one back from a copy, or start anew "
            "in another folder or with --fresh."
        )
    return None if found == none else found


def unfinished(folder: epath.Path, step: int) -> epath.Path:
    """Where a checkpoint is written."""
    return folder / (f"{step}.saving" if is_local(folder) else str(step))


def complete(folder: epath.Path, step: int, files: dict[str, str]) -> None:
    """Adds `files` to what Orbax has written, then the checksums, and gives the folder its name."""
    written, final = unfinished(folder, step), folder / str(step)
    for name, text in files.items():
        (written / name).write_text(text)
    names = sorted(_files(written))
    sums = zip(_digests(written, names), names, strict=True)
    (written / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))
    if written != final:
        if final.exists():  # damaged, or restore would have taken it and save passed it over
            remove(final)
        written.rename(final)


def remove(path: epath.Path) -> None:
    """Removes a checkpoint so that none of it counts for one if this is cut short."""
    if is_local(path):
        path = path.rename(path.with_name(f"{path.name}.old"))
    else:
        (path / CHECKSUMS).unlink(missing_ok=True)
    path.rmtree()


def clean(folder: epath.Path) -> None:
    """Removes what killed or failed saves and removals have left."""
    if folder.exists():
        good = {str(step) for step in steps(folder)}
        for path in folder.iterdir():
            if re.fullmatch(r"\d+(\.saving.*|\.old)?", path.name) and path.name not in good:
                path.rmtree()


def _damage(path: epath.Path, part: str | None = None) -> str | None:
    """What is wrong with the first bad file of a checkpoint, or of one of its parts."""

    def needed(name: str) -> bool:
        return part is None or "/" not in name or name.startswith(f"{part}/")

    try:
        text = (path / CHECKSUMS).read_text()
        if not re.fullmatch(r"([0-9a-f]{64}  .+\n)+", text):
            return f"{CHECKSUMS} is not as it was written"
        lines = (line.split("  ", 1) for line in text.splitlines())
        expected = {name: digest for digest, name in lines if needed(name)}
        found = {name for name in _files(path) if needed(name)} - {CHECKSUMS}
        if unlisted := sorted(found - expected.keys()):
            return f"{CHECKSUMS} does not list {unlisted[0]}"
        if missing := sorted(expected.keys() - found):
            return f"{missing[0]} is missing"
        for name, digest in zip(expected, _digests(path, list(expected)), strict=True):
            if digest != expected[name]:
                return f"{name} is not as it was written"
    except UnicodeDecodeError:
        return f"{CHECKSUMS} is not as it was written"
    except OSError as error:
        return str(error)
    return None


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files below `path`, relative to it; hidden ones are the file system's own."""
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        elif not child.name.startswith("."):
            yield prefix + child.name


def _digests(path: epath.Path, names: list[str]) -> list[str]:
    """SHA-256 of each file, in hex."""

    def digest(name: str) -> str:
        sha = hashlib.sha256()
        with (path / name).open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
        return sha.hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(digest, names))
