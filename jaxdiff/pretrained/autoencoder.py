"""The autoencoder's parameters under the tensor names of diffusers' AutoencoderKL."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from jaxdiff.models.layers import abstract_params
from jaxdiff.pretrained import names


def _half_names(half: str, level: str, resample: str) -> dict[str, str]:
    block, shortcut = f"{half}.{level}.{{}}.resnets.{{}}", "conv_shortcut"
    middle = f"{half}.mid_block"
    attention = f"{middle}.attentions.0"
    return {
        f"{half}.conv_in": f"{half}.conv_in",
        f"{half}.levels.*.blocks.*": block,
        f"{half}.levels.*.blocks.*.shortcut": f"{block}.{shortcut}",
        f"{half}.levels.*.resample": f"{half}.{level}.{{}}.{resample}.0.conv",
        f"{half}.middle.first": f"{middle}.resnets.0",
        f"{half}.middle.second": f"{middle}.resnets.1",
        f"{half}.middle.attention.norm": f"{attention}.group_norm",
        f"{half}.middle.attention.q": f"{attention}.to_q",
        f"{half}.middle.attention.k": f"{attention}.to_k",
        f"{half}.middle.attention.v": f"{attention}.to_v",
        f"{half}.middle.attention.out": f"{attention}.to_out.0",
        f"{half}.norm_out": f"{half}.conv_norm_out",
        f"{half}.conv_out": f"{half}.conv_out",
    }


AUTOENCODER_NAMES = {
    **_half_names("encoder", "down_blocks", "downsamplers"),
    **_half_names("decoder", "up_blocks", "upsamplers"),
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}

# Checkpoints from before diffusers 0.18, Stable Diffusion 1.x among them, name the attention so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renew(name: str) -> str:
    return re.sub(
        r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
        lambda match: _OLD_ATTENTION[match[0]],
        name,
    )


def from_torch_names(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig
) -> dict[str, Any]:
    """Parameters of `Autoencoder(config)` from the tensors of a diffusers checkpoint, old or new.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names them.
    """
    tensors = {_renew(name): value for name, value in tensors.items()}
    abstract = abstract_params(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    return names.from_torch_names(tensors, AUTOENCODER_NAMES, abstract)


def to_torch_names(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a diffusers checkpoint from the autoencoder's parameters, a nested dict."""
    return names.to_torch_names(params, AUTOENCODER_NAMES)
