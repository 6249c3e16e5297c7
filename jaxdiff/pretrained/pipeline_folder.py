"""What the model families share in diffusers' layout: a folder with `model_index.json`.

model_index.json            the class of the pipeline, and its parts: {"vae": [library, class], ...}
unet/ or transformer/       config.json, diffusion_pytorch_model.safetensors
vae/                        the same
text_encoder/ ...           config.json, model.safetensors
tokenizer/ ...              files of transformers
scheduler/                  scheduler_config.json
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from safetensors.numpy import save

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import read_json
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import Bundle, write_json
from jaxdiff.pretrained.config_check import Kind, Used
from jaxdiff.pretrained.placement import Place

INDEX = "model_index.json"
MODEL, DIFFUSION_MODEL = "model", "diffusion_pytorch_model"


class PipelineFamily(NamedTuple):
    """How one family of models is read from a folder and written to one.

    Attributes:
      pipelines: its classes in diffusers.
      read_spec: returns the specification, given the folder and its index.
      read: returns the model, given the folder, its index, and the function that is called with
        each parameter in our layout.
      read_tokenizers: returns the tokenizers, given the folder and its index.
      holds: whether a model is of this family.
      write: writes the folder of such a model, without adapters and added tokens; the index comes
        last and marks it as complete.
    """

    pipelines: tuple[str, ...]
    read_spec: Callable[[epath.Path, Any], TextToImage]
    read: Callable[[epath.Path, Any, Place], Bundle]
    read_tokenizers: Callable[[epath.Path, Any], Mapping[str, TextTokenizer]]
    holds: Callable[[Bundle], bool]
    write: Callable[[epath.Path, Bundle], None]


def read_part_config(path: epath.Path) -> Any:
    """Read a JSON file of a part."""
    return read_json(path, "the whole folder of a model", infinities=True)


def part_key(classes: tuple[str, ...] | None) -> Used:
    """Return the rule of a part in the index: [library, class], read as the class.

    Args:
      classes: the supported ones; None accepts all. null and [null, null] mean that there is no
        such part.
    """

    def parse(value: Any) -> str | None:
        library, name = value or (None, None)
        known = library in ("diffusers", "transformers") and isinstance(name, str)
        if name is not None and not (known and (classes is None or name in classes)):
            raise ValueError
        return name

    names = "a class" if classes is None else " or ".join(classes)
    return Used(None, Kind(f'["diffusers" or "transformers", {names}]', parse))


def write_part(
    folder: epath.Path, stem: str, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    """Write the config and the weights of a part."""
    # transformers refuses a file without this entry.
    write_whole(folder / f"{stem}.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
