"""Names of layers in LoRA files, in every spelling, and the roles of their tensors.

    unet.down_blocks.0 ... to_q.lora_A.weight              diffusers, PEFT; text_encoder. the same
    unet.down_blocks.0 ... processor.to_q_lora.down.weight diffusers before PEFT, and without unet.
    base_model.model.down_blocks.0 ... to_q.lora_A.weight  PEFT's own files
    lora_unet_down_blocks_0_ ... _to_q.lora_down.weight    kohya; lora_te_, lora_te1_, lora_te2_
    lora_unet_input_blocks_1_1_ ... _to_q.lora_down.weight kohya, by the original names of the U-Net
    diffusion_model.input_blocks.1.1 ... to_q.lora_A.weight ComfyUI

A name is a component, a layer and a role. Dots and underscores of a layer's name are the same here.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.lora import Path
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.clip_keys import TEXT_NAMES
from jaxdiff.pretrained.key_mapping import flatten_params, locate
from jaxdiff.pretrained.safetensors_io import Shape
from jaxdiff.pretrained.single_file_keys import unet_original_name
from jaxdiff.pretrained.stable_diffusion import ENCODERS
from jaxdiff.pretrained.unet_keys import UNET_NAMES

FOLDERS = {"denoiser": "unet", **ENCODERS}
"""Our parts by their names in a diffusers checkpoint, the components of a file."""

_COMPONENTS = {
    "unet": r"unet\.|lora_unet_|lycoris_unet_|(model\.)?diffusion_model\.",
    "text_encoder": r"text_encoder\.|lora_te1?_|lycoris_text_encoder_|text_encoders\.clip_l\.",
    "text_encoder_2": r"text_encoder_2\.|lora_te2_|lycoris_text_encoder_2_|text_encoders\.clip_g\.",
    "": "(lycoris_)?",  # of the layer that has the name
}
_WRAPPERS = r"(base_model\.model\.|_orig_mod\.|module\.|transformer\.(?=text_model))*"
_PREFIXES = {
    component: re.compile(f"{_WRAPPERS}({prefix}){_WRAPPERS}")
    for component, prefix in sorted(_COMPONENTS.items(), reverse=True)
}

_FACTOR = (
    r"(?:\.lora_{peft}(?:\.[^.]+)?|\.lora_{side}|[._]lora\.{side}|\.lora_linear_layer\.{side})"
)
_DOWN, _UP = _FACTOR.format(peft="A", side="down"), _FACTOR.format(peft="B", side="up")
_ROLES = {
    rf"{_DOWN}\.weight": "down",
    rf"{_UP}\.weight": "up",
    rf"{_UP}\.bias": "up_bias",
    r"[._]lora[._]mid\.weight": "mid",
    r"(?:[._]lora|\.lora_linear_layer)?\.alpha": "alpha",
    r"\.lora_magnitude_vector(?:\.[^.]+){0,2}": "magnitude",
    r"\.(?:diff|w_norm)": "diff",
    r"\.(?:diff_b|b_norm)": "diff_b",
    **{rf"\.{name}": name for name in ("dora_scale", "hada_t1", "hada_t2", "lokr_t2")},
    **{rf"\.{name}": name for name in (f"hada_w{i}_{x}" for i in (1, 2) for x in "ab")},
    **{rf"\.{name}": name for name in (f"lokr_w{i}{x}" for i in (1, 2) for x in ("", "_a", "_b"))},
}
_END = re.compile("(?:" + "|".join(f"(?P<r{i}>{end})" for i, end in enumerate(_ROLES)) + ")$")
_GROUPS = {f"r{i}": role for i, role in enumerate(_ROLES.values())}

_OTHERS = {
    r"\.(b?oft_\w+|rescale)(\.|$)": "OFT",
    r"\.on_input$|\.ia3_l(\.|$)": "(IA)^3",
    r"\.(a1|a2|b1|b2|bm)\.weight$": "GLoRA",
    r"\.([qp]_layer\.weight|lambda_layer)$": "T-LoRA",
    r"\.lora_embedding_[AB](\.|$)": "LoRA of an embedding",
    r"\.lora_E(\.|$)": "AdaLoRA",
    r"(^|\.)vera_": "VeRA",
    r"\.lora_diag(\.|$)": "KaSA",
    r"\.lokr_t1$": "LoKr with lokr_t1",
    r"\.scalar$": "LyCORIS' scalar",
    r"\.bias_(indices|values|size)$": "LyCORIS' sparse biases",
    r"\.(set_weight|set_bias|reshape_weight)$": "replaced weights",
    r"\.(base_layer|modules_to_save|original_module)\.": "PEFT's bias or modules_to_save",
    r"^bundle_emb\.": "a bundled embedding",
    r"^(unet|text_encoder):|:(up|down)$": "LoRA in the format of cloneofsimo/lora",
    r"^lora_controlnet$|\.(up|down)$": "Control-LoRA",
}
"""Ends of names that mark other methods."""


_LONGEST_SHOWN = 160  # characters


class Layer(NamedTuple):
    """A layer of ours; `index` is its index in a stack of `depth`, None for single layers.

    Attributes:
      name: in a diffusers checkpoint.
      part: `denoiser` or the name of a text encoder.
      path: of the layer.
      shapes: of its parameters `kernel`, `scale` and `bias`, without the stack's axis.
    """

    name: str
    part: str
    path: Path
    shapes: Mapping[str, Shape]
    index: int | None
    depth: int | None

    @property
    def weight(self) -> str:
        """The name of the parameter that PyTorch calls weight."""
        return "kernel" if "kernel" in self.shapes else "scale"


class Place(NamedTuple):
    """The layer and role of a tensor, and the name of the layer that PEFT's patterns match."""

    layer: Layer
    role: str
    component: str  # as the name states it: "" if it does not
    module: str


