"""Each key of CLIP's image processor is followed, refused by name, or without effect."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.text_encoders.clip import normalize_for_clip
from jaxdiff.pretrained.clip_folder import IMAGE_KEYS, read_image_config

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.processing_utils import ImagesKwargs

pytestmark = pytest.mark.parity

# transformers' processor of the size that a CLIP reads, on images of this size.
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
IMAGE_BASE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
IMAGE_VALUES = {
    "image_mean": [[0.5, 0.5, 0.5]],
    "image_std": [[0.5, 0.5, 0.5]],
    "size": [16, {"height": 16, "width": 16}, {"shortest_edge": 24}, 24, None],
    "crop_size": [16, {"height": 16, "width": 16}, {"height": 8, "width": 8}, 8, None],
    "resample": [0, 2],
    "rescale_factor": [1 / 127.5],
    "do_pad": [True],
    "pad_size": [{"height": 16, "width": 16}],
    "data_format": ["channels_first"],
    "input_data_format": ["channels_last"],
    "device": ["cpu"],
    "return_tensors": ["np"],
    "disable_grouping": [True],
    "image_seq_length": [5],
    "image_processor_type": ["CLIPFeatureExtractor"],
}


def image_keys():
    return sorted({*ImagesKwargs.__annotations__, *transformers.CLIPImageProcessor().to_dict()})


def test_every_key_of_an_image_processor():
    plain = json.loads(transformers.CLIPImageProcessor(**IMAGE_BASE).to_json_string())
    ours = np.asarray(normalize_for_clip(jnp.asarray(IMAGES / 127.5 - 1, jnp.float32)))
    wrong = [f"{key} is not declared" for key in image_keys() if key not in IMAGE_KEYS]
    for key in image_keys():
        default = plain.get(key)
        for value in IMAGE_VALUES.get(key, [not default]):
            config = json.loads(json.dumps({**plain, key: value}))
            try:
                read_image_config(config, "preprocessor_config.json", 16)
            except UserError as error:
                if key not in str(error):
                    wrong.append(f"{key}={value!r}: refused without its name: {error}")
                continue
            try:
                processor = transformers.CLIPImageProcessor.from_dict(config)
                pixels = processor(list(IMAGES), return_tensors="np")["pixel_values"]
            except Exception:  # an odd value may fail anywhere
                continue
            if pixels.shape != (2, 3, 16, 16):
                wrong.append(f"{key}={value!r}: {pixels.shape}")
            elif np.abs(pixels.transpose(0, 2, 3, 1) - ours).max() > 1e-3:
                wrong.append(f"{key}={value!r}: other pixels")
    assert wrong == []
