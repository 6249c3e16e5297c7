"""LoRA files of diffusers, PEFT, kohya's scripts, ai-toolkit and LyCORIS.

`lora_layers` has the layers and their spellings, `lora_names` the names of tensors, `lora_kinds`
the kinds of adapters, and `lora_scale` what PEFT's configs state of their scale.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import reason
from jaxdiff.io.text import parse_json, read_json
from jaxdiff.models.lora import Adapters, Change, Factors, Path
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.lora_kinds import Adapter, Apply, Effect, to_ours, to_theirs
from jaxdiff.pretrained.lora_layers import PARTS, Layer, layers_of
from jaxdiff.pretrained.lora_names import Target, find_targets
from jaxdiff.pretrained.lora_scale import PeftConfig, read_peft_config
from jaxdiff.pretrained.original_layout import Rows, cut, put
from jaxdiff.pretrained.safetensors_io import Shape, TensorFiles, write_tensors

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PEFT_NAME = "base_model.model."  # the beginning of names in PEFT's own files
_METADATA = "lora_adapter_metadata"  # of diffusers: PEFT's keys for each component
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def read_lora(file: epath.PathLike, spec: TextToImage) -> dict[str, dict[Path, Factors | Change]]:
    """Read the adapters in a LoRA file, with their scale, in float32.

    Where only some layers of a stack have adapters, the others get zeros.

    Args:
      file: safetensors, or the folder of one, as diffusers and PEFT write it.
      spec: of the model.

    Returns:
      By part, `denoiser` or the name of a text encoder: the factors of plain LoRA, with their
      scale in `up`, by the path of the layer; changes by other kinds by the path of the parameter.

    Raises:
      UserError: the file is damaged, empty, pickled, of an unknown kind of adapter, for another
        model, or holds numbers that are not finite.
    """
    path = _find(epath.Path(file))
    layers_of(spec)  # another model is refused before a damaged file
    tensors = TensorFiles([path], _SMALL_FLOATS)
    if not tensors:
        raise UserError(f"{path} has no tensors: expected those of a LoRA; copy it again.")
    targets = find_targets(path, tensors.shapes, spec)
    configs = _configs(path, tensors)
    grouped: dict[str, dict[str, Target]] = defaultdict(dict)
    for name, target in targets.items():
        grouped[target.layer.name][name] = target
    effects: dict[tuple[str, Path], list[tuple[Layer, Effect]]] = defaultdict(list)
    for group in grouped.values():
        first = next(iter(group.values()))
        found = {target.role: tensors[name] for name, target in group.items()}
        config = configs.get(first.component)
        effect = Adapter(path, first.layer, first.module, found, config).read()
        for layer, own in _by_layer(first.layer, effect):
            effects[layer.part, layer.path].append((layer, own))
    adapters: dict[str, dict[Path, Factors | Change]] = defaultdict(dict)
    for (part, layer_path), stack in effects.items():
        pairs = [(layer, effect.pair) for layer, effect in stack if effect.pair is not None]
        if pairs:
            adapters[part][layer_path] = _stacked(pairs)
        for name in sorted({name for _, effect in stack for name in effect.changes}):
            adapters[part][*layer_path, name] = _change(name, stack)
    return dict(adapters)


_SMALL_FLOATS = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}


def _find(path: epath.Path) -> epath.Path:
    """Return the file of a folder, and check that a file is of safetensors."""
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else None
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        raise UserError(
            f"{path} cannot be read ({reason(error)}): give the path of a LoRA file or its folder."
        ) from error
    if inside is None:
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is no LoRA file: expected a .safetensors file; convert it.")
        return path
    files = [x for x in inside if x.suffix == ".safetensors"]
    named = [path / name for name in (FILE, PEFT_FILE) if path / name in files]
    if not files and any(x.suffix in _PICKLED for x in inside):
        raise UserError(
            f"{path} holds only pickled files, which can run code: expected {FILE}; convert them "
            "to safetensors."
        )
    if not named and len(files) != 1:
        raise UserError(
            f"{path} has {len(files)} .safetensors files: expected {FILE}, or one file alone; give "
            "the path of the file."
        )
    return (named or files)[0]


def _configs(path: epath.Path, tensors: TensorFiles) -> dict[str, PeftConfig]:
    """Return what PEFT's configs state, by component; "" is of names without one."""
    stated: dict[str, dict[str, Any]] = defaultdict(dict)
    if text := tensors.metadata.get(_METADATA):
        what = f"{path}, {_METADATA}"
        config = parse_json(text, what)
        if not isinstance(config, Mapping):
            raise UserError(f"{what} is no config of PEFT: expected a JSON object; copy it again.")
        for key, value in config.items():
            folder, _, rest = key.partition(".")
            part, rest = (PARTS[folder], rest) if folder in PARTS and rest else ("", key)
            stated[part][rest] = value
    configs = {x: read_peft_config(f"{path}, {_METADATA}", keys) for x, keys in stated.items()}
    beside = path.parent / PEFT_CONFIG
    is_peft = path.name == PEFT_FILE or any(name.startswith(_PEFT_NAME) for name in tensors)
    if is_peft and beside.exists():
        configs[""] = read_peft_config(str(beside), read_json(beside), selects=True)
    return configs


