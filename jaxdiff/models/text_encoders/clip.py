"""CLIP's text and image encoders (Radford et al. 2021), in OpenAI's and OpenCLIP's variants.

Both are pre-norm transformers of the same block. Variants differ in activation, sizes and the
position of the end token.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural, Positive
from jaxdiff.distributed.sharding import Axes
from jaxdiff.errors import UserError
from jaxdiff.models.flops import attention_flops, conv_flops, linear_flops
from jaxdiff.models.initializers import fan_in_normal, normal
from jaxdiff.models.layers import (
    EMBED,
    FROM_HEADS,
    FROM_MLP,
    TO_HEADS,
    TO_MLP,
    Dense,
    Remat,
    scan_blocks,
    stack_blocks,
)

Activation = Literal["quick_gelu", "gelu"]
"""OpenAI's x * sigmoid(1.702 x), or the exact GELU of OpenCLIP (Hendrycks & Gimpel 2016)."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5

NORM_EPSILON = 1e-5


def _check_heads(encoder: str, width: int, heads: int):
    if width % heads:
        raise UserError(
            f"{encoder}: width {width} does not split into {heads} heads: expected a multiple of "
            "heads."
        )


@checked
@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Size and variant of a text encoder; the defaults are those of OpenAI's ViT-L/14.

    Attributes:
      vocab_size: number of token ids.
      length: the most tokens a prompt has, start and end included.
      width: width of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the MLP over `width`.
      activation: activation of the MLP.
      projection_dim: width of the joint space that `pooled` is projected to; None: it is not.
      end_id: the first token of this id ends the prompt; None takes the largest id, as OpenAI's
        code does, and transformers where a config has `eos_token_id = 2`.
      remat: what a block keeps for the backward pass.
    """

    vocab_size: Count = 49408
    length: Count = 77
    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    activation: Activation = "quick_gelu"
    projection_dim: Count | None = None
    end_id: Natural | None = None
    remat: Remat = "none"

    def __post_init__(self):
        _check_heads("CLIP text encoder", self.width, self.heads)

    def flops(self) -> float:
        """FLOPs of encoding one prompt of `length` tokens, padding included."""
        return _transformer_flops(self, self.length)


@checked
@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """Size and variant of an image encoder; the defaults are those of OpenAI's ViT-L/14.

    Attributes:
      image_size: side of the square images, in pixels; a multiple of `patch_size`.
      patch_size: side of the square that becomes one token.
      width: width of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the MLP over `width`.
      activation: activation of the MLP.
      projection_dim: width of the joint space that `pooled` is projected to; None: it is not.
      remat: what a block keeps for the backward pass.
    """

    image_size: Count = 224
    patch_size: Count = 14
    width: Count = 1024
    depth: Count = 24
    heads: Count = 16
    mlp_ratio: Positive = 4.0
    activation: Activation = "quick_gelu"
    projection_dim: Count | None = None
    remat: Remat = "none"

    def __post_init__(self):
        _check_heads("CLIP image encoder", self.width, self.heads)
        if self.image_size % self.patch_size:
            raise UserError(
                f"CLIP image encoder: patches of {self.patch_size} do not tile images of "
                f"{self.image_size}: expected an image_size that is a multiple of patch_size."
            )

    def flops(self) -> float:
        """FLOPs of encoding one image of `image_size`."""
        patches = (self.image_size // self.patch_size) ** 2
        embedding = conv_flops(self.patch_size, 3, self.width, patches)
        return embedding + _transformer_flops(self, patches + 1)


def _transformer_flops(config: ClipTextConfig | ClipVisionConfig, tokens: int) -> float:
    """Return the FLOPs of the blocks and of the projection."""
    d, hidden = config.width, round(config.width * config.mlp_ratio)
    block = linear_flops(tokens, d, 4 * d) + attention_flops(tokens, tokens, d)
    block += linear_flops(tokens, d, 2 * hidden)
    return config.depth * block + linear_flops(1, d, config.projection_dim or 0)


@checked
@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both encoders, of one joint space: the `projection_dim` of both must be set and equal."""

    text: ClipTextConfig
    vision: ClipVisionConfig

    def __post_init__(self):
        ends = self.text.projection_dim, self.vision.projection_dim
        if None in ends or ends[0] != ends[1]:
            raise UserError(
                f"CLIP: projection_dim is {ends[0]} (text) and {ends[1]} (vision): expected equal "
                "numbers; set text.projection_dim and vision.projection_dim to the same."
            )


