"""What a model family adds to the reading and writing of diffusers' folders.

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

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json
from jaxdiff.models.text_to_image import (
    AnyAutoencoder,
    AnyConditioner,
    AnyDenoiser,
    TextToImage,
)
from jaxdiff.pretrained.config_check import Kind, Schema, Unused, Used, read_keys
from jaxdiff.sampling.sampler import Sampler

INDEX = "model_index.json"
ENCODERS = {"text": "text_encoder", "text_2": "text_encoder_2"}
"""Folders of text encoders by our names; XL's refiner has only the second."""


class WrittenSpec(NamedTuple):
    """A specification as diffusers has it.

    Attributes:
      index: `model_index.json` without the parts that the model has.
      network: the config of the network.
      scheduler: the config of the scheduler.
    """

    index: dict[str, Any]
    network: dict[str, Any]
    scheduler: dict[str, Any]


class PipelineFamily(NamedTuple):
    """How one family of models is read from a folder and written to one.

    Attributes:
      pipelines: its classes in diffusers.
      network: the folder of the network.
      read_spec: returns the specification, given the folder and its index.
      holds: whether a model is of this family.
      write_spec: the inverse of `read_spec`, for such a model.
      from_torch: returns the network's parameters, given its tensors, its config and `place`.
      to_torch: returns its tensors, given its parameters and its config.
    """

    pipelines: tuple[str, ...]
    network: str
    read_spec: Callable[[epath.Path, Mapping[str, Any]], TextToImage]
    holds: Callable[[TextToImage], bool]
    write_spec: Callable[[TextToImage], WrittenSpec]
    from_torch: Callable[..., dict[str, Any]]
    to_torch: Callable[[Mapping[str, Any], Any], dict[str, np.ndarray]]


def read_part_config(path: epath.Path) -> Any:
    """Read a JSON file of a part."""
    return read_json(path, "the whole folder of a model", infinities=True)


def part_key(*classes: str) -> Used:
    """Return the rule of a part in the index, which is [library, class], read as the class.

    null and [null, null] mean that there is no such part.

    Args:
      classes: the supported ones; without any, all are.
    """

    def parse(value: Any) -> str | None:
        library, name = value or (None, None)
        known = library in ("diffusers", "transformers") and isinstance(name, str)
        if name is not None and not (known and (not classes or name in classes)):
            raise ValueError
        return name

    names = " or ".join(classes) or "a class"
    return Used(None, Kind(f'["diffusers" or "transformers", {names}]', parse))


COMMON_KEYS: Schema = {
    "_class_name": Unused("read before all others"),
    "scheduler": part_key(),
    "feature_extractor": Unused("of the safety checker and of IP-Adapters"),
    "image_encoder": Unused("of IP-Adapters"),
}
"""Keys of the index of several families."""


def read_index(
    root: epath.Path, index: Mapping[str, Any], schema: Schema, required: tuple[str, ...]
) -> dict[str, Any]:
    """Return the keys of an index that are used, by `read_keys`.

    Raises:
      UserError: a key is unknown, has an unsupported value, or a required part is missing.
    """
    what = str(root / INDEX)
    values = read_keys(what, index, schema)
    for part in required:
        if values[part] is None:
            raise UserError(
                f"{what} names no {part}: expected one for a {index['_class_name']}; copy the "
                "whole folder of the model."
            )
    return values


def flow_spec(
    root: epath.Path,
    denoiser: AnyDenoiser,
    conditioner: AnyConditioner,
    autoencoder: AnyAutoencoder,
    sampler: Sampler,
) -> TextToImage:
    """Return the specification of a flow-matching transformer for images of 1024 x 1024.

    Raises:
      UserError: widths or channels of the parts differ.
    """
    _check_parts(denoiser, conditioner, autoencoder)
    return TextToImage(
        name=root.resolve().name,
        denoiser=denoiser,
        conditioner=conditioner,
        autoencoder=autoencoder,
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=1024,
        sampler=sampler,
    )


def _check_parts(
    denoiser: AnyDenoiser, conditioner: AnyConditioner, autoencoder: AnyAutoencoder
) -> None:
    """Check that a transformer, text encoders and an autoencoder belong together."""
    if autoencoder.latent_channels != denoiser.channels:
        raise UserError(
            f"transformer/config.json has in_channels for latents of {denoiser.channels} channels "
            f"and vae/config.json gives {autoencoder.latent_channels}: expected equal numbers; "
            "copy the whole folder of the model."
        )
    for kind, reads, gives in (
        ("tokens", denoiser.text_width, conditioner.text_width),
        ("the pooled text", denoiser.pooled_width, conditioner.pooled_width),
    ):
        if reads not in (None, gives):
            raise UserError(
                f"transformer/config.json expects {kind} of width {reads} and the text encoder "
                f"gives {gives}: expected equal widths; copy the whole folder of the model."
            )