def _by_layer(layer: Layer, effect: Effect) -> Iterator[tuple[Layer, Effect]]:
    """Yield the layers of ours that an adapter changes, with its effect on each."""
    for own, rows in layer.pieces:
        if rows is None:
            yield own, effect
            continue
        pair = effect.pair and Factors(effect.pair.down, cut(rows)(effect.pair.up.T).T)
        changes = {
            name: functools.partial(_of_rows, change, rows, layer.shapes[name][::-1])
            for name, change in effect.changes.items()
        }
        yield own, Effect(effect.kind, pair, changes)


def _of_rows(change: Apply, rows: Rows, shape: Shape, value: np.ndarray, scale: float) -> Any:
    """Apply a change of a module to the rows of one layer in it; others do not matter to them."""
    whole = np.zeros(shape, value.dtype)
    put(whole, rows, value)
    return cut(rows)(change(whole, scale))


def _stacked(pairs: list[tuple[Layer, Factors]]) -> Factors:
    """Stack the factors of all layers, padded to the largest rank."""
    layer = pairs[0][0]
    if layer.depth is None:
        return pairs[0][1]
    rank = max(pair.down.shape[-1] for _, pair in pairs)
    inputs, outputs = layer.shapes["kernel"]
    down = np.zeros((layer.depth, inputs, rank), np.float32)
    up = np.zeros((layer.depth, rank, outputs), np.float32)
    for at, pair in pairs:
        assert at.index is not None
        down[at.index, :, : pair.down.shape[-1]] = pair.down
        up[at.index, : pair.up.shape[-2]] = pair.up
    return Factors(down, up)


def _change(name: str, stack: list[tuple[Layer, Effect]]) -> Change:
    """Return the change of a parameter of a layer, or of all those of a stack."""
    changes: dict[int | None, Apply] = {
        layer.index: effect.changes[name] for layer, effect in stack if name in effect.changes
    }

    def apply(value: np.ndarray, scale: float) -> np.ndarray:
        if None in changes:
            return to_ours(changes[None](to_theirs(value), scale))
        value = value.copy()
        for index, change in changes.items():
            value[index] = to_ours(change(to_theirs(value[index]), scale))
        return value

    kinds = sorted({effect.kind for _, effect in stack if name in effect.changes})
    return Change(kind=" and ".join(kinds), apply=apply)


def write_lora(file: epath.PathLike, adapters: Adapters, spec: TextToImage) -> None:
    """Write a LoRA file that diffusers' `load_lora_weights` and `read_lora` read.

    Args:
      file: safetensors, or a folder to write `pytorch_lora_weights.safetensors` into.
      adapters: by part and path, with their scale in `up`.
      spec: of the model.

    Raises:
      UserError: such files have no names for an adapted layer, such as one of T5's.
    """
    path = epath.Path(file)
    path = path / FILE if path.suffix != ".safetensors" else path
    tensors, layers = {}, layers_of(spec)
    named = {(layer.part, layer.path) for layer in layers.values()}
    for part, pairs in adapters.items():
        if lost := [x for x in pairs if (part, x) not in named]:
            name = ".".join(map(str, (part, *lost[0])))
            raise UserError(
                f"LoRA files have no name for {name}, which has an adapter in {spec.name}: "
                "expected adapters of the denoiser or of CLIP's text encoders; export them with "
                "--format jaxdiff."
            )
    for theirs, layer in layers.items():
        pair = adapters.get(layer.part, {}).get(layer.path)
        if pair is None:
            continue
        for name, value in zip(("lora_A", "lora_B"), pair, strict=True):
            value = np.asarray(value if layer.index is None else value[layer.index])
            tensors[f"{theirs}.{name}.weight"] = to_theirs(value)
    write_tensors(path, tensors)
