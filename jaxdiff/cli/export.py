"""`jaxdiff export`: write a trained model as one folder."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from etils import epath

from jaxdiff.cli.parsing import parse_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.serialization import to_json
from jaxdiff.errors import UserError
from jaxdiff.io.files import make_folder, write_whole
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import write_line
from jaxdiff.io.text import check_text, read_json
from jaxdiff.pipelines.lora import adapters_of, detach, merge
from jaxdiff.pretrained.adapted_folder import base_of
from jaxdiff.pretrained.bundle import CONFIG, Bundle, write_bundle, write_json
from jaxdiff.pretrained.diffusers_folder import is_diffusers_folder, write_diffusers
from jaxdiff.pretrained.embeddings import write_embedding
from jaxdiff.pretrained.load import base_folder, load_bundle, model_folder
from jaxdiff.pretrained.lora import write_lora
from jaxdiff.pretrained.model_card import (
    EVALUATION,
    HISTORY,
    CardInputs,
    bundle_card,
    check_destination,
    folder_card,
    model_card,
    read_figures,
    read_history,
    remove_export,
    write_card,
)
from jaxdiff.pretrained.pipeline_folder import INDEX
from jaxdiff.pretrained.run_folder import read_word
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask
from jaxdiff.training.workdir import find_recipe_of

FORMATS = ("jaxdiff", "adapters", "diffusers", "lora", "embedding")
DTYPES = ("bfloat16", "float16", "float32")


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained model as one small folder that `jaxdiff.load` and `--model` read."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of a model; with --base, the file of a FLUX or Z-Image transformer."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; with --format lora or embedding also a new file, NAME.safetensors."""
    format: str = "jaxdiff"
    """jaxdiff; adapters: the adapters alone, for jaxdiff, with the name of the model that the run
    started from; diffusers: a folder for DiffusionPipeline.from_pretrained, with adapters and added
    tokens merged into the weights; lora: the adapters alone, for
    load_lora_weights; embedding: the added token alone, for load_textual_inversion."""
    base: str | None = None
    """Folder or hub id of the model that such a file was made from, for all other parts."""
    dtype: str | None = None
    """Type of the weights: bfloat16, float16 or float32. By default bfloat16, and with --format
    diffusers the type that they have."""


def export_command(arguments: list[str]) -> None:
    """Run `jaxdiff export RUN_OR_MODEL OUT [--format FORMAT] [--dtype TYPE]`."""
    options = parse_flags(ExportOptions, arguments, prog="jaxdiff export")
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {options.dtype}: expected bfloat16, float16 or float32.")
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format}: expected {', '.join(FORMATS)}.")
    check_text(options.out, "The output folder")
    _check_out(options)
    export_model(options)
    write_line(f"Wrote {options.out}")


def _check_out(options: ExportOptions) -> None:
    """Raise `UserError` where the export would replace other files, or be no file."""
    out = epath.Path(options.out)
    if not _is_file(options):
        check_destination(out)
    elif options.format not in ("lora", "embedding"):
        raise UserError(
            f"{out} is the name of a file, but --format {options.format} writes a folder: expected "
            "a name without .safetensors; give one."
        )
    elif out.exists():
        raise UserError(f"{out} exists: expected a new file; name another, or remove that one.")


def _is_file(options: ExportOptions) -> bool:
    return epath.Path(options.out).suffix == ".safetensors"


def export_model(options: ExportOptions) -> None:
    """Write the folder, or the file.

    Raises:
      UserError: there is no such model, or the format cannot represent it.
    """
    if options.format == "embedding":
        _export_embedding(options)
        return
    bundle = load_bundle(options.run, base=options.base)
    config = find_recipe_of(options.run)
    if options.format in ("adapters", "lora"):
        _check_adapters(options, bundle, config)
    with _output(options):
        _export(options, bundle, config)


@contextlib.contextmanager
def _output(options: ExportOptions) -> Iterator[None]:
    """Create the folder, and hold its lock, or create that of the file."""
    if _is_file(options):
        make_folder(epath.Path(options.out).parent)
        yield
    else:
        with output_folder(options.out):
            yield


def _other_parts(config: Config | None, held: str) -> list[str]:
    """Name what a run trained beside what a format holds, adapters or added tokens."""
    task = config and config.task
    if not isinstance(task, DiffusionTask):
        return []
    trainable = task.trainable
    has_adapters = trainable.lora is not None or trainable.text_lora is not None
    trained = {"adapters": has_adapters, "added tokens": trainable.inversion is not None}
    trained |= {".".join(p.path): trainable.includes(p.path) for p in task.model.parts}
    return [name for name, is_trained in trained.items() if is_trained and name != held]


