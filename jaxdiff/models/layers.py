"""Layers that several networks share: time embedding, rotary positions, stacked blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.distributed.sharding import (
    Axes,
    batch_axes,
    gather_weights,
    partition_spec,
    tensor_spec,
    traced_mesh,
)
from jaxdiff.errors import UserError
from jaxdiff.models.quantized import QuantizedKernel, is_quantized

Remat = Literal["none", "dots", "full"]
"""What a block keeps for the backward pass: everything, its matrix products, or its input only."""

ComputeType = Literal["float32", "bfloat16"]

Block = TypeVar("Block", bound=nnx.Module)

# Names of a kernel's axes, inputs before outputs; AXIS_RULES in distributed/sharding.py says what
# they mean. A parameter has them as metadata under the key "axes".
EMBED: Axes = ("embed", "embed")
TO_HEADS: Axes = ("embed", "heads")
FROM_HEADS: Axes = ("heads", "embed")
TO_MLP: Axes = ("embed", "mlp")
FROM_MLP: Axes = ("mlp", "embed")
TO_MODULATION: Axes = ("embed", "modulation")
FROM_CHANNELS: Axes = ("channels", "embed")
TO_CHANNELS: Axes = ("embed", "channels")


def axes_of(param: nnx.Variable) -> Axes:
    """Return the names of a parameter's axes; None for those without."""
    return param.get_metadata("axes", (None,) * len(param.shape))


def pooled_token_sum(
    tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
) -> Float[Array, "b d"]:
    """Sum a prompt's token embeddings: 2 sum / sqrt(number of tokens).

    Every token contributes, including those that the encoder's pooled vector ignores. Tokens of
    unit variance give a vector of variance 4. Prompts share more than half of it (the start, the
    end, "a", "with"); the part that differs has a variance of 1 to 2.
    """
    if mask is None:
        mask = jnp.ones(tokens.shape[:2], bool)
    mask = mask[..., None].astype(tokens.dtype)
    return 2.0 * jnp.sum(tokens * mask, axis=1) / jnp.sqrt(jnp.sum(mask, axis=1))


