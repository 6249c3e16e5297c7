"""Names of layers in LoRA files, in every spelling, and the roles of their tensors.

    unet.down_blocks.0 ... to_q.lora_A.weight              diffusers, PEFT; text_encoder. the same
    unet.down_blocks.0 ... processor.to_q_lora.down.weight diffusers before PEFT, and without unet.
    base_model.model.down_blocks.0 ... to_q.lora_A.weight  PEFT's own files
    lora_unet_down_blocks_0_ ... _to_q.lora_down.weight    kohya; lora_te_, lora_te1_, lora_te2_
    lora_unet_input_blocks_1_1_ ... _to_q.lora_down.weight kohya, by the original names of the U-Net
    diffusion_model.input_blocks.1.1 ... to_q.lora_A.weight ComfyUI, ai-toolkit
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight diffusers, of FLUX; lora_transformer_
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight kohya, of FLUX

A name is a component, a layer and a role. Dots and underscores of a layer's name are the same here.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.lora_layers import Layer, flat_name, spellings_of
from jaxdiff.pretrained.safetensors_io import Shape

_COMPONENTS = {
    "denoiser": (
        r"unet\.|lora_unet_|lycoris_unet_|(model\.)?diffusion_model\.|lora_transformer_"
        r"|transformer\.(?!text_model)"
    ),
    "text": r"text_encoder\.|lora_te1?_|lycoris_text_encoder_|text_encoders\.clip_l\.",
    "text_2": r"text_encoder_2\.|lora_te2_|lycoris_text_encoder_2_|text_encoders\.clip_g\.",
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


class Target(NamedTuple):
    """The layer and role of a tensor, and the name of the layer that PEFT's patterns match."""

    layer: Layer
    role: str
    component: str  # our part, as the name states it: "" if it does not
    module: str


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


def find_targets(file: object, shapes: Mapping[str, Shape], spec: TextToImage) -> dict[str, Target]:
    """Return the layer and role of each tensor of a file.

    A name without a component is of the denoiser, or of the only text encoder that the file fits.

    Args:
      file: for messages.
      shapes: of the file's tensors, by name.
      spec: of the model.

    Raises:
      UserError: a tensor is of another method or model, or has the same place as another.
    """
    spellings = spellings_of(spec)
    targets: dict[str, Target] = {}
    ambiguous: dict[str, list[Target]] = {}
    for name in shapes:
        component, module, role = _split(name) or ("", name, "")
        parts = [component] if component else spellings
        flat = flat_name(module)
        known = [spellings[x][flat] for x in parts if role and flat in spellings.get(x, {})]
        found = [Target(layer, role, component, module) for layer in known]
        if len(found) == 1:
            targets[name] = found[0]
        elif found:
            ambiguous[name] = found
    strange = [name for name in shapes if name not in targets and name not in ambiguous]
    if strange:
        raise UserError(_complaint(file, strange))
    return _unique(file, targets | _choose(file, shapes, ambiguous))


def _choose(
    file: object, shapes: Mapping[str, Shape], ambiguous: Mapping[str, list[Target]]
) -> dict[str, Target]:
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


def _unique(file: object, targets: dict[str, Target]) -> dict[str, Target]:
    names: dict[tuple[str, str], str] = {}
    for name, target in targets.items():
        for layer, _ in target.layer.pieces:
            other = names.setdefault((layer.name, target.role), name)
            if other != name:
                raise UserError(
                    f"{file} has two tensors for one place, {_shown(other)} and {_shown(name)}: "
                    "expected one adapter for each layer; leave one of them out."
                )
    return targets


def _shown(name: str) -> str:
    """Return a name for a message of one line."""
    return repr(name[:_LONGEST_SHOWN])[1:-1]


_FAMILIES = {
    r"joint_blocks": "Stable Diffusion 3",
    r"(down|up|input|output|mid|middle)_block": "Stable Diffusion 1, 2 or XL",
    r"(context|noise)_refiner|layers[._]\d+[._](attention|feed_forward)": "Z-Image",
    r"stream_modulation|(single\w*attn|to_qkv_mlp)|linear_(in|out)\b": "FLUX.2",
    r"(img|txt)_mod[._]lin|modulation[._]lin|vector_in|proj_mlp|(ff|ff_context)[._]net": "FLUX.1",
    r"(double|single)_blocks|(single_|^)transformer_blocks": "FLUX",
}
"""Names of layers of each family."""


def _complaint(file: object, strange: list[str]) -> str:
    """Return the message for tensors that have no place in the model."""
    for end, method in _OTHERS.items():
        if name := next(filter(re.compile(end).search, strange), None):
            return (
                f"{file} has {method} ({_shown(name)}), which jaxdiff does not read: expected "
                "LoRA, DoRA, LoHa, LoKr or differences of weights; convert it to LoRA."
            )
    known = (kind for mark, kind in _FAMILIES.items() if any(re.search(mark, x) for x in strange))
    family = next(known, None)
    like = "" if family is None else f", as of {family}"
    return (
        f"{file} has {len(strange)} tensors that are no LoRA of this model's layers{like}, such as "
        f"{_shown(strange[0])}: expected pairs like lora_A and lora_B, or lora_down and lora_up; "
        "load the model that the file was trained on."
    )
