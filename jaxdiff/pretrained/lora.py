"""LoRA files of Stable Diffusion: those of diffusers and PEFT, and those of kohya's scripts.

    unet.down_blocks.0 ... to_q.lora_A.weight              diffusers, PEFT; text_encoder. the same
    unet.down_blocks.0 ... processor.to_q_lora.down.weight diffusers before PEFT
    lora_unet_down_blocks_0_ ... _to_q.lora_down.weight    kohya; lora_te_, lora_te1_, lora_te2_
    lora_unet_input_blocks_1_1_ ... _to_q.lora_down.weight kohya, by the original names of the U-Net

The factor on an adapter's output is alpha / rank: kohya stores a tensor `alpha` with each pair,
PEFT stores it in the file's metadata; by default alpha is the rank.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from safetensors.numpy import save

from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.lora import Adapters, Factors, Path
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.clip_keys import TEXT_NAMES
from jaxdiff.pretrained.diffusers import ENCODERS
from jaxdiff.pretrained.key_mapping import flatten_params, locate
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file_keys import unet_original_name
from jaxdiff.pretrained.unet_keys import UNET_NAMES

FOLDERS = {"denoiser": "unet", **ENCODERS}
"""Our parts by their names in a diffusers checkpoint."""

FILE = "pytorch_lora_weights.safetensors"

_KOHYA = {"unet": ("unet",), "text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}

_ENDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}


class _Layer(NamedTuple):
    """A layer of ours; `index` is its index in a stack of `depth`, None for single layers."""

    part: str
    path: Path
    kernel: tuple[int, ...]  # without the stack's axis
    index: int | None
    depth: int | None


@functools.lru_cache(maxsize=4)
def _layers(spec: TextToImage) -> dict[str, _Layer]:
    """Return the layers that can have an adapter, by part and name in a diffusers checkpoint."""
    if not isinstance(spec.denoiser, UNet2DConditionConfig):
        raise UserError(
            f"The denoiser of {spec.name} is of type {type(spec.denoiser).__name__}: expected "
            "Stable Diffusion's U-Net, the only network that LoRA files are for; use another model."
        )
    abstract = spec.abstract_params()
    parts: dict[str, tuple[Any, Mapping[str, str]]] = {
        "denoiser": (abstract["denoiser"], UNET_NAMES)
    }
    for name, encoder in spec.conditioner.encoders.items():
        if isinstance(encoder, ClipTextEncoder) and name in ENCODERS:
            parts[name] = (abstract["text_encoders"][name], TEXT_NAMES)
    layers = {}
    for part, (params, table) in parts.items():
        for path, leaf in flatten_params(params).items():
            if path[-1] != "kernel":
                continue
            tensor = locate(path, leaf.shape, table)
            stacked = tensor.depth is not None
            kernel = leaf.shape[1:] if stacked else leaf.shape
            for index, name in enumerate(tensor.names()):
                place = (index, tensor.depth) if stacked else (None, None)
                name = f"{FOLDERS[part]}.{name.removesuffix('.weight')}"
                layers[name] = _Layer(part, path[:-1], kernel, *place)
    return layers


def _names(spec: TextToImage) -> dict[str, _Layer]:
    """Return the layers by all names that files use."""
    names = dict(_layers(spec))
    for name, layer in _layers(spec).items():
        folder, _, theirs = name.partition(".")
        calls = [theirs]
        if layer.part == "denoiser":
            names[f"base_model.model.{theirs}"] = layer
            assert isinstance(spec.denoiser, UNet2DConditionConfig)
            calls.append(unet_original_name(theirs, spec.denoiser))
        for kind in _KOHYA[folder]:
            names |= {f"lora_{kind}_{call.replace('.', '_')}": layer for call in calls}
    return names


def _split(name: str) -> tuple[str, str] | None:
    """Split a tensor's name into layer and kind; None for tensors that are not of LoRA."""
    # A processor's to_q_lora is to_q in later files; its output layer is to_out.0.
    name = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", name)
    name = name.replace(".to_out.lora.", ".to_out.0.lora.")
    for end, kind in _ENDS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), kind
    return None


