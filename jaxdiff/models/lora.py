"""Low-rank adaptation: y = x W + x A B, where only A and B are trained (Hu et al. 2021, eq. 3).

The factor alpha / rank of the paper's section 4.1 is part of B, so that adapters of one layer
concatenate to one adapter. A convolution's A has its kernel size; its B is 1x1.

Adapters are a nested dict of parameters that mirrors the network's: the layer at a path has its
adapter at (*path, "lora").
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.errors import UserError
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.layers import Dense, axes_of

LORA = "lora"  # the attribute of a layer that is its adapter


@checked
@dataclass(frozen=True, kw_only=True)
class LoraPattern:
    """Another rank and alpha for some of the adapted layers.

    Attributes:
      targets: ends of the paths of these layers, as in `LoraConfig`.
      rank: rank of their adapters.
      alpha: alpha of their adapters; None is `rank`.
    """

    targets: tuple[str, ...]
    rank: Count
    alpha: float | None = None


@checked
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank, scale and target layers of adapters that are to be trained.

    Attributes:
      rank: rank of every adapter.
      alpha: an adapter's output is multiplied by alpha / rank; None is `rank`, for a factor of 1.
      targets: ends of the paths of the adapted layers, in whole names; `*` is any number. By
        default the input and output projections of attention.
      patterns: layers with another rank or alpha; of several that match, the first counts.

    Raises:
      UserError: a rank below 1.
    """

    rank: Count = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    patterns: tuple[LoraPattern, ...] = ()

    def adapts(self, path: str) -> bool:
        """Whether a layer's path, such as `down.0.transformers.1.blocks.attention.q`, matches."""
        return _matches(self.targets, path)

    def rank_of(self, path: str) -> int:
        """Return the rank of the adapter of an adapted layer."""
        return self._of(path).rank

    def scale_of(self, path: str) -> float:
        """Return the factor on the output of an adapter, alpha / rank."""
        found = self._of(path)
        return 1.0 if found.alpha is None else found.alpha / found.rank

    def _of(self, path: str) -> "LoraConfig | LoraPattern":
        return next((x for x in self.patterns if _matches(x.targets, path)), self)


def _matches(targets: tuple[str, ...], path: str) -> bool:
    ends = "|".join(re.escape(target).replace(r"\*", r"\d+") for target in targets)
    return re.search(rf"(^|\.)({ends})$", path) is not None


class Factors(NamedTuple):
    """An adapter: A is [..., in, rank], B [..., rank, out], with the kernel's leading axes."""

    down: Any
    up: Any

    @property
    def product(self) -> Array:
        """The change of the kernel."""
        return jnp.matmul(self.down, self.up)

    def beside(self, other: "Factors") -> "Factors":
        """Concatenate two adapters of a layer; their effects add up."""
        return Factors(
            jnp.concatenate([self.down, other.down], axis=-1),
            jnp.concatenate([self.up, other.up], axis=-2),
        )

    def scaled(self, scale: float) -> "Factors":
        """Multiply the effect."""
        return Factors(self.down, self.up * scale)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a parameter that is not of low rank, or that depends on its value.

    Attributes:
      kind: of adapter, for messages.
      apply: from the parameter and a factor on the effect to the changed parameter, in float32.
      scale: the factor.
    """

    kind: str
    apply: Callable[[np.ndarray, float], np.ndarray]
    scale: float = 1.0

    def scaled(self, scale: float) -> "Change":
        """Multiply the effect."""
        return dataclasses.replace(self, scale=self.scale * scale)


Path = tuple[str | int, ...]
Adapters = Mapping[str, Mapping[Path, Factors]]
"""Adapters by part of a model (`denoiser`, `text`, `text_2`), then by the path of the layer."""

Changes = Mapping[str, Mapping[Path, Factors | Change]]
"""Adapters and changes by part, then by the path of the layer, or of the parameter to change."""


class Lora(nnx.Module):
    """The adapter of one layer, or of all those of a stack.

    Args:
      pair: its parameters.
      kernel: of the layer, whose axes it shares.
    """

    def __init__(self, pair: Factors, kernel: nnx.Param):
        axes = _axes(kernel)
        self.down = nnx.Param(pair.down, axes=axes.down)
        self.up = nnx.Param(pair.up, axes=axes.up)


def _axes(kernel: nnx.Param) -> Factors:
    """Return the names of the axes of an adapter of a layer with this kernel."""
    *first, inputs, outputs = axes_of(kernel)
    return Factors((*first, inputs, "rank"), (*first, "rank", outputs))


def adapter_axes(module: nnx.Module) -> dict[str, Any]:
    """Return the axes of the adapters of all Dense and Conv layers of a module, a nested dict."""
    layers: Any = nnx.iter_modules(module)
    return tree({p: _axes(x.kernel) for p, x in layers if isinstance(x, Dense | Conv)})


def init_adapters(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Initialise adapters for the layers of a module that `config` names.

    A is uniform (He et al. 2015), B zero, so that outputs are unchanged before the first update.

    Raises:
      UserError: no layer matches.
    """
    layers = {
        path: layer
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, Dense | Conv) and config.adapts(_dotted(path))
    }
    if not layers:
        raise UserError(
            f"LoRA: no layer's path ends in {', '.join(config.targets)}: expected names of layers "
            "in targets."
        )
    pairs: dict[Path, Factors] = {
        cast(Path, path): _init(layer.kernel, config.rank_of(_dotted(path)), rngs)
        for path, layer in layers.items()
    }
    return tree(pairs)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _init(kernel: nnx.Param, rank: int, rngs: nnx.Rngs) -> Factors:
    down, up = _shapes(kernel.shape, rank)
    fan_in = math.prod(down[:-1]) if kernel.ndim >= 4 else down[-2]
    bound = 1 / math.sqrt(fan_in)
    return Factors(
        jax.random.uniform(rngs.params(), down, minval=-bound, maxval=bound), jnp.zeros(up)
    )


