"""EmojiScenes: composed scenes of everyday things in several drawing styles, with captions.

Records are composed on demand from (seed, split, index), of the drawings of `Iconify`.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Fraction, Range, Seed
from jaxdiff.data.sources.base import PickledFields, Record
from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.datasets.emoji_names import with_article
from jaxdiff.datasets.icons.names import STYLES
from jaxdiff.datasets.icons.scene import (
    Catalogue,
    IconScene,
    Share,
    sample_background,
    sample_equal,
    sample_one,
    sample_three,
    sample_two,
)
from jaxdiff.datasets.icons.source import Iconify
from jaxdiff.errors import UserError

_SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium-sized",),
    "large": ("large", "large", "big"),
}
_POSITION_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
}
_RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_COUNT_WORDS = {2: "two", 3: "three"}
_PREFIXES = ("a drawing of", "a picture of", "an emoji of")
_IRREGULAR = {
    **dict.fromkeys(("fish", "sheep", "deer", "moose", "bison", "squid", "shrimp"), ""),
    **{"mouse": "mice", "goose": "geese", "knife": "knives", "leaf": "leaves", "wolf": "wolves"},
    **{"ox": "oxen", "loaf": "loaves", "die": "dice", "scarf": "scarves", "shelf": "shelves"},
    **{"foot": "feet", "tooth": "teeth", "man": "men", "snowman": "snowmen"},
}
_CONTRAST, _TRIES = 90, 4  # distance of the mean colour from the background, of 441
# After so many records, few captions have a new word.
_VOCABULARY_RECORDS = 20_000


@checked
@dataclass(frozen=True, kw_only=True)
class EmojiScenes(PickledFields):
    """Composed scenes, as {"image": uint8 [size, size, 3], "captions", "name"}.

    The training split mixes single things, two or three equal drawings (`group_fraction`), two
    things in a relation (`pair_fraction`) and three together (`trio_fraction`), on plain
    backgrounds, without held-out combinations. The held-out split has single things in held-out
    styles and, as `pair_fraction`, held-out pairs. Captions omit attributes at random, except for
    a `full_fraction` that names all. A record is a function of (seed, split, index) and of the
    drawings. `sets`, `folder`, `download` and `cache` are those of `Iconify`.

    Raises:
      UserError: as `Iconify`, or the fractions sum to more than 1.
    """

    split: Share = "train"
    size: Annotated[int, Range(32)] = 128
    length: Count = 200_000
    seed: Seed = 0
    group_fraction: Fraction = 0.1
    pair_fraction: Fraction = 0.35
    trio_fraction: Fraction = 0.05
    full_fraction: Fraction = 0.3
    captions_per_image: Count = 2
    sets: tuple[str, ...] = tuple(STYLES)
    folder: str | None = None
    download: bool = False
    cache: str | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        scene, rng = self._scene(index)
        return {
            "image": self.compose(scene),
            "captions": list(dict.fromkeys(self._captions(scene, rng))),
            "name": f"emoji_scenes/{self.split}/{index}",
        }

    def identity(self, index: int) -> str:
        """Return what the scene is a function of."""
        return f"{self.seed}/{self.split}/{index}"

    def scene(self, index: int) -> IconScene:
        """Return the scene of record `index`."""
        return self._scene(index)[0]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The words of the captions, in lower case."""
        scenes = map(self._scene, range(min(self.length, _VOCABULARY_RECORDS)))
        texts = (text for scene, rng in scenes for text in self._captions(scene, rng))
        return frozenset(word for text in texts for word in words_of(text))

    @property
    def related_words(self) -> dict[str, tuple[str, ...]]:
        """Names in captions by words that are in none, such as cat and dog by pet."""
        return self.drawings.related_to(self.vocabulary)

    def check(self) -> None:
        """Render the drawings unless cached; raise `UserError` for wrong fields or packages."""
        fractions = (self.pair_fraction, self.trio_fraction, self.group_fraction)
        if sum(fractions) > 1:
            raise UserError(
                f"data.source.pair_fraction, trio_fraction and group_fraction are {fractions}: "
                "expected fractions that sum to at most 1."
            )
        self.drawings.check()
        for form in (0.0, *accumulate(fractions)):  # where each kind of scene begins
            if form < 1:
                self.sample(np.random.default_rng(0), form)

    @cached_property
    def drawings(self) -> Iconify:
        """The drawings of things, in all styles."""
        return Iconify(
            sets=self.sets,
            split="all",
            subset="things",
            size=self.size,
            folder=self.folder,
            download=self.download,
            cache=self.cache,
        )

    @cached_property
    def catalogue(self) -> Catalogue:
        """The things and the styles that draw them, in both splits."""
        styles: dict[str, list[str]] = {}
        for thing, style in self._rows:
            styles.setdefault(thing, []).append(style)
        found = {thing: tuple(sorted(of)) for thing, of in styles.items()}
        return Catalogue(tuple(sorted(found)), found)

    def compose(self, scene: IconScene) -> UInt8[np.ndarray, "h w 3"]:
        """Return the pixels of a scene."""
        canvas = Image.new("RGB", (self.size, self.size), scene.colour)
        items = scene.items * scene.count if scene.count > 1 else scene.items
        for item, (x, y, side) in zip(items, scene.boxes, strict=True):
            drawing = self.drawing(item.thing, item.style)
            scale = side * self.size / max(drawing.size)
            width, height = (max(1, round(length * scale)) for length in drawing.size)
            scaled = drawing.resize((width, height), Image.Resampling.LANCZOS)
            corner = (round(x * self.size - width / 2), round(y * self.size - height / 2))
            canvas.paste(scaled, corner, scaled)
        return np.asarray(canvas)

    def caption(self, scene: IconScene, rng: np.random.Generator, *, full: bool = False) -> str:
        """Sample a description of a scene; unless `full`, it may omit attributes."""
        return _caption(scene, rng, self._names, full)

    def sample(self, rng: np.random.Generator, form: float) -> IconScene:
        """Sample a scene of the split, of the kind that `form`, in [0, 1), selects."""
        if self.split == "held_out":
            if form < self.pair_fraction:
                return sample_two(rng, self.shares["train"], "held_out")
            return sample_one(rng, self.shares["held_out"])
        if form < self.pair_fraction:
            return sample_two(rng, self.shares["train"])
        if form < self.pair_fraction + self.trio_fraction:
            return sample_three(rng, self.shares["train"])
        if form < self.pair_fraction + self.trio_fraction + self.group_fraction:
            return sample_equal(rng, self._countable)
        return sample_one(rng, self.shares["train"])

    def _scene(self, index: int) -> tuple[IconScene, np.random.Generator]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        rng = np.random.default_rng((self.seed, self.split == "held_out", index))
        return self.with_contrast(self.sample(rng, rng.random()), rng), rng

    def with_contrast(self, scene: IconScene, rng: np.random.Generator) -> IconScene:
        """Return a scene with a background of another colour than its drawings."""
        means = np.array([self._mean_colour(item.thing, item.style) for item in scene.items])
        for _ in range(_TRIES):
            if np.linalg.norm(means - scene.colour, axis=1).min() >= _CONTRAST:
                break
            name, colour = sample_background(rng)
            scene = dataclasses.replace(scene, background=name, colour=colour)
        return scene

    def _captions(self, scene: IconScene, rng: np.random.Generator) -> list[str]:
        return [
            self.caption(scene, rng, full=rng.random() < self.full_fraction)
            for _ in range(self.captions_per_image)
        ]

    @cached_property
    def shares(self) -> dict[Share, Catalogue]:
        """The drawings of each split."""
        return {share: self.catalogue.of_share(share) for share in ("train", "held_out")}

    @cached_property
    def _countable(self) -> Catalogue:
        """The things of the training split that have a plural."""
        things, styles = self.shares["train"]
        return Catalogue(tuple(thing for thing in things if plural(thing)), styles)

    @cached_property
    def _means(self) -> dict[int, np.ndarray]:
        return {}

    def _mean_colour(self, thing: str, style: str) -> np.ndarray:
        """Return the mean red, green and blue of what is visible."""
        row = self._rows[thing, style]
        if row not in self._means:
            rgba = self.drawings.rgba(row).astype(np.float32)
            weights = rgba[..., 3:]
            self._means[row] = (rgba[..., :3] * weights).sum((0, 1)) / max(weights.sum(), 1.0)
        return self._means[row]

    @cached_property
    def _rows(self) -> dict[tuple[str, str], int]:
        icons = enumerate(self.drawings.icons)
        things = ((i, icon.emoji and icon.emoji.thing, icon.set) for i, icon in icons)
        return {(thing, style): i for i, thing, style in things if thing}

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        icons = (icon.emoji for icon in self.drawings.icons)
        return {emoji.thing: emoji.names for emoji in icons if emoji and emoji.thing}

    def drawing(self, thing: str, style: str) -> Image.Image:
        """Return a drawing, cut to what is visible."""
        image = Image.fromarray(self.drawings.rgba(self._rows[thing, style]))
        return image.crop(image.getchannel("A").point(_visible).getbbox() or (0, 0, *image.size))


