"""`jaxdiff evaluate` without a model: images of any generator, references, comparison, and test."""

import dataclasses
from typing import TYPE_CHECKING

from etils import epath

from jaxdiff.config.fields import flag
from jaxdiff.config.recipe_files import find_recipe
from jaxdiff.distributed.multihost import held_on_host0, is_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.evaluation.extraction import remove_parts
from jaxdiff.evaluation.feature_distance import check_measures, measure
from jaxdiff.evaluation.features import AnyFeatures, ClipFeatures, features_of
from jaxdiff.evaluation.image_sets import DataImages, ImageArray, ImageFiles, ImageSet
from jaxdiff.evaluation.provenance import compare_figures, figures_json
from jaxdiff.evaluation.reference import Reference, open_reference, set_statistics
from jaxdiff.evaluation.self_test import self_test
from jaxdiff.evaluation.statistics import read_npz, write_statistics
from jaxdiff.io.files import make_folder, write_whole
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import write_line, write_text
from jaxdiff.io.text import format_json
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.run import on_host0

if TYPE_CHECKING:
    from jaxdiff.cli.evaluate import EvaluateOptions

FIGURES, PARTS = "evaluation.json", "evaluation_parts"

_OF_MODELS = (
    "recipe",
    "samples",
    "batch_size",
    "guidance_scale",
    "best_of",
    "clip_scale",
    "clip_model",
    "sweep",
    "scalar",
)
_OF_IMAGES = ("images", "reference", "features", "resize", "measures", "few", "out")


def chosen_features(options: "EvaluateOptions") -> AnyFeatures:
    """Return the feature network that --features and --resize name."""
    return features_of(options.features or ClipFeatures.model, options.resize)


def compare_command(files: list[str]) -> None:
    """Run `jaxdiff evaluate compare A.json B.json`."""
    if len(files) != 2 or any(file.startswith("-") for file in files):
        raise UserError("jaxdiff evaluate compare takes two files: give A.json and B.json.")
    write_text(compare_figures(*files))


def has_model(options: "EvaluateOptions") -> bool:
    """Whether options name a model to evaluate, rather than images, a reference or the self-test.

    Raises:
      UserError: they exclude each other, or ask for nothing.
    """
    if options.run is not None:
        for name in ("images", "self_test"):
            if getattr(options, name):
                raise UserError(
                    f"{flag(name)} and a model exclude each other: leave one of them out."
                )
        return True
    unused = _OF_MODELS + (_OF_IMAGES if options.self_test else ())
    for field in dataclasses.fields(options):
        if field.name in unused and getattr(options, field.name) != field.default:
            what = "with --self-test" if options.self_test else "without a model"
            raise UserError(f"{flag(field.name)} has no effect {what}: leave it out.")
    if options.self_test:
        return False
    if options.images is not None:
        if options.reference is None:
            raise UserError("--images needs --reference: give the images to compare with.")
        return False
    if options.reference is None:
        raise UserError("jaxdiff evaluate needs a model: give its folder, or --images.")
    if options.out is None or not options.out.endswith(".safetensors"):
        raise UserError(
            "--reference alone writes statistics and needs --out: give the name of a file that "
            "ends in .safetensors, or a model or --images to compare."
        )
    return False


def score_images(options: "EvaluateOptions") -> None:
    """Test the metrics, score images, or write the statistics of a reference.

    Raises:
      UserError: the metrics differ, or the images or the network cannot be read.
    """
    if options.self_test:
        self_test(on_host0(write_line))
    elif options.images is None:
        _write_reference(options)
    elif options.out is None:
        _score(options, None)
    else:
        with held_on_host0(output_folder(options.out)):
            _score(options, epath.Path(options.out))


def _score(options: "EvaluateOptions", folder: epath.Path | None) -> None:
    """Score a set of images, and save the figures in a folder, if there is one."""
    assert options.images is not None
    assert options.reference is not None
    features = chosen_features(options)
    reference, images = _reference(options.reference), _images(options.images)
    network = features.load()
    parts = None if folder is None else folder / PARTS
    reference.check(network)
    check_measures(network, len(images), reference, options.measures, few=options.few)
    theirs = reference.statistics(network, parts)
    ours = set_statistics(network, images, parts)
    report = measure(network, ours, theirs, options.measures, few=options.few)
    if not is_host0():
        return
    write_text(report.text)
    if folder is not None:
        _save_figures(folder, report, options.images)


def _save_figures(folder: epath.Path, report: Report, images: str) -> None:
    """Write `evaluation.json` of images, and remove the features in progress."""
    content = figures_json(report, {"images": images})
    write_whole(folder / FIGURES, (format_json(content, indent=2) + "\n").encode())
    remove_parts(folder / PARTS)
    write_line(f"Saved {folder / FIGURES}")


def _write_reference(options: "EvaluateOptions") -> None:
    """Compute the statistics of a reference and write them."""
    assert options.reference is not None
    assert options.out is not None
    path = epath.Path(options.out)
    reference = _reference(options.reference)
    if not reference.has_features:
        raise UserError(
            f"{options.reference} holds mean and covariance alone, which are read as they are: "
            "expected images; give a folder of them."
        )
    network = chosen_features(options).load()
    parts = make_folder(path.parent) / f".{path.stem}_{PARTS}"
    found = reference.statistics(network, parts)
    if not is_host0():
        return
    write_statistics(path, found)
    remove_parts(parts)
    write_line(f"Saved {path}: statistics of {found.count} images of {found.data}")


def _reference(name: str) -> Reference:
    """Open the reference in a file or a folder, or the data of a recipe."""
    if epath.Path(name).exists() and not name.endswith(".py"):
        return open_reference(name)
    try:
        find_recipe(name)
    except UserError as error:
        raise UserError(
            f"--reference {name} does not exist and is no recipe: expected a folder of images, an "
            ".npz file, statistics that jaxdiff evaluate wrote, or a recipe; give its path or name."
        ) from error
    return Reference(name=name, images=DataImages(load_recipe(name).data))


def _images(path: str) -> ImageSet:
    if not path.lower().endswith(".npz"):
        return ImageFiles(path)
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise UserError(f"{path} holds statistics: expected images as arr_0; give a folder.")
    return ImageArray(arrays["arr_0"], path)
