"""Files of prompts: JSON lines, CSV with a header, or one prompt a line.

A row may set what `Row` has. What cannot be used is told with its line, and the others are read.
"""

import csv
import dataclasses
import difflib
import io
import json
import os
import re
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pipelines.inputs import LARGEST_SEED
from jaxdiff.sampling.sampler import SOLVERS, check_num_steps

MOST_STEPS = int(np.iinfo(np.int32).max)
LARGEST_SIDE = 8192  # a row of more, most likely a slip, would take all memory
MOST_CUTOUTS = 256
MOST_REPEATS = 1000
MOST_TRIED = 1000
LARGEST_FACTOR = 16
PATHS = ("init_image", "mask")
LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is set for the images of one prompt; None is left to somebody else.

    Attributes:
      number: of the row in its file, from 0; blank lines are no rows.
      line: of the file, from 1, where it starts.
      prompt: what to draw.
      negative_prompt: what to steer away from.
      seed: of its first image.
      num_steps: of the solver.
      guidance_scale: of classifier-free guidance.
      size: width and height, or their ratio, such as "16:9".
      solver: one of `SOLVERS`.
      init_image: file of an image to start from.
      strength: how far the image is taken back to noise, from 0 to 1.
      mask: file of a mask, white where that image is drawn anew.
      name: what to call its files by, in the place of the number.
      clip_scale: how strongly a CLIP steers toward the prompt; 0 is not at all.
      clip_interval: times, of noise 1 and data 0, between which it does.
      clip_cutouts: random squares that it looks at in the place of the whole image.
      repeats: how often each step is taken.
      toward: another prompt, to mix into the prompt.
      toward_seed: of the noise that comes with it, on the way to which the noise is turned.
      share: of both in the mixture, from 0 to 1.
      guidance_interval: times between which classifier-free guidance acts.
      guidance_rescale: how far its contrast is taken back, from 0 to 1.
      apg: what counts of what it does along the image itself, from 0 to 1 (`APG.eta`).
      zero_star: steps at the start that CFG-Zero* does not take.
      weak_scale: how far to steer away from the weaker model; 1 is not at all.
      variation: how far the noise of the image is turned toward that of the seed, from 0 to 1.
      upscale: by which the sides of what is drawn get longer.
      upscale_strength: how much of it is then drawn anew, from 0 to 1.
      best_of: how many images are drawn for each, of which a CLIP chooses one.
    """

    number: int = 0
    line: int = 0
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | str | None = None
    solver: str | None = None
    init_image: epath.Path | None = None
    strength: float | None = None
    mask: epath.Path | None = None
    name: str | None = None
    clip_scale: float | None = None
    clip_interval: tuple[float, float] | None = None
    clip_cutouts: int | None = None
    repeats: int | None = None
    toward: str | None = None
    toward_seed: int | None = None
    share: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    apg: float | None = None
    zero_star: int | None = None
    weak_scale: float | None = None
    variation: float | None = None
    upscale: int | None = None
    upscale_strength: float | None = None
    best_of: int | None = None


class BadRow(NamedTuple):
    """A row that cannot be drawn."""

    line: int
    reason: str


class PromptFile(NamedTuple):
    """What a file of prompts holds."""

    rows: list[Row]
    bad: list[BadRow]


def read_prompts(file: epath.PathLike) -> PromptFile:
    """The rows of a .jsonl, .csv or .txt file, and those that are no rows.

    Paths in it are relative to its folder, which they may not leave, by a link neither.

    Raises:
      UserError: the file cannot be read, is of another kind or holds no row at all; or its CSV
        header names what no row can set.
    """
    path = epath.Path(file)
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".txt": _lines}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{file} is of no known kind: expected a file of prompts called .jsonl (a JSON object "
            "a line), .csv (with a header) or .txt (a prompt a line)."
        )
    try:
        # A byte that is no UTF-8 spoils its row alone.
        content = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file} cannot be read ({reason}): give a file of prompts.") from error
    rows, bad = [], []
    for number, (line, values) in enumerate(readers[path.suffix.lower()](content)):
        try:
            if isinstance(values, str):
                raise UserError(values)
            rows.append(_row(number, line, values, path.parent))
        except UserError as error:
            bad.append(BadRow(line, str(error)))
    if not rows and not bad:
        raise UserError(f"{file} holds no prompt: expected at least one row.")
    return PromptFile(rows, bad)


def slug(text: str, otherwise: str = "prompt") -> str:
    """A text as part of a file name: letters and digits only, so that it stays in its folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or otherwise


