"""The layers that LoRA files change, by their names in diffusers and in the original code.

Other trainers adapt the original code's modules. One module may hold several layers of ours, such
as queries, keys and values: `Layer.parts` are these, with their rows.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.lora import Path
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.clip_keys import TEXT_NAMES
from jaxdiff.pretrained.flux_keys import flux_names
from jaxdiff.pretrained.flux_original import flux_modules, fused_flux_modules
from jaxdiff.pretrained.key_mapping import flatten_params, locate
from jaxdiff.pretrained.original_layout import Pieces, Rows
from jaxdiff.pretrained.pipeline_folder import ENCODERS
from jaxdiff.pretrained.safetensors_io import Shape
from jaxdiff.pretrained.single_file_keys import unet_original_name
from jaxdiff.pretrained.unet_keys import UNET_NAMES
from jaxdiff.pretrained.z_image_keys import Z_IMAGE_NAMES
from jaxdiff.pretrained.z_image_original import z_image_modules

PARTS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    **{folder: name for name, folder in ENCODERS.items()},
}
"""Our parts by their folders in a diffusers checkpoint, the components of a file."""


class Layer(NamedTuple):
    """A layer of ours; `index` is its index in a stack of `depth`, None for single layers.

    Attributes:
      name: in a diffusers checkpoint, or that of a module of the original code.
      part: `denoiser` or the name of a text encoder.
      path: of the layer.
      shapes: of its parameters `kernel`, `scale` and `bias`, without the stack's axis.
      parts: the layers of ours in a module of the original code, with their rows in it; empty for
        a layer of ours.
    """

    name: str
    part: str
    path: Path
    shapes: Mapping[str, Shape]
    index: int | None
    depth: int | None
    parts: "tuple[tuple[Layer, Rows | None], ...]" = ()

    @property
    def weight(self) -> str:
        """The name of the parameter that PyTorch calls weight."""
        return "kernel" if "kernel" in self.shapes else "scale"

    @property
    def pieces(self) -> "tuple[tuple[Layer, Rows | None], ...]":
        """The layers of ours, with their rows; None for all rows."""
        return self.parts or ((self, None),)


class _Names(NamedTuple):
    """A denoiser's names in files.

    Attributes:
      folder: in a diffusers checkpoint.
      table: its names there (`key_mapping`).
      others: modules by further names, given the names of all layers.
    """

    folder: str
    table: Mapping[str, str]
    others: Callable[[Iterator[str]], Mapping[str, Pieces]]


def _names_of(denoiser: Denoiser, model: str) -> _Names:
    if isinstance(denoiser, UNet2DConditionConfig):
        return _Names(
            "unet",
            UNET_NAMES,
            lambda layers: {unet_original_name(x, denoiser): ((x, None),) for x in layers},
        )
    if isinstance(denoiser, FluxConfig):
        modules = {**flux_modules(denoiser), **fused_flux_modules(denoiser)}
        return _Names("transformer", flux_names(denoiser), lambda layers: modules)
    if isinstance(denoiser, ZImageConfig):
        return _Names("transformer", Z_IMAGE_NAMES, lambda layers: z_image_modules(denoiser))
    raise UserError(
        f"The denoiser of {model} is of type {type(denoiser).__name__}: expected Stable "
        "Diffusion's U-Net, FLUX or Z-Image, the networks that LoRA files are for; use another "
        "model."
    )


@functools.lru_cache(maxsize=4)
def layers_of(spec: TextToImage) -> dict[str, Layer]:
    """Return the layers that a file can change, by component and name in a diffusers checkpoint."""
    names = _names_of(spec.denoiser, spec.name)
    abstract = spec.abstract_params()
    parts: dict[str, tuple[str, Any, Mapping[str, str]]] = {
        "denoiser": (names.folder, abstract["denoiser"], names.table)
    }
    for name, encoder in spec.conditioner.encoders.items():
        if isinstance(encoder, ClipTextEncoder) and name in ENCODERS:
            parts[name] = (ENCODERS[name], abstract["text_encoders"][name], TEXT_NAMES)
    layers: dict[str, Layer] = {}
    for part, (folder, params, table) in parts.items():
        for (*path, leaf), value in flatten_params(params).items():
            if leaf not in ("kernel", "scale", "bias"):
                continue
            tensor = locate((*path, leaf), value.shape, table)
            stacked = tensor.depth is not None
            shape = value.shape[1:] if stacked else value.shape
            for index, theirs in enumerate(tensor.names()):
                place = (index, tensor.depth) if stacked else (None, None)
                name = f"{folder}.{theirs.rpartition('.')[0]}"
                layer = layers.setdefault(name, Layer(name, part, tuple(path), {}, *place))
                layers[name] = layer._replace(shapes={**layer.shapes, str(leaf): shape})
    return layers


def flat_name(name: str) -> str:
    """Return a name in which dots are underscores, as kohya's scripts write it."""
    return name.replace(".", "_")


@functools.lru_cache(maxsize=4)
def spellings_of(spec: TextToImage) -> dict[str, dict[str, Layer]]:
    """Return the layers of each part by all names that files use, with underscores."""
    layers = layers_of(spec)
    spellings: dict[str, dict[str, Layer]] = {layer.part: {} for layer in layers.values()}
    for name, layer in layers.items():
        theirs = name.partition(".")[2]
        names = [theirs, re.sub(r"\.to_out\.0$", ".to_out", theirs)]
        if layer.part != "denoiser":  # of transformers from 5.6 on, and of the first diffusers
            old = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", theirs)
            names += [x.removeprefix("text_model.") for x in (theirs, old)] + [old]
        spellings[layer.part] |= {flat_name(x): layer for x in names}
    folder, _, others = _names_of(spec.denoiser, spec.name)
    own = {
        name.removeprefix(f"{folder}."): layer
        for name, layer in layers.items()
        if layer.part == "denoiser"
    }
    for old, pieces in others(iter(own)).items():
        spellings["denoiser"][flat_name(old)] = _joined(f"{folder}.{old}", pieces, own)
    return spellings


def _joined(name: str, pieces: Pieces, layers: Mapping[str, Layer]) -> Layer:
    """Return a module of the original code, which consists of layers of ours."""
    parts = tuple((layers[theirs], rows) for theirs, rows in pieces)
    first = parts[0][0]
    if len(parts) == 1 and parts[0][1] is None:
        return first
    outputs = sum(layer.shapes["kernel"][-1] for layer, _ in parts)
    shapes = {
        leaf: (*shape[:-1], outputs) for leaf, shape in first.shapes.items() if leaf != "scale"
    }
    path = tuple(name.split(".")[1:])
    return Layer(name, first.part, path, shapes, None, None, parts)
