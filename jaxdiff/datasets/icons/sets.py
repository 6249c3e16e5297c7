"""Icon sets in Iconify's JSON format: each icon as an SVG document.

The format (https://iconify.design/docs/types/iconify-json.html): `icons` maps names to bodies,
whose size and origin default to those of the set; `aliases` are other names, or transformed copies.
Beside it `chars.json` maps characters to names, `metadata.json` has categories of icons, and
`info.json` the category of the set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.datasets.icons.packages import read_object
from jaxdiff.errors import UserError

_DEFAULTS = {"left": 0, "top": 0, "width": 16, "height": 16}
_DEEPEST_ALIAS = 8
_TRANSFORMS = {*_DEFAULTS, "hFlip", "vFlip", "rotate"}


class IconData(NamedTuple):
    """An icon: its SVG elements, its box, and its transformation."""

    body: str
    box: tuple[float, float, float, float]  # left, top, width, height
    horizontal_flip: bool = False
    vertical_flip: bool = False
    quarter_turns: int = 0

    def svg(self) -> str:
        """Return the SVG document, of the icon's box."""
        left, top, width, height = self.box
        x, y = left + width / 2, top + height / 2
        steps = []
        if self.quarter_turns:
            steps.append(f"rotate({90 * self.quarter_turns} {x} {y})")
        if self.horizontal_flip or self.vertical_flip:
            across, down = 1 - 2 * self.horizontal_flip, 1 - 2 * self.vertical_flip
            steps.append(f"translate({x} {y}) scale({across} {down}) translate({-x} {-y})")
        body = f'<g transform="{" ".join(steps)}">{self.body}</g>' if steps else self.body
        if self.quarter_turns % 2:
            left, top, width, height = x - height / 2, y - width / 2, height, width
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
            f"{body}</svg>"
        )


@dataclass(frozen=True)
class IconSet:
    """The icons of a package.

    Attributes:
      name: of the set.
      data: its `icons.json`.
      codes: icon names by the characters of the emoji that they draw, in hexadecimal.
      categories: icon names by category.
    """

    name: str
    data: Mapping[str, Any]
    codes: Mapping[str, str]
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Return the names of the icons, without aliases that draw the same, in order."""
        yield from self.data["icons"]
        for name, alias in self.data.get("aliases", {}).items():
            if _TRANSFORMS & alias.keys():
                yield name

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Return the further names of icons: aliases that draw the same."""
        aliases, found = self.data.get("aliases", {}), {}
        for name in aliases:
            same, depth = name, 0
            while (
                same in aliases
                and not _TRANSFORMS & aliases[same].keys()
                and depth < _DEEPEST_ALIAS
            ):
                same, depth = aliases[same]["parent"], depth + 1
            if same != name:
                found.setdefault(same, []).append(name)
        return {name: tuple(names) for name, names in found.items()}

    def tags(self) -> dict[str, tuple[str, ...]]:
        """Return the words of the categories of icons: "account" and "user" of "Account / User"."""
        found: dict[str, dict[str, None]] = {}
        for category, names in self.categories.items():
            for name in names:
                words = (word.strip().lower() for word in category.split("/"))
                found.setdefault(name, {}).update(dict.fromkeys(words))
        return {name: tuple(words) for name, words in found.items()}

    def icon(self, name: str) -> IconData:
        """Return an icon, or the one that an alias stands for.

        Raises:
          UserError: the set is damaged.
        """
        icons, aliases = self.data["icons"], self.data.get("aliases", {})
        layers = []
        while name not in icons and name in aliases and len(layers) < _DEEPEST_ALIAS:
            layers.append(aliases[name])
            name = aliases[name].get("parent", "")
        if not isinstance(icons.get(name), dict) or "body" not in icons[name]:
            raise UserError(
                f"The icon set {self.name} has no drawing for {name!r}: fetch its package again."
            )
        layers.append(icons[name])
        merged: dict[str, Any] = dict(
            _DEFAULTS | {k: self.data[k] for k in _DEFAULTS if k in self.data}
        )
        for layer in reversed(layers):
            merged |= {key: layer[key] for key in (*_DEFAULTS, "body") if key in layer}
        return IconData(
            body=merged["body"],
            box=(merged["left"], merged["top"], merged["width"], merged["height"]),
            horizontal_flip=sum(bool(layer.get("hFlip")) for layer in layers) % 2 == 1,
            vertical_flip=sum(bool(layer.get("vFlip")) for layer in layers) % 2 == 1,
            quarter_turns=sum(int(layer.get("rotate", 0)) for layer in layers) % 4,
        )


def read_set(name: str, place: Path) -> IconSet:
    """Return the icon set of a package.

    Raises:
      UserError: it is none.
    """
    data = read_object(place, "icons.json")
    if not isinstance(data.get("icons"), dict) or not isinstance(data.get("aliases", {}), dict):
        raise UserError(f"icons.json of {place} has no icons: expected an icon set of Iconify.")
    codes, more = (
        read_object(place, file, required=False) for file in ("chars.json", "metadata.json")
    )
    return IconSet(name, data, codes, more.get("categories", {}))


def draws_emoji(name: str, place: Path) -> bool:
    """Return whether the icons of a package are emoji, by the set's name or its category."""
    if "emoji" in name:
        return True
    return read_object(place, "info.json", required=False).get("category") == "Emoji"