def _shapes(kernel: tuple[int, ...], rank: int) -> Factors:
    """Return the shapes of an adapter of a layer, or of a stack, with a kernel of this shape."""
    *first, inputs, outputs = kernel
    ones = [1] * len(first) if len(kernel) >= 4 else first  # of a convolution
    return Factors((*first, inputs, rank), (*ones, rank, outputs))


def fits(pair: Factors, kernel: tuple[int, ...]) -> bool:
    """Whether an adapter, of any rank, has the shapes of one of a layer with this kernel."""
    shapes = Factors(pair.down.shape, pair.up.shape)
    return shapes == _shapes(kernel, (0, *shapes.down)[-1])


def add_adapters(module: nnx.Module, adapters: Mapping[str, Any]) -> None:
    """Add adapters, a nested dict of parameters, to the layers of a module."""
    for path, pair in factors(adapters).items():
        layer: Any = module
        for name in path:
            layer = layer[name] if isinstance(name, int) else getattr(layer, name)
        layer.lora = Lora(pair, layer.kernel)


def factors(adapters: Mapping[str, Any]) -> dict[Path, Factors]:
    """Return the adapters in a nested dict of parameters, by the paths of their layers.

    Raises:
      UserError: one lacks a factor, or a parameter is of no adapter.
    """
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(adapters))
    paths = sorted({path[:-2] for path in flat}, key=str)
    expected = {(*path, LORA, name) for path in paths for name in Factors._fields}
    for path in sorted(expected ^ flat.keys(), key=str):
        raise UserError(
            f"The adapters' parameter {_dotted(path)} is "
            f"{'missing' if path in expected else 'unknown'}: expected {LORA}.down and {LORA}.up "
            "of each adapted layer; copy or export the model again."
        )
    return {path: Factors(flat[*path, LORA, "down"], flat[*path, LORA, "up"]) for path in paths}


def tree(adapters: Mapping[Path, Factors]) -> dict[str, Any]:
    """Return a nested dict of parameters, the inverse of `factors`."""
    flat = {
        (*path, LORA, name): value
        for path, pair in adapters.items()
        for name, value in pair._asdict().items()
    }
    return traverse_util.unflatten_dict(flat)


def scale_adapters(adapters: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Multiply trained adapters, a nested dict of parameters, by their alpha / rank."""
    scaled = {}
    for path, pair in factors(adapters).items():
        scale = config.scale_of(_dotted(path))
        scaled[path] = pair if scale == 1 else pair.scaled(scale)
    return tree(scaled)


def merge_adapters(
    params: Mapping[str, Any], adapters: Mapping[Path, Factors | Change]
) -> dict[str, Any]:
    """Add adapters to a network's parameters, summed in float32, and apply changes."""
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(params))
    for path, adapter in adapters.items():
        adapted = adapted_path(path, adapter)
        flat[adapted] = with_adapter(flat[adapted], adapter)
    return traverse_util.unflatten_dict(flat)


def adapted_path(path: Path, adapter: Factors | Change) -> Path:
    """Return the path of the parameter that an adapter changes."""
    return path if isinstance(adapter, Change) else (*path, "kernel")


def with_adapter(old: Any, adapter: Factors | Change) -> Any:
    """Add an adapter to a parameter, summed in float32, or apply its change."""
    if isinstance(adapter, Change):
        value = old[...]
        new = adapter.apply(np.asarray(value, np.float32), adapter.scale).astype(value.dtype)
        return jax.device_put(new, value.sharding) if isinstance(value, jax.Array) else new
    # On the host, as JAX would compile each shape.
    product = np.matmul if isinstance(old, np.ndarray) else jnp.matmul
    change = product(*(x.astype(np.float32) for x in adapter))
    return (old.astype(jnp.float32) + change).astype(old.dtype)