def _say_what_is_left_out(options: ExportOptions, config: Config | None, held: str) -> None:
    if others := _other_parts(config, held):
        write_line(
            f"jaxdiff: {options.run} has also trained {', '.join(others)}, which --format "
            f"{options.format} leaves out: export those too, or all weights with --format jaxdiff.",
            stderr=True,
        )


def _export(options: ExportOptions, bundle: Bundle, config: Config | None) -> None:
    recipe = None if config is None else to_json(config)
    history = read_history(model_folder(options.run))
    if options.format in ("jaxdiff", "adapters"):
        _export_bundle(options, bundle, recipe, history)
        return
    if options.dtype:
        bundle = bundle._replace(params=jax.tree.map(_cast_to(options.dtype), bundle.params))
    if options.format == "diffusers":
        merged = merge(detach(bundle), adapters_of(bundle))
        write_diffusers(epath.Path(options.out), merged, original=_original(options, config))
        remove_export(options.out, keep=INDEX)
        write_card(options.out, bundle_card(merged, options.out, "diffusers", recipe, history))
    else:
        _say_what_is_left_out(options, config, "adapters")
        _export_lora(options, bundle, recipe, history)


def _cast_to(dtype: str) -> Callable[[Any], Any]:
    """Return a function that casts floats; a counter would overflow in float16."""
    return lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _original(options: ExportOptions, config: Config | None) -> epath.Path | None:
    """Return the folder of diffusers that a model's text encoders come from, if there is one."""
    pretrained = getattr(config and config.task, "pretrained", None)
    if options.base is not None:
        return base_folder(options.run, options.base)
    source = getattr(pretrained, "text_encoders", None) if config else options.run
    if source is None:
        return None
    folder = model_folder(source)
    return folder if is_diffusers_folder(folder) else None


def _export_bundle(
    options: ExportOptions, bundle: Bundle, recipe: dict[str, Any] | None, history: str
) -> None:
    folder, base = epath.Path(options.out), None
    figures = _figures(options, bundle)
    if options.format == "adapters":
        bundle = bundle._replace(params={"adapters": bundle.params["adapters"]}, tokenizers={})
        base = base_of(recipe, options.run)
    remove_export(folder)
    write_bundle(folder, bundle, options.dtype or "bfloat16", recipe, base=base)
    if history:
        write_whole(folder / HISTORY, f"{history}\n".encode())
    if figures is not None:
        write_json(folder / EVALUATION, figures)
    write_card(folder, folder_card(folder))


def _figures(options: ExportOptions, bundle: Bundle) -> Mapping[str, Any] | None:
    """Return the figures beside a model; those of other weights are named and left out."""
    folder = model_folder(options.run)
    figures = read_figures(folder, bundle.params)
    if figures is None and (folder / EVALUATION).exists():
        write_line(
            f"jaxdiff: {folder / EVALUATION} has figures of other weights, which the model card "
            f"leaves out: expected those of the exported ones; run jaxdiff evaluate {options.run}, "
            "and export again.",
            stderr=True,
        )
    return figures


def _export_embedding(options: ExportOptions) -> None:
    folder = model_folder(options.run)
    word = read_word(folder)
    if word is None:
        raise UserError(
            f"{options.run} has no added token: expected a run of a recipe with "
            "task.trainable.inversion, such as configs/sd15_inversion.py."
        )
    card = CardInputs(
        name=word.word, folder=options.out, kind="embedding", recipe=read_json(folder / CONFIG)
    )
    if options.dtype:
        word = word._replace(rows={k: x.astype(options.dtype) for k, x in word.rows.items()})
    _say_what_is_left_out(options, find_recipe_of(options.run), "added tokens")
    with _output(options):
        write_embedding(options.out, word)
        if not _is_file(options):
            remove_export(options.out)
            write_card(options.out, model_card(card))


def _export_lora(
    options: ExportOptions, bundle: Bundle, recipe: dict[str, Any] | None, history: str
) -> None:
    write_lora(options.out, adapters_of(bundle), bundle.spec)
    if not _is_file(options):
        remove_export(options.out)
        write_card(options.out, bundle_card(bundle, options.out, "lora", recipe, history))


def _check_adapters(options: ExportOptions, bundle: Bundle, config: Config | None) -> None:
    """Raise `UserError` for a model without adapters, or a folder of adapters that lacks more."""
    if not adapters_of(bundle):
        raise UserError(
            f"{options.run} has no adapters: expected a run of a recipe with task.trainable.lora, "
            "such as configs/sd15_lora.py."
        )
    others = _other_parts(config, "adapters")
    if others and options.format == "adapters":
        raise UserError(
            f"{options.run} has also trained {', '.join(others)}, which --format adapters leaves "
            "out: expected a run of adapters alone; export it with --format jaxdiff, which writes "
            "all weights."
        )