class TextFeatures(NamedTuple):
    """A prompt's hidden states, its pooled vector, and a mask up to and including the end token."""

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b e"]
    mask: Bool[Array, "b n"]


class ImageFeatures(NamedTuple):
    """An image's hidden states, a class token, then patches row by row; and its pooled vector."""

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b e"]


class ClipEmbeddings(NamedTuple):
    """Unit vectors in the joint space and the factor on their cosines, 1 / temperature; float32."""

    image: Float[Array, "b e"]
    text: Float[Array, "b e"]
    logit_scale: Float[Array, ""]


def _linear(
    inputs: int,
    outputs: int,
    std: float,
    rngs: nnx.Rngs,
    *,
    axes: Axes = EMBED,
    bias: bool = True,
) -> Dense:
    init = normal(std)
    return Dense(inputs, outputs, axes=axes, use_bias=bias, kernel_init=init, rngs=rngs)


def _layer_norm(width: int, rngs: nnx.Rngs):
    return nnx.LayerNorm(width, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs)


def _activate(x: Array, activation: Activation) -> Array:
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=False)


class ClipAttention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, out_std: float, rngs: nnx.Rngs):
        self.heads = heads
        self.q = _linear(width, width, width**-0.5, rngs, axes=TO_HEADS)
        self.k = _linear(width, width, width**-0.5, rngs, axes=TO_HEADS)
        self.v = _linear(width, width, width**-0.5, rngs, axes=TO_HEADS)
        self.out = _linear(width, width, out_std, rngs, axes=FROM_HEADS)

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        """Attend between all tokens, or if `causal` to earlier ones and the token itself."""
        heads = *x.shape[:2], self.heads, x.shape[2] // self.heads
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x.shape))


class ClipBlock(nnx.Module):
    """Attention and MLP, each after a layer norm and with a residual around it.

    Output projections have a smaller initial scale in deeper networks, as in OpenAI's code.
    """

    def __init__(self, config: ClipTextConfig | ClipVisionConfig, rngs: nnx.Rngs):
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        out_std = width**-0.5 * (2 * config.depth) ** -0.5
        self.activation: Activation = config.activation
        self.attention_norm = _layer_norm(width, rngs)
        self.attention = ClipAttention(width, config.heads, out_std=out_std, rngs=rngs)
        self.mlp_norm = _layer_norm(width, rngs)
        self.mlp_in = _linear(width, hidden, (2 * width) ** -0.5, rngs, axes=TO_MLP)
        self.mlp_out = _linear(hidden, width, out_std, rngs, axes=FROM_MLP)

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        """Return the same shape."""
        # Norms may have float32 scales beside bfloat16 kernels; the sum keeps the kernels' type.
        x = x + self.attention(self.attention_norm(x).astype(x.dtype), causal=causal)
        y = self.mlp_in(self.mlp_norm(x).astype(x.dtype))
        return x + self.mlp_out(_activate(y, self.activation))


def _run_blocks(
    blocks: ClipBlock,
    x: Float[Array, "b n d"],
    *,
    causal: bool,
    remat: Remat,
    depth: int,
    layer: int | None,
) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """Return the last hidden state, and the one of index `layer`."""
    count = depth + 1
    index = depth if layer is None else layer
    if not -count <= index < count:
        raise UserError(
            f"CLIP: there is no hidden layer {layer}: expected {-count} to {count - 1} for "
            f"{depth} blocks."
        )
    index %= count
    inner = 0 < index < depth
    last, states = scan_blocks(
        blocks, x, lambda block, x: block(x, causal=causal), remat=remat, all_states=inner
    )
    if inner:
        return last, states[index - 1]
    return last, last if index else x