def _visible(alpha: int) -> int:
    return 255 * (alpha > 8)


def prompt_of(scene: IconScene) -> str:
    """Return the caption that names things, styles and relation alone, with fixed wording."""
    phrases = [_styled(with_article(item.thing), item.style) for item in scene.items]
    if scene.relation is not None:
        same = scene.items[0].style == scene.items[1].style
        second = with_article(scene.items[1].thing) if same else phrases[1]
        return f"{phrases[0]} {_RELATION_WORDS[scene.relation][0]} {second}"
    return phrases[0]


def plural(name: str) -> str | None:
    """Return the plural of a noun phrase; None where English counts it in another way."""
    head = name.rpartition(" ")[2]
    if with_article(name) == name or head == "food":
        return None
    if head in _IRREGULAR:
        return name[: len(name) - len(head)] + (_IRREGULAR[head] or head)
    if re.search(r"[^aeiou]y$", head):
        return f"{name[:-1]}ies"
    ends = ("s", "x", "ch", "sh", "tomato", "potato", "mango", "mosquito", "buffalo", "tornado")
    return name + ("es" if head.endswith(ends) else "s")


def _caption(
    scene: IconScene, rng: np.random.Generator, names: dict[str, tuple[str, ...]], full: bool
) -> str:
    def often(fraction: float) -> bool:
        return bool(rng.random() < fraction) or full

    def pick(options):
        return options[int(rng.integers(len(options)))]

    called = [pick(names[item.thing]) if rng.random() < 0.3 else item.thing for item in scene.items]
    if scene.count > 1 and not plural(called[0]):
        called[0] = scene.items[0].thing
    phrases = [with_article(name) for name in called]
    # A thing of unsaid size is nearly always large and in the centre.
    if scene.size is not None and often(0.3 if scene.size == "large" else 0.9):
        word, bare = pick(_SIZE_WORDS[scene.size]), phrases[0] == called[0]
        phrases[0] = f"{word} {called[0]}" if bare else f"a {word} {called[0]}"
    if scene.count > 1:
        phrases[0] = f"{_COUNT_WORDS[scene.count]} {plural(called[0])}"
    styles = [item.style for item in scene.items]
    if often(0.7):
        if len(set(styles)) == 1:
            phrases[0] = _styled(phrases[0], styles[0], scene.count > 1)
        else:
            phrases = [_styled(*both) for both in zip(phrases, styles, strict=True)]
    elif rng.random() < 0.2:
        phrases[0] = f"{pick(_PREFIXES)} {phrases[0]}"
    return " ".join([_joined(scene, phrases, pick), *_ends(scene, often, pick)])


def _joined(scene: IconScene, phrases: list[str], pick) -> str:
    """Return the phrases of the things in their relation."""
    if len(phrases) == 3:
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    if scene.relation is not None:
        return f"{phrases[0]} {pick(_RELATION_WORDS[scene.relation])} {phrases[1]}"
    return phrases[0]


def _ends(scene: IconScene, often, pick) -> list[str]:
    """Return what a caption says of the position and the background."""
    ends = []
    if scene.position is not None and often(0.2 if scene.position == "centre" else 0.9):
        ends.append(pick(_POSITION_WORDS[scene.position]))
    if often(0.25 if scene.background == "white" else 0.75):
        words = with_article(f"{scene.background} background")
        ends.append(pick((f"on {scene.background}", f"on {words}")))
    return ends


def _styled(phrase: str, style: str, several: bool = False) -> str:
    """Return e.g. "a flat drawing of a cat"; the phrase alone for sets without a word."""
    word = STYLES.get(style)
    if word is None:
        return phrase
    return f"{word} drawings of {phrase}" if several else f"a {word} drawing of {phrase}"