Read = Iterator[tuple[int, dict[str, Any] | str]]  # line, and what it sets or why it cannot be read


def _lines(text: str) -> Read:
    # Not splitlines(), which also splits where only a typesetter would.
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            yield i + 1, {"prompt": line.strip()}


def _json_lines(text: str) -> Read:
    for i, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield i + 1, f"it is no JSON ({reason}): expected an object on a line of its own."
            continue
        if isinstance(values, dict):
            yield i + 1, values
        else:
            yield i + 1, f"it is {reprlib.repr(values)}: expected an object with a prompt."


def _csv_rows(text: str) -> Read:
    """Rows by the names in the header; an empty cell sets nothing."""
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"it is no CSV ({error}): put quotes around cells with commas or quotes."
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header)
        elif len(cells) > len(header):
            yield line, f"it has {len(cells)} cells for {len(header)} columns: quote its commas."
        else:
            pairs = zip(header, cells, strict=False)
            yield line, {key: _from_cell(key, cell) for key, cell in pairs if cell.strip()}


def _check_header(header: list[str]) -> None:
    for name in header:
        if name not in CHECKS:
            raise UserError(f"The header of the file of prompts: {_no_key(name)}")
        if header.count(name) > 1:
            raise UserError(f"The header of the file of prompts has {name!r} twice: remove one.")
    if "prompt" not in header:
        raise UserError("The header of the file of prompts has no column prompt: add it.")


def _from_cell(key: str, cell: str) -> str | int | float:
    """A cell as the number that its column has, or as it is, for the check to complain of."""
    held = typing.get_args(typing.get_type_hints(Row)[key])
    kind = next((kind for kind in (int, float) if kind in held), str)
    try:
        return kind(cell)
    except ValueError:
        return cell


def _no_key(name: str) -> str:
    near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}?" if near else f"there are {', '.join(CHECKS)}."
    return f"there is no key {reprlib.repr(name)}: {known}"


def _row(number: int, line: int, values: dict[str, Any], folder: epath.Path) -> Row:
    for name in values:
        if name not in CHECKS:
            raise UserError(_no_key(name))
    found = checked(values)
    if "prompt" not in found:
        raise UserError("prompt is missing: every row needs one.")
    for name in PATHS:
        if name in found:
            found[name] = _inside(folder, name, found[name])
    return Row(number=number, line=line, **found)


def flag(name: str) -> str:
    """What the command line calls a column."""
    return f"--{name.replace('_', '-')}"


def checked(values: Mapping[str, Any], called: Callable[[str], str] = str) -> dict[str, Any]:
    """What `Row` holds of values as JSON has them, paths still as texts; None is left out.

    Args:
      values: by the names in `CHECKS`.
      called: what messages call a name.

    Raises:
      UserError: there is no such value.
    """
    return {
        name: CHECKS[name](called(name), value)
        for name, value in values.items()
        if value is not None
    }


def _inside(folder: epath.Path, name: str, text: str) -> epath.Path:
    """A path relative to the folder, refused where it leads out of it."""
    path = folder / text
    out = os.path.isabs(text) or "://" in text or "\0" in text
    out = out or os.path.normpath(text).split(os.sep)[0] == os.pardir
    if not out and "://" not in str(folder):
        root = os.path.realpath(folder)
        out = os.path.commonpath([root, os.path.realpath(path)]) != root
    if out:
        raise UserError(
            f"{name} is {reprlib.repr(text)}, which leaves the folder of the file of prompts: "
            "put it there."
        )
    return path


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {reprlib.repr(value)}: expected a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is no UTF-8: save the file as UTF-8.") from error
    return value


