"""Z-Image's transformer in one file, in the layout of its original code.

layers.N.attention.qkv        queries, keys and values, one under another
layers.N.attention.out, q_norm, k_norm
x_embedder, final_layer       diffusers' all_x_embedder.2-1, all_final_layer.2-1
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.z_image import PATCH, ZImageConfig
from jaxdiff.pretrained.original_layout import (
    Pieces,
    TransformerShapes,
    open_transformer,
    stacked_rows,
    to_diffusers_names,
    to_original_names,
)
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, to_device, write_tensors
from jaxdiff.pretrained.z_image_keys import z_image_from_torch, z_image_to_torch

_ORIGINAL = "noise_refiner.0.attention.qkv.weight"
Z_IMAGE_MARKS = _ORIGINAL, "noise_refiner.0.attention.to_q.weight"
"""Names that the file of a Z-Image has, in the original layout and in diffusers'."""
_UNUSED = ("norm_final.weight",)  # of the original code, which computes nothing with it
_AXES = (32, 48, 48)  # of a head of 128 channels


def z_image_modules(config: ZImageConfig) -> dict[str, Pieces]:
    """Return the modules that the original code names differently, and diffusers' in each."""
    whole = {"x_embedder": f"all_x_embedder.{PATCH}-1"}
    for module in ("linear", "adaLN_modulation.1"):
        whole[f"final_layer.{module}"] = f"all_final_layer.{PATCH}-1.{module}"
    modules: dict[str, Pieces] = {}
    depths = {
        "noise_refiner": config.refiner_depth,
        "context_refiner": config.refiner_depth,
        "layers": config.depth,
    }
    for stack, depth in depths.items():
        for n in range(depth):
            attention = f"{stack}.{n}.attention"
            modules[f"{attention}.qkv"] = stacked_rows(
                [f"{attention}.to_{x}" for x in "qkv"], config.width
            )
            whole |= {f"{attention}.{x}_norm": f"{attention}.norm_{x}" for x in "qk"}
            whole[f"{attention}.out"] = f"{attention}.to_out.0"
    return modules | {old: ((new, None),) for old, new in whole.items()}


def z_image_config_of(found: TransformerShapes) -> ZImageConfig:
    """Return the config of a published Z-Image from the shapes of its tensors.

    Raises:
      UserError: tensors are missing that determine it.
    """
    width, patch = found.shape(2, "x_embedder.weight", f"all_x_embedder.{PATCH}-1.weight")
    attention = "noise_refiner.0.attention"
    (head,) = found.shape(1, f"{attention}.q_norm.weight", f"{attention}.norm_q.weight")
    if width % head or head % 16 or patch % PATCH**2:
        raise UserError(
            f"{found.file} has heads of {head} channels of {width}, and {patch} numbers in a "
            "patch: expected whole heads, a multiple of 16 in each, and patches of 2 x 2; use "
            "another model."
        )
    return ZImageConfig(
        channels=patch // PATCH**2,
        heads=width // head,
        depth=found.depth("layers"),
        refiner_depth=found.depth("noise_refiner"),
        text_width=found.shape(2, "cap_embedder.1.weight")[1],
        rope_axes=tuple(axis * head // sum(_AXES) for axis in _AXES),
    )


def original_z_image_rename(
    config: ZImageConfig,
) -> Callable[[str], str | Mapping[str, Cut | None] | None]:
    """Return what `Renamed` takes to read the original code's tensors under diffusers' names."""
    rename = to_diffusers_names(z_image_modules(config))
    return lambda name: None if name in _UNUSED else rename(name)


def z_image_to_original(
    tensors: Mapping[str, np.ndarray], config: ZImageConfig
) -> dict[str, np.ndarray]:
    """Return tensors of diffusers under the original code's names."""
    return to_original_names(tensors, z_image_modules(config))


def open_z_image_file(
    file: epath.PathLike, config: ZImageConfig | None = None
) -> tuple[ZImageConfig, Renamed]:
    """Open the tensors of a published Z-Image transformer in one file, under diffusers' names.

    Args:
      file: safetensors.
      config: of the network; None finds it by the shapes of the tensors.

    Raises:
      UserError: the file is damaged, or holds another network.
    """
    tensors = open_transformer(file, "Z-Image", Z_IMAGE_MARKS)
    config = config or z_image_config_of(TransformerShapes(file, "Z-Image", tensors.shapes))
    if _ORIGINAL in tensors:
        tensors = Renamed(tensors, original_z_image_rename(config))
    return config, tensors


def read_z_image_file(
    file: epath.PathLike, *, place: Place = to_device
) -> tuple[ZImageConfig, dict[str, Any]]:
    """Read a published Z-Image transformer from one file, with tensors in their stored type.

    Args:
      file: safetensors.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the file is damaged, or holds another network.
    """
    config, tensors = open_z_image_file(file)
    options = {"what": str(file), "advice": "use a whole, unpruned Z-Image transformer"}
    return config, z_image_from_torch(tensors, config, place=place, **options)


def write_z_image_file(
    file: epath.PathLike, params: Mapping[str, Any], config: ZImageConfig, prefix: str = ""
) -> None:
    """Write a Z-Image transformer in the original layout, which ComfyUI and diffusers read.

    Args:
      file: safetensors.
      params: of the network, a nested dict; tensors keep their type.
      config: of the network.
      prefix: before all names, such as ComfyUI's `model.diffusion_model.`.
    """
    tensors = z_image_to_original(z_image_to_torch(params), config)
    write_tensors(file, {prefix + name: value for name, value in tensors.items()})
