"""Produce: rendered scenes of fruit and vegetables with captions in plain English.

Records are rendered on demand from (seed, split, index). `jaxdiff.datasets.produce.scene` states
the combinations of kind and colour that are held out of training.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Fraction, Range, Seed
from jaxdiff.data.sources.base import Record
from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import (
    Item,
    Kind,
    Scene,
    Split,
    sample_group,
    sample_pair,
    sample_single,
)
from jaxdiff.errors import UserError

# The colour that "ripe" means; for these kinds "unripe" means green.
RIPE: dict[Kind, str] = {
    "banana": "yellow",
    "tomato": "red",
    "pear": "yellow",
    "pepper": "red",
    "lemon": "yellow",
    "strawberry": "red",
}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big"),
}
POSITION_WORDS = {
    "left": ("on the left", "at the left side", "on the left side"),
    "right": ("on the right", "at the right side", "on the right side"),
    "top": ("at the top", "in the top part", "near the top"),
    "bottom": ("at the bottom", "in the bottom part", "near the bottom"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PREFIXES = ("a picture of", "a drawing of", "an image of")
COUNT_WORDS = {2: "two", 3: "three"}
# Words that people may type which no caption has.
_RELATED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fruit", "fruits"), ("banana", "lemon", "orange", "pear")),
    **dict.fromkeys(("vegetable", "vegetables", "veggie"), ("carrot", "pea", "pepper", "tomato")),
    **dict.fromkeys(("eggplant", "eggplants"), ("aubergine",)),
    **dict.fromkeys(("capsicum", "paprika", "chili"), ("pepper",)),
    **dict.fromkeys(("berry", "berries"), ("strawberry",)),
    **dict.fromkeys(("citrus", "lime", "limes"), ("lemon", "orange")),
    **dict.fromkeys(("huge", "giant", "enormous"), ("large", "big")),
    **dict.fromkeys(("mini", "miniature"), ("small", "tiny")),
    **dict.fromkeys(("violet", "lilac", "magenta"), ("purple",)),
    **dict.fromkeys(("crimson", "scarlet"), ("red",)),
    **dict.fromkeys(("gold", "golden"), ("yellow",)),
    **dict.fromkeys(("beside", "next"), ("to the left of", "to the right of")),
    **dict.fromkeys(("beneath", "underneath"), ("below", "under")),
    **dict.fromkeys(("photo", "painting"), ("a picture of", "a drawing of")),
    **dict.fromkeys(("leaf", "stalk"), ("stem",)),
}
# After a tenth of them, no caption has a new word.
VOCABULARY_RECORDS = 5_000


@checked
@dataclass(frozen=True, kw_only=True)
class Produce:
    """Rendered scenes, as {"image": uint8 [size, size, 3], "captions", "name"}.

    The training split mixes single objects, two or three equal objects (`group_fraction`) and pairs
    in a relation (`pair_fraction`), without held-out combinations. The held-out split has single
    objects in held-out combinations only. Captions omit attributes at random, except for a
    `full_fraction` that names all. A record is a function of (seed, split, index).
    """

    split: Split = "train"
    size: Annotated[int, Range(32)] = 64
    length: Count = 200_000
    seed: Seed = 0
    group_fraction: Fraction = 0.15
    pair_fraction: Fraction = 0.3
    full_fraction: Fraction = 0.0
    captions_per_image: Count = 2

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        scene, rng = self._scene(index)
        captions = self._captions(scene, rng)
        return {
            "image": render(scene, rng, self.size),
            "captions": list(dict.fromkeys(captions)),
            "name": f"produce/{self.split}/{index}",
        }

    def identity(self, index: int) -> str:
        """Return what the scene is a function of."""
        return f"{self.seed}/{self.split}/{index}"

    def scene(self, index: int) -> Scene:
        """Return the scene of record `index`."""
        return self._scene(index)[0]

    @property
    def vocabulary(self) -> frozenset[str]:
        """The words of the captions, in lower case."""
        captions = (
            text
            for index in range(min(self.length, VOCABULARY_RECORDS))
            for text in self._captions(*self._scene(index))
        )
        return frozenset(word for text in captions for word in words_of(text))

    @property
    def related_words(self) -> dict[str, tuple[str, ...]]:
        """Names in captions by words that are in none."""
        return _RELATED

    def check(self) -> None:
        """Raise `UserError` if the fractions sum to more than 1."""
        fractions = (self.group_fraction, self.pair_fraction)
        if sum(fractions) > 1:
            raise UserError(
                f"data.source.group_fraction is {self.group_fraction} and pair_fraction "
                f"{self.pair_fraction}: expected fractions that sum to at most 1."
            )

    def _captions(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        return [
            caption(scene, rng, full=self.full_fraction > 0 and rng.random() < self.full_fraction)
            for _ in range(self.captions_per_image)
        ]

    def _scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        rng = np.random.default_rng((self.seed, self.split == "held_out", index))
        form = rng.random()
        if self.split == "held_out" or form >= self.group_fraction + self.pair_fraction:
            return sample_single(rng, self.split), rng
        if form < self.group_fraction:
            return sample_group(rng, self.split), rng
        return sample_pair(rng, self.split), rng


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> str:
    """Sample a description of the scene; unless `full`, it may omit attributes."""

    def pick(options) -> str:
        return options[rng.integers(len(options))]

    phrases = [_varied_phrase(item, scene.count, rng, full) for item in scene.items]
    text = phrases[0]
    if scene.relation is not None:
        text = f"{text} {pick(RELATION_WORDS[scene.relation])} {phrases[1]}"
    if scene.position is not None and (rng.random() < 0.7 or full):
        text = f"{text} {pick(POSITION_WORDS[scene.position])}"
    if rng.random() < 0.15:
        text = f"{pick(PREFIXES)} {text}"
    return text


def full_caption(scene: Scene) -> str:
    """Return the caption that names every attribute, with fixed wording."""
    phrases = [
        _phrase(i.kind, [i.size, i.colour], "with" if i.stem else "without", scene.count)
        for i in scene.items
    ]
    if scene.relation is not None:
        return f"{phrases[0]} {RELATION_WORDS[scene.relation][0]} {phrases[1]}"
    if scene.position is not None:
        return f"{phrases[0]} {POSITION_WORDS[scene.position][0]}"
    return phrases[0]


def _varied_phrase(item: Item, count: int, rng: np.random.Generator, full: bool) -> str:
    words = []
    if rng.random() < 0.75 or full:
        options = SIZE_WORDS[item.size]
        words.append(options[rng.integers(len(options))])
    if rng.random() < 0.85 or full:
        words.append(_colour_word(item, rng))
    stem = ""
    if rng.random() < 0.75 or full:
        stem = "with" if item.stem else "without"
    return _phrase(item.kind, words, stem, count)


def _colour_word(item: Item, rng: np.random.Generator) -> str:
    if item.kind in RIPE and rng.random() < 0.4:
        if item.colour == RIPE[item.kind]:
            return "ripe"
        if item.colour == "green":
            return "unripe"
    return item.colour


def _phrase(kind: Kind, words: list[str], stem: str, count: int) -> str:
    """Map e.g. ("pea", ["small", "green"], "with", 2) to "two small green peas with stems"."""
    noun = kind if count == 1 else _plural(kind)
    text = " ".join([*words, noun])
    if count > 1:
        text = f"{COUNT_WORDS[count]} {text}"
    else:
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    if not stem:
        return text
    return f"{text} {stem} {'a stem' if count == 1 else 'stems'}"


def _plural(kind: Kind) -> str:
    if kind == "strawberry":
        return "strawberries"
    return kind + ("es" if kind.endswith("o") else "s")
