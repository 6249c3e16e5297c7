"""Score whether images show the prompted things, in the prompted style and relation.

What differs from the border's colour is cut out, scaled to a square and blurred; the nearest of all
drawings, in all styles, by the mean squared difference of colour and outline, is what the image
shows. Images of two things are first cut in two at the widest gap. No network is involved, and the
distance was fixed before any model was trained; the ceiling states how well it recognises disturbed
scenes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes, prompt_of
from jaxdiff.datasets.icons.scene import IconScene, SceneItem, Share, sample_one, sample_two
from jaxdiff.datasets.scoring import disturbed, rolled

SceneKind = Literal["single", "two"]

_SEED = 20_261_129  # differs from all training seeds
_SIDE = 20  # of the squares that are compared
_DIFFERENT = 36.0  # distance from the border's colour of what is visible, of 441
_OUTLINE = 128.0  # weight of the outline, as a grey level
_FEWEST = 12  # visible pixels of a thing
_GREY = 128


class IconScore(NamedTuple):
    """Fractions of images, in [0, 1], by attribute.

    Of single things: "thing", "style", "joint". Of two: "things", both in any order; "joint", both
    in the relation. `score`: of the images. `ceiling`: of the true scenes, disturbed. `chance`: of
    the images against other prompts.
    """

    score: dict[str, float]
    ceiling: dict[str, float]
    chance: dict[str, float]


def icon_scenes(source: EmojiScenes, count: int, share: Share, kind: SceneKind) -> list[IconScene]:
    """Return the first `count` of a fixed sequence of scenes, with held-out styles or pairs."""
    scenes = []
    for index in range(count):
        rng = np.random.default_rng((_SEED, share == "held_out", kind == "two", index))
        if kind == "single":
            scenes.append(sample_one(rng, source.shares[share]))
        else:
            scenes.append(sample_two(rng, source.shares["train"], share))
    return [source.with_contrast(scene, np.random.default_rng(_SEED)) for scene in scenes]


def icon_prompts(scenes: Sequence[IconScene]) -> list[str]:
    """Return the prompts of scenes: things, styles and relation, without places and backgrounds."""
    return [prompt_of(scene) for scene in scenes]


class IconJudge:
    """Recognises the drawings of a source in images."""

    def __init__(self, source: EmojiScenes):
        icons = source.drawings.icons
        self.source = source
        self.items = [
            SceneItem(icon.emoji.thing, icon.set)
            for icon in icons
            if icon.emoji and icon.emoji.thing
        ]
        self._drawings = np.stack([self._of_drawing(item) for item in self.items])
        self._norms = (self._drawings**2).sum(1)

    def score(self, images: UInt8[np.ndarray, "n s s 3"], scenes: Sequence[IconScene]) -> IconScore:
        """Score one image for each scene; all scenes are of one kind.

        Raises:
          ValueError: the numbers differ.
        """
        if len(images) != len(scenes) or len(scenes) == 0:
            raise ValueError(f"{len(images)} images for {len(scenes)} scenes: give one for each")
        wanted = [(scene.items, scene.relation) for scene in scenes]
        rng = np.random.default_rng(_SEED)
        true = np.stack([disturbed(self.source.compose(scene), rng) for scene in scenes])
        found = self._recognised(images, len(scenes[0].items))
        return IconScore(
            score=_fractions(found, wanted),
            ceiling=_fractions(self._recognised(true, len(scenes[0].items)), wanted),
            chance=_fractions(found, rolled(wanted)),
        )

    def fractions(
        self, images: UInt8[np.ndarray, "n s s 3"], scenes: Sequence[IconScene]
    ) -> dict[str, float]:
        """Return the fractions of images of scenes alone, without ceiling and chance."""
        found = self._recognised(images, len(scenes[0].items))
        return _fractions(found, [(scene.items, scene.relation) for scene in scenes])

    def _recognised(self, images: UInt8[np.ndarray, "n s s 3"], count: int) -> list["Found"]:
        """Return what each image shows, from left to right or top to bottom, and whether across."""
        found = []
        for image in images:
            blurred, visible = _foreground(image)
            parts, across = ([visible], True) if count == 1 else _cut(visible)
            items = tuple(self._nearest(_features(blurred, part)) for part in parts)
            found.append((items, across))
        return found

    def _nearest(self, features: np.ndarray) -> SceneItem:
        return self.items[int(np.argmin(self._norms - 2 * self._drawings @ features))]

    def _of_drawing(self, item: SceneItem) -> np.ndarray:
        drawing = self.source.drawing(*item)
        size = self.source.size
        square = Image.new("RGBA", (size, size))
        corner = ((size - drawing.width) // 2, (size - drawing.height) // 2)
        square.paste(drawing, corner)
        rgba = np.asarray(square)
        backed = Image.new("RGB", square.size, (_GREY,) * 3)
        backed.paste(square, (0, 0), square)
        return _features(_blurred(np.asarray(backed)), rgba[..., 3] > _GREY)


Found = tuple[tuple[SceneItem, ...], bool]
Wanted = tuple[tuple[SceneItem, ...], str | None]


def _fractions(found: Sequence[Found], wanted: Sequence[Wanted]) -> dict[str, float]:
    rows = []
    for (items, across), (targets, relation) in zip(found, wanted, strict=True):
        if relation is None:
            same = (items[0].thing == targets[0].thing, items[0].style == targets[0].style)
            rows.append((*same, all(same)))
            continue
        things, named = ([item.thing for item in of] for of in (items, targets))
        ordered = things if relation in ("left of", "above") else things[::-1]
        placed = across == (relation in ("left of", "right of"))
        rows.append((sorted(things) == sorted(named), placed and ordered == named))
    names = ("thing", "style", "joint") if len(rows[0]) == 3 else ("things", "joint")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _blurred(image: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, "s s 3"]:
    blur = ImageFilter.GaussianBlur(image.shape[0] / 64)
    return np.asarray(Image.fromarray(image).filter(blur), np.float32)


def _foreground(
    image: UInt8[np.ndarray, "s s 3"],
) -> tuple[Float[np.ndarray, "s s 3"], Bool[np.ndarray, "s s"]]:
    """Return the blurred image, and where it differs from the colour of its border."""
    blurred = _blurred(image)
    border = np.concatenate([blurred[0], blurred[-1], blurred[:, 0], blurred[:, -1]])
    distance = np.linalg.norm(blurred - np.median(border, axis=0), axis=-1)
    return blurred, distance > _DIFFERENT


def _cut(
    visible: Bool[np.ndarray, "s s"],
) -> tuple[list[Bool[np.ndarray, "s s"]], bool]:
    """Return the two parts of what is visible at its widest gap, and whether they are side by side.

    Without a gap, the cut is in the middle of the longer side.
    """
    best = (-1, 0, True)
    for axis in (0, 1):
        places = np.flatnonzero(visible.sum(axis) > 0)
        if len(places) < 2:
            continue
        gaps = np.diff(places)
        widest = int(np.argmax(gaps))
        start, end = int(places[0]), int(places[-1])
        cut = places[widest] + gaps[widest] // 2 if gaps[widest] > 1 else (start + end) // 2
        width = int(gaps[widest]) * visible.shape[0] + end - start
        best = max(best, (width, int(cut), axis == 0))
    _, cut, across = best
    indices = np.arange(visible.shape[0])
    first = (indices <= cut)[None, :] if across else (indices <= cut)[:, None]
    return [visible & first, visible & ~first], across


def _features(
    image: Float[np.ndarray, "s s 3"], visible: Bool[np.ndarray, "s s"]
) -> Float[np.ndarray, " f"]:
    """Return colour and outline of what is visible, scaled to a small square on grey."""
    rows, columns = (np.flatnonzero(visible.sum(axis) > 0) for axis in (1, 0))
    if visible.sum() < _FEWEST:
        return np.full(_SIDE * _SIDE * 4, _GREY, np.float32)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    square = np.full((side, side, 4), _GREY, np.float32)
    square[..., 3] = 0
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    inside = visible[top:bottom, left:right, None]
    colour = np.where(inside, image[top:bottom, left:right], np.float32(_GREY))
    place = np.s_[y : y + bottom - top, x : x + right - left]
    square[place] = np.concatenate([colour, inside * np.float32(_OUTLINE)], -1)
    planes = [
        Image.fromarray(square[..., channel]).resize((_SIDE, _SIDE), Image.Resampling.BOX)
        for channel in range(4)
    ]
    return np.stack([np.asarray(plane) for plane in planes]).ravel()
