"""The model card of an exported model: README.md beside its weights.

Its sources are the specification, the recipe (`recipe.json`), the history of training in words
(`history.txt`), which people write where the recipe is not the whole of it, such as after several
runs, and the figures of `jaxdiff evaluate` (`evaluation.json`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from etils import epath
from jaxtyping import PyTree

from jaxdiff.config.recipe_files import recipe_names
from jaxdiff.config.serialization import to_json
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.datasets.icons.names import STYLES
from jaxdiff.datasets.icons.source import Iconify
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import parse_json, read_json, read_text
from jaxdiff.models.text_encoders.clip import ClipConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import (
    BASE,
    CHECKPOINTS,
    CONFIG,
    MODEL,
    RECIPE,
    TOKENIZERS,
    Bundle,
    exported_fingerprint,
)
from jaxdiff.pretrained.pipeline_folder import INDEX

CARD, EVALUATION, HISTORY = "README.md", "evaluation.json", "history.txt"
ORIGIN = "ema.json"
_LIBRARY = "library_name: jaxdiff"
_MODEL_FILES = (INDEX, CONFIG, MODEL, RECIPE, BASE, EVALUATION, HISTORY, ORIGIN)


class DataCard(NamedTuple):
    """Description and SPDX license of a data set that comes with jaxdiff, and whom it credits."""

    about: str
    license: str
    credits: str = ""


_ICONS = (
    "The drawings are those of Fluent Emoji (Microsoft, MIT), Noto Emoji (Google, Apache-2.0) and "
    "Twemoji (Twitter, Inc. and other contributors, CC BY 4.0), rendered and adapted; the names "
    "are emojibase's (Miles Johnson, MIT)."
)
DATA_CARDS = {
    Produce.__name__: DataCard(
        "scenes of fruit and vegetables that jaxdiff renders, with captions", "Apache-2.0"
    ),
    OpenMoji.__name__: DataCard("drawings of OpenMoji, with captions", "CC-BY-SA-4.0"),
    Iconify.__name__: DataCard("drawings of icon sets, with captions", "Apache-2.0", _ICONS),
    EmojiScenes.__name__: DataCard(
        "scenes composed of drawings of icon sets, with captions", "Apache-2.0", _ICONS
    ),
}

_USE = {
    "text-to-image": """\
import jaxdiff

pipe = jaxdiff.load("{folder}")
images = pipe("a prompt", seeds=7)  # uint8 [1, h, w, 3]""",
    "clip": """\
import jaxdiff
from jaxdiff import Guidance
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance

pipe = jaxdiff.load()
guidance = Guidance(clip=ClipGuidance(model="{folder}"))
images = pipe("a prompt", guidance_scale=1, guidance=guidance)""",
    "autoencoder": """\
from jaxdiff.pretrained.load import load_bundle

spec, params, _ = load_bundle("{folder}")
# A recipe uses it by task.pretrained.autoencoder = "{folder}".""",
    "diffusers": """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
# jaxdiff: pipe = jaxdiff.load("{folder}")""",
    "lora": """\
import jaxdiff
from jaxdiff.pipelines.lora import apply_lora

pipe = apply_lora(jaxdiff.load("BASE_MODEL"), "{folder}")
# diffusers: pipe.load_lora_weights("{folder}")""",
    "embedding": """\
import jaxdiff
from jaxdiff.pipelines.textual_inversion import apply_embedding

pipe = apply_embedding(jaxdiff.load("BASE_MODEL"), "{folder}")
# diffusers: pipe.load_textual_inversion("{folder}")""",
}
_USE["adapters"] = _USE["text-to-image"]
_ABOUT = {
    "text-to-image": "A text-to-image diffusion model",
    "clip": "A CLIP: a text and an image encoder with a joint embedding",
    "autoencoder": "An autoencoder between images and latents",
    "diffusers": "A text-to-image diffusion model in diffusers' layout",
    "adapters": "A text-to-image diffusion model, as low-rank adapters (LoRA) of another model",
    "lora": "Low-rank adapters (LoRA) for a text-to-image model",
    "embedding": "An added token (textual inversion) for a text-to-image model",
}


@dataclass(frozen=True, kw_only=True)
class CardInputs:
    """The contents of a card.

    Attributes:
      name: of the model.
      folder: as the example names it.
      kind: a key of `_ABOUT`: "text-to-image", "clip", "autoencoder", "adapters",
        "diffusers", "lora" or "embedding".
      spec: JSON of the specification; None for an added token.
      parameters: number of parameters; None omits it.
      recipe: JSON of the recipe, if known.
      history: how the weights were trained, in Markdown; "" where the recipe says all.
      evaluation: JSON of the figures, if any.
    """

    name: str
    folder: str
    kind: str
    spec: Mapping[str, Any] | None = None
    parameters: int | None = None
    recipe: Mapping[str, Any] | None = None
    history: str = ""
    evaluation: Mapping[str, Any] | None = None


