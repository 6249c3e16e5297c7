"""FLUX.1 and FLUX.2 (Black Forest Labs 2024, 2025): text and image tokens in one sequence.

Double blocks have weights of their own for text and for image tokens, which attend to each other
(MMDiT, Esser et al. 2024, section 4). Single blocks compute attention and MLP in parallel from the
joined sequence (Dehghani et al. 2023, section 2). Rotary positions have axes for the image's
number, row, column and, in FLUX.2, the place in the text. Reference images are further tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural, Positive
from jaxdiff.errors import UserError
from jaxdiff.models.attention import linear
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.denoisers.flux_blocks import (
    DoubleBlock,
    Embedder,
    Inputs,
    SharedModulation,
    SingleBlock,
    Tokens,
    Words,
    init_modulation,
)
from jaxdiff.models.flops import attention_flops, linear_flops
from jaxdiff.models.layers import (
    FROM_CHANNELS,
    TO_CHANNELS,
    Remat,
    axial_angles,
    fourier_features,
    modulate,
    patchify,
    plain_layer_norm,
    scan_blocks,
    stack_blocks,
    unpatchify,
)
from jaxdiff.sampling.feature_cache import Shallow

_REFERENCE_STEP = 10  # between the first positions of reference images


@checked
@dataclass(frozen=True, kw_only=True)
class FluxConfig(Denoiser):
    """Size and structure of a FLUX transformer; the defaults are those of FLUX.2-klein 4B.

    Attributes:
      channels: channels of the latents.
      patch_size: side of the square of latents that becomes one token.
      heads: number of attention heads.
      head_width: channels of a head.
      double_depth: number of double blocks.
      single_depth: number of single blocks.
      text_width: width of the text encoder's tokens.
      pooled_width: width of the pooled text, which is added to the time embedding; None for none.
      mlp: activation of the MLPs.
      mlp_ratio: hidden width of the MLPs over the width of a token.
      bias: whether linear layers have a bias.
      shared_modulation: one modulation for all double and one for all single blocks, instead of
        one in each block.
      fused: whether queries, keys, values and the MLP of a single block are one layer.
      guidance_embedding: whether the network reads `Conditioning.guidance`.
      time_width: width of the sinusoidal features of the time.
      rope_axes: channels of a head that rotate with each axis: image, row, column, and the place
        in the text if `text_positions`.
      rope_theta: base of the rotation's frequencies.
      text_positions: whether text tokens rotate with their place, on the last axis.
      max_references: most reference images; 0 for networks that read none.
      eps: epsilon of the norms.
      remat: what a block keeps for the backward pass.
    """

    channels: Count = 128
    patch_size: Count = 1
    heads: Count = 24
    head_width: Count = 128
    double_depth: Count = 5
    single_depth: Count = 20
    text_width: Count = 7680
    pooled_width: Count | None = None
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_ratio: Positive = 3.0
    bias: bool = False
    shared_modulation: bool = True
    fused: bool = True
    guidance_embedding: bool = False
    time_width: Count = 256
    rope_axes: tuple[Count, ...] = (32, 32, 32, 32)
    rope_theta: Positive = 2000.0
    text_positions: bool = True
    max_references: Natural = 4
    eps: Positive = 1e-6
    remat: Remat = "none"

    def __post_init__(self):
        odd = any(width % 2 for width in self.rope_axes)
        least = 4 if self.text_positions else 3
        if sum(self.rope_axes) != self.head_width or odd or len(self.rope_axes) < least:
            raise UserError(
                f"Flux: rope_axes are {self.rope_axes} and head_width is {self.head_width}: "
                f"expected at least {least} even numbers whose sum is head_width; change one of "
                "both."
            )
        if not self.hidden:
            raise UserError(
                f"Flux: mlp_ratio is {self.mlp_ratio}, which leaves no hidden unit of "
                f"{self.width}: expected a larger number, such as 3."
            )
        if self.time_width % 2:
            raise UserError(
                f"Flux: time_width is {self.time_width}: expected an even number, for a cosine and "
                "a sine of each frequency."
            )

    def build(self, *, rngs: nnx.Rngs) -> "Flux":
        """Initialise the network."""
        return Flux(self, rngs=rngs)

    @property
    def size_multiple(self) -> int:
        """Sides of the latents must be multiples of this."""
        return self.patch_size

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def inner(self) -> int:
        """Outputs of an MLP's first layer: a SwiGLU has a gate for each hidden unit."""
        return self.hidden * (2 if self.mlp == "swiglu" else 1)

    @property
    def patch_channels(self) -> int:
        """Numbers in the patch that becomes one token."""
        return self.channels * self.patch_size**2

    def flops(
        self, *, height: int, width: int, text_length: int, reference_tokens: int = 0
    ) -> float:
        """FLOPs of one evaluation on one image.

        Args:
          height: of the latents.
          width: likewise.
          text_length: tokens of the prompt, padding included.
          reference_tokens: of all reference images.
        """
        d = self.width
        image = height // self.patch_size * (width // self.patch_size)
        length = image + reference_tokens + text_length

        # The projections of attention and the MLP; they differ only in what is one matrix.
        block = linear_flops(length, d, 4 * d + self.inner) + linear_flops(length, self.hidden, d)
        block += attention_flops(length, length, d)
        doubles, singles = self.double_depth, self.single_depth
        vectors = (12 + 3) if self.shared_modulation else (12 * doubles + 3 * singles)
        ends = linear_flops(1, d, (vectors + 2) * d) + linear_flops(text_length, self.text_width, d)
        ends += linear_flops(image + reference_tokens, self.patch_channels, d)
        ends += linear_flops(image, d, self.patch_channels)
        sinusoids = 2 if self.guidance_embedding else 1
        ends += sinusoids * (linear_flops(1, self.time_width, d) + linear_flops(1, d, d))
        if self.pooled_width is not None:
            ends += linear_flops(1, self.pooled_width, d) + linear_flops(1, d, d)
        return (doubles + singles) * block + ends

    def reference_tokens(
        self, latents: Sequence[Float[Array, "b _ _ c"]]
    ) -> tuple[Float[Array, "b m r"], Int[Array, "b m axes"]]:
        """Return `Conditioning.reference` and its positions for latents of reference images."""
        tokens = [patchify(z, self.patch_size, channels_first=True) for z in latents]
        places = [
            self.image_positions(*z.shape[1:3]).at[:, 0].set(_REFERENCE_STEP * (1 + i))
            for i, z in enumerate(latents)
        ]
        positions = jnp.concatenate(places)
        return (
            jnp.concatenate(tokens, axis=1),
            jnp.broadcast_to(positions, (len(latents[0]), *positions.shape)),
        )

    def image_positions(self, height: int, width: int) -> Int[Array, "n axes"]:
        """Return the positions of the tokens of latents of a size."""
        grid = jnp.mgrid[: height // self.patch_size, : width // self.patch_size]
        grid = grid.reshape(2, -1).T
        return jnp.pad(grid, ((0, 0), (1, len(self.rope_axes) - 3)))

    def word_positions(self, length: int) -> Int[Array, "n axes"]:
        """Return the positions of text tokens."""
        places = jnp.arange(length) if self.text_positions else jnp.zeros(length, int)
        return jnp.pad(places[:, None], ((0, 0), (len(self.rope_axes) - 1, 0)))


FLUX1 = FluxConfig(
    channels=16,
    patch_size=2,
    double_depth=19,
    single_depth=38,
    text_width=4096,
    pooled_width=768,
    mlp="gelu",
    mlp_ratio=4.0,
    bias=True,
    shared_modulation=False,
    fused=False,
    rope_axes=(16, 56, 56),
    rope_theta=10_000.0,
    text_positions=False,
    max_references=0,
)
"""FLUX.1 schnell; dev has a guidance embedding."""


class Flux(nnx.Module):
    """The network; its prediction has the shape of x_t."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch, bias = config.width, config.patch_channels, config.bias
        self.patch = linear(patch, width, rngs, axes=FROM_CHANNELS, bias=bias)
        self.words = linear(config.text_width, width, rngs, bias=bias)
        self.time = Embedder(config.time_width, config, rngs)
        if config.guidance_embedding:
            self.guidance = Embedder(config.time_width, config, rngs)
        if config.pooled_width is not None:
            self.pooled = Embedder(config.pooled_width, config, rngs)
        if config.shared_modulation:
            self.text_modulation = init_modulation(6, config, rngs)
            self.image_modulation = init_modulation(6, config, rngs)
            self.single_modulation = init_modulation(3, config, rngs)
        self.double = stack_blocks(
            lambda rngs: DoubleBlock(config, rngs=rngs), config.double_depth, rngs
        )
        self.single = stack_blocks(
            lambda rngs: SingleBlock(config, rngs=rngs), config.single_depth, rngs
        )
        self.final_norm = plain_layer_norm(width, config.eps, rngs)
        self.final_modulation = init_modulation(2, config, rngs)
        self.final = linear(width, patch, rngs, axes=TO_CHANNELS, zero=True, bias=bias)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Float[Array, "b h w c"]:
        """Evaluate the network; it computes in the type of its weights, and returns float32.

        Args:
          x: noisy latents; h and w are multiples of the patch size.
          t: time in [0, 1].
          cond: its `tokens`; `pooled`, `guidance` and `reference` with its positions where the
            config has them.

        Returns:
          The velocity eps - x0.

        Raises:
          UserError: the patch size does not divide the latents, or an input is missing.
        """
        inputs = self._embed(x, t, cond)
        return self._project(self._blocks(inputs), inputs)

    def shallow(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Shallow:
        """Embed the inputs and apply the first block (`sampling.feature_cache`)."""
        inputs = self._embed(x, t, cond)
        text, image = self._doubles(inputs, (0, 1))
        return Shallow(image - inputs.image, inputs._replace(text=text, image=image))

    def deep(self, inputs: Inputs) -> Tokens:
        """Return what all other blocks add to the image's tokens."""
        return self._blocks(inputs, first=1) - self._of_image(inputs.image, inputs)

    def finish(self, inputs: Inputs, features: Tokens) -> Float[Array, "b h w c"]:
        """Return the prediction."""
        return self._project(self._of_image(inputs.image, inputs) + features, inputs)

    def _doubles(self, inputs: Inputs, span: tuple[int, int] | None) -> tuple[Words, Tokens]:
        def call(block: DoubleBlock, tokens: Any) -> Any:
            return block(tokens, inputs)

        tokens: Any = inputs.tokens
        return scan_blocks(self.double, tokens, call, remat=self.config.remat, span=span)[0]

    def _blocks(self, inputs: Inputs, first: int = 0) -> Tokens:
        """Apply all blocks but the first ones; return the image's tokens."""
        span = (first, self.config.double_depth) if first else None
        text, image = self._doubles(inputs, span)
        tokens, _ = scan_blocks(
            self.single,
            jnp.concatenate([text, image], axis=1),
            lambda block, x: block(x, inputs),
            remat=self.config.remat,
        )
        return self._of_image(tokens[:, text.shape[1] :], inputs)

    def _of_image(self, tokens: Tokens, inputs: Inputs) -> Float[Array, "b image d"]:
        """Return the tokens of the image, which precede those of reference images."""
        return tokens[:, : inputs.rows * inputs.columns]

    def _embed(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Inputs:
        config, dtype = self.config, self.patch.kernel[...].dtype
        if cond.tokens is None:
            raise UserError("A Flux reads text: expected Conditioning.tokens.")
        vector = jax.nn.silu(self._vector(t, cond))
        shared = None
        if config.shared_modulation:
            parts = self.text_modulation, self.image_modulation, self.single_modulation
            shared = SharedModulation(*(modulation(vector) for modulation in parts))
        tokens = patchify(x.astype(dtype), config.patch_size, channels_first=True)
        places = [config.word_positions(cond.tokens.shape[1])]
        places.append(config.image_positions(*x.shape[1:3]))
        if cond.reference is not None and cond.reference_positions is not None:
            tokens = jnp.concatenate([tokens, cond.reference.astype(dtype)], axis=1)
            positions = jnp.broadcast_to(
                jnp.concatenate(places), (len(x), sum(map(len, places)), len(config.rope_axes))
            )
            positions = jnp.concatenate([positions, cond.reference_positions], axis=1)
        else:
            positions = jnp.concatenate(places)
        return Inputs(
            text=self.words(cond.tokens.astype(dtype)),
            image=self.patch(tokens),
            vector=vector,
            shared=shared,
            angles=axial_angles(positions, config.rope_axes, config.rope_theta),
            rows=x.shape[1] // config.patch_size,
            columns=x.shape[2] // config.patch_size,
        )

    def _vector(self, t: Float[Array, " b"], cond: Conditioning) -> Float[Array, "b d"]:
        """Embed the time, the guidance scale and pooled text."""
        config, dtype = self.config, self.patch.kernel[...].dtype
        vector = self.time(fourier_features(t, config.time_width).astype(dtype))
        if config.guidance_embedding:
            if cond.guidance is None:
                raise UserError(
                    "This Flux reads the guidance scale: expected Conditioning.guidance."
                )
            features = fourier_features(cond.guidance, config.time_width)
            vector = vector + self.guidance(features.astype(dtype))
        if config.pooled_width is not None:
            if cond.pooled is None:
                raise UserError("This Flux reads pooled text: expected Conditioning.pooled.")
            vector = vector + self.pooled(cond.pooled.astype(dtype))
        return vector

    def _project(self, tokens: Tokens, inputs: Inputs) -> Float[Array, "b h w c"]:
        scale, shift = jnp.split(self.final_modulation(inputs.vector), 2, axis=-1)
        out = self.final(modulate(self.final_norm(tokens), shift, scale))
        return unpatchify(
            out.astype(jnp.float32),
            inputs.rows,
            inputs.columns,
            self.config.patch_size,
            channels_first=True,
        )
