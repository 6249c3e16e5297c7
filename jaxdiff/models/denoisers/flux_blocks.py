"""The blocks of FLUX transformers, and what they read."""

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.models.attention import attend, linear
from jaxdiff.models.layers import (
    FROM_HEADS,
    FROM_MLP,
    TO_HEADS,
    TO_MLP,
    Modulation,
    UnitDense,
    apply_rope,
    modulate,
    plain_layer_norm,
)

if TYPE_CHECKING:
    from jaxdiff.models.denoisers.flux import FluxConfig

Tokens = Float[Array, "b n d"]
Words = Float[Array, "b m d"]


class SharedModulation(NamedTuple):
    """Modulation of all blocks."""

    text: Float[Array, "b e"]
    image: Float[Array, "b e"]
    single: Float[Array, "b f"]


class Inputs(NamedTuple):
    """What the blocks and the last layer read."""

    text: Words
    image: Tokens
    vector: Float[Array, "b d"]
    shared: SharedModulation | None
    angles: Float[Array, "*b n half"]
    rows: int
    columns: int

    @property
    def tokens(self) -> tuple[Words, Tokens]:
        """What the double blocks transform."""
        return self.text, self.image

    def attend(self, q: Array, k: Array, v: Array) -> Tokens:
        """Attend over all tokens, rotated by their positions."""
        q, k = (apply_rope(y, self.angles, interleaved=True) for y in (q, k))
        return attend(q, k, v).reshape(*v.shape[:2], -1)


def _activate(units: Float[Array, "b n u w"], mlp: str) -> Float[Array, "b n v w"]:
    """Apply the MLP's activation to units of hidden channels; a SwiGLU's gates come first."""
    if mlp == "gelu":
        return jax.nn.gelu(units, approximate=True)
    gate, up = jnp.split(units, 2, axis=-2)
    return jax.nn.silu(gate) * up


def _unit_linear(inputs: int, outputs: int, units: int, config: "FluxConfig", rngs: nnx.Rngs, axes):
    init = nnx.initializers.xavier_uniform()
    return UnitDense(
        inputs,
        outputs,
        units=units,
        axes=axes,
        kernel_init=init,
        use_bias=config.bias,
        rngs=rngs,
    )


class Embedder(nnx.Module):
    """A vector of the network's width from the time, the guidance scale or pooled text."""

    def __init__(self, inputs: int, config: "FluxConfig", rngs: nnx.Rngs):
        self.first = linear(inputs, config.width, rngs, bias=config.bias)
        self.second = linear(config.width, config.width, rngs, bias=config.bias)

    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b d"]:
        """Return two layers of x with a SiLU between them."""
        return self.second(jax.nn.silu(self.first(x)))


def init_modulation(vectors: int, config: "FluxConfig", rngs: nnx.Rngs) -> Modulation:
    """Build a layer of `vectors` vectors per image, initialised at zero."""
    width, zeros = config.width, nnx.initializers.zeros
    return Modulation(width, vectors * width, use_bias=config.bias, kernel_init=zeros, rngs=rngs)


class Heads(nnx.Module):
    """RMS norms of queries and keys (Henry et al. 2020)."""

    def __init__(self, config: "FluxConfig", rngs: nnx.Rngs):
        self.heads = config.heads
        self.q = nnx.RMSNorm(config.head_width, epsilon=config.eps, rngs=rngs)
        self.k = nnx.RMSNorm(config.head_width, epsilon=config.eps, rngs=rngs)

    def __call__(self, q: Tokens, k: Tokens, v: Tokens) -> tuple[Array, Array, Array]:
        """Split into heads, and normalise queries and keys."""
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return self.q(q).astype(v.dtype), self.k(k).astype(v.dtype), v


class Mlp(nnx.Module):
    """The MLP of a double block, for one kind of tokens."""

    def __init__(self, config: "FluxConfig", rngs: nnx.Rngs):
        self.activation = config.mlp
        units = config.inner // config.hidden
        self.inner = _unit_linear(config.width, config.inner, units, config, rngs, TO_MLP)
        self.outer = linear(config.hidden, config.width, rngs, axes=FROM_MLP, bias=config.bias)

    def __call__(self, x: Tokens) -> Tokens:
        """Return the same shape."""
        return self.outer(_activate(self.inner.split(x), self.activation)[..., 0, :])


