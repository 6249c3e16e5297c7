"""A CLIP as transformers keeps it: `config.json`, `model.safetensors` and its tokenizer's files."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.pretrained import clip
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.safetensors_io import open_weights, to_device
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.clip import ClipTask

CONFIG = "config.json"


def is_clip_folder(folder: epath.PathLike) -> bool:
    """Whether a folder holds a CLIP of transformers."""
    try:
        config = json.loads((epath.Path(folder) / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "clip"


def read_clip_folder(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> Bundle:
    """A CLIP of OpenAI's, OpenCLIP's or anybody's who publishes it so.

    Args:
      folder: that `is_clip_folder`.
      place: where a parameter goes once it has our layout.

    Raises:
      UserError: a file is missing or damaged, or asks for what jaxdiff does not have.
    """
    root = epath.Path(folder)
    model = clip.read_config(json.loads((root / CONFIG).read_text()), str(root / CONFIG))
    params = clip.from_torch_names(open_weights(root, "model"), model, place=place)
    transforms = Transforms(size=model.vision.image_size)
    data = DataConfig(source=ImageFolder(path="images"), transforms=transforms)
    config = Config(name=root.resolve().name, task=ClipTask(model=model), data=data)
    return Bundle(config, params, {}, Tokenizer.load(str(root)))
