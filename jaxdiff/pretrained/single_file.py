"""Stable Diffusion as one safetensors file in the layout of its original training code.

    model.diffusion_model.*            the U-Net
    first_stage_model.*                the autoencoder
    cond_stage_model.*                 the text encoder of 1.x (CLIP) and 2.x (OpenCLIP)
    conditioner.embedders.N.*          those of XL

Such a file holds only weights. Tensor names identify the model; everything else is as published.
2.x is the variant for 768 pixels, which predicts v unless the file states eps.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_keys, clip_keys, unet_keys
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.hub import download_tokenizer
from jaxdiff.pretrained.presets import (
    CLIP_L,
    OPENCLIP_G,
    OPENCLIP_H,
    REFINER,
    SD1,
    SD2,
    XL,
    XL_SCALING_FACTOR,
)
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, TensorFiles, to_device
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, Euler

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."

OPENCLIP_PAD = 0
"""The id of "!", with which OpenCLIP pads."""


class Variant(NamedTuple):
    """One published generation.

    Attributes:
      mark: the name of a tensor that no earlier entry of `VARIANTS` has.
      network: the U-Net.
      conditioner: the text encoders.
      prefixes: the beginnings of the text encoders' tensor names, by encoder.
      sampler: default sampler settings.
      prediction: of the network, unless the file states it.
      autoencoder: its size.
      size: of the images, in pixels.
    """

    mark: str
    network: UNet2DConditionConfig
    conditioner: ClipConditioner | StableDiffusionXLConditioner
    prefixes: dict[str, str]
    sampler: Sampler
    prediction: Prediction = "eps"
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    size: int = 512


def _leading(solver: PLMS | Euler | DDIM, **changes: Any) -> Sampler:
    grid = TrainStepGrid(offset=1, **changes)
    return Sampler(solver=solver, grid=grid, init_noise="unit", num_steps=50, guidance_scale=7.5)


def _penultimate(model: ClipTextConfig) -> ClipTextEncoder:
    """Return an encoder of XL: the penultimate hidden state, without the final norm."""
    return ClipTextEncoder(model=model, hidden_layer=-2, final_norm=False)


_XL_SAMPLER = _leading(Euler(), rounded=False)

VARIANTS = [
    Variant(
        "conditioner.embedders.1.model.ln_final.weight",
        XL,
        StableDiffusionXLConditioner(text=_penultimate(CLIP_L), text_2=_penultimate(OPENCLIP_G)),
        {
            "text": "conditioner.embedders.0.transformer.",
            "text_2": "conditioner.embedders.1.model.",
        },
        _XL_SAMPLER,
        autoencoder=AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),
        size=1024,
    ),
    Variant(
        "conditioner.embedders.0.model.ln_final.weight",
        REFINER,
        StableDiffusionXLConditioner(text_2=_penultimate(OPENCLIP_G)),
        {"text_2": "conditioner.embedders.0.model."},
        _XL_SAMPLER,
        autoencoder=AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),
        size=1024,
    ),
    Variant(
        "cond_stage_model.model.ln_final.weight",
        SD2,
        ClipConditioner(text=ClipTextEncoder(model=OPENCLIP_H), masked=False),
        {"text": "cond_stage_model.model."},
        _leading(DDIM(), ends_at="first_step"),
        prediction="v",
        size=768,
    ),
    Variant(
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        SD1,
        ClipConditioner(text=ClipTextEncoder(model=CLIP_L), masked=False),
        {"text": "cond_stage_model.transformer."},
        _leading(PLMS(), ends_at="first_step"),
    ),
]


def read_original_spec(file: epath.PathLike) -> TextToImage:
    """Read the specification of a Stable Diffusion checkpoint in one file.

    Raises:
      UserError: the file is damaged, or of a kind that jaxdiff does not know.
    """
    file = epath.Path(file)
    return _identify(file, TensorFiles([file]))[1]


def read_original(
    file: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> Bundle:
    """Read a Stable Diffusion checkpoint in one file, with tensors in their stored type.

    The file has no tokenizer: CLIP's is downloaded from the hub.

    Args:
      file: safetensors.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the file is damaged or of a kind that jaxdiff does not know, or the tokenizer
        cannot be downloaded.
    """
    file = epath.Path(file)
    tensors = TensorFiles([file])
    variant, spec = _identify(file, tensors)
    network, model = spec.denoiser, variant.autoencoder
    assert isinstance(network, UNet2DConditionConfig)
    parts = Renamed(tensors, unet_rename(network))
    params = {
        "denoiser": unet_keys.unet_from_torch(parts, network, place=place),
        "text_encoders": {},
    }
    parts = Renamed(tensors, autoencoder_rename(model))
    params["autoencoder"] = autoencoder_keys.autoencoder_from_torch(parts, model, place=place)
    for name, encoder in variant.conditioner.encoders.items():
        parts = Renamed(tensors, text_rename(variant.prefixes[name], encoder.model))
        params["text_encoders"][name] = clip_keys.clip_from_torch(parts, encoder.model, place=place)
    return Bundle(spec, params, _tokenizers(variant))


def read_original_tokenizers(file: epath.PathLike) -> dict[str, Tokenizer]:
    """Return CLIP's tokenizer for each text encoder, padded as the model in `file` expects."""
    file = epath.Path(file)
    return _tokenizers(_identify(file, TensorFiles([file]))[0])