def read_lora(file: epath.PathLike, spec: TextToImage) -> dict[str, dict[Path, Factors]]:
    """Read the adapters in a LoRA file, with their scale in `up`, in float32.

    Where only some layers of a stack have adapters, the others get zeros.

    Args:
      file: safetensors, or a folder with `pytorch_lora_weights.safetensors`.
      spec: of the model.

    Returns:
      Adapters by part, `denoiser` or the name of a text encoder, then by the path of the layer.

    Raises:
      UserError: the file is damaged, pickled, of another kind of adapter, or for another model.
    """
    path = epath.Path(file)
    path = path / FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no LoRA file: expected a .safetensors file; convert it.")
    tensors = TensorFiles([path])
    layers, found = _names(spec), defaultdict(dict)
    strange = []
    for name in tensors:
        split = _split(name)
        if split is None or split[0] not in layers:
            strange.append(name)
        else:
            found[layers[split[0]]][split[1]] = np.asarray(tensors[name], np.float32)
    if strange:
        raise UserError(
            f"{path} has {len(strange)} tensors that are no LoRA of this model's layers, such as "
            f"{strange[0]}: expected pairs like lora_A and lora_B, or lora_down and lora_up; load "
            "the model that the file was trained on."
        )
    stated = _metadata_alphas(tensors)
    alphas = {part: stated[folder] for part, folder in FOLDERS.items() if folder in stated}
    pairs = {layer: _pair(layer, parts, alphas, path) for layer, parts in found.items()}
    adapters: dict[str, dict[Path, Factors]] = defaultdict(dict)
    for layer in pairs:
        if layer.path not in adapters[layer.part]:
            stack = {x.index: f for x, f in pairs.items() if x[:2] == layer[:2]}
            adapters[layer.part][layer.path] = _stacked(stack, layer)
    return dict(adapters)


def _pair(
    layer: _Layer, parts: Mapping[str, np.ndarray], alphas: Mapping[str, float], path: epath.Path
) -> Factors:
    name = ".".join(map(str, layer.path))
    if not {"down", "up"} <= set(parts):
        raise UserError(f"{path} has half a pair for {name}: expected both; copy it again.")
    down, up = parts["down"], parts["up"]
    rank = len(down)
    *window, inputs, outputs = layer.kernel
    # A linear layer here may be a 1x1 convolution there, and vice versa.
    ones = [1] * len(window)
    wanted = (rank, inputs, *window), (outputs, rank, *ones)
    if down.size != np.prod(wanted[0]) or up.size != np.prod(wanted[1]):
        raise UserError(
            f"{path}: the adapter of {name} is {down.shape} and {up.shape}, expected {wanted[0]} "
            f"and {wanted[1]}; load the model that it was trained on."
        )
    alpha = float(parts["alpha"]) if "alpha" in parts else alphas.get(layer.part, rank)
    down, up = down.reshape(wanted[0]), up.reshape(wanted[1]) * np.float32(alpha / rank)
    to_ours = (2, 3, 1, 0) if window else (1, 0)
    return Factors(down.transpose(to_ours), up.transpose(to_ours))


def _stacked(pairs: Mapping[int | None, Factors], layer: _Layer) -> Factors:
    """Stack the adapters of all layers, padded to the largest rank."""
    if layer.depth is None:
        return pairs[None]
    rank = max(pair.down.shape[-1] for pair in pairs.values())
    inputs, outputs = layer.kernel
    down = np.zeros((layer.depth, inputs, rank), np.float32)
    up = np.zeros((layer.depth, rank, outputs), np.float32)
    for index, pair in pairs.items():
        down[index, :, : pair.down.shape[-1]] = pair.down
        up[index, : pair.up.shape[-2]] = pair.up
    return Factors(down, up)


def _metadata_alphas(tensors: TensorFiles) -> dict[str, float]:
    """Return `lora_alpha` by part, where the file states one for all layers of the part."""
    try:
        stated = json.loads(tensors.metadata.get("lora_adapter_metadata", "{}"))
        return {
            name.removesuffix(".lora_alpha"): float(value)
            for name, value in stated.items()
            if name.endswith(".lora_alpha")
        }
    except (ValueError, AttributeError, TypeError):
        return {}


def write_lora(file: epath.PathLike, adapters: Adapters, spec: TextToImage) -> None:
    """Write a LoRA file that diffusers' `load_lora_weights` and `read_lora` read.

    Args:
      file: safetensors, or a folder to write `pytorch_lora_weights.safetensors` into.
      adapters: by part and path, with their scale in `up`.
      spec: of the model.
    """
    path = epath.Path(file)
    path = path / FILE if path.suffix != ".safetensors" else path
    tensors = {}
    for theirs, layer in _layers(spec).items():
        pair = adapters.get(layer.part, {}).get(layer.path)
        if pair is None:
            continue
        to_theirs = (3, 2, 0, 1) if len(layer.kernel) == 4 else (1, 0)
        for name, value in zip(("lora_A", "lora_B"), pair, strict=True):
            value = np.asarray(value if layer.index is None else value[layer.index])
            key = f"{theirs}.{name}.weight"
            tensors[key] = np.ascontiguousarray(value.transpose(to_theirs))
    write_whole(path, save(tensors, metadata={"format": "pt"}))