class Stream(nnx.Module):
    """The weights of a double block for one kind of tokens, text or image."""

    def __init__(self, config: "FluxConfig", rngs: nnx.Rngs):
        if not config.shared_modulation:
            self.modulation = init_modulation(6, config, rngs)
        width, bias = config.width, config.bias
        self.norm = plain_layer_norm(width, config.eps, rngs)
        self.q, self.k, self.v = (
            linear(width, width, rngs, axes=TO_HEADS, bias=bias) for _ in range(3)
        )
        self.heads = Heads(config, rngs)
        self.out = linear(width, width, rngs, axes=FROM_HEADS, bias=bias)
        self.mlp = Mlp(config, rngs)

    def modulated(self, inputs: Inputs, shared: Float[Array, "b e"] | None) -> list[Array]:
        """Return shift, scale and gate, of attention and of the MLP."""
        vectors = self.modulation(inputs.vector) if shared is None else shared
        return jnp.split(vectors, 6, axis=-1)

    def project(self, x: Tokens, vectors: list[Array]) -> tuple[Array, Array, Array]:
        """Return queries, keys and values by heads."""
        h = modulate(self.norm(x), *vectors[:2])
        return self.heads(self.q(h), self.k(h), self.v(h))

    def finish(self, x: Tokens, attended: Tokens, vectors: list[Array]) -> Tokens:
        """Add the outputs of attention and of the MLP."""
        x = x + vectors[2][:, None] * self.out(attended)
        return x + vectors[5][:, None] * self.mlp(modulate(self.norm(x), *vectors[3:5]))


class DoubleBlock(nnx.Module):
    """Attention over text and image tokens, each with weights of their own."""

    def __init__(self, config: "FluxConfig", *, rngs: nnx.Rngs):
        self.text, self.image = Stream(config, rngs), Stream(config, rngs)

    def __call__(self, tokens: tuple[Words, Tokens], inputs: Inputs) -> tuple[Words, Tokens]:
        """Return text and image tokens of the same shapes."""
        text, image = tokens
        shared = inputs.shared
        text_vectors = self.text.modulated(inputs, shared and shared.text)
        image_vectors = self.image.modulated(inputs, shared and shared.image)
        both = zip(
            self.text.project(text, text_vectors),
            self.image.project(image, image_vectors),
            strict=True,
        )
        y = inputs.attend(*(jnp.concatenate(pair, axis=1) for pair in both))
        length = text.shape[1]
        return (
            self.text.finish(text, y[:, :length], text_vectors),
            self.image.finish(image, y[:, length:], image_vectors),
        )


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel, from the same normalised tokens to one output layer."""

    def __init__(self, config: "FluxConfig", *, rngs: nnx.Rngs):
        self.activation = config.mlp
        if not config.shared_modulation:
            self.modulation = init_modulation(3, config, rngs)
        width, hidden, bias = config.width, config.hidden, config.bias
        # The widest units that both q, k, v and the hidden channels consist of.
        unit = math.gcd(width, hidden)
        self.units = width // unit
        self.norm = plain_layer_norm(width, config.eps, rngs)
        if not config.fused:
            self.q, self.k, self.v = (
                linear(width, width, rngs, axes=TO_HEADS, bias=bias) for _ in range(3)
            )
        inner = config.inner + (3 * width if config.fused else 0)
        self.inner = _unit_linear(width, inner, inner // unit, config, rngs, TO_MLP)
        self.heads = Heads(config, rngs)
        outer = width + hidden
        self.out = _unit_linear(outer, width, outer // unit, config, rngs, FROM_MLP)

    def __call__(self, x: Tokens, inputs: Inputs) -> Tokens:
        """Return the same shape."""
        shared = inputs.shared
        vectors = self.modulation(inputs.vector) if shared is None else shared.single
        shift, scale, gate = jnp.split(vectors, 3, axis=-1)
        h = modulate(self.norm(x), shift, scale)
        units = self.inner.split(h)
        if hasattr(self, "q"):
            qkv = self.q(h), self.k(h), self.v(h)
        else:
            ends = self.units, 2 * self.units, 3 * self.units
            *qkv, units = jnp.split(units, ends, axis=-2)
        y = inputs.attend(*self.heads(*(y.reshape(x.shape) for y in qkv)))
        y = y.reshape(*x.shape[:2], self.units, -1)
        y = jnp.concatenate([y, _activate(units, self.activation)], axis=-2)
        return x + gate[:, None] * self.out.join(y)