def model_card(inputs: CardInputs) -> str:
    """Return the card as Markdown, with the front matter that the Hugging Face hub reads."""
    license_name, license_text = _license(inputs.recipe)
    header = ["---", *([f"license: {license_name.lower()}"] if license_name else [])]
    tag = "text-to-image" if inputs.kind not in ("clip", "autoencoder") else inputs.kind
    header += [_LIBRARY, "tags:", f"- {tag}", "---", ""]
    count = "" if inputs.parameters is None else f", {inputs.parameters:,} parameters"
    blocks = [
        f"# {inputs.name}",
        f"{_ABOUT[inputs.kind]}{count}.",
        "## Use",
        f"```python\n{_USE[inputs.kind].format(folder=inputs.folder)}\n```",
        *_model(inputs.spec),
        *_training(inputs.recipe, inputs.history),
        *_figures(inputs.evaluation),
        "## License",
        license_text,
    ]
    return "\n".join(header) + "\n\n".join(blocks) + "\n"


def folder_card(folder: epath.PathLike, *, name: str | None = None, shown_as: str = "") -> str:
    """Return the card of a model's folder, from its specification, recipe and figures.

    Args:
      folder: that `write_bundle` wrote.
      name: of the model; by default its specification's, its recipe's or the folder's.
      shown_as: how the example names the folder; by default as it is.

    Raises:
      UserError: its JSON cannot be read.
    """
    root = epath.Path(folder)
    spec = read_json(root / CONFIG)
    recipe = read_json(root / RECIPE) if (root / RECIPE).exists() else None
    evaluation = read_json(root / EVALUATION) if (root / EVALUATION).exists() else None
    kinds = {TextToImage.__name__: "text-to-image", ClipConfig.__name__: "clip"}
    return model_card(
        CardInputs(
            name=name or spec.get("name") or (recipe or {}).get("name") or root.name,
            folder=shown_as or str(folder),
            kind="adapters" if (root / BASE).exists() else kinds.get(spec["type"], "autoencoder"),
            spec=spec,
            parameters=_stored_parameters(root / MODEL),
            recipe=recipe,
            history=read_history(root),
            evaluation=evaluation,
        )
    )


def read_history(folder: epath.PathLike) -> str:
    """Return what people wrote in a model's folder on how it was trained; "" for nothing."""
    path = epath.Path(folder) / HISTORY
    return read_text(path).strip() if path.exists() else ""


def read_figures(folder: epath.PathLike, params: PyTree) -> Mapping[str, Any] | None:
    """Return what `jaxdiff evaluate` wrote into a model's folder, if it measured these weights.

    Raises:
      UserError: its JSON cannot be read.
    """
    path = epath.Path(folder) / EVALUATION
    evaluation = read_json(path) if path.exists() else None
    about = evaluation.get("provenance") if isinstance(evaluation, Mapping) else None
    measured = about.get("weights") if isinstance(about, Mapping) else None
    return evaluation if measured and measured == exported_fingerprint(params) else None


def check_destination(folder: epath.PathLike) -> None:
    """Raise `UserError` for a folder where the files of an export would replace others."""
    root = epath.Path(folder)
    has_card = (root / CARD).exists()
    others = [root / name for name in _MODEL_FILES if not has_card and (root / name).exists()]
    if (root / CHECKPOINTS).exists():
        holds = "a run, whose config.json the export would replace"
    elif has_card and _LIBRARY not in read_text(root / CARD):
        holds = f"a {CARD} that no export wrote"
    elif others:
        holds = f"a {others[0].name} that no export wrote, as it has no {CARD}"
    else:
        return
    raise UserError(
        f"{folder} holds {holds}: expected a new folder, or one of an earlier export; name another."
    )


def remove_export(folder: epath.PathLike, *, keep: str | None = None) -> None:
    """Remove what an earlier export left that says how a folder is read, but for the file `keep`.

    The next model would be read with another's index or tokenizers, and shown with its figures.
    """
    root = epath.Path(folder)
    for name in _MODEL_FILES:
        if name != keep:
            (root / name).unlink(missing_ok=True)
    if (root / TOKENIZERS).exists():
        (root / TOKENIZERS).rmtree()


def write_card(folder: epath.PathLike, card: str) -> None:
    """Write a card into a model's folder."""
    write_whole(epath.Path(folder) / CARD, card.encode())


def bundle_card(
    bundle: Bundle,
    folder: epath.PathLike,
    kind: str,
    recipe: Mapping[str, Any] | None,
    history: str = "",
) -> str:
    """Return the card of a model in another library's layout.

    Args:
      bundle: the model.
      folder: that it is written to.
      kind: "diffusers" or "lora", whose card counts only the adapters.
      recipe: JSON of the recipe, if known.
      history: how the weights were trained; "" where the recipe says all.
    """
    spec, params = bundle.spec, bundle.params
    if kind == "lora":
        params = params.get("adapters", {})
    return model_card(
        CardInputs(
            name=spec.name,
            folder=str(folder),
            kind=kind,
            spec=to_json(spec),
            parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
            recipe=recipe,
            history=history,
        )
    )


