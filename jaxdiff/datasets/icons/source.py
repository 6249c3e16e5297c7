"""Iconify: icon sets with captions, rendered once from SVG into a cache.

The sets named by default are Fluent Emoji, flat and shaded (Microsoft, MIT), Noto Emoji (Google,
Apache-2.0) and Twemoji (Twitter and jdecked, CC BY 4.0); names are emojibase's (Miles Johnson,
MIT). They are packages of the npm registry and not part of jaxdiff.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import safetensors
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.base import PickledFields, Record
from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.datasets.emoji_names import captions, plain_words, with_article
from jaxdiff.datasets.icons import names as naming
from jaxdiff.datasets.icons import packages
from jaxdiff.datasets.icons import sets as formats
from jaxdiff.datasets.icons.names import (
    STYLES,
    NamedEmoji,
    held_out_style,
    icon_spelling,
    normal_code,
)
from jaxdiff.datasets.icons.related import related_words
from jaxdiff.datasets.icons.sets import IconSet, draws_emoji, read_set
from jaxdiff.datasets.rendered import (
    cache_errors,
    image_cache,
    optional_package,
    write_cached,
)
from jaxdiff.errors import UserError
from jaxdiff.io.image_decoding import open_image
from jaxdiff.io.user_cache import user_cache

Subset = Literal["all", "things"]

LEAST_STYLES = 3
"""Icon sets that have each thing, if the source has as many."""


class Icon(NamedTuple):
    """One icon.

    Attributes:
      row: in the rendered images.
      set: the icon set.
      name: in the set.
      aliases: further names in the set.
      tags: words of its categories in the set.
      emoji: that it draws; None for other icons.
    """

    row: int
    set: str
    name: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    emoji: NamedEmoji | None

    @property
    def held_out(self) -> bool:
        """Whether training excludes this thing in this style."""
        thing = self.emoji and self.emoji.thing
        return thing is not None and held_out_style(thing) == self.set


_FILES = ("icons.json", "chars.json", "metadata.json", "info.json", "en/data.json")
_FILE = re.compile(r"""href\s*=\s*["'](?!#)""")