def _tokenizers(variant: Variant) -> dict[str, Tokenizer]:
    plain = Tokenizer.load(str(download_tokenizer()))
    return {
        name: plain.with_pad(OPENCLIP_PAD) if prefix.endswith(_OPENCLIP_PREFIX) else plain
        for name, prefix in variant.prefixes.items()
    }


def _identify(file: epath.Path, tensors: TensorFiles) -> tuple[Variant, TextToImage]:
    """Return the published model of a file, and its specification."""
    variant = next((variant for variant in VARIANTS if variant.mark in tensors), None)
    stem = tensors.shapes.get(f"{UNET}input_blocks.0.0.weight")
    if variant is None or stem is None:
        raise UserError(
            f"{file} is no checkpoint of Stable Diffusion 1.x, 2.x or XL: expected a tensor "
            f"{VARIANTS[-1].mark} or one like it; give the file of a whole model."
        )
    prediction, schedule = objective_of(variant, tensors)
    return variant, TextToImage(
        name=file.stem,
        denoiser=dataclasses.replace(variant.network, in_channels=stem[1]),
        conditioner=variant.conditioner,
        autoencoder=variant.autoencoder,
        prediction=prediction,
        schedule=schedule,
        image_size=variant.size,
        sampler=variant.sampler,
    )


_PREDICTIONS: dict[str, Prediction] = {"v": "v", "v_prediction": "v", "epsilon": "eps"}


def objective_of(variant: Variant, tensors: TensorFiles) -> tuple[Prediction, ScaledLinear]:
    """Return prediction and schedule as the file states them, else as published.

    A file states them in its metadata (Stability AI's ModelSpec 1.0.1, `modelspec.prediction_type`)
    or, as later models of XL's shape do, by empty tensors named `v_pred` and `ztsnr`.
    """
    stated = "v" if "v_pred" in tensors else tensors.metadata.get("modelspec.prediction_type")
    prediction = _PREDICTIONS.get(stated or "", variant.prediction)
    return prediction, ScaledLinear(zero_terminal_snr="ztsnr" in tensors)


def _table_rename(
    prefix: str, table: Mapping[str, str], inner: Mapping[str, str]
) -> Callable[[str], str | None]:
    """Rename the longest prefix in `table`, then modules within a residual block."""

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        pieces = name.removeprefix(prefix).split(".")
        for end in range(len(pieces), 0, -1):
            theirs = table.get(".".join(pieces[:end]))
            if theirs is not None:
                rest = ".".join(pieces[end:])
                for old, new in inner.items():
                    if rest.startswith(f"{old}."):
                        rest = new + rest.removeprefix(old)
                return f"{theirs}.{rest}"
        return None

    return rename


_UNET_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_rename(config: UNet2DConditionConfig) -> Callable[[str], str | None]:
    """Rename the U-Net's tensors to diffusers' names; None for other parts' tensors."""
    return _table_rename(UNET, _unet_table(config), _UNET_BLOCK)


def unet_original_name(name: str, config: UNet2DConditionConfig) -> str:
    """Invert `unet_rename`, for layers too, and without the U-Net's prefix."""
    modules = {new: old for old, new in _unet_table(config).items()}
    pieces = name.split(".")
    end = next(n for n in range(len(pieces), 0, -1) if ".".join(pieces[:n]) in modules)
    old, rest = modules[".".join(pieces[:end])], pieces[end:]
    if rest and "resnets" in pieces:
        inner = {new: old for old, new in _UNET_BLOCK.items()}
        rest[0] = inner.get(rest[0], rest[0])
    return ".".join([old, *rest])


