"""DINOv2 (Oquab et al. 2023): a vision transformer whose class token is the image's feature."""

import math
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Range
from jaxdiff.errors import UserError
from jaxdiff.models.initializers import fan_in_normal, normal
from jaxdiff.models.layers import FROM_MLP, TO_MLP, Dense, scan_blocks, stack_blocks
from jaxdiff.models.text_encoders.clip import ClipAttention

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_EPSILON = 1e-6
_CUBIC = -0.75  # of PyTorch's bicubic interpolation (Keys 1981)


@checked
@dataclass(frozen=True, kw_only=True)
class Dinov2Config:
    """Size of a network; the defaults are those of ViT-L/14.

    Attributes:
      image_size: side of the images in training, which sets the number of stored positions.
      patch_size: side of the square that becomes one token.
      width: of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: of attention.
      mlp_ratio: hidden width of the MLP over `width`.
      position_offset: added to the number of patches in the scale at which positions are
        interpolated; 0.1 in the authors' code, 0 in transformers.
    """

    image_size: Count = 518
    patch_size: Count = 14
    width: Count = 1024
    depth: Count = 24
    heads: Count = 16
    mlp_ratio: Count = 4
    position_offset: Annotated[float, Range(0, 1)] = 0.1

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(
                f"DINOv2: width {self.width} does not split into {self.heads} heads: expected a "
                "multiple of heads."
            )

    @property
    def grid(self) -> int:
        """Stored positions along one side."""
        return self.image_size // self.patch_size

    def build(self, *, rngs: nnx.Rngs) -> "Dinov2":
        """Build the network."""
        return Dinov2(self, rngs=rngs)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=_EPSILON, use_fast_variance=False, rngs=rngs)


class Dinov2Block(nnx.Module):
    """Attention and MLP, each after a layer norm and scaled by a learned vector."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        width, hidden = config.width, config.width * config.mlp_ratio
        std = width**-0.5
        self.attention_norm = _layer_norm(width, rngs)
        self.attention = ClipAttention(width, config.heads, out_std=std, rngs=rngs)
        self.attention_scale = nnx.Param(jnp.ones(width))
        self.mlp_norm = _layer_norm(width, rngs)
        self.mlp_in = Dense(width, hidden, axes=TO_MLP, kernel_init=normal(std), rngs=rngs)
        self.mlp_out = Dense(hidden, width, axes=FROM_MLP, kernel_init=normal(std / 2), rngs=rngs)
        self.mlp_scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the same shape."""
        x = x + self.attention_scale[...] * self.attention(self.attention_norm(x), causal=False)
        hidden = jax.nn.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False)
        return x + self.mlp_scale[...] * self.mlp_out(hidden)


class Dinov2(nnx.Module):
    """The network with positions interpolated to the size of the images."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        self.config = config
        self.patch_embedding = nnx.Conv(
            3,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            kernel_init=fan_in_normal(),
            rngs=rngs,
        )
        self.class_token = nnx.Param(normal(0.02)(rngs.params(), (1, 1, width)))
        positions = normal(0.02)(rngs.params(), (1, config.grid**2 + 1, width))
        self.position_embedding = nnx.Param(positions)
        self.blocks = stack_blocks(lambda rngs: Dinov2Block(config, rngs), config.depth, rngs)
        self.final_norm = _layer_norm(width, rngs)

    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Return the class token's final state.

        Args:
          images: normalised by ImageNet's mean and deviation; a multiple of the patches a side.
        """
        x = self.patch_embedding(images)
        side = x.shape[1]
        x = x.reshape(len(x), side * side, -1)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self._positions(side)
        x, _ = scan_blocks(self.blocks, x, lambda block, x: block(x))
        return self.final_norm(x)[:, 0]

    def _positions(self, side: int) -> Float[Array, "1 n d"]:
        stored, table = self.config.grid, self.position_embedding[...]
        if side == stored:
            return table
        weights = jnp.asarray(cubic_weights(stored, side, self.config.position_offset))
        grid = table[0, 1:].reshape(stored, stored, -1)
        grid = jnp.einsum("ir,jc,rcd->ijd", weights, weights, grid)
        return jnp.concatenate([table[:, :1], grid.reshape(1, side * side, -1)], axis=1)


def cubic_weights(stored: int, side: int, offset: float) -> Float[np.ndarray, "{side} {stored}"]:
    """Return the matrix of PyTorch's bicubic interpolation along one axis, without antialiasing.

    Args:
      stored: positions that there are.
      side: positions that are wanted.
      offset: added to `side` in the scale.
    """
    matrix = np.zeros((side, stored))
    for i in range(side):
        centre = (i + 0.5) * stored / (side + offset) - 0.5
        low = math.floor(centre)
        for j in range(low - 1, low + 3):
            matrix[i, min(max(j, 0), stored - 1)] += _keys(abs(centre - j))
    return matrix.astype(np.float32)


def _keys(x: float) -> float:
    """Return the cubic convolution kernel at a distance below 2."""
    a = _CUBIC
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4)
