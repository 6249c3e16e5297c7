"""The options of `jaxdiff sample`, and the model that they name."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from etils import epath

from jaxdiff.cli.progress import show_progress
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Doc, Field, Range, fields_of, flag
from jaxdiff.data.nearest_words import with_nearest
from jaxdiff.distributed.distributed_init import Hosts
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import FieldError, UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.image_files import Format
from jaxdiff.models.layers import ComputeType
from jaxdiff.models.quantized import QuantizedType
from jaxdiff.pipelines import textual_inversion
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.compiled import CompiledFolder
from jaxdiff.pipelines.inputs import check_prompt
from jaxdiff.pipelines.load import DEFAULT_MODEL, load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.program_cache import program_cache
from jaxdiff.pipelines.rerank import DEFAULT_CLIP
from jaxdiff.pipelines.resolve import FILES, CommandDefaults
from jaxdiff.pipelines.settings import EDITING, GUIDANCE, PROMPTS, SAMPLING, GenerationSettings

LARGEST_PREVIEW = 16  # images

MODEL, HOSTS = "Model", "Hosts"
GROUPS = (PROMPTS, SAMPLING, GUIDANCE, EDITING, MODEL, HOSTS)
"""Headings of the long help, in order."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of the command; `settings` come from the flags of `GenerationSettings`."""

    prompt: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        Doc("What to generate, each prompt in quotes.", PROMPTS),
    ] = ()
    prompts: Annotated[
        str | None,
        Doc(
            "Prompt file: .jsonl, .csv, or .txt with a prompt a line. A row may set every option "
            "of an image, spelled with underscores, and the name of its file, and inherits what it "
            "leaves out from the flags. Paths are relative to the folder of the file. Images and "
            "their settings are listed in OUT/manifest.jsonl, and the same command resumes. "
            "Invalid rows are reported and make the exit status 1.",
            PROMPTS,
            common=True,
            metavar="FILE",
        ),
    ] = None
    again: Annotated[
        str | None,
        Doc(
            "PNG or WebP of this command, to reproduce. --model must be the one that made it; the "
            "exit status is 1 if the pixels differ.",
            PROMPTS,
            common=True,
            metavar="FILE",
        ),
    ] = None
    out: Annotated[str, Doc("Folder for the images.", PROMPTS, True, "DIR")] = "samples"
    format: Annotated[
        Format, Doc("png, webp (lossless) or jpg; png by default.", PROMPTS, metavar="NAME")
    ] = "png"
    num_images: Annotated[int, Range(1), Doc("Images of each prompt.", PROMPTS, common=True)] = 1
    words: Annotated[bool, Doc("Print the words that the model knows, and exit.", MODEL)] = False
    interpolate: Annotated[
        int,
        Range(0),
        Doc("Generate this many images from the first prompt to the second.", EDITING),
    ] = 0
    grid: Annotated[
        bool, Doc("Write a grid of the images of --prompts too; others always have one.", PROMPTS)
    ] = False
    strip: Annotated[
        int, Range(0), Doc("Write a strip of this many estimates, from noise to image.", PROMPTS)
    ] = 0
    preview: Annotated[
        int,
        Range(0),
        Doc("Write images in progress to OUT/preview.png every so many steps.", PROMPTS),
    ] = 0
    preview_decoder: Annotated[
        str | None,
        Doc(
            "Tiny autoencoder that decodes previews: a folder or a hub id.", PROMPTS, False, "MODEL"
        ),
    ] = None
    model: Annotated[
        str,
        Doc(
            "Run, model folder, shipped:NAME or hub OWNER/NAME. A Stable Diffusion checkpoint may "
            "be a folder of diffusers or a single file.",
            MODEL,
            common=True,
            metavar="MODEL",
        ),
    ] = DEFAULT_MODEL
    base: Annotated[
        str | None,
        Doc(
            "Where --model is the file of a FLUX or Z-Image transformer: folder or hub id of the "
            "model that it was made from, for all other parts.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None
    autoencoder: Annotated[
        str | None,
        Doc(
            "Autoencoder instead of the model's own: a folder, a hub id, or a file of FLUX's.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        Doc("LoRA files, each as FILE or FILE:SCALE.", MODEL, common=True, metavar="FILE"),
    ] = ()
    embedding: Annotated[
        tuple[str, ...],
        Doc("Files of textual inversion, each with a word for prompts.", MODEL, metavar="FILE"),
    ] = ()
    dtype: Annotated[
        ComputeType | None,
        Doc(
            "Type to compute in: float32 or bfloat16. By default that of the weights, but float32 "
            "on a CPU.",
            MODEL,
            metavar="NAME",
        ),
    ] = None
    quantize: Annotated[
        QuantizedType | None,
        Doc(
            "Store kernels in 8 bits: int8 or fp8. Weights take half the memory of bfloat16, and "
            "images change a little.",
            MODEL,
            metavar="NAME",
        ),
    ] = None
    compiled: Annotated[
        str | None,
        Doc(
            "Folder of `jaxdiff compile`, whose programs need no tracing and no compilation.",
            MODEL,
            metavar="DIR",
        ),
    ] = None
    clip_model: Annotated[
        str | None,
        Doc(
            "CLIP of --clip-scale and --best-of: a folder (a run, exported, or of transformers), "
            f"shipped:NAME or hub OWNER/NAME. By default the model's own, or {DEFAULT_CLIP}.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None
    guide_model: Annotated[
        str | None,
        Doc(
            "Model of autoguidance: a worse one of the same kind, such as an earlier run.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None
    refiner_model: Annotated[
        str | None,
        Doc(
            "Model that takes over at --refiner-start, such as Stable Diffusion XL's refiner.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None
    quiet: Annotated[
        bool,
        Doc(
            "Print results and errors only. No progress, times or warnings.",
            PROMPTS,
            common=True,
            alias="-q",
        ),
    ] = False
    verbose: Annotated[
        bool,
        Doc(
            "Also log what JAX compiles. Without a terminal, the progress of --prompts is logged, "
            "too.",
            PROMPTS,
            common=True,
            alias="-v",
        ),
    ] = False
    mesh: Annotated[
        MeshConfig,
        Doc(
            "Devices along each axis, for a model that is too large for one of them: 8 along fsdp "
            "each hold an eighth of it.",
            MODEL,
        ),
    ] = dataclasses.field(default_factory=MeshConfig)
    offload_text: Annotated[
        bool,
        Doc(
            "Keep text encoders in the host's memory, and on the devices only to encode prompts.",
            MODEL,
        ),
    ] = False
    hosts: Annotated[
        Hosts, Doc("Processes that share the rows of --prompts; see docs/launch.md.", HOSTS)
    ] = dataclasses.field(default_factory=Hosts)
    settings: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    @property
    def command_defaults(self) -> CommandDefaults:
        """The models that rows cannot set."""
        names = ("clip_model", "guide_model", "refiner_model")
        return CommandDefaults(**{name: getattr(self, name) for name in names})


NOT_FLAGS = ("prompt", "name")  # positional, and for rows only


def setting_flags(settings: type = GenerationSettings) -> list[Field]:
    """Return the fields of `GenerationSettings`, or of a subclass, that are flags."""
    return [f for f in fields_of(settings).values() if f.name not in NOT_FLAGS]


def flags_class(settings: type = GenerationSettings) -> type:
    """Return a dataclass for tyro with all flags: those of the command, then of an image."""
    own: list[Any] = []
    hints = fields_of(SampleOptions)
    for f in dataclasses.fields(SampleOptions):
        if f.name in hints:
            doc = hints[f.name].doc
            aliases = (doc.alias,) if doc.alias else None
            kind = Annotated[f.type, tyro.conf.arg(help=doc.text, aliases=aliases)]  # type: ignore[valid-type]
            default = dataclasses.field(default=f.default, default_factory=f.default_factory)  # type: ignore[call-overload]
            own.append((f.name, kind, default))
    for f in setting_flags(settings):
        kind = f.flag_type if f.flag_type is bool else f.flag_type | None
        kind = Annotated[kind, tyro.conf.arg(help=f.doc.text)]
        own.append((f.name, kind, False if f.flag_type is bool else None))
    return dataclasses.make_dataclass(
        "SampleFlags",
        own,
        frozen=True,
        kw_only=True,
        namespace={"__doc__": "Generate images from prompts."},
    )


SampleFlags: Any = flags_class()


def from_flags(
    flags: Any, settings: type[GenerationSettings] = GenerationSettings
) -> SampleOptions:
    """Return the options that parsed flags state.

    Raises:
      UserError: a value out of range, or options that exclude each other.
    """
    own = fields_of(SampleOptions)
    values = {f.name: getattr(flags, f.name) for f in setting_flags(settings)}
    # A disabled switch counts as not given.
    values = {name: None if value is False else value for name, value in values.items()}
    read = settings.read(values, flag)
    try:
        options = SampleOptions(**{name: getattr(flags, name) for name in own}, settings=read)
    except FieldError as error:
        raise error.called(flag(error.field)) from None
    check(options)
    return options


_ANY_IMAGE = {*FILES, "again", "hosts", "model", "out", "clip_model", "guide_model", "dtype"}
_ANY_IMAGE |= {"refiner_model"}
_ANY_IMAGE |= {
    "autoencoder",
    "base",
    "compiled",
    "lora",
    "mesh",
    "offload_text",
    "embedding",
    "quantize",
    "quiet",
    "verbose",
}
"""Options that --again accepts, since an image's file does not contain them."""

CONFLICTS = (
    ("quiet", "verbose"),
    ("strip", "prompts"),
    ("strip", "variation"),
    ("strip", "refiner_model"),
    ("interpolate", "prompts"),
    ("interpolate", "mix_prompt"),
    ("interpolate", "mix"),
    ("interpolate", "num_images"),
    ("interpolate", "best_of"),
)
"""Flags that exclude each other; `pipelines/settings.py` has those that rows may set."""


def check(options: SampleOptions) -> None:
    """Raise `UserError` for flags that exclude each other."""
    kinds = [bool(options.prompt), options.prompts is not None, options.again is not None]
    if sum(kinds) > 1:
        raise UserError("A prompt, --prompts and --again exclude each other: give one of them.")
    for prompt in options.prompt:
        check_prompt("A prompt", prompt)
    own = fields_of(SampleOptions).values()
    given = {f.name for f in own if getattr(options, f.name) != f.default} - {"hosts"}
    given |= options.settings.given().keys() - {"prompt"}
    for one, other in (*CONFLICTS, *((name, "again") for name in sorted(given - _ANY_IMAGE))):
        if {one, other} <= given:
            raise UserError(
                f"{flag(one)} and {flag(other)} exclude each other: leave one of them out."
            )
    if options.interpolate and (options.interpolate == 1 or len(options.prompt) != 2):
        raise UserError(
            f"--interpolate {options.interpolate} with {len(options.prompt)} prompts: expected at "
            "least 2 images from one prompt to another."
        )
    if options.preview_decoder is not None and not options.preview:
        raise UserError("--preview-decoder has no effect without --preview: give that as well.")


def open_pipeline(
    options: SampleOptions,
    dtype: ComputeType | None = None,
    quantize: QuantizedType | None = None,
) -> Pipeline:
    """Load the model of the options with its adapters and words.

    `dtype` and `quantize` are the types where the options name none.

    Raises:
      UserError: it cannot be read, or the files are for another model.
    """
    files = list(map(file_and_scale, options.lora))
    with show_progress(f"Loading {options.model}", quiet=options.quiet):
        dtype, quantize = options.dtype or dtype, options.quantize or quantize
        stored = None if options.compiled is None else CompiledFolder(options.compiled)
        programs = stored or program_cache()
        pipe = load(
            options.model,
            base=options.base,
            dtype=dtype,
            quantize=quantize,
            mesh=options.mesh,
            offload_text=options.offload_text,
            lora=files,
        )
        if options.autoencoder is not None:
            pipe = pipe.with_autoencoder(options.autoencoder)
        for file in options.embedding:
            pipe = textual_inversion.apply_embedding(pipe, file)
    return pipe.with_programs(programs)


def make_preview(options: SampleOptions, pipe: Pipeline, folder: epath.Path) -> Preview | None:
    """Return a preview that writes `OUT/preview.png`, or None without --preview.

    Raises:
      UserError: the autoencoder that decodes it cannot be read, or is for other latents.
    """
    if not options.preview:
        return None
    alone = jax.process_count() == 1
    path = folder / ("preview.png" if alone else f"preview.{jax.process_index()}.png")

    def show(step: int, images: np.ndarray, indices: Sequence[int]) -> None:
        pictures.save_png(path, pictures.grid(images[:LARGEST_PREVIEW]))

    decoder = options.preview_decoder and pipe.with_autoencoder(options.preview_decoder)
    return Preview(every=options.preview, show=show, decoder=decoder or None)


def prompt_warnings(pipe: Pipeline, prompt: str, where: str, said: set[str]) -> list[str]:
    """Return warnings about a truncated prompt and unknown words.

    Args:
      pipe: the model.
      prompt: the prompt.
      where: names it.
      said: unknown words that need no further warning; those of this prompt are added.
    """
    warnings = []
    if names := pipe.truncated(prompt):
        encoders = pipe.spec.conditioner.encoders
        if len(encoders) == 1:
            lengths = f"{encoders[names[0]].length} tokens of the text encoder"
        else:
            lengths = " and the ".join(f"{encoders[x].length} tokens of {x}" for x in names)
        warnings.append(f"{where} is longer than the {lengths}: its end is cut off there.")
    unknown = pipe.unknown_words(prompt)
    if new := {word: nearest for word, nearest in unknown.items() if word not in said}:
        said.update(new)
        warnings.append(
            f"{where} has words that no training caption contains: {with_nearest(new)}; "
            "`jaxdiff sample --words` lists the known ones."
        )
    return warnings


def summary(count: int, seconds: float, speed: str) -> str:
    """Return the line that ends a command."""
    images = f"{count} image{'s' * (count != 1)}"
    return f"{images} in {seconds:.1f} s, compile included{speed}."


def file_and_scale(lora: str) -> tuple[str, float]:
    """Split FILE:SCALE; FILE alone, which may have a colon in its path, has a scale of 1.

    Raises:
      UserError: the scale is not finite.
    """
    file, _, text = lora.rpartition(":")
    try:
        scale = float(text)
    except ValueError:  # a colon of the path, as in gs://
        return lora, 1.0
    if not file or os.path.exists(lora):
        return lora, 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {lora}: the scale is {scale}: expected a finite number.")
    return file, scale
