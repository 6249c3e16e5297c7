"""diffusers' denoisers with random weights, and the same ones in jaxdiff, called alike.

U-Net of Stable Diffusion 1.5 as published. Of the transformers few blocks are enough, since the
others compute the same: of FLUX one double and two single ones, of Z-Image one refiner for image
and text each and two layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.pretrained import flux_keys, unet_keys, z_image_keys
from jaxdiff.pretrained.presets import SD1
from jaxdiff.pretrained.safetensors_io import to_device

TIME, HEAD = 0.5, 128
_TIMESTEP = 500  # of the U-Net's 1000 training steps; jaxdiff's time is (500 + 1) / 1000


class Denoiser(NamedTuple):
    """A kind of denoiser in diffusers and in jaxdiff.

    Attributes:
      make: returns diffusers' network, given the number of heads of a transformer.
      read: returns jaxdiff's config and parameters, given the network.
      call: calls the network on tensors of x_t and conditioning in jaxdiff's layout; returns that.
      tokens: of a prompt.
      cell: pixels along a side of one latent.
    """

    make: Callable[[int], Any]
    read: Callable[[Any], tuple[Any, Any]]
    call: Callable[[Any, torch.Tensor, Any], torch.Tensor]
    tokens: int
    cell: int = 8


class Contenders(NamedTuple):
    """One call of a denoiser: in jaxdiff, and in diffusers by a network, compiled or not."""

    jaxdiff: Callable[[], np.ndarray]
    diffusers: Callable[[Any], np.ndarray]
    network: Any


def contenders(kind: Denoiser, *, batch: int, size: int, heads: int) -> Contenders:
    """Return calls on random inputs for images of `size` pixels, with the same random weights."""
    torch.manual_seed(0)
    network = kind.make(heads).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 2:  # Z-Image's pad tokens have no initial values
            torch.nn.init.normal_(parameter, std=0.02)
    config, params = kind.read(network)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(size=(batch, *shape)).astype(np.float32)

    side = size // kind.cell
    x, pooled = random(side, side, config.channels), getattr(config, "pooled_width", None)
    cond = Conditioning(
        tokens=jnp.asarray(random(kind.tokens, config.text_width)),
        pooled=None if pooled is None else jnp.asarray(random(pooled)),
    )

    @jax.jit
    def predict(params: Any, x: Any, t: Any, cond: Conditioning) -> Any:
        return bind_params(bind_build(config), params)(x, t, cond)

    is_unet = isinstance(network, UNet2DConditionModel)
    t = jnp.full(batch, (_TIMESTEP + 1) / 1000 if is_unet else TIME)
    inputs = jax.tree.map(jnp.asarray, (x, t, cond))

    there = jax.tree.map(lambda array: torch.from_numpy(np.array(array)), (x, cond))

    def theirs(network: Any) -> np.ndarray:
        with torch.no_grad():
            return kind.call(network, *there).numpy()

    return Contenders(lambda: np.asarray(predict(params, *inputs)), theirs, network)


def _tensors(network: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


def _nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _times(x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), TIME)


def _unet(heads: int) -> Any:
    config = unet_keys.write_unet_config(SD1)
    return UNet2DConditionModel(**{k: v for k, v in config.items() if k != "_class_name"})


def _read_unet(network: Any) -> tuple[Any, Any]:
    return SD1, unet_keys.unet_from_torch(_tensors(network), SD1, place=to_device)


def _call_unet(network: Any, x: torch.Tensor, cond: Any) -> torch.Tensor:
    return network(_nchw(x), torch.tensor(_TIMESTEP), cond.tokens).sample.permute(0, 2, 3, 1)


def _flux1(heads: int) -> Any:
    return FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=heads)


def _flux2(heads: int) -> Any:
    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=heads,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def _read_flux1(network: Any) -> tuple[Any, Any]:
    config = flux_keys.read_flux1_config({**network.config})
    return config, flux_keys.flux_from_torch(_tensors(network), config, place=to_device)


def _read_flux2(network: Any) -> tuple[Any, Any]:
    config = flux_keys.read_flux2_config({**network.config})
    return config, flux_keys.flux_from_torch(_tensors(network), config, place=to_device)


def _ids(*axes: int) -> torch.Tensor:
    """Return the position of each token on these axes: [the product of their lengths, axes]."""
    return torch.cartesian_prod(*(torch.arange(float(length)) for length in axes))


def _call_flux1(network: Any, x: torch.Tensor, cond: Any) -> torch.Tensor:
    b, h, w, c = x.shape
    packed = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4)
    out = network(
        packed.reshape(b, h * w // 4, 4 * c),
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        timestep=_times(x),
        img_ids=_ids(1, h // 2, w // 2),
        txt_ids=torch.zeros(cond.tokens.shape[1], 3),
    ).sample
    out = out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(b, h, w, c)


def _call_flux2(network: Any, x: torch.Tensor, cond: Any) -> torch.Tensor:
    b, h, w, c = x.shape
    return network(
        x.reshape(b, h * w, c),
        encoder_hidden_states=cond.tokens,
        timestep=_times(x),
        img_ids=_ids(1, h, w, 1).expand(b, -1, -1),
        txt_ids=_ids(1, 1, 1, cond.tokens.shape[1]).expand(b, -1, -1),
    ).sample.reshape(b, h, w, c)


def _z_image(heads: int) -> Any:
    return ZImageTransformer2DModel(
        dim=HEAD * heads, n_heads=heads, n_kv_heads=heads, n_layers=2, n_refiner_layers=1
    )


def _read_z_image(network: Any) -> tuple[Any, Any]:
    config = z_image_keys.read_z_image_config({**network.config})
    return config, z_image_keys.z_image_from_torch(_tensors(network), config, place=to_device)


def _call_z_image(network: Any, x: torch.Tensor, cond: Any) -> torch.Tensor:
    images = list(_nchw(x)[:, :, None])
    prompts = list(cond.tokens)
    out = network(images, 1 - _times(x), prompts).sample
    return -torch.stack(list(out))[:, :, 0].permute(0, 2, 3, 1)


DENOISERS = {
    "SD1.5": Denoiser(_unet, _read_unet, _call_unet, 77),
    "FLUX.1": Denoiser(_flux1, _read_flux1, _call_flux1, 512),
    "FLUX.2": Denoiser(_flux2, _read_flux2, _call_flux2, 512, 16),
    "Z-Image": Denoiser(_z_image, _read_z_image, _call_z_image, 512),
}
