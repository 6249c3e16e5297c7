"""`jaxdiff evaluate`: run the evaluators of a recipe on a trained model."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro
from etils import epath

from jaxdiff.cli.evaluate_sweep import parse_sweep, run_sweep
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.cli.score_images import (
    FIGURES,
    PARTS,
    chosen_features,
    compare_command,
    has_model,
    score_images,
)
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, NotNegative, Range
from jaxdiff.config.serialization import to_json
from jaxdiff.distributed.distributed_init import Hosts, join_hosts
from jaxdiff.distributed.multihost import held_on_host0, is_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Generation,
    Report,
    check_evaluators,
    with_samples,
)
from jaxdiff.evaluation.extraction import remove_parts
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.features import Measure, clip_score_network
from jaxdiff.evaluation.provenance import figures_json
from jaxdiff.io.files import make_folder, write_whole
from jaxdiff.io.lock import lock_folder, output_folder
from jaxdiff.io.terminal import write_line, write_text
from jaxdiff.io.text import format_json
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import AnySpec, Bundle, exported_fingerprint
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.training.held_out import bundle_metrics
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.run import on_host0, run_evaluators
from jaxdiff.training.workdir import read_config

SAMPLES = 500
"""Images for a distance of features that flags ask for."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate a trained model or images; print the figures and save them in its folder.

    `jaxdiff evaluate compare A.json B.json` compares the figures of two evaluations.
    """

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of a run or of an exported model, or `shipped:NAME`."""
    out: str | None = None
    """Folder of `evaluation.json`, by default the model's; for --reference alone, the file of its
    statistics, ending in .safetensors."""
    images: str | None = None
    """Images of any generator, in the place of a model: a folder, or .npz with arr_0."""
    reference: str | None = None
    """Images to compare with: a folder, .npz of ADM or pytorch-fid, statistics that jaxdiff wrote,
    or for --images a recipe. Alone it writes its statistics to --out."""
    features: str | None = None
    """Network of the compared features: weights of the FID Inception as safetensors, or a DINOv2
    or CLIP (folder, `shipped:NAME` or OWNER/NAME); `shipped:produce_clip` by default."""
    resize: Literal["tensorflow", "pytorch"] | None = None
    """Resizing before the FID Inception: as torch-fidelity and ADM (tensorflow, the default), or as
    pytorch-fid."""
    measures: tuple[Measure, ...] = ()
    """Distances of the features; by default those for which the network is known."""
    few: bool = False
    """Report a Frechet distance of few images, which is biased."""
    self_test: bool = False
    """Check the installed metrics against stored values."""
    recipe: str | None = None
    """Recipe whose evaluators and data are used; by default the one that trained the model."""
    samples: Annotated[int | None, Range(2)] = None
    """Prompts of each evaluator that counts samples; by default those of the recipe, and 500 for
    the distance of features that --reference and its like ask for."""
    batch_size: Count | None = None
    """Images generated at a time; chosen for the device by default."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale; 1 is unguided; the model's own by default."""
    best_of: Count = 1
    """Images generated for each prompt; the one that CLIP ranks closest to it is scored."""
    clip_scale: NotNegative = 0.0
    """Strength of CLIP guidance; 0 is without."""
    clip_model: str | None = None
    """CLIP for --best-of and --clip-scale: a folder (a run, exported, or of transformers),
    `shipped:NAME` or OWNER/NAME; `shipped:produce_clip` by default."""
    sweep: tuple[str, ...] = ()
    """Settings of sampling to compare, all combinations: guidance_scale=1:4:0.25 num_steps=8,12,20
    solver=ddim,heun. Writes a table, `evaluation_sweep.json` and a plot of quality over cost; the
    same command resumes."""
    scalar: str | None = None
    """Figure that --sweep shows, such as clip_score/score; the first one by default."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


def evaluate_command(arguments: list[str]) -> None:
    """Run `jaxdiff evaluate RUN [--samples N] ...`."""
    if arguments[:1] == ["compare"]:
        compare_command(arguments[1:])
        return
    options = parse_flags(EvaluateOptions, arguments, prog="jaxdiff evaluate")
    _check(options)
    evaluate = evaluate_model if has_model(options) else score_images
    with join_hosts(options.hosts):
        evaluate(options)


def evaluate_model(options: EvaluateOptions) -> None:
    """Run the evaluators, print their tables, and write `evaluation.json`.

    The figures of a model without a folder here, shipped or of the hub, are only printed, and so
    are those of a model whose folder cannot be written to.

    Raises:
      UserError: there is no model, no recipe, or nothing to evaluate.
    """
    assert options.run is not None
    config = load_recipe(options.recipe) if options.recipe else read_config(options.run)
    if options.sweep and _folder(options) is None:
        raise UserError(
            f"--sweep writes files and {options.run} is no folder here: expected --out; name it."
        )
    with held_on_host0(_held(options)):
        _evaluate(options, config)


@contextlib.contextmanager
def _held(options: EvaluateOptions) -> Iterator[None]:
    """Hold the lock of the folder that the figures go to."""
    assert options.run is not None
    with contextlib.ExitStack() as stack:
        if options.out is not None:
            stack.enter_context(output_folder(options.out))
        elif _folder(options) is not None:
            try:
                make_folder(options.run)
            except UserError:  # saving says why
                pass
            else:
                stack.enter_context(lock_folder(options.run))
        yield


def _folder(options: EvaluateOptions) -> epath.Path | None:
    """Return the folder that the figures go to; None for a model without one here.

    A folder made for a model of the hub would hide it from then on.
    """
    if options.out is not None:
        return epath.Path(options.out)
    run = epath.Path(str(options.run))
    return run if run.is_dir() else None


def _evaluate(options: EvaluateOptions, config: Config) -> None:
    assert options.run is not None
    points = parse_sweep(options.sweep)
    evaluators = _evaluators(config, options)
    spec, params, tokenizers = load_bundle(options.run)
    check_evaluators(evaluators, spec, config.data)
    generation = _generation(options)
    folder = _folder(options)
    parts = None if folder is None else folder / PARTS
    bundle = Bundle(spec, params, tokenizers)
    loss = functools.partial(bundle_metrics, config, bundle, batch_size=options.batch_size)
    context = EvalContext(0, *bundle, config.data, generation, loss=loss, parts=parts)
    settings = _settings(options, spec, generation)
    if options.sweep:
        assert folder is not None
        run_sweep(points, evaluators, context, settings, folder=folder, scalar=options.scalar)
        if is_host0():
            remove_parts(folder / PARTS)
        return
    report = run_evaluators(evaluators, context, None, on_host0(write_text))
    if not is_host0():
        return
    images = _images(report)
    if images:
        counts = ", ".join(f"{count} of {name}" for name, count in images.items())
        settings = {"images": counts, **settings}
    write_line("; ".join(f"{name} {value}" for name, value in settings.items()))
    if folder is None or parts is None:
        return
    path = folder / FIGURES
    seeds = f"0 to {max(images.values()) * options.best_of - 1}" if images else None
    sampler = to_json(getattr(spec, "sampler", None))
    weights = exported_fingerprint(params)
    about = {"seeds": seeds, "sampler": sampler, "model": options.run, "weights": weights}
    content = figures_json(report, settings, **about)
    try:
        write_whole(path, (format_json(content, indent=2) + "\n").encode())
        remove_parts(parts)
    except UserError as error:  # the figures are printed
        write_line(f"jaxdiff: The figures are printed but not saved: {error}", stderr=True)
    else:
        write_line(f"Saved {path}")


def _evaluators(config: Config, options: EvaluateOptions) -> tuple[Evaluator, ...]:
    """Return the evaluators that report figures, with the number of samples asked for.

    With options of features it is the distance of features alone.
    """
    asked = (options.features, options.reference, options.resize, options.measures, options.few)
    if any(asked):
        distance = FeatureDistance(
            network=chosen_features(options),
            reference=options.reference,
            samples=options.samples or SAMPLES,
            measures=options.measures,
            few=options.few,
        )
        return (distance,)
    found = [e for e in config.evaluators if e.has_figures]
    if not found:
        raise UserError(
            f"{config.name} has no evaluators with figures: name a recipe that has some in "
            "--recipe, such as one with evaluators=(ClipScore(),)."
        )
    return tuple(with_samples(e, options.samples) for e in found)


def _images(report: Report) -> dict[str, int]:
    """Return the number of generated images by evaluator, for those that count images."""
    return {
        name.split("/")[0]: about["images"]
        for name, about in report.provenance.items()
        if "images" in about
    }


def _settings(options: EvaluateOptions, spec: AnySpec, generation: Generation) -> dict[str, Any]:
    """Return how the images were generated, to be printed and saved with the figures."""
    settings: dict[str, Any] = {}
    if isinstance(spec, TextToImage):
        scale = options.guidance_scale
        default = spec.sampler.resolve().guidance_scale
        settings["guidance_scale"] = default if scale is None else scale
    settings["best_of"] = options.best_of
    if clip := generation.used_clip:
        settings |= {
            "clip_scale": options.clip_scale,
            "clip_model": clip,
            "clip_weights": clip_score_network(clip).provenance["weights"],
        }
    return settings


def _generation(options: EvaluateOptions) -> Generation:
    model = options.clip_model or ClipGuidance.model
    arguments: dict[str, Any] = {
        "batch_size": options.batch_size,
        "guidance_scale": options.guidance_scale,
    }
    if options.clip_scale:
        clip = ClipGuidance(scale=options.clip_scale, model=model)
        arguments["guidance"] = Guidance(clip=clip)
    return Generation(best_of=options.best_of, clip_model=model, arguments=arguments)


def _check(options: EvaluateOptions) -> None:
    if options.scalar is not None and not options.sweep:
        raise UserError("--scalar has no effect alone: give --sweep as well.")
    if options.clip_scale and options.best_of > 1:
        raise UserError("--clip-scale and --best-of exclude each other: leave one of them out.")
    with_clip = options.clip_scale != 0 or options.best_of > 1
    if options.clip_model is not None and not with_clip:
        raise UserError("--clip-model has no effect alone: give --clip-scale or --best-of as well.")
