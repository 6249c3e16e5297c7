"""Scenes of fruit and vegetables: their contents, and the combinations that are held out.

Held-out rule: the kind with index k in `KINDS` and the colour with index c in `COLOURS` are held
out if c = (k + 4) mod 6. This is one colour per kind, never the colour of the ripe fruit, and no
training scene contains such a combination: blue bananas, purple tomatoes, red pea pods, orange
peas, yellow carrots, green aubergines, blue pears, purple peppers, red lemons and orange
strawberries.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxdiff.datasets.scenes import pick

Kind = Literal[
    "banana",
    "tomato",
    "pea pod",
    "pea",
    "carrot",
    "aubergine",
    "pear",
    "pepper",
    "lemon",
    "strawberry",
]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple"]
Size = Literal["small", "medium", "large"]
Relation = Literal["left of", "right of", "above", "below"]
Position = Literal["left", "right", "top", "bottom", "centre"]
Split = Literal["train", "held_out"]

KINDS: tuple[Kind, ...] = get_args(Kind)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
POSITIONS: tuple[Position, ...] = get_args(Position)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object of a scene."""

    kind: Kind
    colour: Colour
    size: Size
    stem: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One item, alone at a `position` or `count` times; or two items in a `relation`.

    The relation is that of the first item to the second. `position` is set for single objects only.
    """

    items: tuple[Item, ...]
    count: int = 1
    relation: Relation | None = None
    position: Position | None = None


def held_out(kind: Kind, colour: Colour) -> bool:
    """Whether this combination is excluded from training; see the module's docstring."""
    return COLOURS.index(colour) == (KINDS.index(kind) + 4) % len(COLOURS)


def sample_item(
    rng: np.random.Generator,
    split: Split,
    sizes: tuple[Size, ...] = SIZES,
    not_kind: Kind | None = None,
) -> Item:
    """Sample an item whose kind and colour belong to the split."""
    kinds: list[Kind] = [k for k in KINDS if k != not_kind]
    kind = pick(rng, kinds)
    wanted = split == "held_out"
    colours: list[Colour] = [c for c in COLOURS if held_out(kind, c) == wanted]
    colour = pick(rng, colours)
    return Item(kind=kind, colour=colour, size=pick(rng, sizes), stem=bool(rng.integers(2)))


def sample_single(rng: np.random.Generator, split: Split) -> Scene:
    """Sample one object at a random position."""
    return Scene(items=(sample_item(rng, split),), position=pick(rng, POSITIONS))


def sample_group(rng: np.random.Generator, split: Split) -> Scene:
    """Sample two or three equal objects; three are small, two small or medium, so that they fit."""
    count = int(rng.integers(2, 4))
    return Scene(items=(sample_item(rng, split, SIZES[: 4 - count]),), count=count)


def sample_pair(rng: np.random.Generator, split: Split) -> Scene:
    """Sample two objects of different kinds in a relation; the first one belongs to `split`."""
    first = sample_item(rng, split, SIZES[:2])
    second = sample_item(rng, "train", SIZES[:2], not_kind=first.kind)
    return Scene(items=(first, second), relation=pick(rng, RELATIONS))
