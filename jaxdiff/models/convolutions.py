"""Layers of Stable Diffusion's autoencoder and U-Net, in the structure of their checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.distributed.sharding import Axes, gather_kernel, traced_mesh
from jaxdiff.models import cpu_convolutions
from jaxdiff.models.initializers import fan_in_normal
from jaxdiff.models.layers import EMBED, Dense, Remat, checkpoint

Wrap = tuple[bool, bool]
"""Whether padding is circular, vertically and horizontally."""

WINDOW_AXES: Axes = ("window", "window", "channels", "channels")
"""Names of a convolution kernel's axes."""

Sides = tuple[tuple[int, int], tuple[int, int]]  # positions added above and below, left and right


_KEEPS_SIZE: Sides = ((1, 1), (1, 1))  # of a 3 x 3 window at stride 1


def _convolve(
    inputs: Array, kernel: Array, strides: Any, padding: Any, *args: Any, **options: Any
) -> Array:
    mesh = traced_mesh()
    splits_rows = mesh is not None and mesh.shape["context"] > 1
    keeps_size = tuple(strides) == (1, 1) and tuple(map(tuple, padding)) == _KEEPS_SIZE
    if keeps_size and not splits_rows and cpu_convolutions.applies(inputs, kernel):
        return cpu_convolutions.convolve(inputs, kernel)
    kernel = gather_kernel(kernel)
    return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, *args, **options)


class Conv(nnx.Conv):
    """A convolution with a square kernel and zero padding.

    `lora.add_adapters` adds an adapter, and `wrap_convolutions` makes the padding circular.
    """

    lora: Any
    padding: Sides

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int,
        rngs: nnx.Rngs,
        *,
        bias: bool = True,
        sides: Sides | None = None,
    ):
        self.stride = stride
        self.around: Sides = ((0, 0), (0, 0))
        init = fan_in_normal()
        half = (size // 2, size // 2)
        super().__init__(
            inputs,
            outputs,
            (size, size),
            stride,
            padding=(half, half) if sides is None else sides,
            use_bias=bias,
            kernel_init=init,
            kernel_metadata={"axes": WINDOW_AXES},
            conv_general_dilated=_convolve,
            rngs=rngs,
        )

    def __call__(
        self, inputs: Float[Array, "b h w c"], out_sharding: None = None
    ) -> Float[Array, "b H W d"]:
        """Convolve; sides are divided by the stride, rounded up."""
        if any(map(any, self.around)):
            inputs = jnp.pad(inputs, ((0, 0), *self.around, (0, 0)), mode="wrap")
        out = super().__call__(inputs, out_sharding)
        if hasattr(self, "lora"):
            layout = ("NHWC", "HWIO", "NHWC")
            strides = (self.stride, self.stride)
            down = _convolve(
                inputs, self.lora.down[...], strides, self.padding, dimension_numbers=layout
            )
            out = out + down @ self.lora.up[0, 0]
        return out


def wrap_convolutions(module: nnx.Module, wrap: Wrap) -> None:
    """Make the padding of a newly built module's convolutions circular."""
    (down, across), none = wrap, (0, 0)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Conv):
            rows, columns = layer.padding
            layer.around = (rows if down else none, columns if across else none)
            layer.padding = (none if down else rows, none if across else columns)


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> Conv:
    """Build a convolution of stride 1, which keeps the size of images."""
    return Conv(inputs, outputs, size, 1, rngs)


def fan_in_linear(
    inputs: int, outputs: int, rngs: nnx.Rngs, *, axes: Axes = EMBED, bias: bool = True
) -> Dense:
    """Build a linear layer with `fan_in_normal` initialisation."""
    init = fan_in_normal()
    return Dense(inputs, outputs, axes=axes, use_bias=bias, kernel_init=init, rngs=rngs)


class GroupNorm(nnx.GroupNorm):
    """Group norm with statistics in float32 that returns the dtype of its input."""

    def __init__(self, channels: int, groups: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(channels, groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise each group of each image."""
        return super().__call__(x).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two convolutions, each after a norm and SiLU, with a residual around them.

    With a `time_width`, a projected time embedding is added between the two.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
        time_width: int | None = None,
        remat: Remat = "none",
    ):
        self.remat: Remat = remat
        self.norm1 = GroupNorm(inputs, groups, epsilon, rngs)
        self.conv1 = conv(inputs, outputs, 3, rngs)
        self.time = None if time_width is None else fan_in_linear(time_width, outputs, rngs)
        self.norm2 = GroupNorm(outputs, groups, epsilon, rngs)
        self.conv2 = conv(outputs, outputs, 3, rngs)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, rngs)

    def _residual(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b d"] | None
    ) -> Float[Array, "b h w e"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            y = y + self.time(jax.nn.silu(time))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))

    @jax.named_scope("block")
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b h w e"]:
        """To the width of `outputs`, at the same resolution."""
        graphdef, params = nnx.split(self)

        def residual(params: Any, x: Array, time: Array | None) -> Array:
            return nnx.merge(graphdef, params)._residual(x, time)

        return checkpoint(residual, self.remat)(params, x, time)