class _Row(NamedTuple):
    """A rendered icon, as the cache has it."""

    set: str
    name: str
    code: str | None
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@checked
@dataclass(frozen=True, kw_only=True)
class Iconify(PickledFields):
    """Drawings of icon sets with captions, as {"image", "captions", "name"}.

    Emoji have emojibase's names. Icons of other sets have the names, aliases and categories that
    their set states, and need no emojibase, except for the subset "things".
    Images are uint8 [size, size, 3] over white; `rgba` has the alpha too. The subset "things" has
    the everyday things that at least three of the sets have. The split "train" excludes one style
    of every second thing (`jaxdiff.datasets.icons.names`), "held_out" has only those, "all" has
    both. Packages come from `folder` (default: the folder `icons` of the user's cache). The first
    use renders all icons of the subset into one file in the folder `cache`, at about 180 icons/s
    and 4 size^2 bytes for each: 1,400 drawings of things take 8 seconds and 90 MB at 128 pixels.

    Raises:
      UserError: a name in `sets` is impossible, a package is missing or damaged, the extra `icons`
        is not installed, or the cache cannot be written or read.
    """

    sets: tuple[str, ...] = tuple(STYLES)
    split: Literal["train", "held_out", "all"] = "train"
    subset: Subset = "all"
    size: Count = 128
    folder: str | None = None
    download: bool = False
    cache: str | None = None

    def __post_init__(self):
        if not self.sets or any(name != icon_spelling(name) for name in self.sets):
            raise UserError(
                f"data.source.sets is {list(self.sets)}: expected names of Iconify's icon sets, "
                "such as noto."
            )

    def __len__(self) -> int:
        return len(self.icons)

    def __getitem__(self, index: int, /) -> Record:
        icon = self.icons[index]
        return {
            "image": over(self.rgba(index), (255, 255, 255)),
            "captions": icon_captions(icon),
            "name": f"{icon.set}/{icon.name}",
        }

    def identity(self, index: int) -> str:
        """Return the set and the name of the icon."""
        icon = self.icons[index]
        return f"{icon.set}/{icon.name}"

    def rgba(self, index: int) -> UInt8[np.ndarray, "h w 4"]:
        """Return the pixels of record `index`, with straight alpha."""
        return self._file[1].get_slice("images")[self.icons[index].row]

    def check(self) -> None:
        """Render the icons unless cached; raise `UserError` if anything is missing."""
        _ = self._file

    @cached_property
    def icons(self) -> list[Icon]:
        """The icons of this split, in the order of the records."""
        emoji = {one.code: one for one in self._emoji}
        icons = [
            Icon(
                row,
                entry.set,
                entry.name,
                tuple(entry.aliases),
                tuple(entry.tags),
                emoji.get(entry.code or ""),
            )
            for row, entry in enumerate(self._file[0])
        ]
        return [
            icon
            for icon in icons
            if self.split == "all" or icon.held_out == (self.split != "train")
        ]

    @cached_property
    def _file(self) -> tuple[list[_Row], Any]:
        """What the cache's file has: its rows, and the open file."""
        renderer = optional_package("resvg_py", "Iconify", "icons")
        folder = image_cache(self.cache, "Iconify")
        path = folder / f"icons-{self._digest()[:16]}-{self.size}.safetensors"
        with cache_errors(path, "Iconify"):
            if not path.exists():
                with packages.damaged_package_as_user_error(self.folder or "the user's cache"):
                    icons = list(self._select())
                write_cached(path, lambda file: _render_all(file, icons, self.size, renderer))
            opened = safetensors.safe_open(path, "np").__enter__()
        return [_Row(*row) for row in json.loads(opened.metadata()["icons"])], opened

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The words of the captions, in lower case."""
        texts = (text for icon in self.icons for text in icon_captions(icon))
        return frozenset(word for text in texts for word in words_of(text))

    @property
    def related_words(self) -> dict[str, tuple[str, ...]]:
        """Names in captions by words that are in none, such as cat and dog by pet."""
        return self.related_to(self.vocabulary)

    @cached_property
    def _named_sets(self) -> frozenset[str]:
        """The sets whose icons have the names of emojibase."""
        if self.subset == "things":
            return frozenset(self.sets)
        places = {name: self._place(packages.package_of(name)) for name in self.sets}
        return frozenset(name for name, place in places.items() if draws_emoji(name, place))

    @cached_property
    def _emoji(self) -> list[NamedEmoji]:
        """The emoji that the sets can draw; [] where none does."""
        if not self._named_sets:
            return []
        place = self._place(packages.NAMES)
        with packages.damaged_package_as_user_error(place):
            return naming.read_emoji(place)

    def related_to(self, known: frozenset[str]) -> dict[str, tuple[str, ...]]:
        """Return names in captions by words that are not known; see `related`."""
        if not self._named_sets:
            return {}
        emoji = (icon.emoji for icon in self.icons)
        things = {one.code: one.thing for one in emoji if one and one.thing}
        place = self._place(packages.NAMES)
        with packages.damaged_package_as_user_error(place):
            return related_words(place, things, known)

    def _place(self, package: str) -> Path:
        folder = self.folder or user_cache("icons")
        if folder is None:
            raise UserError(
                "The data set Iconify keeps icon sets in the user's cache, which JAXDIFF_CACHE "
                "turns off: set data.source.folder to a folder for them."
            )
        return packages.find_package(Path(folder), package, download=self.download)

    def _digest(self) -> str:
        """Return a digest of all that the rendered rows depend on, but for their size."""
        parts = [json.dumps([self.sets, self.subset])]
        parts += [Path(str(module.__file__)).read_text() for module in (naming, formats)]
        names = (packages.NAMES,) if self._named_sets else ()
        for package in (*names, *map(packages.package_of, self.sets)):
            place = self._place(package)
            parts.append(packages.content_digest(place, *_FILES))
        return packages.text_digest(parts)

    def _select(self) -> Iterator[tuple[_Row, str]]:
        """Yield the icons of the subset, as rows and SVG."""
        emoji = self._emoji
        read = [read_set(name, self._place(packages.package_of(name))) for name in self.sets]
        rows = [
            row for one in read for row in _rows(one, emoji if one.name in self._named_sets else [])
        ]
        if self.subset == "things":
            rows = _things(rows, emoji, min(LEAST_STYLES, len(read)))
        of = {one.name: one for one in read}
        for row in rows:
            yield row, of[row.set].icon(row.name).svg()


def icon_captions(icon: Icon) -> list[str]:
    """Return captions of an icon, in lower case; the last ones name its style, if known."""
    emoji = icon.emoji
    label = (emoji and (emoji.thing or emoji.label)) or plain_words(icon.name.replace("-", " "))
    texts = captions(label, flag=emoji is not None and emoji.flag)
    aliases = [alias.replace("-", " ") for alias in icon.aliases if "tone" not in alias]
    further = [with_article(name) for name in (*(emoji.names[1:] if emoji else ()), *aliases)]
    texts += further
    if icon.tags and not emoji:
        texts.append(f"{texts[1]}, {', '.join(icon.tags)}")
    style = STYLES.get(icon.set)
    if style is not None:
        texts += [f"a {style} drawing of {text}" for text in (texts[1], *further)]
    return list(dict.fromkeys(texts))


def over(
    rgba: UInt8[np.ndarray, "h w 4"], colour: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image over a plain colour."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)
    return mixed.round().astype(np.uint8)


def _rows(icons: IconSet, emoji: list[NamedEmoji]) -> Iterator[_Row]:
    """Yield each icon's names, and the emoji that it draws, by the set's table or by its name."""
    table = {name: normal_code(code) for code, name in icons.codes.items()}
    known = {one.code for one in emoji}
    by_spelling = {icon_spelling(one.label): one.code for one in reversed(emoji)}
    aliases, tags = icons.aliases(), icons.tags()
    for name in icons.names():
        code = table.get(name)
        if code not in known:  # characters of icon fonts are no emoji
            code = by_spelling.get(name) or by_spelling.get(f"{name}-skin-tone")
        yield _Row(icons.name, name, code, aliases.get(name, ()), tags.get(name, ()))


def _things(rows: list[_Row], emoji: list[NamedEmoji], least: int) -> list[_Row]:
    """Return one icon for each thing and set, of the things that `least` sets have."""
    things = {one.code for one in emoji if one.thing}
    chosen: dict[tuple[str, str], _Row] = {}
    for row in rows:
        if row.code in things:
            chosen.setdefault((row.code, row.set), row)
    count: dict[str, int] = {}
    for code, _ in chosen:
        count[code] = count.get(code, 0) + 1
    return [row for (code, _), row in chosen.items() if count[code] >= least]


def _render_all(file: BinaryIO, icons: list[tuple[_Row, str]], size: int, renderer: Any) -> None:
    """Write the rows, and their images as uint8 [n, size, size, 4], as safetensors.

    The file is written image by image, since a large set does not fit a small memory.
    """
    total = len(icons) * size * size * 4
    header = {
        "__metadata__": {"icons": json.dumps([row for row, _ in icons])},
        "images": {
            "dtype": "U8",
            "shape": [len(icons), size, size, 4],
            "data_offsets": [0, total],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    with ThreadPoolExecutor() as threads:  # the renderer releases the GIL
        for pixels in threads.map(lambda icon: rasterise(icon[1], size, renderer), icons):
            file.write(pixels.tobytes())


def rasterise(svg: str, size: int, renderer: Any) -> UInt8[np.ndarray, "s s 4"]:
    """Return an SVG document in the middle of a square, with straight alpha.

    Raises:
      UserError: it is damaged, or shows a file, which the renderer would read from anywhere.
    """
    try:
        if _FILE.search(svg):
            raise ValueError("it refers to a file")
        data = renderer.svg_to_bytes(
            svg_string=svg, width=size, height=size, skip_system_fonts=True
        )
        with open_image(bytes(data)) as opened:
            image = opened.convert("RGBA")
    except (ValueError, RecordError) as error:
        raise UserError(
            f"The icon {svg[:80]!r} cannot be rendered ({error}): expected SVG elements; remove "
            "its package and fetch it again."
        ) from error
    if image.size != (size, size):
        square = Image.new("RGBA", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return np.asarray(image)
