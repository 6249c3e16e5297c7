"""A model as the adapters (LoRA) of another one, in a folder of a few megabytes.

config.json            the specification
base.json              the other model: `shipped:NAME`, or OWNER/NAME of the Hugging Face hub
model.safetensors      the adapters, in training's scale
recipe.json            how they were trained; for the record

Reading merges them into the other model's weights: it samples as fast as that.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import (
    BASE,
    MODEL,
    Bundle,
    check_params,
    read_weights,
    spec_from_json,
)
from jaxdiff.pretrained.merging import merge_additions
from jaxdiff.pretrained.placement import Place, place_tree

# Names that mean the same elsewhere, unlike those of folders.
_ANYWHERE = re.compile(r"shipped:[\w-]+|\w[\w.-]*/\w[\w.-]*")


def is_adapted_folder(root: epath.Path) -> bool:
    """Whether a model's folder holds the adapters of another model."""
    return (root / BASE).exists()


def base_of(recipe: Mapping[str, Any] | None, model: str) -> str:
    """Return the one model that a run's recipe starts from.

    Raises:
      UserError: it is of several models, or of one in a local folder.
    """
    task = (recipe or {}).get("task")
    stated = task.get("pretrained") if isinstance(task, Mapping) else None
    pretrained = stated if isinstance(stated, Mapping) else {}
    found = sorted({str(value) for key, value in pretrained.items() if key != "type" and value})
    if len(found) != 1 or not _ANYWHERE.fullmatch(found[0]):
        names = ", ".join(found) or "no model"
        raise UserError(
            f"{model} starts from {names}: expected one that others can name, shipped:NAME or "
            "OWNER/NAME; export it with --format jaxdiff, which writes all weights."
        )
    return found[0]


def base_name(root: epath.Path, find: Callable[[str], epath.Path]) -> str:
    """Return the name of the model that a folder's adapters adapt, whose folder `find` returns.

    Raises:
      UserError: it names none, or a model of adapters.
    """
    data = read_json(root / BASE)
    name = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(name, str) or not _ANYWHERE.fullmatch(name):
        raise UserError(
            f"{root / BASE} names no model: expected shipped:NAME or OWNER/NAME; export it again."
        )
    if is_adapted_folder(find(name)):
        raise UserError(
            f"{root} adapts itself, or other adapters: expected a model with all weights in "
            f"{BASE}; export it again."
        )
    return name


def read_adapted_folder(
    root: epath.Path,
    data: Any,
    place: Place,
    types: Sequence[type],
    load: Callable[[], Bundle],
) -> Bundle:
    """Read a model's folder that `write_bundle` wrote with a base.

    Args:
      root: the folder.
      data: its `config.json`.
      place: called with each parameter, such as to move it to a device.
      types: dataclasses that are accepted beside those of this package.
      load: reads the other model, `base_name`, on the host.

    Raises:
      UserError: the folder is damaged, or its adapters do not fit the other model.
    """
    spec, base = spec_from_json(data, types), load()
    if not isinstance(spec, TextToImage) or not isinstance(base.spec, TextToImage):
        raise UserError(f"{root} adapts no text-to-image model: export it again.")
    params = {**base.params, **read_weights(root / MODEL)}
    check_params(params, spec, str(root))
    merged = merge_additions(Bundle(spec, params, base.tokenizers))
    return merged._replace(params=place_tree(place, merged.params))