@functools.lru_cache(maxsize=4)
def layers_of(spec: TextToImage) -> dict[str, Layer]:
    """Return the layers that a file can change, by component and name in a diffusers checkpoint."""
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
    layers: dict[str, Layer] = {}
    for part, (params, table) in parts.items():
        for (*path, leaf), value in flatten_params(params).items():
            if leaf not in ("kernel", "scale", "bias"):
                continue
            tensor = locate((*path, leaf), value.shape, table)
            stacked = tensor.depth is not None
            shape = value.shape[1:] if stacked else value.shape
            for index, theirs in enumerate(tensor.names()):
                place = (index, tensor.depth) if stacked else (None, None)
                name = f"{FOLDERS[part]}.{theirs.rpartition('.')[0]}"
                layer = layers.setdefault(name, Layer(name, part, tuple(path), {}, *place))
                layers[name] = layer._replace(shapes={**layer.shapes, str(leaf): shape})
    return layers


def _flat(name: str) -> str:
    return name.replace(".", "_")


@functools.lru_cache(maxsize=4)
def _spellings(spec: TextToImage) -> dict[str, dict[str, Layer]]:
    """Return each component's layers by all names that files use, with underscores."""
    spellings: dict[str, dict[str, Layer]] = {
        FOLDERS[layer.part]: {} for layer in layers_of(spec).values()
    }
    for name, layer in layers_of(spec).items():
        component, _, theirs = name.partition(".")
        names = [theirs]
        if layer.part == "denoiser":
            assert isinstance(spec.denoiser, UNet2DConditionConfig)
            names.append(unet_original_name(theirs, spec.denoiser))
            names.append(re.sub(r"\.to_out\.0$", ".to_out", theirs))
        else:  # the text encoders of transformers from 5.6 on, and of the first diffusers
            old = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", theirs)
            names += [x.removeprefix("text_model.") for x in (theirs, old)] + [old]
        spellings[component] |= {_flat(x): layer for x in names}
    return spellings


