"""Read a run's folder as a model: its recipe's specification and its newest moving average.

config.json           the recipe as JSON; task.model is the specification
tokenizers/NAME/      tokenizer.json, one per text encoder
frozen.safetensors    weights that are not trained, each at its path in the tree of parameters;
                      for the best model of a run, in a folder of it, those of the run
checkpoints/          the trained ones
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.config.serialization import from_json
from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.lora import LoraConfig, scale_adapters
from jaxdiff.models.text_to_image import TextToImage, merge_params
from jaxdiff.pretrained.bundle import (
    CHECKPOINTS,
    CONFIG,
    RECIPE,
    AnySpec,
    Bundle,
    abstract_of,
    check_params,
    read_exported_tokenizers,
    read_weights,
    spec_from_json,
)
from jaxdiff.pretrained.checkpoint_folder import load_params
from jaxdiff.pretrained.embeddings import Word
from jaxdiff.pretrained.placement import Place, place_tree

FROZEN = "frozen.safetensors"


def is_recipe(data: Any) -> bool:
    """Whether a `config.json` is a recipe rather than a specification."""
    return isinstance(data, Mapping) and data.get("type") == "Config"


def read_run_spec(
    folder: epath.PathLike, data: Mapping[str, Any], types: Sequence[type] = ()
) -> AnySpec:
    """Return the specification of the model that a recipe trains.

    Args:
      folder: of the run.
      data: its recipe.
      types: dataclasses that are accepted beside those of this package.

    Raises:
      UserError: the recipe cannot be read, or is of another version.
    """
    task = data.get("task")
    model = task.get("model") if isinstance(task, Mapping) else None
    if model is None or "sampling" in data:
        raise UserError(
            f"{folder} was written by jaxdiff 0.1: expected this version's format; train or export "
            "it again."
        )
    return spec_from_json(model, types)


def read_run(
    folder: epath.PathLike,
    data: Mapping[str, Any],
    place: Place,
    types: Sequence[type] = (),
    trained: Mapping[str, Any] | None = None,
) -> Bundle:
    """Read the model of a run, with adapters scaled as in training.

    Args:
      folder: of the run.
      data: its recipe.
      place: called with each parameter, such as to move it to a device.
      types: dataclasses that are accepted beside those of this package.
      trained: the trained parameters; None reads the moving average of the newest checkpoint.

    Raises:
      UserError: there is no undamaged checkpoint, or it belongs to another model.
    """
    root, spec = epath.Path(folder), read_run_spec(folder, data, types)
    params = load_params(root / CHECKPOINTS)[0] if trained is None else trained
    if isinstance(spec, TextToImage | AutoencoderConfig):
        parts = set(abstract_of(spec))
        files = [folder / FROZEN for folder in (root, root.parent) if (folder / FROZEN).exists()]
        frozen = read_weights(files[0]) if files else {}
        own = {name: part for name, part in frozen.items() if name in parts}
        params = merge_params(own, _scaled(params, data))
    check_params(params, spec, str(folder))
    return Bundle(spec, place_tree(place, params), read_exported_tokenizers(root, spec))


def recipe_json(folder: epath.PathLike) -> dict[str, Any] | None:
    """Return the recipe of a run or an exported model as JSON; None if unknown."""
    root = epath.Path(folder)
    for name in (CONFIG, RECIPE):
        if (root / name).exists() and is_recipe(data := read_json(root / name)):
            return data
    return None


def read_word(folder: epath.PathLike) -> Word | None:
    """Return the word of a run of textual inversion; None for other runs."""
    data = recipe_json(folder)
    inversion = _trainable(data).get("inversion") if data else None
    if not isinstance(inversion, Mapping):
        return None
    ema, _ = load_params(epath.Path(folder) / CHECKPOINTS)
    rows = {name: np.asarray(x) for name, x in ema["added_tokens"].items()}
    return Word(str(inversion.get("word")), rows)


def _trainable(data: Mapping[str, Any]) -> Mapping[str, Any]:
    task = data.get("task")
    trainable = task.get("trainable") if isinstance(task, Mapping) else None
    return trainable if isinstance(trainable, Mapping) else {}


def _scaled(params: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Multiply a run's adapters by its recipe's alpha / rank."""
    if "adapters" not in params:
        return dict(params)
    adapters = dict(params["adapters"])
    for name, part in (("lora", "denoiser"), ("text_lora", "text_encoders")):
        stated = _trainable(data).get(name)
        config = from_json(LoraConfig | None, stated, f"config.task.trainable.{name}")
        if config is not None:
            adapters[part] = scale_adapters(adapters[part], config)
    return {**params, "adapters": adapters}