class ClipText(nnx.Module):
    """The text encoder: causal, pooled at the end token."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        tokens = normal(0.02)(rngs.params(), (config.vocab_size, width))
        positions = normal(0.01)(rngs.params(), (config.length, width))
        self.token_embedding = nnx.Param(tokens, axes=("vocab", "embed"))
        self.position_embedding = nnx.Param(positions, axes=("position", "embed"))
        self.blocks = stack_blocks(lambda rngs: ClipBlock(config, rngs), config.depth, rngs)
        self.final_norm = _layer_norm(width, rngs)
        if config.projection_dim:
            self.projection = _linear(width, config.projection_dim, width**-0.5, rngs, bias=False)

    def __call__(
        self,
        ids: Int[Array, "b n"],
        *,
        hidden_layer: int | None = None,
        final_norm: bool = True,
        added_tokens: Float[Array, "k d"] | None = None,
    ) -> TextFeatures:
        """Encode tokenized prompts of at most `config.length` tokens.

        Stable Diffusion 1.x and 2.x read the last hidden state after the final norm, the default
        (2.x comes without the last block); "clip skip" is an earlier layer, still normalised. XL
        and 3 read `hidden_layer=-2, final_norm=False`.

        Args:
          ids: token ids, each prompt with its end token, followed by padding.
          hidden_layer: which of the `depth + 1` hidden states becomes `tokens`, counted as in
            transformers: 0 is the embeddings, -1 or None the output of the last block.
          final_norm: whether the final layer norm is applied to `tokens`.
          added_tokens: embeddings of the ids that follow the vocabulary (textual inversion).

        Returns:
          Features in the dtype of the weights. `pooled` is always the last hidden state at the end
          token, normalised, and projected if the config has a projection.

        Raises:
          UserError: there is no such layer.
        """
        config, is_end = self.config, self._is_end(ids)
        table = self.token_embedding[...]
        dtype = table.dtype
        if added_tokens is not None:
            table = jnp.concatenate([table, added_tokens.astype(dtype)])
        # An id beyond the vocabulary becomes NaN rather than its neighbour.
        x = jnp.take(table, ids, axis=0, mode="fill")
        x = x + self.position_embedding[: ids.shape[1]].astype(dtype)
        last, tokens = _run_blocks(
            self.blocks, x, causal=True, remat=config.remat, depth=config.depth, layer=hidden_layer
        )
        end = jnp.argmax(is_end, axis=1)  # 0 for prompts without it, as in transformers
        pooled = self.final_norm(last[jnp.arange(ids.shape[0]), end]).astype(dtype)
        if config.projection_dim:
            pooled = self.projection(pooled)
        if final_norm:
            tokens = self.final_norm(tokens).astype(dtype)
        ended_before = jnp.cumsum(is_end, axis=1) - is_end > 0
        return TextFeatures(tokens, pooled, ~ended_before)

    def _is_end(self, ids: Int[Array, "b n"]) -> Bool[Array, "b n"]:
        """Return where end tokens are."""
        if self.config.end_id is not None:
            return ids == self.config.end_id
        # Added tokens follow the vocabulary and are no end tokens.
        known = jnp.where(ids < self.config.vocab_size, ids, -1)
        return known == known.max(axis=1, keepdims=True)


def normalize_for_clip(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Normalise images in [-1, 1] to transformers' `pixel_values`, in NHWC."""
    mean, std = jnp.array(CLIP_MEAN), jnp.array(CLIP_STD)
    return ((images + 1) / 2 - mean) / std