def _split(name: str) -> tuple[str, str, str] | None:
    """Split a name into component, module and role; None for tensors of other methods."""
    end = _END.search(name)
    if end is None or end.lastgroup is None:
        return None
    module = name[: end.start()]
    for component, prefix in _PREFIXES.items():
        if start := prefix.match(module):
            module = module[start.end() :].replace(".processor.", ".")
            return component, module, _GROUPS[end.lastgroup]
    return None


def _fits(layer: Layer, role: str, shape: Shape) -> bool:
    """Whether a factor has the width of a layer's weights."""
    *_, inputs, outputs = layer.shapes.get("kernel", (0, 0))
    if len(shape) < 2 or role not in ("down", "up"):
        return True
    return shape[1] == inputs if role == "down" else shape[0] == outputs


def place_tensors(file: object, shapes: Mapping[str, Shape], spec: TextToImage) -> dict[str, Place]:
    """Return the place of each tensor of a file in the model.

    A name without a component is of the U-Net, or of the only text encoder that the file fits.

    Args:
      file: for messages.
      shapes: of the file's tensors, by name.
      spec: of the model.

    Raises:
      UserError: a tensor is of another method or model, or has the same place as another.
    """
    spellings = _spellings(spec)
    places: dict[str, Place] = {}
    ambiguous: dict[str, list[Place]] = {}
    for name in shapes:
        component, module, role = _split(name) or ("", name, "")
        folders = [component] if component else spellings
        known = [spellings[x] for x in folders if role and _flat(module) in spellings.get(x, {})]
        found = [Place(x[_flat(module)], role, component, module) for x in known]
        if len(found) == 1:
            places[name] = found[0]
        elif found:
            ambiguous[name] = found
    strange = [name for name in shapes if name not in places and name not in ambiguous]
    if strange:
        raise UserError(_complaint(file, strange))
    return _unique(file, places | _choose(file, shapes, ambiguous))


def _choose(
    file: object, shapes: Mapping[str, Shape], ambiguous: Mapping[str, list[Place]]
) -> dict[str, Place]:
    """Choose the text encoder that all names without a component fit."""
    options = list(zip(*ambiguous.values(), strict=True))
    fitting = [
        option
        for option in options
        if all(_fits(x.layer, x.role, shapes[n]) for n, x in zip(ambiguous, option, strict=True))
    ]
    if len(fitting) > 1:
        raise UserError(
            f"{file} fits both text encoders and names neither: expected tensor names that begin "
            "with text_encoder. or text_encoder_2.; rename its tensors."
        )
    return dict(zip(ambiguous, (fitting or options or [()])[0], strict=True))


def _unique(file: object, places: dict[str, Place]) -> dict[str, Place]:
    names: dict[tuple[str, str], str] = {}
    for name, place in places.items():
        other = names.setdefault((place.layer.name, place.role), name)
        if other != name:
            raise UserError(
                f"{file} has two tensors for one place, {_shown(other)} and {_shown(name)}: "
                "expected one adapter for each layer; leave one of them out."
            )
    return places


def _shown(name: str) -> str:
    """Return a name for a message of one line."""
    return repr(name[:_LONGEST_SHOWN])[1:-1]


def _complaint(file: object, strange: list[str]) -> str:
    """Return the message for tensors that have no place in the model."""
    for end, method in _OTHERS.items():
        if name := next(filter(re.compile(end).search, strange), None):
            return (
                f"{file} has {method} ({_shown(name)}), which jaxdiff does not read: expected "
                "LoRA, DoRA, LoHa, LoKr or differences of weights; convert it to LoRA."
            )
    return (
        f"{file} has {len(strange)} tensors that are no LoRA of this model's layers, such as "
        f"{_shown(strange[0])}: expected pairs like lora_A and lora_B, or lora_down and lora_up; "
        "load the model that the file was trained on."
    )
