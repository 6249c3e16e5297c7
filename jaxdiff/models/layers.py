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
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdiff.distributed.sharding import (
    Axes,
    batch_axes,
    gather_weights,
    partition_spec,
    tensor_spec,
    traced_mesh,
)
from jaxdiff.errors import UserError
from jaxdiff.models.initializers import NoRngs
from jaxdiff.models.products import dot_general, product_primitive
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

    def build(rngs: nnx.Rngs) -> Block:
        block = make(rngs)
        for _, param in nnx.to_flat_state(nnx.state(block)):
            param.set_metadata(axes=("layers", *axes_of(param)))
        return block

    if not isinstance(rngs, NoRngs):
        return nnx.split_rngs(splits=depth)(nnx.vmap(build, in_axes=0, out_axes=0))(rngs)
    block = build(rngs)
    for _, param in nnx.to_flat_state(nnx.state(block)):
        param.set_value(jnp.zeros((depth, *param.shape), param.dtype))
    return block


def checkpoint(
    function: Callable[..., Any], remat: Remat, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    """Rematerialize a function; `prevent_cse=False` saves a barrier in the body of a scan."""
    if remat == "none":
        return function
    return jax.checkpoint(
        function, policy=_saves_dots if remat == "dots" else None, prevent_cse=prevent_cse
    )


def _saves_dots(primitive: Any, *args: Any, **params: Any) -> Any:
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return saved or primitive is product_primitive


def scan_blocks(
    blocks: Block,
    x: PyTree[Float[Array, "b _ d"]],
    call: Callable[[Block, Any], Any],
    *,
    remat: Remat = "none",
    all_states: bool = False,
    span: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Run stacked blocks in sequence; their body compiles once.

    Args:
      blocks: what `stack_blocks` returned.
      x: the input of the first block, an array or a tree of them.
      call: `call(block, x)` gives the next x, of the same shapes.
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
        options.setdefault("dot_general", dot_general)
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


class UnitDense(Dense):
    """A linear layer whose outputs, or inputs, are units of equal width, such as q, k and v.

    Where `tensor` splits these, a device has columns of some units only. The weights are exchanged,
    so that it has the same columns of all units; the products would be larger.

    Args:
      in_features: of the input.
      out_features: of the output.
      units: number of units of the outputs, or of the inputs.
      **options: of `Dense`.
    """

    def __init__(self, in_features: int, out_features: int, *, units: int, **options: Any):
        super().__init__(in_features, out_features, **options)
        self.units = units

    def split(self, inputs: Float[Array, "... d"]) -> Float[Array, "... units w"]:
        """Return `inputs @ kernel + bias` by units of the outputs."""
        if not self._is_exchanged:
            out = self(inputs)
            return out.reshape(*out.shape[:-1], self.units, -1)
        out = jnp.tensordot(inputs, self._columns(self.kernel[...]), 1)
        if self.bias is not None:
            out = out + self._columns(self.bias[...])
        if hasattr(self, "lora"):
            out = out + jnp.tensordot(inputs @ self.lora.down, self._columns(self.lora.up[...]), 1)
        return out

    def join(self, inputs: Float[Array, "... units w"]) -> Float[Array, "... d"]:
        """Return `inputs @ kernel + bias` of inputs by units."""
        if not self._is_exchanged:
            return self(inputs.reshape(*inputs.shape[:-2], -1))
        out = jnp.tensordot(inputs, self._rows(self.kernel[...]), 2)
        if self.bias is not None:
            out = out + self.bias[...]
        if hasattr(self, "lora"):
            out = out + jnp.tensordot(inputs, self._rows(self.lora.down[...]), 2) @ self.lora.up
        return out

    @property
    def _is_exchanged(self) -> bool:
        mesh = traced_mesh()
        return mesh is not None and mesh.shape["tensor"] > 1

    def _columns(self, weight: Float[Array, "... d"]) -> Float[Array, "... units w"]:
        weight = weight.reshape(*weight.shape[:-1], self.units, -1)
        return _split_over_tensor(weight, (None,) * (weight.ndim - 1) + ("mlp",))

    def _rows(self, weight: Float[Array, "d e"]) -> Float[Array, "units w e"]:
        weight = weight.reshape(self.units, -1, weight.shape[-1])
        return _split_over_tensor(weight, (None, "mlp", None))


def _split_over_tensor(weight: Array, axes: Axes) -> Array:
    mesh = traced_mesh()
    assert mesh is not None
    spec = tensor_spec(axes, weight.shape, mesh)
    return jax.lax.with_sharding_constraint(weight, spec)


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


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    """Scale and shift the channels of each image's tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


def plain_layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Build a layer norm without parameters."""
    return nnx.LayerNorm(
        width,
        epsilon=epsilon,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        rngs=rngs,
    )


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


def axial_angles(
    positions: Int[Array, "*b n axes"], widths: tuple[int, ...], theta: float
) -> Float[Array, "*b n half"]:
    """Return the angles of rotary embeddings (Su et al. 2021) with channels of their own by axis.

    Args:
      positions: of tokens.
      widths: channels of a head that rotate with each axis.
      theta: base of the frequencies, theta^(-2i / width).
    """
    angles = [
        positions[..., axis, None].astype(jnp.float32)
        * (float(theta) ** (-np.arange(0, width, 2) / width)).astype(np.float32)
        for axis, width in enumerate(widths)
    ]
    return jnp.concatenate(angles, axis=-1)


def apply_rope(
    x: Float[Array, "b n heads k"],
    angles: Float[Array, "n half"] | Float[Array, "b n half"],
    *,
    interleaved: bool = False,
) -> Array:
    """Rotate pairs of a head's channels by their positions' angles, in float32.

    Pairs are (x[i], x[i + k/2]), or (x[2i], x[2i + 1]) if `interleaved`.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    y = x.astype(jnp.float32)
    if interleaved:
        cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.repeat(sin, 2, axis=-1)
        sign = np.resize(np.array([-1, 1], np.float32), x.shape[-1])
        # XLA fuses this, but neither rolled nor strided channels: on a CPU it is 15 times as fast.
        swapped = jnp.flip(y.reshape(*y.shape[:-1], -1, 2), axis=-1).reshape(y.shape)
        return (y * cos + swapped * (sign * sin)).astype(x.dtype)
    a, b = jnp.split(y, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def absolute_positions(positions: Array, width: int) -> Float[Array, "n {width}"]:
    """Return 2D sin-cos embeddings: row, then column (Dosovitskiy et al. 2021)."""
    rows, columns = positions.astype(jnp.float32).T
    return jnp.concatenate(
        [fourier_features(axis, width // 2, scale=1.0) for axis in (rows, columns)], axis=-1
    )


def patchify(
    x: Float[Array, "b h w c"], patch: int, *, channels_first: bool = False
) -> Float[Array, "b n d"]:
    """Split images into square patches as tokens, row by row; `UserError` if they do not fit.

    A token's numbers are ordered (row, column, channel), or (channel, row, column).
    """
    b, h, w, c = x.shape
    if h % patch or w % patch:
        raise UserError(
            f"An image of {w}x{h} does not split into patches: expected a size that is a multiple "
            f"of {patch}."
        )
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    order = (0, 1, 3, 5, 2, 4) if channels_first else (0, 1, 3, 2, 4, 5)
    return x.transpose(order).reshape(b, -1, patch * patch * c)


def unpatchify(
    x: Float[Array, "b n d"], rows: int, columns: int, patch: int, *, channels_first: bool = False
) -> Array:
    """Invert `patchify` for images of rows x columns patches."""
    if channels_first:
        x = x.reshape(x.shape[0], rows, columns, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(x.shape[0], rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], rows * patch, columns * patch, -1)


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
    return lambda: make(*parts, rngs=NoRngs())


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