@functools.lru_cache(maxsize=4)
def _unet_table(config: UNet2DConditionConfig) -> dict[str, str]:
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    depths, layers = config.transformer_layers, config.layers_per_block
    number = 1
    for i, depth in enumerate(depths):
        for j in range(layers):
            table[f"input_blocks.{number}.0"] = f"down_blocks.{i}.resnets.{j}"
            if depth:
                table[f"input_blocks.{number}.1"] = f"down_blocks.{i}.attentions.{j}"
            number += 1
        if i + 1 < len(depths):
            table[f"input_blocks.{number}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            number += 1
    number = 0
    for i, depth in enumerate(reversed(depths)):
        for j in range(layers + 1):
            table[f"output_blocks.{number}.0"] = f"up_blocks.{i}.resnets.{j}"
            if depth:
                table[f"output_blocks.{number}.1"] = f"up_blocks.{i}.attentions.{j}"
            if j == layers and i + 1 < len(depths):
                resample = f"output_blocks.{number}.{2 if depth else 1}.conv"
                table[resample] = f"up_blocks.{i}.upsamplers.0.conv"
            number += 1
    return table


_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def autoencoder_rename(
    config: AutoencoderConfig,
) -> Callable[[str], str | Mapping[str, Cut] | None]:
    """Rename the autoencoder's tensors to diffusers' names; None for other parts' tensors."""
    levels = len(config.block_out_channels)
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, level, resample in (("encoder", "down", "down"), ("decoder", "up", "up")):
        table |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
            f"{half}.mid.block_1": f"{half}.mid_block.resnets.0",
            f"{half}.mid.block_2": f"{half}.mid_block.resnets.1",
            f"{half}.mid.attn_1.norm": f"{half}.mid_block.attentions.0.group_norm",
        }
        for old, new in _ATTENTION.items():
            table[f"{half}.mid.attn_1.{old}"] = f"{half}.mid_block.attentions.0.{new}"
        for i in range(levels):
            # The original counts the decoder's levels from the finest, too.
            theirs = i if half == "encoder" else levels - 1 - i
            ours = f"{half}.{level}_blocks.{i}"
            for j in range(config.layers_per_block + 1):
                table[f"{half}.{level}.{theirs}.block.{j}"] = f"{ours}.resnets.{j}"
            table[f"{half}.{level}.{theirs}.{resample}sample.conv"] = (
                f"{ours}.{resample}samplers.0.conv"
            )
    rename = _table_rename(AUTOENCODER, table, {"nin_shortcut": "conv_shortcut"})

    def with_linear_attention(name: str) -> str | Mapping[str, Cut] | None:
        new = rename(name)
        if new and re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name):
            return {new: lambda kernel: kernel[:, :, 0, 0]}  # a 1x1 convolution there
        return new

    return with_linear_attention


_OPENCLIP_PREFIX = ".model."  # of the names of OpenCLIP's tensors
_OPENCLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPENCLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def text_rename(
    prefix: str, config: ClipTextConfig
) -> Callable[[str], str | Mapping[str, Cut] | None]:
    """Rename a text encoder's tensors to transformers' names; None for other parts' tensors.

    OpenCLIP has queries, keys and values in one matrix; blocks after `config.depth` are dropped.
    """

    def rename(name: str) -> str | Mapping[str, Cut] | None:
        if not name.startswith(prefix):
            return None
        name = name.removeprefix(prefix)
        if not prefix.endswith(_OPENCLIP_PREFIX):
            return name
        if name == "text_projection" and config.projection_dim is not None:
            return {"text_projection.weight": np.transpose}
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", name)
        if block is None:
            return _OPENCLIP_ENDS.get(name)
        layer, module, kind = block.groups()
        if int(layer) >= config.depth:
            return None
        ours = f"text_model.encoder.layers.{layer}"
        if kind.startswith("in_proj_"):
            kind = kind.removeprefix("in_proj_")
            return {
                f"{ours}.self_attn.{part}_proj.{kind}": _third(i) for i, part in enumerate("qkv")
            }
        return f"{ours}.{_OPENCLIP[module]}.{kind}"

    return rename


def _third(i: int) -> Cut:
    return lambda x: x[i * len(x) // 3 : (i + 1) * len(x) // 3]