class ClipVision(nnx.Module):
    """The image encoder: patches and a class token, which is pooled."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        init = normal(width**-0.5)
        self.config = config
        self.patch_embedding = nnx.Conv(
            3,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            kernel_init=fan_in_normal(),
            kernel_metadata={"axes": ("window", "window", "channels", "embed")},
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        tokens = (config.image_size // patch) ** 2 + 1
        positions = init(rngs.params(), (tokens, width))
        self.position_embedding = nnx.Param(positions, axes=("position", "embed"))
        self.first_norm = _layer_norm(width, rngs)
        self.blocks = stack_blocks(lambda rngs: ClipBlock(config, rngs), config.depth, rngs)
        self.final_norm = _layer_norm(width, rngs)
        if config.projection_dim:
            self.projection = _linear(width, config.projection_dim, width**-0.5, rngs, bias=False)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, layer: int | None = None
    ) -> ImageFeatures:
        """Encode images in [-1, 1], both sides `config.image_size`.

        Args:
          images: in [-1, 1]; `normalize_for_clip` is applied here.
          layer: which of the `depth + 1` hidden states becomes `tokens`, without normalisation,
            counted as in transformers: 0 is the input of the first block, -1 or None the output of
            the last.

        Returns:
          Features in the dtype of the weights. `pooled` is the last hidden state at the class
          token, normalised, and projected if the config has a projection.

        Raises:
          UserError: the images are of another size, or there is no such layer.
        """
        config = self.config
        x = self._embed(images)
        last, tokens = _run_blocks(
            self.blocks, x, causal=False, remat=config.remat, depth=config.depth, layer=layer
        )
        pooled = self.final_norm(last[:, 0]).astype(x.dtype)
        if config.projection_dim:
            pooled = self.projection(pooled)
        return ImageFeatures(tokens, pooled)

    def hidden_states(self, images: Float[Array, "b h w 3"]) -> Float[Array, "k b n d"]:
        """Return all `depth + 1` hidden states; the same arguments and errors as a call."""
        x = self._embed(images)
        _, states = scan_blocks(
            self.blocks,
            x,
            lambda block, x: block(x, causal=False),
            remat=self.config.remat,
            all_states=True,
        )
        return jnp.concatenate([x[None], states])

    def _embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Return the input of the first block."""
        config, (b, h, w, _) = self.config, images.shape
        if not h == w == config.image_size:
            raise UserError(
                f"CLIP: images are {w}x{h}: expected {config.image_size}x{config.image_size}; "
                "resize them."
            )
        dtype = self.patch_embedding.kernel.dtype
        patches = self.patch_embedding(normalize_for_clip(images).astype(dtype))
        patches = patches.reshape(b, -1, config.width)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (b, 1, config.width))
        x = jnp.concatenate([first, patches], axis=1) + self.position_embedding[...].astype(dtype)
        return self.first_norm(x).astype(dtype)


def unit_vectors(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Normalise vectors to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Clip(nnx.Module):
    """Both encoders and the learned temperature of their cosines."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = ClipText(config.text, rngs=rngs)
        self.vision = ClipVision(config.vision, rngs=rngs)
        # The logarithm of the factor; 0.07 as in Wu et al. 2018.
        self.logit_scale = nnx.Param(jnp.array(math.log(1 / 0.07), jnp.float32))

    def __call__(self, images: Float[Array, "b h w 3"], ids: Int[Array, "m n"]) -> ClipEmbeddings:
        """Embed b images in [-1, 1] and m tokenized prompts."""
        log = self.logit_scale[...].astype(jnp.float32)
        # Clipped in the forward pass only: a zero gradient would keep it at the limit.
        log = log - jax.lax.stop_gradient(jnp.maximum(log - math.log(MAX_LOGIT_SCALE), 0))
        return ClipEmbeddings(
            unit_vectors(self.vision(images).pooled),
            unit_vectors(self.text(ids).pooled),
            jnp.exp(log),
        )