def _filled(name: str, value: Any) -> str:
    if not _text(name, value).strip():
        raise UserError(f"{name} is empty: expected a text.")
    return value


def _name(name: str, value: Any) -> str:
    return _filled(name, str(value) if type(value) is int else value)


def _whole_number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UserError(
            f"{name} is {reprlib.repr(value)}: expected a whole number from {least} to {most}."
        )
    return value


def _steps(name: str, value: Any) -> int:
    if type(value) is int:
        check_num_steps(value)
    return _whole_number(name, value, 1, MOST_STEPS)


def _number(name: str, value: Any, least: float, most: float) -> float:
    # NaN is in no range; and a whole number may be too large to become a float.
    if type(value) not in (int, float) or not least <= value <= most:
        expected = f" from {least:g} to {most:g}" if most < LARGEST_SCALE else ""
        raise UserError(f"{name} is {reprlib.repr(value)}: expected a number{expected}.")
    return float(value)


def _share(name: str, value: Any) -> float:
    return _number(name, value, 0.0, 1.0)


def _size(name: str, value: Any) -> tuple[int, int] | str:
    if isinstance(value, str) and ":" in value:
        return value  # which ratios there are is the model's affair
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value) if isinstance(value, str) else None
    if not match:
        raise UserError(
            f"{name} is {reprlib.repr(value)}: expected WIDTHxHEIGHT, such as 64x64, or a "
            "ratio, such as 16:9."
        )
    width, height = int(match[1]), int(match[2])
    if max(width, height) > LARGEST_SIDE:
        raise UserError(f"{name} is {value}: expected at most {LARGEST_SIDE} pixels a side.")
    return width, height


def _solver(name: str, value: Any) -> str:
    if value not in list(SOLVERS):
        raise UserError(f"{name} is {reprlib.repr(value)}: expected one of {', '.join(SOLVERS)}.")
    return value


def _interval(name: str, value: Any) -> tuple[float, float]:
    number = r"([0-9]*\.?[0-9]+)"
    match = re.fullmatch(f"{number}-{number}", value) if isinstance(value, str) else None
    low, high = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"{name} is {reprlib.repr(value)}: expected LOW-HIGH from 0 to 1, such as 0.3-1."
        )
    return low, high


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _filled,
    "negative_prompt": _text,
    "seed": lambda name, value: _whole_number(name, value, 0, LARGEST_SEED),
    "num_steps": _steps,
    "guidance_scale": lambda name, value: _number(name, value, -LARGEST_SCALE, LARGEST_SCALE),
    "size": _size,
    "solver": _solver,
    "init_image": _filled,
    "strength": _share,
    "mask": _filled,
    "name": _name,
    "clip_scale": lambda name, value: _number(name, value, 0.0, LARGEST_SCALE),
    "clip_interval": _interval,
    "clip_cutouts": lambda name, value: _whole_number(name, value, 0, MOST_CUTOUTS),
    "repeats": lambda name, value: _whole_number(name, value, 1, MOST_REPEATS),
    "toward": _filled,
    "toward_seed": lambda name, value: _whole_number(name, value, 0, LARGEST_SEED),
    "share": _share,
    "guidance_interval": _interval,
    "guidance_rescale": _share,
    "apg": _share,
    "zero_star": lambda name, value: _whole_number(name, value, 0, MOST_STEPS),
    "weak_scale": lambda name, value: _number(name, value, -LARGEST_SCALE, LARGEST_SCALE),
    "variation": _share,
    "upscale": lambda name, value: _whole_number(name, value, 1, LARGEST_FACTOR),
    "upscale_strength": _share,
    "best_of": lambda name, value: _whole_number(name, value, 1, MOST_TRIED),
}
"""What a row may set, and the check of each, which takes what to call it and its value.

The value is as JSON has it; a check returns what `Row` holds, except for paths, and raises
`UserError`.
"""