def stack_blocks(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Build `depth` blocks as one module whose parameters have a leading axis, "layers"."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Block:
        block = make(rngs)
        for _, param in nnx.to_flat_state(nnx.state(block)):
            param.set_metadata(axes=("layers", *axes_of(param)))
        return block

    return build(rngs)


def checkpoint(
    function: Callable[..., Any], remat: Remat, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    """Rematerialize a function; `prevent_cse=False` saves a barrier in the body of a scan."""
    if remat == "none":
        return function
    saves_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(
        function, policy=saves_dots if remat == "dots" else None, prevent_cse=prevent_cse
    )


def scan_blocks(
    blocks: Block,
    x: Float[Array, "b n d"],
    call: Callable[[Block, Any], Any],
    *,
    remat: Remat = "none",
    all_states: bool = False,
    span: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Run stacked blocks in sequence; their body compiles once.

    Args:
      blocks: what `stack_blocks` returned.
      x: the input of the first block.
      call: `call(block, x)` gives the next x, of the same shape.
      remat: what is kept for the backward pass.
      all_states: also return the output of every block, `[depth, b, n, d]`; otherwise None.
      span: the first block to run, and the one after the last; None runs all.

    Returns:
      The output of the last block, and all outputs or None.
    """
    graphdef, state = nnx.split(blocks)
    axes = _axes_tree(state, first=1)

    @jax.named_scope("block")
    def body(x, params):
        x = call(nnx.merge(graphdef, gather_weights(params, axes)), x)
        return x, x if all_states else None

    step, stack = checkpoint(body, remat, prevent_cse=False), nnx.to_pure_dict(state)
    if span is None:
        return jax.lax.scan(step, x, stack)

    def indexed(x, i):  # a slice of the stack would be a copy
        return step(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, 0, False), stack))

    return jax.lax.scan(indexed, x, jnp.arange(*span))


class Dense(nnx.Linear):
    """A linear layer over the last axis, computed as one product of two matrices.

    With merged leading axes, XLA's CPU backend computes the kernel's gradient without transposing
    the activations: a DiT block trains 1.2 times as fast. `lora.add_adapters` adds an adapter.

    Args:
      in_features: of the input.
      out_features: of the output.
      axes: names of the kernel's axes; None leaves them without.
      **options: of `nnx.Linear`.
    """

    lora: Any

    def __init__(
        self, in_features: int, out_features: int, *, axes: Axes | None = None, **options: Any
    ):
        metadata = {} if axes is None else {"axes": axes}
        super().__init__(in_features, out_features, kernel_metadata=metadata, **options)

    def __call__(self, inputs: Float[Array, "... d"], out_sharding: None = None) -> Array:
        """`inputs @ kernel + bias`, in the type of the inputs and the weights."""
        mesh = traced_mesh()
        if mesh is not None and mesh.shape["context"] > 1:  # axes that are split are not merged
            flat = inputs
        else:
            flat = inputs.reshape(-1, inputs.shape[-1])
        out = super().__call__(flat, out_sharding)
        if hasattr(self, "lora"):
            out = out + flat @ self.lora.down @ self.lora.up
        return out.reshape(*inputs.shape[:-1], -1)


class PairedDense(Dense):
    """A linear layer whose outputs are two halves that are multiplied with each other."""

    def halves(self, inputs: Float[Array, "... d"]) -> tuple[Array, Array]:
        """Return both halves of `inputs @ kernel + bias`.

        Where `tensor` splits the outputs, a device has columns of one half only. The weights are
        exchanged, so that it has the same columns of both; the products would be larger.
        """
        mesh = traced_mesh()
        if mesh is None or mesh.shape["tensor"] == 1:
            first, second = jnp.split(self(inputs), 2, axis=-1)
            return first, second

        def pair(weight: Array) -> Float[Array, "... 2 h"]:
            weight = weight.reshape(*weight.shape[:-1], 2, -1)
            spec = tensor_spec((None,) * (weight.ndim - 1) + ("mlp",), weight.shape, mesh)
            return jax.lax.with_sharding_constraint(weight, spec)

        out = jnp.tensordot(inputs, pair(self.kernel[...]), 1)
        if self.bias is not None:
            out = out + pair(self.bias[...])
        if hasattr(self, "lora"):
            out = out + jnp.tensordot(inputs @ self.lora.down, pair(self.lora.up[...]), 1)
        return out[..., 0, :], out[..., 1, :]


class Modulation(Dense):
    """A linear layer of one vector per image, such as that of adaLN (Peebles & Xie 2023).

    A device has few images and would gather the whole kernel for them. The devices along `fsdp`
    exchange their vectors instead: each multiplies all of them with its part of the kernel.
    """

    def __init__(self, in_features: int, out_features: int, **options: Any):
        super().__init__(in_features, out_features, axes=TO_MODULATION, **options)

    def __call__(self, inputs: Float[Array, "b d"], out_sharding: None = None) -> Array:
        """`inputs @ kernel + bias`, in the type of the inputs and the weights."""
        mesh = traced_mesh()
        if mesh is None or mesh.shape["fsdp"] == 1:
            return super().__call__(inputs, out_sharding)
        images = batch_axes(mesh)
        replicas = tuple(axis for axis in images if axis != "fsdp")
        kernel = self.kernel[...]
        _, columns = partition_spec(TO_MODULATION, kernel.shape, mesh)
        if columns is None or len(inputs) % math.prod(mesh.shape[axis] for axis in images):
            return super().__call__(inputs, out_sharding)
        constrain = jax.lax.with_sharding_constraint
        out = super().__call__(constrain(inputs, PartitionSpec(replicas)), out_sharding)
        out = constrain(out, PartitionSpec(replicas, columns))
        return constrain(out, PartitionSpec(images))


def fourier_features(
    t: Float[Array, " b"], width: int, *, scale: float = 1000.0
) -> Float[Array, "b {width}"]:
    """Return cosines, then sines, of t at geometric frequencies (Vaswani et al. 2017, section 3.5).

    `scale` maps t in [0, 1] to the range of DDPM's step index.
    """
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(width // 2) / (width // 2))
    angles = scale * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_table(positions: Int[Array, "n axes"], head_dim: int) -> Float[Array, "n {head_dim//2}"]:
    """Return the angles of axial rotary embeddings (Su et al. 2021), channels split by axis."""
    axes = positions.shape[1]
    per_axis = head_dim // 2 // axes
    frequencies = 100.0 ** (-jnp.arange(per_axis) / per_axis)
    angles = positions[:, :, None] * frequencies
    angles = angles.reshape(positions.shape[0], axes * per_axis)
    return jnp.pad(angles, ((0, 0), (0, head_dim // 2 - axes * per_axis)))


def apply_rope(x: Float[Array, "b n heads k"], angles: Float[Array, "n half"]) -> Array:
    """Rotate each pair (x[i], x[i + k/2]) of a head by its position's angle, in float32."""
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def absolute_positions(positions: Array, width: int) -> Float[Array, "n {width}"]:
    """Return 2D sin-cos embeddings: row, then column (Dosovitskiy et al. 2021)."""
    rows, columns = positions.astype(jnp.float32).T
    return jnp.concatenate(
        [fourier_features(axis, width // 2, scale=1.0) for axis in (rows, columns)], axis=-1
    )


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
    """Split images into square patches as tokens, row by row; `UserError` if they do not fit."""
    b, h, w, c = x.shape
    if h % patch or w % patch:
        raise UserError(
            f"An image of {w}x{h} does not split into patches: expected a size that is a multiple "
            f"of {patch}."
        )
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: Float[Array, "b n d"], rows: int, columns: int, patch: int) -> Array:
    """Invert `patchify` for images of rows x columns patches."""
    x = x.reshape(x.shape[0], rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * patch, columns * patch, -1)


class _Count(np.ndarray):
    """A counter that copies on read, as JAX may read it after the next increment."""

    def __getitem__(self, key: Any) -> Any:
        return np.array(super().__getitem__(key))


def rngs_from_seed(seed: int) -> nnx.Rngs:
    """Return `nnx.Rngs(seed)` for modules that are built under tracing; the numbers are the same.

    The host counts the keys. Flax counts them in a traced array, which makes each key slower to
    trace than the one before: a full U-Net takes three times as long.
    """
    rngs = nnx.Rngs(seed)
    count: Any = np.zeros((), np.uint32).view(_Count)
    rngs.default.count.set_value(count)
    return rngs


def any_rngs() -> nnx.Rngs:
    """Return random keys for a module whose values are not used, only its shapes."""
    return rngs_from_seed(0)


@functools.lru_cache(maxsize=64)
def bind_init(make: Callable[..., nnx.Module], *parts: Hashable) -> Callable[[], nnx.Module]:
    """Bind `make(*parts, rngs)` to its arguments, for `abstract_params` and `bind_params`.

    Equal arguments return the same function, so that a module is traced once.
    """
    return lambda: make(*parts, rngs=any_rngs())


def bind_build(config: Any) -> Callable[[], nnx.Module]:
    """Bind the `build` method of a network's config, as `bind_init` does."""
    return bind_init(type(config).build, config)


def abstract_params(build: Callable[[], nnx.Module]) -> Any:
    """Return shapes and types of the parameters of `build()`, a nested dict, without allocation."""
    return nnx.to_pure_dict(_traced(build)[1])


def abstract_module(build: Callable[[], nnx.Module]) -> nnx.Module:
    """Return the module of `build` with shapes and types as parameters."""
    return nnx.merge(*_traced(build))


def param_axes(build: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Return the axes of the parameters of `build()`, a nested dict like that of the parameters."""
    return _axes_tree(_traced(build)[1])


def _axes_tree(state: Any, first: int = 0) -> dict[str, Any]:
    flat = {path: axes_of(param)[first:] for path, param in nnx.to_flat_state(state)}
    return traverse_util.unflatten_dict(flat)


def bind_params(build: Callable[[], nnx.Module], params: Any) -> Any:
    """Return the module of `build` with these parameters; `build` runs abstractly."""
    return nnx.merge(_traced(build)[0], params)


def init_params(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """Initialise a module's parameters as a nested dict."""
    return nnx.to_pure_dict(nnx.split(make(rngs))[1])


@functools.lru_cache(maxsize=64)
def _traced(build: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(build))


def cast(tree: Any, compute: ComputeType) -> Any:
    """Cast floating arrays to the compute type; a module computes in that of its weights.

    Scalars keep their type: in bfloat16 CLIP's logarithmic temperature would have steps of 2 %.
    """

    def convert(leaf):
        if isinstance(leaf, QuantizedKernel):
            return dataclasses.replace(leaf, compute=compute)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(compute) if is_float and leaf.ndim and leaf.dtype != compute else leaf

    return jax.tree.map(convert, tree, is_leaf=is_quantized)
