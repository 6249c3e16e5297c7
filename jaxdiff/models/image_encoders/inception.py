"""Inception-v3 (Szegedy et al. 2016) as the Frechet inception distance uses it.

The network is that of TensorFlow's release of 2015-12-05 (Heusel et al. 2017), in PyTorch known as
the FID Inception. Unlike torchvision's, it leaves padding out of average pooling, and its last
block has maximum pooling in its pooling branch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.models.initializers import fan_in_normal

IMAGE_SIZE = 299
FEATURES = 2048

_EPSILON = 1e-3


class ConvSpec(NamedTuple):
    """A convolution with batch normalisation, by its published name; stride 1 pads with zeros."""

    name: str
    outputs: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


Step = str | ConvSpec | tuple[ConvSpec, ConvSpec]  # pooling, a convolution, or two side by side
Branches = tuple[tuple[Step, ...], ...]


def _conv(name: str, outputs: int, *window: int, stride: int = 1) -> ConvSpec:
    height, width = window or (1, 1)
    return ConvSpec(name, outputs, (height, width), stride, padded=stride == 1)


def _block_a(pooled: int) -> Branches:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5, 5)),
        (
            _conv("branch3x3dbl_1", 64),
            _conv("branch3x3dbl_2", 96, 3, 3),
            _conv("branch3x3dbl_3", 96, 3, 3),
        ),
        ("average", _conv("branch_pool", pooled)),
    )


def _block_c(inner: int) -> Branches:
    return (
        (_conv("branch1x1", 192),),
        (
            _conv("branch7x7_1", inner),
            _conv("branch7x7_2", inner, 1, 7),
            _conv("branch7x7_3", 192, 7, 1),
        ),
        (
            _conv("branch7x7dbl_1", inner),
            _conv("branch7x7dbl_2", inner, 7, 1),
            _conv("branch7x7dbl_3", inner, 1, 7),
            _conv("branch7x7dbl_4", inner, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ),
        ("average", _conv("branch_pool", 192)),
    )


def _block_e(pooling: str) -> Branches:
    def pair(name: str) -> tuple[ConvSpec, ConvSpec]:
        return _conv(f"{name}a", 384, 1, 3), _conv(f"{name}b", 384, 3, 1)

    return (
        (_conv("branch1x1", 320),),
        (_conv("branch3x3_1", 384), pair("branch3x3_2")),
        (
            _conv("branch3x3dbl_1", 448),
            _conv("branch3x3dbl_2", 384, 3, 3),
            pair("branch3x3dbl_3"),
        ),
        (pooling, _conv("branch_pool", 192)),
    )


_BLOCK_B: Branches = (
    (_conv("branch3x3", 384, 3, 3, stride=2),),
    (
        _conv("branch3x3dbl_1", 64),
        _conv("branch3x3dbl_2", 96, 3, 3),
        _conv("branch3x3dbl_3", 96, 3, 3, stride=2),
    ),
    ("shrink",),
)
_BLOCK_D: Branches = (
    (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, 3, stride=2)),
    (
        _conv("branch7x7x3_1", 192),
        _conv("branch7x7x3_2", 192, 1, 7),
        _conv("branch7x7x3_3", 192, 7, 1),
        _conv("branch7x7x3_4", 192, 3, 3, stride=2),
    ),
    ("shrink",),
)
STEM: tuple[Step, ...] = (
    _conv("Conv2d_1a_3x3", 32, 3, 3, stride=2),
    ConvSpec("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    _conv("Conv2d_2b_3x3", 64, 3, 3),
    "shrink",
    _conv("Conv2d_3b_1x1", 80),
    ConvSpec("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    "shrink",
)
BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}
"""Blocks by their published names."""


class NormalizedConv(nnx.Module):
    """A convolution without bias, batch normalisation by stored moments, and ReLU."""

    def __init__(self, inputs: int, spec: ConvSpec, rngs: nnx.Rngs):
        self.stride, self.padding = spec.stride, "SAME" if spec.padded else "VALID"
        shape = *spec.window, inputs, spec.outputs
        self.kernel = nnx.Param(fan_in_normal()(rngs.params(), shape))
        self.scale = nnx.Param(jnp.ones(spec.outputs))
        self.bias = nnx.Param(jnp.zeros(spec.outputs))
        self.mean = nnx.Param(jnp.zeros(spec.outputs))
        self.variance = nnx.Param(jnp.ones(spec.outputs))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Return the activations."""
        dims = ("NHWC", "HWIO", "NHWC")
        strides = (self.stride, self.stride)
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], strides, self.padding, dimension_numbers=dims
        )
        factor = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON)
        return jax.nn.relu((x - self.mean[...]) * factor + self.bias[...])


def _pool(x: Float[Array, "b h w c"], kind: str) -> Float[Array, "b i j c"]:
    """Pool windows of 3 x 3: the maximum at stride 2, or the maximum or average at stride 1."""
    window = (1, 3, 3, 1)
    if kind == "shrink":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
    if kind == "maximum":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME")
    rows, columns = (_window_counts(side) for side in x.shape[1:3])
    return total / (rows[:, None] * columns)[:, :, None]


def _window_counts(side: int) -> np.ndarray:
    """Return how many positions of a window of 3 lie within the image, by its centre."""
    return np.convolve(np.ones(side, np.float32), np.ones(3, np.float32), "same")[:side]


class _Steps(nnx.Module):
    """A module that holds convolutions under their published names."""

    def __init__(self):
        self.outputs = 0

    def _add(self, inputs: int, steps: tuple[Step, ...], rngs: nnx.Rngs) -> int:
        """Add the convolutions of steps in sequence; return the channels of the last."""
        for step in steps:
            if isinstance(step, str):
                continue
            specs = [step] if isinstance(step, ConvSpec) else step
            for spec in specs:
                setattr(self, spec.name, NormalizedConv(inputs, spec, rngs))
            inputs = sum(spec.outputs for spec in specs)
        return inputs

    def _run(self, x: Array, steps: tuple[Step, ...]) -> Array:
        for step in steps:
            if isinstance(step, str):
                x = _pool(x, step)
            elif isinstance(step, ConvSpec):
                x = getattr(self, step.name)(x)
            else:
                x = jnp.concatenate([getattr(self, spec.name)(x) for spec in step], axis=-1)
        return x


class InceptionBlock(_Steps):
    """Branches side by side, whose channels are concatenated."""

    def __init__(self, inputs: int, name: str, rngs: nnx.Rngs):
        super().__init__()
        self.name = name
        self.outputs = sum(self._add(inputs, steps, rngs) for steps in BLOCKS[name])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Return the channels of all branches."""
        return jnp.concatenate([self._run(x, steps) for steps in BLOCKS[self.name]], axis=-1)


class InceptionV3(_Steps):
    """The network up to its last average pooling."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__()
        channels = self._add(3, STEM, rngs)
        for name in BLOCKS:
            block = InceptionBlock(channels, name, rngs)
            setattr(self, name, block)
            channels = block.outputs

    def __call__(self, images: Float[Array, "b 299 299 3"]) -> Float[Array, "b 2048"]:
        """Return the features of images in [-1, 1]."""
        x: Any = self._run(images, STEM)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(axis=(1, 2))
