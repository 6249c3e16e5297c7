"""Folders of transformers' text encoders in a pipeline: `config.json`, `model.safetensors`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_encoders.base import TextEncoder
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5TextEncoder
from jaxdiff.pretrained import clip_keys, qwen3_keys, t5_keys
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import open_weights

MODEL = "model"


class PublishedEncoder(NamedTuple):
    """A text encoder as transformers has it."""

    config: dict[str, Any]
    tensors: Mapping[str, np.ndarray]


def read_text_encoder(folder: epath.Path, encoder: TextEncoder, *, place: Place) -> dict[str, Any]:
    """Read a text encoder's parameters.

    Args:
      folder: of the text encoder.
      encoder: as its config describes it.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the weights are missing, damaged or of another size.
    """
    tensors, options = open_weights(folder, MODEL), {"place": place, "what": folder.name}
    match encoder:
        case ClipTextEncoder():
            return clip_keys.clip_from_torch(tensors, encoder.model, **options)
        case Qwen3TextEncoder():
            return qwen3_keys.qwen3_from_torch(tensors, encoder, **options)
        case T5TextEncoder():
            return t5_keys.t5_from_torch(tensors, encoder.model, **options)
    raise _unknown(encoder)


def published_text_encoder(
    encoder: TextEncoder, params: Mapping[str, Any], original: epath.Path | None = None
) -> PublishedEncoder:
    """Return transformers' config and tensors of a text encoder.

    Args:
      encoder: the text encoder.
      params: its parameters.
      original: folder that it was read from, for the tensors that no hidden state depends on;
        without it there are fewer layers.

    Raises:
      UserError: transformers has no such encoder.
    """
    match encoder:
        case ClipTextEncoder():
            config = clip_keys.write_text_config(encoder.model)
            return PublishedEncoder(config, clip_keys.clip_to_torch(params, encoder.model))
        case Qwen3TextEncoder():
            unused = None
            if original is not None:
                unused = qwen3_keys.qwen3_unused(open_weights(original, MODEL), encoder)
            config = qwen3_keys.write_qwen3_config(encoder, whole=unused is not None)
            tensors = qwen3_keys.qwen3_to_torch(params, encoder, unused)
            return PublishedEncoder(config, tensors)
        case T5TextEncoder():
            return PublishedEncoder(
                t5_keys.write_t5_config(encoder.model), t5_keys.t5_to_torch(params)
            )
    raise _unknown(encoder)


def _unknown(encoder: TextEncoder) -> UserError:
    return UserError(
        f"transformers has no {type(encoder).__name__}: expected a ClipTextEncoder, a "
        "Qwen3TextEncoder or a T5TextEncoder; export the model in another format."
    )