def _stored_parameters(path: epath.Path) -> int:
    """Return the number of parameters in a safetensors file, from its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), path)
    return sum(math.prod(x["shape"]) for key, x in header.items() if key != "__metadata__")


def _model(spec: Mapping[str, Any] | None) -> list[str]:
    """Return the table of a text-to-image model's parts; [] for others."""
    if spec is None or "denoiser" not in spec:
        return []
    autoencoder = spec.get("autoencoder")
    sampler = spec.get("sampler") or {}
    rows = {
        "denoiser": f"`{spec['denoiser']['type']}`",
        "conditioner": f"`{spec['conditioner']['type']}`",
        "autoencoder": f"`{autoencoder['type']}`" if autoencoder else "none: it works on pixels",
        "prediction": f"`{spec['prediction']}`",
        "noise schedule": f"`{spec['schedule']['type']}`",
        "image size": f"{spec['image_size']} pixels",
        "steps by default": sampler.get("num_steps"),
        "guidance scale by default": sampler.get("guidance_scale"),
    }
    return ["## Model", _table(("part", "value"), rows)]


def _training(recipe: Mapping[str, Any] | None, history: str) -> list[str]:
    """Return the section on training; [] where nothing is known of it."""
    paragraphs = [history] if history else []
    if recipe is None:
        return ["## Training", *paragraphs] if paragraphs else []
    name, train = recipe["name"], recipe["train"]
    optimizer = recipe["optimizer"]
    rows = {
        "data": _data(recipe),
        "initialised from": ", ".join(f"`{base}`" for base in _bases(recipe)) or None,
        "steps": f"{train['steps']:,}",
        "batch size": f"{train['batch_size']:,}",
        "optimizer": f"`{optimizer['type']}`, learning rate {optimizer['learning_rate']:g}",
        "moving average": f"decay {recipe['ema']['decay']:g}",
        "compute type": f"`{train['compute']}`",
    }
    text = f"The recipe is `{name}`."
    if name in recipe_names():
        trains = "is one such run, with these settings" if history else "trains it"
        text = f"`jaxdiff train {name}` {trains}; `jaxdiff recipes {name}` states what it costs."
    return ["## Training", *paragraphs, text, _table(("setting", "value"), rows)]


def _source(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the source of images inside wrappers such as cached latents."""
    source = recipe["data"]["source"]
    while inner := source.get("of") or source.get("own"):
        source = inner
    return source


def _card(source: Mapping[str, Any]) -> DataCard | None:
    """Return the card of a data set that comes with jaxdiff; None for icon sets of any license."""
    if not set(source.get("sets", ())) <= set(STYLES):
        return None
    return DATA_CARDS.get(source["type"])


def _data(recipe: Mapping[str, Any]) -> str:
    source = _source(recipe)
    known = _card(source)
    if known is not None:
        return f"{known.about} (`{source['type']}`)"
    return f"`{source['type']}`" + (f" at `{source['path']}`" if "path" in source else "")


def _bases(recipe: Mapping[str, Any]) -> list[str]:
    """Return the pretrained models of this one's parts, without repetition."""
    pretrained = recipe["task"].get("pretrained") or {}
    if isinstance(pretrained, str):  # of a task with one part
        return [pretrained]
    values = [value for key, value in pretrained.items() if key != "type" and value]
    return list(dict.fromkeys(values))


def _license(recipe: Mapping[str, Any] | None) -> tuple[str | None, str]:
    """Return the SPDX name of the weights' license, if known, and the section's text."""
    if recipe is None:
        return None, "Not stated here: the license of the model that these weights come from."
    known = _card(_source(recipe))
    others = [base for base in _bases(recipe) if not base.startswith("shipped:")]
    if known is not None and not others:
        credits = f" {known.credits}" if known.credits else ""
        return known.license, f"Data and weights: {known.license}.{credits}"
    data = f"{known.license} (data)" if known else "the license of the training data"
    bases = "".join(f", and that of `{base}`" for base in others)
    return None, f"The weights are subject to {data}{bases}."


def _figures(evaluation: Mapping[str, Any] | None) -> list[str]:
    """Return the section with the figures; a scalar NAME/COLUMN is in the row of NAME."""
    if evaluation is None:
        return []
    figures = evaluation.get("figures") or {}
    rows: dict[str, dict[str, float | None]] = {}
    for name, value in figures.items():
        parent, _, column = name.rpartition("/")
        row, column = (parent, column) if parent in figures else (name, "score")
        rows.setdefault(row, {})[column] = value
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| figure | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = ["" if row.get(column) is None else f"{row[column]:.4g}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = evaluation.get("provenance") or {}
    versions = about.get("versions") or {}
    settings = {key: x for key, x in evaluation.items() if key not in ("figures", "provenance")}
    settings |= {key: about.get(key) for key in ("model", "seeds", "devices", "date")}
    settings |= {key: versions.get(key) for key in ("jaxdiff", "jax")}
    return ["## Figures", "\n".join(lines), _table(("measured with", "value"), settings)]


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(lines)
