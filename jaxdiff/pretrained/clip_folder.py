"""Folders of transformers' CLIP: `config.json`, `model.safetensors` and the tokenizer's files."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.io.text import read_json
from jaxdiff.models.text_encoders.clip import CLIP_MEAN, CLIP_STD, ClipConfig
from jaxdiff.pretrained import clip_keys
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.config_check import Only, Schema, Unused, read_keys
from jaxdiff.pretrained.safetensors_io import open_weights, to_device

CONFIG, IMAGES = "config.json", "preprocessor_config.json"

_RESIZING = Unused("images come in the size of vision_config")
IMAGE_KEYS: Schema = {
    "image_mean": Only(list(CLIP_MEAN)),
    "image_std": Only(list(CLIP_STD)),
    "do_normalize": Only(True),
    "do_rescale": Only(True),
    "rescale_factor": Only(1 / 255),
    **dict.fromkeys(
        ("crop_size", "default_to_square", "do_center_crop", "do_resize", "resample", "size"),
        _RESIZING,
    ),
    **dict.fromkeys(
        ("feature_extractor_type", "image_processor_type", "processor_class"),
        Unused("describes the file"),
    ),
    "do_convert_rgb": Unused("images have three channels"),
}
"""Schema of CLIP's `preprocessor_config.json`."""


def is_clip_config(data: Any) -> bool:
    """Whether a `config.json` is that of a CLIP of transformers."""
    return isinstance(data, dict) and data.get("model_type") == "clip"


def read_clip_spec(folder: epath.PathLike) -> ClipConfig:
    """Read the specification of a CLIP.

    Raises:
      UserError: the config is missing, or has unsupported values.
    """
    root, wanted = epath.Path(folder), "the whole folder of a model"
    if (root / IMAGES).exists():
        read_keys(str(root / IMAGES), read_json(root / IMAGES, wanted), IMAGE_KEYS)
    return clip_keys.read_clip_config(read_json(root / CONFIG, wanted), str(root / CONFIG))


def read_clip_tokenizers(folder: epath.PathLike) -> dict[str, Tokenizer]:
    """Read the tokenizer."""
    return {"text": Tokenizer.load(str(folder))}


def read_clip_folder(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> Bundle:
    """Read a CLIP in transformers' layout.

    Args:
      folder: with a config that `is_clip_config` accepts.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: a file is missing or damaged, or has unsupported values.
    """
    root, spec = epath.Path(folder), read_clip_spec(folder)
    params = clip_keys.clip_from_torch(open_weights(root, "model"), spec, place=place)
    return Bundle(spec, params, read_clip_tokenizers(root))
