"""`jaxdiff export`: write a trained model as one folder."""

import dataclasses
import functools
from typing import Annotated

import jax
import tyro

from jaxdiff.cli.parsing import parse
from jaxdiff.errors import UserError
from jaxdiff.pipelines import lora as adapters
from jaxdiff.pipelines import textual_inversion
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.diffusers import write_diffusers
from jaxdiff.pretrained.embeddings import write_embedding
from jaxdiff.pretrained.load import make_folder, read_bundle, write_bundle
from jaxdiff.pretrained.lora import write_lora
from jaxdiff.training.tasks.diffusion import DiffusionTask

FORMATS = ("jaxdiff", "diffusers", "lora", "embedding")
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained model as one small folder that `jaxdiff.load` and `--model` read."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of a model."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    format: str = "jaxdiff"
    """jaxdiff; diffusers: a folder for StableDiffusionPipeline.from_pretrained or its XL variant,
    with adapters and added tokens merged into the weights; lora: the adapters alone, for
    load_lora_weights; embedding: the added token alone, for load_textual_inversion."""
    dtype: str | None = None
    """Type of the weights: bfloat16, float16 or float32. By default bfloat16, and with --format
    diffusers the type that they have."""


def export_command(arguments: list[str]) -> None:
    """Run `jaxdiff export RUN_OR_MODEL OUT [--format FORMAT] [--dtype TYPE]`."""
    options = parse(ExportOptions, arguments, prog="jaxdiff export")
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {options.dtype}: expected bfloat16, float16 or float32.")
    if options.format not in FORMATS:
        raise UserError(
            f"--format {options.format}: expected jaxdiff, diffusers, lora or embedding."
        )
    bundle = read_bundle(options.run)
    if options.format == "jaxdiff":
        write_bundle(make_folder(options.out), bundle, options.dtype or "bfloat16")
    elif options.format == "embedding":
        _export_embedding(options, bundle)
    else:
        _export_stable_diffusion(options, bundle)
    print(f"Wrote {options.out}")


def _export_embedding(options: ExportOptions, bundle: Bundle) -> None:
    word = textual_inversion.word_of(bundle)
    if word is None:
        raise UserError(
            f"{options.run} has no added token: expected a run of a recipe with task.inversion, "
            "such as configs/sd15_inversion.py."
        )
    write_embedding(make_folder(options.out), word)


def _export_stable_diffusion(options: ExportOptions, bundle: Bundle) -> None:
    """Write the whole model for diffusers, or its adapters alone."""
    if options.dtype:
        cast = functools.partial(jax.tree.map, lambda x: x.astype(options.dtype))
        bundle = bundle._replace(params=cast(bundle.params), frozen=cast(bundle.frozen))
    bundle = textual_inversion.settled(bundle)
    found = adapters.adapters_of(bundle)
    if options.format == "diffusers":
        merged = adapters.merge(adapters.detach(bundle), found) if found else bundle
        write_diffusers(make_folder(options.out), merged)
        return
    if not found:
        raise UserError(
            f"{options.run} has no adapters: expected a run of a recipe with task.lora, such as "
            "configs/sd15_lora.py."
        )
    assert isinstance(bundle.config.task, DiffusionTask)  # no other has adapters
    write_lora(make_folder(options.out), found, bundle.config.task)
