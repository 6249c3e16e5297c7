"""`jaxdiff explore`: embedding maps of a data set, as figures and as a web page."""

import dataclasses
from typing import Annotated

import numpy as np
import tyro

from jaxdiff.cli.parsing import parse_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Range, Seed
from jaxdiff.config.recipe_files import names_recipe
from jaxdiff.errors import UserError
from jaxdiff.explore.axes import (
    ATTRIBUTES,
    Axis,
    distinctive_words,
    linear_probe,
    principal_components,
    text_scores,
)
from jaxdiff.explore.figure import Panel, render_figure
from jaxdiff.explore.page import Space, nearest_neighbours, render_page
from jaxdiff.explore.spaces import (
    ClipReader,
    Records,
    has_autoencoder,
    is_clip,
    read_autoencoder,
    read_clip,
    read_records,
)
from jaxdiff.explore.tsne import check_tsne, tsne
from jaxdiff.io import images as pictures
from jaxdiff.io.files import write_whole
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import write_line
from jaxdiff.io.text import check_text
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.workdir import read_config

MAX_SAMPLES = 4000  # all pairs of images are compared: seconds to minutes at this size
NEIGHBOURS = 12
LEARNED = ("pc1", "pc2", "tsne1", "tsne2")


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """Map the images of a data set in the spaces of CLIP and of an autoencoder."""

    data: Annotated[str, tyro.conf.Positional]
    """A recipe, the folder of a run or model, or shipped:NAME: the data to map."""
    samples: Annotated[int, Range(10, MAX_SAMPLES)] = 400
    """Number of records, sampled at random."""
    seed: Seed = 0
    """Seed of that sample."""
    out: str = "explore"
    """Folder to write."""
    x: str = "small:large"
    """Horizontal axis: LOW:HIGH, two texts that CLIP compares with each image; a learned axis, pc1,
    pc2, tsne1 or tsne2; or size, hue or stem, attributes of synthetic produce."""
    y: str = "green:red"
    """Vertical axis, likewise."""
    axes: tuple[str, ...] = ("without a stem:with a stem",)
    """More axes LOW:HIGH that the page offers."""
    clip: str | None = None
    """Folder of a CLIP run or model; by default the model given as data if it is a CLIP, otherwise
    shipped:produce_clip."""
    autoencoder: str | None = None
    """Folder of a run or model that is or contains an autoencoder; by default that of the recipe or
    model given as data, otherwise shipped:produce."""


def explore_data(options: ExploreOptions) -> None:
    """Write `OUT/clip.png`, `OUT/autoencoder.png` and `OUT/index.html`, and print their paths.

    Raises:
      UserError: no such recipe, model or axis; too few records, or too many; scikit-learn is not
        installed.
    """
    check_tsne()
    is_recipe = names_recipe(options.data)
    config = load_recipe(options.data) if is_recipe else read_config(options.data)
    specs = list(dict.fromkeys([options.x, options.y, *options.axes]))
    texts = {spec: _split(spec) for spec in specs if spec not in {*ATTRIBUTES, *LEARNED}}
    own = None if is_recipe else options.data
    clip = read_clip(options.clip or (is_clip(config) and own) or "shipped:produce_clip")
    encode = read_autoencoder(
        config, options.autoencoder or (has_autoencoder(config) and own) or None
    )
    with output_folder(options.out) as folder:
        records = read_records(config, options.samples, options.seed)
        unknown = [spec for spec in specs if spec in ATTRIBUTES and spec not in records.truths]
        if unknown:
            raise UserError(
                f"The axis {unknown[0]} is known only for synthetic produce, not for the data of "
                f"{config.name}: give two texts instead, such as --x small:large."
            )
        embeddings, latents = clip.images(records.images), encode(records.images)
        scores = _scores(clip, embeddings, texts)
        views = {
            "chosen axes": (options.x, options.y),
            "principal components": ("pc1", "pc2"),
            "t-SNE": ("tsne1", "tsne2"),
        }
        title = f"{len(records.images)} images of {config.name}"
        spaces = [
            Space(
                name,
                _axes(vectors, records, scores, is_clip=vectors is embeddings),
                views,
                nearest_neighbours(vectors, NEIGHBOURS),
            )
            for name, vectors in (("CLIP", embeddings), ("the autoencoder", latents))
        ]
        for space, file in zip(spaces, ("clip.png", "autoencoder.png"), strict=True):
            axes = {axis.key: axis for axis in space.axes}
            panels = [
                Panel(view, *(axes[key] for key in views[view]))
                for view in ("chosen axes", "t-SNE")
            ]
            figure = render_figure(records.images, f"{title} in the space of {space.name}", panels)
            pictures.save_png(folder / file, figure)
            write_line(folder / file)
        page = render_page(title, records.images, records.captions, spaces)
        write_whole(folder / "index.html", page.encode())
        write_line(folder / "index.html")


def _split(spec: str) -> tuple[str, str]:
    """Split an axis LOW:HIGH into its two texts.

    Raises:
      UserError: it is neither of that form nor the name of another axis.
    """
    check_text(spec, "The axis")
    low, colon, high = (part.strip() for part in spec.partition(":"))
    if not (colon and low and high) or low == high:
        raise UserError(
            f"There is no axis {spec!r}: give two texts, such as small:large, or one of "
            f"{', '.join([*ATTRIBUTES, *LEARNED])}."
        )
    return low, high


def _scores(
    clip: ClipReader, images: np.ndarray, texts: dict[str, tuple[str, str]]
) -> dict[str, np.ndarray]:
    """Return CLIP's score of each image between the two texts of each axis."""
    return {
        spec: text_scores(images, *clip.texts([low, high])) for spec, (low, high) in texts.items()
    }


def _axes(
    vectors: np.ndarray, records: Records, scores: dict[str, np.ndarray], *, is_clip: bool
) -> list[Axis]:
    """Return all axes of one space; names of probed axes state the probe's R^2."""
    axes = []
    for spec, values in scores.items():
        low, high = _split(spec)
        name = "CLIP score"
        if not is_clip:
            values, r_squared = linear_probe(vectors, values)
            name = _probed(name, r_squared)
        axes.append(_chosen(spec, name, low, high, values))
    for key, target in records.truths.items():
        values, r_squared = linear_probe(vectors, target)
        low, high = ATTRIBUTES[key].low, ATTRIBUTES[key].high
        axes.append(_chosen(key, _probed(key, r_squared), low, high, values))
    components, fractions = principal_components(vectors, 2)
    for i, fraction in enumerate(fractions, 1):
        name = f"principal component {i}, {fraction:.0%} of the variance"
        axes.append(_learned(f"pc{i}", name, components[:, i - 1], records.captions))
    for i, values in enumerate(tsne(vectors).T, 1):
        axes.append(_learned(f"tsne{i}", f"t-SNE {i}", values, records.captions))
    return axes


def _probed(name: str, r_squared: float) -> str:
    return f"{name}, linear probe explains {max(r_squared, 0):.0%}"


def _chosen(key: str, name: str, low: str, high: str, values: np.ndarray) -> Axis:
    return Axis(key=key, name=name, low=low, high=high, values=values, group="chosen")


def _learned(key: str, name: str, values: np.ndarray, captions: list[str]) -> Axis:
    low, high = distinctive_words(values, captions)
    return Axis(key=key, name=name, low=low, high=high, values=values, group="learned")


def explore_command(arguments: list[str]) -> None:
    """Run `jaxdiff explore RECIPE_OR_MODEL [--x LOW:HIGH] [--y LOW:HIGH] ...`."""
    explore_data(parse_flags(ExploreOptions, arguments, prog="jaxdiff explore"))
