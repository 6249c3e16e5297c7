"""`jaxdiff explore`: the maps of a data set, as pictures and as a page to walk about in."""

import dataclasses
from typing import Annotated

import numpy as np
import tyro

from jaxdiff.cli.parsing import parse
from jaxdiff.errors import UserError
from jaxdiff.explore.axes import TRUTHS, Axis, end_words, principal, read_out, text_scores
from jaxdiff.explore.page import Space, nearest, page
from jaxdiff.explore.picture import Panel, draw_map
from jaxdiff.explore.spaces import (
    ClipReader,
    Records,
    has_autoencoder,
    is_clip,
    read_autoencoder,
    read_clip,
    read_records,
)
from jaxdiff.explore.tsne import neighbour_map
from jaxdiff.io import images as pictures
from jaxdiff.io.files import write_whole
from jaxdiff.pretrained.load import make_folder, read_config
from jaxdiff.training.recipe import load_recipe

MOST = 4000  # what compares every image with every other takes seconds to minutes up to here
NEAREST = 12
LEARNED = ("pc1", "pc2", "near1", "near2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """Draws the map of a data set in CLIP's and in an autoencoder's space."""

    data: Annotated[str, tyro.conf.Positional]
    """A recipe, or the folder of a run or model, or shipped:NAME: its data are drawn."""
    samples: int = 400
    """Records, drawn at random."""
    seed: int = 0
    """Of that."""
    out: str = "explore"
    """Folder to write."""
    x: str = "small:large"
    """Axis to the right: LOW:HIGH, two texts that CLIP tells apart; or pc1, pc2, near1, near2, that
    the spaces have of themselves; or size, hue, stem, which are known of drawn produce."""
    y: str = "green:red"
    """Axis upwards, likewise."""
    axes: tuple[str, ...] = ("without a stem:with a stem",)
    """Further axes LOW:HIGH to choose from on the page."""
    clip: str | None = None
    """Folder of a run or model that is a CLIP; shipped:produce_clip by default, or the model whose
    data are drawn if it is one."""
    autoencoder: str | None = None
    """Folder of a run or model that is an autoencoder or has one; by default that of the recipe
    or model whose data are drawn, or, if it has none, shipped:produce_autoencoder."""


def explore_data(options: ExploreOptions) -> None:
    """Writes `OUT/clip.png`, `OUT/autoencoder.png` and `OUT/index.html`, and prints where.

    Raises:
      UserError: no such recipe, model or axis; too few records, or too many.
    """
    if not 10 <= options.samples <= MOST:
        raise UserError(f"--samples is {options.samples}: expected from 10 to {MOST}.")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}: expected 0 or a positive number.")
    is_recipe = options.data.endswith(".py")
    config = load_recipe(options.data) if is_recipe else read_config(options.data)
    specs = list(dict.fromkeys([options.x, options.y, *options.axes]))
    texts = {spec: _texts(spec) for spec in specs if spec not in {*TRUTHS, *LEARNED}}
    own = None if is_recipe else options.data
    clip = read_clip(options.clip or (is_clip(config) and own) or "shipped:produce_clip")
    autoencode = read_autoencoder(
        config, options.autoencoder or (has_autoencoder(config) and own) or None
    )
    folder = make_folder(options.out)
    records = read_records(config, options.samples, options.seed)
    wanted = [spec for spec in specs if spec in TRUTHS and spec not in records.truths]
    if wanted:
        raise UserError(
            f"{wanted[0]} is known of drawn produce only, not of {config.name}'s data: give two "
            "texts instead, such as --x small:large."
        )
    seen, latents = clip.images(records.images), autoencode(records.images)
    scores = _scores(clip, seen, texts)
    views = {
        "by hand": (options.x, options.y),
        "principal components": ("pc1", "pc2"),
        "neighbours": ("near1", "near2"),
    }
    count = len(records.images)
    spaces = [
        Space(name, _axes(points, records, scores, points is seen), views, nearest(points, NEAREST))
        for name, points in (("CLIP", seen), ("the autoencoder", latents))
    ]
    for space, file in zip(spaces, ("clip.png", "autoencoder.png"), strict=True):
        path = folder / file
        title = f"{count} images of {config.name} in the space of {space.name}"
        known = {axis.key: axis for axis in space.axes}
        panels = [
            Panel(view, *(known[k] for k in views[view])) for view in ("by hand", "neighbours")
        ]
        pictures.save_png(path, draw_map(records.images, title, panels))
        print(path)
    text = page(f"{count} images of {config.name}", records.images, records.captions, spaces)
    write_whole(folder / "index.html", text.encode())
    print(folder / "index.html")


def _texts(spec: str) -> tuple[str, str]:
    """Both ends of an axis LOW:HIGH.

    Raises:
      UserError: it is none, nor any of the other axes.
    """
    low, colon, high = (part.strip() for part in spec.partition(":"))
    if not (colon and low and high) or low == high:
        raise UserError(
            f"There is no axis {spec!r}: give two texts, such as small:large, or one of "
            f"{', '.join([*TRUTHS, *LEARNED])}."
        )
    return low, high


def _scores(
    clip: ClipReader, images: np.ndarray, texts: dict[str, tuple[str, str]]
) -> dict[str, np.ndarray]:
    """How far each image is from the first of two texts toward the second, by CLIP."""
    return {
        spec: text_scores(images, *clip.texts([low, high])) for spec, (low, high) in texts.items()
    }


def _axes(
    vectors: np.ndarray, records: Records, scores: dict[str, np.ndarray], is_clip: bool
) -> list[Axis]:
    """All axes of one space; of a hand-made one, how much of it the space tells is in its name."""
    axes = []
    for spec, values in scores.items():
        low, high = _texts(spec)
        name = "CLIP's score"
        if not is_clip:
            values, told = read_out(vectors, values)
            name = f"CLIP's score, {_share(told)} of it told by this space"
        axes.append(_by_hand(spec, name, low, high, values))
    for key, target in records.truths.items():
        values, told = read_out(vectors, target)
        name = f"{key}, {_share(told)} of it told by this space"
        axes.append(_by_hand(key, name, TRUTHS[key].low, TRUTHS[key].high, values))
    components, shares = principal(vectors, 2)
    for i, share in enumerate(shares, 1):
        name = f"principal component {i}, {share:.0%} of the variance"
        axes.append(_learned(f"pc{i}", name, components[:, i - 1], records.captions))
    for i, values in enumerate(neighbour_map(vectors).T, 1):
        axes.append(_learned(f"near{i}", "what is alike lies close", values, records.captions))
    return axes


def _share(told: float) -> str:
    return f"{max(told, 0):.0%}"


def _by_hand(key: str, name: str, low: str, high: str, values: np.ndarray) -> Axis:
    return Axis(key=key, name=name, low=low, high=high, values=values, group="by hand")


def _learned(key: str, name: str, values: np.ndarray, captions: list[str]) -> Axis:
    low, high = end_words(values, captions)
    return Axis(key=key, name=name, low=low, high=high, values=values, group="learned")


def explore_command(arguments: list[str]) -> None:
    """Run `jaxdiff explore RECIPE_OR_MODEL [--x LOW:HIGH] [--y LOW:HIGH] ...`."""
    explore_data(parse(ExploreOptions, arguments, prog="jaxdiff explore"))
