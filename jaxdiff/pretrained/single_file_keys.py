"""Names of the tensors in single files of Stable Diffusion, in every spelling that tools write.

    component_of    name -> component of the model, name within it
    unet_rename     the original layout's names, or diffusers'  -> diffusers' U-Net
    vae_rename      the same                                    -> diffusers' AutoencoderKL
    text_rename     OpenCLIP's names, or transformers'          -> transformers' CLIPTextModel

A name that no table knows stays as it is, so that reading the component reports it.
"""

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pretrained.safetensors_io import Cut, to_linear

UNET, AUTOENCODER, TEXT = "denoiser", "autoencoder", "text"
IRRELEVANT, UNKNOWN = "irrelevant", "unknown"

New = str | Mapping[str, Cut] | None
"""What `safetensors_io.Renamed` takes: a name, parts of the tensor by name, or None."""

_WRAPPERS = re.compile(r"(state_dict|module)\.")

_COMPONENTS = {
    r"(model\.)?diffusion_model\.|unet\.": UNET,
    r"first_stage_model\.|vae\.": AUTOENCODER,
    r"cond_stage_model\.((transformer|model)\.)?": f"{TEXT} 0",
    r"conditioner\.embedders\.0\.(transformer|model)\.|text_encoder\.": f"{TEXT} 0",
    r"conditioner\.embedders\.1\.(transformer|model)\.|text_encoder_2\.": f"{TEXT} 1",
}
"""Components by the beginnings of names; text encoders in the order of the conditioner's."""

_IRRELEVANT = re.compile(
    r"""
    model_ema\..*                                   # a moving average; the weights are used
    | betas|alphas_cumprod|denoiser\.sigmas         # the noise schedule, which is checked apart
    | alphas_cumprod_prev|lvlb_weights|logvar       # tables that follow from it
    | (sqrt|log|posterior)_\w+
    | (global_step|epoch|iteration)                 # of training
    | first_stage_model\.(loss|model_ema)\..*       # the autoencoder's training
    | (.*\.)?(position_ids|logit_scale|attn_mask)   # constants; CLIP's temperature
    """,
    re.VERBOSE,
)


def component_of(name: str) -> tuple[str, str]:
    """Return the component of a tensor, and its name in it.

    The component is `UNET`, `AUTOENCODER`, `TEXT` with the encoder's index, `IRRELEVANT` for
    tensors that do not change images, or `UNKNOWN`.
    """
    if wrapper := _WRAPPERS.match(name):
        name = name[wrapper.end() :]
    if _IRRELEVANT.fullmatch(name):
        return IRRELEVANT, name
    for start, component in _COMPONENTS.items():
        if match := re.match(start, name):
            return component, name[match.end() :]
    return UNKNOWN, name


def _renamer(table: Mapping[str, str], inner: Mapping[str, str]) -> Callable[[str], str]:
    """Rename the longest prefix in `table`, then modules within a residual block."""

    def rename(name: str) -> str:
        pieces = name.split(".")
        for end in range(len(pieces), 0, -1):
            theirs = table.get(".".join(pieces[:end]))
            if theirs is not None:
                rest = ".".join(pieces[end:])
                for old, new in inner.items():
                    if rest.startswith(f"{old}."):
                        rest = new + rest.removeprefix(old)
                return f"{theirs}.{rest}"
        return name

    return rename


_UNET_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_rename(config: UNet2DConditionConfig) -> Callable[[str], New]:
    """Rename the U-Net's tensors to diffusers' names."""
    rename = _renamer(_unet_table(config), _UNET_BLOCK)

    def with_projections(name: str) -> New:
        new = rename(name)
        if new.endswith((".proj_in.weight", ".proj_out.weight")):
            return {new: to_linear if config.use_linear_projection else _to_convolution}
        return new

    return with_projections


def unet_original_name(name: str, config: UNet2DConditionConfig) -> str:
    """Invert `unet_rename`, for layers too."""
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


def _to_convolution(kernel: np.ndarray) -> np.ndarray:
    """Return a linear layer as a 1x1 convolution; others unchanged."""
    return kernel[:, :, None, None] if kernel.ndim == 2 else kernel


def vae_rename(config: AutoencoderConfig | Flux2AutoencoderConfig) -> Callable[[str], New]:
    """Rename the autoencoder's tensors to names that `autoencoder_keys` reads."""
    return _renamer(_vae_table(config), _VAE_BLOCK)


_VAE_BLOCK = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_original(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig | Flux2AutoencoderConfig
) -> dict[str, np.ndarray]:
    """Return the tensors of diffusers' autoencoder in the original layout."""
    modules = {new: old for old, new in _vae_table(config).items()}
    inner = {new: old for old, new in _VAE_BLOCK.items()} | _VAE_ATTENTION
    rename, original = _renamer(modules, inner), {}
    for name, value in tensors.items():
        is_matrix = ".attentions." in name and value.ndim == 2
        original[rename(name)] = _to_convolution(value) if is_matrix else value
    return original


@functools.lru_cache(maxsize=4)
def _vae_table(config: AutoencoderConfig | Flux2AutoencoderConfig) -> dict[str, str]:
    levels = len(config.block_out_channels)
    table: dict[str, str] = {}
    if isinstance(config, Flux2AutoencoderConfig):
        table = {
            "encoder.quant_conv": "quant_conv",
            "decoder.post_quant_conv": "post_quant_conv",
        }
    for half, level, resample in (("encoder", "down", "down"), ("decoder", "up", "up")):
        table |= {
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.mid.block_1": f"{half}.mid_block.resnets.0",
            f"{half}.mid.block_2": f"{half}.mid_block.resnets.1",
            f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0",
        }
        for i in range(levels):
            # The original counts the decoder's levels from the finest, too.
            theirs = i if half == "encoder" else levels - 1 - i
            ours = f"{half}.{level}_blocks.{i}"
            for j in range(config.layers_per_block + 1):
                table[f"{half}.{level}.{theirs}.block.{j}"] = f"{ours}.resnets.{j}"
            table[f"{half}.{level}.{theirs}.{resample}sample.conv"] = (
                f"{ours}.{resample}samplers.0.conv"
            )
    return table


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


def text_rename(config: ClipTextConfig) -> Callable[[str], New]:
    """Rename a text encoder's tensors to transformers' names.

    OpenCLIP has queries, keys and values in one matrix, and its projection transposed. Its blocks
    after `config.depth`, and the projection of an encoder that has none, are unused.
    """

    def rename(name: str) -> New:
        if name in ("text_projection", "text_projection.weight"):
            if config.projection_dim is None:
                return None
            return name if "." in name else {"text_projection.weight": np.transpose}
        block = re.fullmatch(r"transformer\.resblocks\.(\d{1,9})\.(.+)\.(\w+)", name)
        if block is None:
            return _OPENCLIP_ENDS.get(name, name)
        layer, module, kind = block.groups()
        if int(layer) >= config.depth:
            return None
        ours = f"text_model.encoder.layers.{layer}"
        if kind.startswith("in_proj_"):
            kind = kind.removeprefix("in_proj_")
            return {
                f"{ours}.self_attn.{part}_proj.{kind}": _third(i) for i, part in enumerate("qkv")
            }
        return f"{ours}.{_OPENCLIP.get(module, module)}.{kind}"

    return rename


def _third(i: int) -> Cut:
    return lambda x: x[i * len(x) // 3 : (i + 1) * len(x) // 3]
