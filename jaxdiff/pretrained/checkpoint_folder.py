"""Checkpoints on disk: completeness, damage, parameters.

A checkpoint is a folder named by its step:

    checkpoints/30/params, ema, training    by Orbax: parameters, their average, all the rest
    checkpoints/30/arrays.json              type and shape of every array, by its path
    checkpoints/30/SHA256SUMS               of all these files, in the format of `sha256sum -c`

The step determines the position in the data (`jaxdiff.data.loader`).

A save writes to `30.saving`, the checksums last, and renames it to `30`. A folder with a step's
name was therefore complete once, and missing or different files are damage, which is reported. A
killed save leaves a `30.saving`, which the next save removes. Object stores cannot rename folders:
there a folder is complete if it has checksums.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local
from jaxdiff.io.text import decode_text, lines_of, parse_json, read_json
from jaxdiff.pretrained.bundle import as_index

ARRAYS = "arrays.json"
CHECKSUMS = "SHA256SUMS"

Report = Callable[[str], None]


def absolute(folder: epath.PathLike) -> epath.Path:
    """Return the folder as Orbax expects it: absolute, with `gs://` paths as they are."""
    path = epath.Path(folder).expanduser()
    return path.resolve() if is_local(folder) else path


def steps(folder: epath.Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    if not folder.exists():
        return []
    named = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(p.name) for p in named if is_local(folder) or (p / CHECKSUMS).exists())


def latest_valid_step(folder: epath.Path, report: Report, part: str | None = None) -> int | None:
    """Return the step of the newest checkpoint whose files, or those of one part, are undamaged.

    Process 0 checks them and broadcasts the step. `report` gets one sentence for each damaged
    checkpoint. None if there is no checkpoint.

    Raises:
      UserError: there are some and all are damaged.
    """
    none, all_damaged = -1, -2
    found = none
    if jax.process_index() == 0:
        for step in reversed(steps(folder)):
            problem = damage(folder / str(step), part)
            if problem is None:
                found = step
                break
            report(f"The checkpoint {folder / str(step)} is damaged and not used: {problem}.")
            found = all_damaged
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == all_damaged:
        raise UserError(
            f"Every checkpoint in {folder} is damaged: expected at least one whose checksums "
            "match; restore one from a copy, or start over with --fresh."
        )
    return None if found == none else found


def load_params(
    folder: epath.PathLike,
    which: Literal["ema", "params"] = "ema",
    *,
    report: Report | None = None,
) -> tuple[dict[str, Any], int]:
    """Load the parameters, or their average, of the newest undamaged checkpoint, and its step.

    Other files are neither read nor checked. The arrays are on this process's first device.

    Raises:
      UserError: there is no checkpoint, or none is undamaged.
    """
    root = absolute(folder)
    step = latest_valid_step(root, report or logging.getLogger(__name__).warning, which)
    if step is None:
        raise UserError(
            f"There is no checkpoint in {root}: expected the folder of a trained run; check the "
            "path."
        )
    return load_part(root / str(step), which), step


def load_part(path: epath.Path, part: str) -> dict[str, Any]:
    """Load one part of a checkpoint, a nested dict, unchecked, onto this process's first device."""
    from orbax.checkpoint import v1 as ocp  # takes longer than everything else

    return ocp.load_checkpointables(path, placed({part: _saved_params(path, part)}))[part]


def parts_of(path: epath.Path) -> list[str]:
    """Return the names of a checkpoint's parts that hold arrays."""
    return sorted({name.split("/")[0] for name in read_json(path / ARRAYS)})


def placed(parts: PyTree) -> PyTree:
    """Set the sharding of abstract leaves, by default this process's first device.

    Otherwise Orbax restores the saved sharding, whose devices may not exist here.
    """
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, parts)


def describe(parts: PyTree) -> dict[str, str]:
    """Return the contents of `arrays.json`: {"params/blocks/kernel": "float32[64, 64]"}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts)
    }


def _saved_params(path: epath.Path, which: str) -> dict[str, Any]:
    """Return the shapes and types of the parameters in a checkpoint, as a nested dict."""
    tree = {}
    for name, array in read_json(path / ARRAYS).items():
        part, *names = name.split("/")
        if part == which:
            dtype, _, shape = array.partition("[")
            tree[tuple(map(as_index, names))] = jax.ShapeDtypeStruct(
                parse_json(f"[{shape}", path / ARRAYS), jnp.dtype(dtype)
            )
    return traverse_util.unflatten_dict(tree)


def unfinished(folder: epath.Path, step: int) -> epath.Path:
    """Return the folder of a checkpoint during a save."""
    return folder / (f"{step}.saving" if is_local(folder) else str(step))


def complete(folder: epath.Path, step: int, files: dict[str, str]) -> None:
    """Complete a save of Orbax: write `files` and the checksums, and rename the folder."""
    written, final = unfinished(folder, step), folder / str(step)
    for name, text in files.items():
        (written / name).write_bytes(text.encode())
    names = sorted(_files(written))
    sums = zip(_digests(written, names), names, strict=True)
    (written / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))
    if written != final:
        if final.exists():  # damaged, or restore would have read it and save skipped it
            remove_checkpoint(final)
        written.rename(final)


def remove_checkpoint(path: epath.Path) -> None:
    """Remove a checkpoint; a partly removed one is incomplete."""
    if is_local(path):
        path = path.rename(path.with_name(f"{path.name}.old"))
    else:
        (path / CHECKSUMS).unlink(missing_ok=True)
    path.rmtree()


def clean(folder: epath.Path) -> None:
    """Remove the leftovers of killed or failed saves and removals."""
    if folder.exists():
        good = {str(step) for step in steps(folder)}
        for path in folder.iterdir():
            if re.fullmatch(r"\d+(\.saving.*|\.old)?", path.name) and path.name not in good:
                path.rmtree()


def damage(path: epath.Path, part: str | None = None) -> str | None:
    """Describe the first damaged file of a checkpoint, or of one of its parts; None if intact."""

    def needed(name: str) -> bool:
        return part is None or "/" not in name or name.startswith(f"{part}/")

    try:
        text = decode_text((path / CHECKSUMS).read_bytes(), CHECKSUMS)
        if not re.fullmatch(r"([0-9a-f]{64}  .+\n)+", text):
            return f"{CHECKSUMS} is not as it was written"
        lines = (line.split("  ", 1) for line in lines_of(text))
        expected = {name: digest for digest, name in lines if needed(name)}
        found = {name for name in _files(path) if needed(name)} - {CHECKSUMS}
        if unlisted := sorted(found - expected.keys()):
            return f"{CHECKSUMS} does not list {unlisted[0]}"
        if missing := sorted(expected.keys() - found):
            return f"{missing[0]} is missing"
        for name, digest in zip(expected, _digests(path, list(expected)), strict=True):
            if digest != expected[name]:
                return f"{name} is not as it was written"
    except UserError:
        return f"{CHECKSUMS} is not as it was written"
    except OSError as error:
        return str(error)
    return None


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
    """Return all files below `path`, relative to it; hidden ones are the file system's own."""
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        elif not child.name.startswith("."):
            yield prefix + child.name


def _digests(path: epath.Path, names: list[str]) -> list[str]:
    """Return the SHA-256 of each file, in hex."""

    def digest(name: str) -> str:
        sha = hashlib.sha256()
        with (path / name).open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
        return sha.hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(digest, names))
