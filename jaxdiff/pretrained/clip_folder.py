"""Folders of transformers' CLIP: `config.json`, `model.safetensors` and the tokenizer's files."""

from typing import Any

from etils import epath

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json
from jaxdiff.models.text_encoders.clip import CLIP_MEAN, CLIP_STD, ClipConfig
from jaxdiff.pretrained import clip_keys
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.config_check import (
    OFF,
    Kind,
    Only,
    Schema,
    Unused,
    Used,
    integer,
    optional,
    read_keys,
)
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import open_weights, to_device

CONFIG, IMAGES = "config.json", "preprocessor_config.json"


def _edge(value: Any) -> int:
    """Return the side of square images, of any of the forms that transformers reads."""
    sides = set(value.values()) if isinstance(value, dict) else {value}
    return _SIDE.parse(sides.pop() if len(sides) == 1 else None)


_SIDE = integer(1, 2**14)
_EDGE = Used(None, optional(Kind("the image_size of vision_config", _edge)))
_FORM = Unused("describes the file, or the form of its images")
IMAGE_KEYS: Schema = {
    "image_mean": Only(list(CLIP_MEAN)),
    "image_std": Only(list(CLIP_STD)),
    "do_normalize": Only(True),
    "do_rescale": Only(True),
    "rescale_factor": Only(1 / 255),
    "size": _EDGE,
    "crop_size": _EDGE,
    "do_pad": OFF,
    "pad_size": Unused("of do_pad, which must be off"),
    **dict.fromkeys(
        ("default_to_square", "do_center_crop", "do_resize", "resample"),
        Unused("images come in the size of vision_config"),
    ),
    **dict.fromkeys(("feature_extractor_type", "image_processor_type", "processor_class"), _FORM),
    **dict.fromkeys(("data_format", "input_data_format", "return_tensors"), _FORM),
    **dict.fromkeys(("device", "disable_grouping", "image_seq_length"), _FORM),
    "do_convert_rgb": Unused("images have three channels"),
}
"""Schema of CLIP's `preprocessor_config.json`."""


def read_image_config(config: Any, what: str, image_size: int) -> None:
    """Check that a `preprocessor_config.json` prepares images as the encoder of `Clip` does.

    Args:
      config: the parsed JSON.
      what: the file, for the message.
      image_size: of the image encoder, in pixels.

    Raises:
      UserError: it would change images of this size otherwise.
    """
    values = read_keys(what, config, IMAGE_KEYS)
    for key in ("size", "crop_size"):
        if values[key] not in (None, image_size):
            raise UserError(
                f"{what}: {key} is {values[key]}: expected {image_size}, the image_size of "
                "vision_config; use another model."
            )


def is_clip_config(data: Any) -> bool:
    """Whether a `config.json` is that of a CLIP of transformers."""
    return isinstance(data, dict) and data.get("model_type") == "clip"


def read_clip_spec(folder: epath.PathLike) -> ClipConfig:
    """Read the specification of a CLIP.

    Raises:
      UserError: the config is missing, or has unsupported values.
    """
    root, wanted = epath.Path(folder), "the whole folder of a model"
    spec = clip_keys.read_clip_config(read_json(root / CONFIG, wanted), str(root / CONFIG))
    if (images := root / IMAGES).exists():
        read_image_config(read_json(images, wanted), str(images), spec.vision.image_size)
    return spec


def read_clip_tokenizers(folder: epath.PathLike) -> dict[str, Tokenizer]:
    """Read the tokenizer."""
    return {"text": Tokenizer.load(str(folder))}


def read_clip_folder(folder: epath.PathLike, *, place: Place = to_device) -> Bundle:
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
