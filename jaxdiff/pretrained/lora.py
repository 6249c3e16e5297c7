"""LoRA files of Stable Diffusion: those of diffusers and PEFT, and those of kohya's scripts.

    unet.down_blocks.0 ... to_q.lora_A.weight              diffusers, PEFT; text_encoder. the same
    unet.down_blocks.0 ... processor.to_q_lora.down.weight diffusers before PEFT
    lora_unet_down_blocks_0_ ... _to_q.lora_down.weight    kohya; lora_te_, lora_te1_, lora_te2_
    lora_unet_input_blocks_1_1_ ... _to_q.lora_down.weight kohya, by the original names of the U-Net

An output counts alpha / rank: kohya has a tensor `alpha` by each pair, PEFT has it in the file's
metadata, and where there is none it is the rank.
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
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig, UNet2DConditionModel
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.lora import Factors, Path
from jaxdiff.models.text_encoders.clip import ClipText
from jaxdiff.pipelines.lora import Adapters
from jaxdiff.pretrained.clip import TEXT_NAMES
from jaxdiff.pretrained.diffusers import text_folders
from jaxdiff.pretrained.key_mapping import flatten, locate
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file import unet_original_name
from jaxdiff.pretrained.unet import UNET_NAMES
from jaxdiff.training.tasks.diffusion import DiffusionTask

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
    """A layer of ours; `index` is its place in a stack of `depth`, None where it is alone."""

    part: str
    path: Path
    kernel: tuple[int, ...]  # without the stack's axis
    index: int | None
    depth: int | None


@functools.lru_cache(maxsize=4)
def _layers(task: DiffusionTask) -> dict[str, _Layer]:
    """The layers that can have an adapter, by part and name in a diffusers checkpoint."""
    if not isinstance(task.denoiser, UNet2DConditionConfig):
        raise UserError(
            f"The model's denoiser is a {type(task.denoiser).__name__.removesuffix('Config')}: "
            "LoRA files are for Stable Diffusion's U-Net."
        )
    network = task.denoiser
    parts: dict[str, tuple[Any, Mapping[str, str]]] = {
        "denoiser": (bind_init(UNet2DConditionModel, network), UNET_NAMES)
    }
    for name, tower in task.towers.items():
        parts[name] = (bind_init(ClipText, tower.model), TEXT_NAMES)
    folders, layers = _folders(task), {}
    for part, (build, table) in parts.items():
        for path, leaf in flatten(abstract_params(build)).items():
            if path[-1] != "kernel":
                continue
            tensor = locate(path, leaf.shape, table)
            stacked = tensor.depth is not None
            kernel = leaf.shape[1:] if stacked else leaf.shape
            for index, name in enumerate(tensor.names()):
                place = (index, tensor.depth) if stacked else (None, None)
                name = f"{folders[part]}.{name.removesuffix('.weight')}"
                layers[name] = _Layer(part, path[:-1], kernel, *place)
    return layers


def _folders(task: DiffusionTask) -> dict[str, str]:
    """The names of our parts in a diffusers checkpoint."""
    return {"denoiser": "unet"} | dict(zip(task.towers, text_folders(task), strict=True))


def _names(task: DiffusionTask) -> dict[str, _Layer]:
    """Every name that a file may call a layer by."""
    names = dict(_layers(task))
    for name, layer in _layers(task).items():
        folder, _, theirs = name.partition(".")
        calls = [theirs]
        if layer.part == "denoiser":
            names[f"base_model.model.{theirs}"] = layer
            assert isinstance(task.denoiser, UNet2DConditionConfig)
            calls.append(unet_original_name(theirs, task.denoiser))
        for kind in _KOHYA[folder]:
            names |= {f"lora_{kind}_{call.replace('.', '_')}": layer for call in calls}
    return names


def _split(name: str) -> tuple[str, str] | None:
    """The name of the layer, and which of its tensors it is; None for what is not of LoRA."""
    # to_q_lora of a processor is what to_q has later; its output layer is the first of a list.
    name = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", name)
    name = name.replace(".to_out.lora.", ".to_out.0.lora.")
    for end, kind in _ENDS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), kind
    return None


def read_lora(file: epath.PathLike, task: DiffusionTask) -> dict[str, dict[Path, Factors]]:
    """The adapters in a LoRA file, with their scale in `up`, in float32.

    Where a stack of layers has them for some of its layers, the others get zeros.

    Args:
      file: safetensors, or a folder with `pytorch_lora_weights.safetensors`.
      task: of the model that they are for.

    Raises:
      UserError: the file is damaged, pickled, of another kind of adapter, or of another model.
    """
    path = epath.Path(file)
    path = path / FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: LoRA is read from .safetensors files alone; convert it.")
    tensors = TensorFiles([path])
    layers, found = _names(task), defaultdict(dict)
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
            f"{strange[0]}: expected pairs like lora_A and lora_B, or lora_down and lora_up, for "
            "the layers of the model that it was trained on."
        )
    said, folders = _metadata_alphas(tensors), _folders(task)
    alphas = {part: said[folder] for part, folder in folders.items() if folder in said}
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
        raise UserError(f"{path} has half a pair for {name}: expected both; copy it anew.")
    down, up = parts["down"], parts["up"]
    rank = len(down)
    *window, inputs, outputs = layer.kernel
    # A layer may be linear here and a 1x1 convolution there, or the other way round.
    ones = [1] * len(window)
    wanted = (rank, inputs, *window), (outputs, rank, *ones)
    if down.size != np.prod(wanted[0]) or up.size != np.prod(wanted[1]):
        raise UserError(
            f"{path}: the adapter of {name} is {down.shape} and {up.shape}, expected {wanted[0]} "
            f"and {wanted[1]}; is it for another model?"
        )
    alpha = float(parts["alpha"]) if "alpha" in parts else alphas.get(layer.part, rank)
    down, up = down.reshape(wanted[0]), up.reshape(wanted[1]) * np.float32(alpha / rank)
    to_ours = (2, 3, 1, 0) if window else (1, 0)
    return Factors(down.transpose(to_ours), up.transpose(to_ours))


def _stacked(pairs: Mapping[int | None, Factors], layer: _Layer) -> Factors:
    """All layers of a stack, of the greatest of their ranks."""
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
    """`lora_alpha` by part, where the file says it; for all layers of the part."""
    try:
        said = json.loads(tensors.metadata.get("lora_adapter_metadata", "{}"))
        return {
            name.removesuffix(".lora_alpha"): float(value)
            for name, value in said.items()
            if name.endswith(".lora_alpha")
        }
    except (ValueError, AttributeError, TypeError):
        return {}


def write_lora(file: epath.PathLike, adapters: Adapters, task: DiffusionTask) -> None:
    """Writes a LoRA file that diffusers' `load_lora_weights` and `read_lora` read.

    Args:
      file: safetensors, or a folder to write `pytorch_lora_weights.safetensors` into.
      adapters: with their scale in `up`.
      task: of the model that they are for.
    """
    path = epath.Path(file)
    path = path / FILE if path.suffix != ".safetensors" else path
    tensors = {}
    for theirs, layer in _layers(task).items():
        pair = adapters.get(layer.part, {}).get(layer.path)
        if pair is None:
            continue
        to_theirs = (3, 2, 0, 1) if len(layer.kernel) == 4 else (1, 0)
        for name, value in zip(("lora_A", "lora_B"), pair, strict=True):
            value = np.asarray(value if layer.index is None else value[layer.index])
            key = f"{theirs}.{name}.weight"
            tensors[key] = np.ascontiguousarray(value.transpose(to_theirs))
    write_whole(path, save(tensors, metadata={"format": "pt"}))
