"""Scenes of one to three drawings: their contents, their layout, and what is held out.

Training has no drawing of a thing in its held-out style, and no two things that are a held-out pair
(`jaxdiff.datasets.icons.names`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxdiff.datasets.icons.names import STYLES, held_out_pair, held_out_style
from jaxdiff.datasets.scenes import DIRECTIONS, pick
from jaxdiff.errors import UserError

ItemSize = Literal["small", "medium", "large"]
Placement = Literal["left", "right", "top", "bottom", "centre"]
Side = Literal["left of", "right of", "above", "below"]
Share = Literal["train", "held_out"]
Box = tuple[float, float, float]
"""Centre and longer side of a drawing, as fractions of the image's side."""

SIDES: dict[ItemSize, float] = {"small": 0.3125, "medium": 0.4375, "large": 0.875}
"""The longer side of a drawing, as a fraction of the image's; of several, each is medium."""
GRID = 0.25
"""Centres of drawings are multiples of this fraction of the image's side.

At 128 pixels these are 32, the pixels of a token of the recipe `icons`, which thus sees a drawing
of one size cut in the same way at all places.
"""
_SIZE_FRACTIONS = (0.2, 0.2, 0.6)  # of small, medium and large
_SAME_STYLE = 0.75  # of pairs and trios
_TRIES = 1000  # a held-out pair takes eight on average

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (225, 70, 65),
    "orange": (250, 160, 70),
    "yellow": (250, 222, 105),
    "green": (120, 195, 115),
    "blue": (95, 155, 235),
    "purple": (165, 120, 215),
    "pink": (248, 180, 205),
    "brown": (160, 115, 80),
    "grey": (160, 165, 170),
    "black": (35, 35, 38),
}
"""Red, green and blue of the backgrounds, before each is varied a little."""
_WHITE_FRACTION = 0.3
_VARIATION = 12


class SceneItem(NamedTuple):
    """One drawing of a scene: the thing, and the icon set that draws it."""

    thing: str
    style: str


@dataclass(frozen=True, kw_only=True)
class IconScene:
    """The contents of a scene, and where its drawings are.

    Attributes:
      items: one thing, alone or `count` times; two in a `relation`, that of the first to the
        second; or three, in a triangle.
      boxes: of the drawings.
      background: a key of `BACKGROUNDS`.
      colour: its red, green and blue here.
      size: of a single thing.
      position: of a single thing.
      relation: of two things.
      count: of the drawings of a single thing.
    """

    items: tuple[SceneItem, ...]
    boxes: tuple[Box, ...]
    background: str
    colour: tuple[int, int, int]
    size: ItemSize | None = None
    position: Placement | None = None
    relation: Side | None = None
    count: int = 1


class Catalogue(NamedTuple):
    """The things that scenes may have, each with the styles that draw it."""

    things: tuple[str, ...]
    styles: Mapping[str, tuple[str, ...]]

    def of_share(self, share: Share) -> "Catalogue":
        """Return the drawings that training has, or those that it does not have."""
        kept = {
            thing: tuple(
                style
                for style in styles
                if (held_out_style(thing) == style) == (share == "held_out")
            )
            for thing, styles in self.styles.items()
        }
        return Catalogue(tuple(thing for thing in self.things if kept[thing]), kept)


def sample_one(rng: np.random.Generator, drawings: Catalogue) -> IconScene:
    """Sample one thing at a random size and position; large ones are in the centre.

    Raises:
      UserError: there is no drawing.
    """
    item = _item(rng, drawings, _thing(rng, drawings))
    size = get_args(ItemSize)[int(rng.choice(3, p=_SIZE_FRACTIONS))]
    position = "centre" if size == "large" else pick(rng, get_args(Placement))
    boxes = [_box(*DIRECTIONS[position], size)]
    return _scene(rng, (item,), boxes, size=size, position=position)


def sample_equal(rng: np.random.Generator, drawings: Catalogue) -> IconScene:
    """Sample two equal drawings, in a row or a column, or three in a triangle."""
    count = int(rng.integers(2, 4))
    item = _item(rng, drawings, _thing(rng, drawings))
    boxes = _triangle(rng) if count == 3 else _apart(pick(rng, get_args(Side)), (0, 0))
    return _scene(rng, (item,), boxes, count=count)


def sample_two(rng: np.random.Generator, drawings: Catalogue, share: Share = "train") -> IconScene:
    """Sample two things in a relation, a pair of the share, in styles of `drawings`."""
    things = _different(rng, drawings, 2, share)
    relation = pick(rng, get_args(Side))
    first, second = (int(step) for step in rng.integers(-1, 2, 2))
    boxes = _apart(relation, (first, second))
    return _scene(rng, _styled(rng, drawings, things), boxes, relation=relation)


def sample_three(rng: np.random.Generator, drawings: Catalogue) -> IconScene:
    """Sample three things, no two of them a held-out pair, in a triangle."""
    things = _different(rng, drawings, 3, "train")
    return _scene(rng, _styled(rng, drawings, things), _triangle(rng))


def _scene(
    rng: np.random.Generator, items: tuple[SceneItem, ...], boxes: list[Box], **further
) -> IconScene:
    name, colour = sample_background(rng)
    return IconScene(items=items, boxes=tuple(boxes), background=name, colour=colour, **further)


def _apart(relation: Side, asides: tuple[int, int]) -> list[Box]:
    """Return the boxes of two drawings in a relation, each moved aside by so many grid steps."""
    across, down = DIRECTIONS[relation]  # one of them is 0: along that axis a drawing may move
    steps = zip((1, -1), asides, strict=True)
    return [_box(sign * across or aside, sign * down or aside, "medium") for sign, aside in steps]


def _triangle(rng: np.random.Generator) -> list[Box]:
    """Return the boxes of three drawings, from the top to the bottom, two of them in a row."""
    tip = 1 if rng.integers(2) else -1
    places = sorted([(tip, 0), (-tip, -1), (-tip, 1)])  # rows, then columns
    return [_box(across, down, "medium") for down, across in places]


def _box(across: int, down: int, size: ItemSize) -> Box:
    """Return a box so many grid steps from the centre."""
    return 0.5 + GRID * across, 0.5 + GRID * down, SIDES[size]


def sample_background(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    """Sample the name of a background, and its red, green and blue."""
    names = list(BACKGROUNDS)
    name = names[0] if rng.random() < _WHITE_FRACTION else pick(rng, names[1:])
    vary = rng.integers(-_VARIATION, _VARIATION + 1, 3) * (name != names[0])
    red, green, blue = np.clip(np.asarray(BACKGROUNDS[name]) + vary, 0, 255).tolist()
    return name, (red, green, blue)


def _different(
    rng: np.random.Generator, drawings: Catalogue, count: int, share: Share
) -> tuple[str, ...]:
    """Sample different things, all pairs of the share.

    Raises:
      UserError: no such things are found.
    """
    for _ in range(_TRIES):
        things = tuple(_thing(rng, drawings) for _ in range(count))
        pairs = list(combinations(things, 2))
        if all(a != b and held_out_pair(a, b) == (share == "held_out") for a, b in pairs):
            return things
    raise UserError(
        f"The icon sets have only {len(drawings.things)} things, too few for scenes of several: "
        "set data.source.sets to sets of more emoji."
    )


def _thing(rng: np.random.Generator, drawings: Catalogue) -> str:
    """Sample a thing.

    Raises:
      UserError: there is none.
    """
    if not drawings.things:
        raise UserError(
            "The icon sets in data.source.sets have no drawings for scenes of this split: expected "
            f"sets of everyday things, with held-out styles one of {', '.join(STYLES)}; add one."
        )
    return pick(rng, drawings.things)


def _item(rng: np.random.Generator, drawings: Catalogue, thing: str) -> SceneItem:
    return SceneItem(thing, pick(rng, drawings.styles[thing]))


def _styled(
    rng: np.random.Generator, drawings: Catalogue, things: tuple[str, ...]
) -> tuple[SceneItem, ...]:
    """Return the things in mostly the same style, if all have one in common."""
    shared = set.intersection(*(set(drawings.styles[thing]) for thing in things))
    if shared and rng.random() < _SAME_STYLE:
        style = pick(rng, sorted(shared))
        return tuple(SceneItem(thing, style) for thing in things)
    return tuple(_item(rng, drawings, thing) for thing in things)
