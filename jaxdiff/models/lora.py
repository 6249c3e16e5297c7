"""Low-rank adaptation: y = x W + x A B, of which only A and B are trained (Hu et al. 2021, eq. 3).

The factor alpha / rank of the paper's section 4.1 is part of B, so that adapters of one layer add
up to one of the sum of their ranks. A convolution's A has its window, its B is 1x1.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from jaxdiff.errors import UserError
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.layers import Dense

LORA = "lora"  # the attribute of a layer that is its adapter


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers are adapted, and how freely.

    Attributes:
      rank: of every adapter.
      alpha: an adapter's output counts alpha / rank; None is `rank`, for a factor of 1.
      targets: ends of the paths of these layers, in whole names; `*` is any number. By default the
        layers that lead into and out of attention.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "out")

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA: the rank is {self.rank}: expected at least 1.")

    @property
    def scale(self) -> float:
        """The factor on an adapter's output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether the layer at `path`, as in `down.0.transformers.1.blocks.attention.q`, is one."""
        ends = "|".join(re.escape(target).replace(r"\*", r"\d+") for target in self.targets)
        return re.search(rf"(^|\.)({ends})$", path) is not None


class Factors(NamedTuple):
    """An adapter: A is [..., in, rank], B [..., rank, out], dots as of the layer's kernel."""

    down: Any
    up: Any

    @property
    def product(self) -> Array:
        """What it adds to the kernel."""
        return jnp.matmul(self.down, self.up)

    def beside(self, other: "Factors") -> "Factors":
        """One adapter that adds what both of them do."""
        return Factors(
            jnp.concatenate([self.down, other.down], axis=-1),
            jnp.concatenate([self.up, other.up], axis=-2),
        )


class Lora(nnx.Module):
    """The adapter of one layer, or of all those of a stack."""

    def __init__(self, kernel: nnx.Param, config: LoraConfig, rngs: nnx.Rngs):
        *window, inputs, outputs = kernel.shape
        is_convolution = kernel.ndim >= 4
        ones = [1] * len(window) if is_convolution else window
        # He et al. 2015 for A, zero for B, so that nothing changes before the first update.
        values = math.prod(window) * inputs if is_convolution else inputs
        bound = 1 / math.sqrt(values)
        down = jax.random.uniform(
            rngs.params(), (*window, inputs, config.rank), minval=-bound, maxval=bound
        )
        self.scale = config.scale
        self.down = nnx.Param(down)
        self.up = nnx.Param(jnp.zeros((*ones, config.rank, outputs)))


def attach(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives the layers that `config` names their adapters.

    Raises:
      UserError: there is no such layer.
    """
    layers = [
        layer
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, Dense | Conv) and config.adapts(".".join(map(str, path)))
    ]
    if not layers:
        raise UserError(
            f"LoRA: no layer's path ends in any of {', '.join(config.targets)}: name others in "
            "targets."
        )
    for layer in layers:
        layer.lora = Lora(layer.kernel, config, rngs)


class Adapters(nnx.Module):
    """The adapters of a network without the network: each at the path that it has there."""

    def __init__(self, network: nnx.Module):
        is_adapter = nnx.PathContains(LORA)
        tree = nnx.to_pure_dict(nnx.state(network, is_adapter))
        for name, part in tree.items():
            setattr(self, name, _module(part))


def _module(tree: Any) -> Any:
    """A nested dict of arrays as modules; in a list, what has no adapter is empty."""
    if not isinstance(tree, Mapping):
        return nnx.Param(tree)
    if tree and all(isinstance(key, int) for key in tree):
        return nnx.List(_module(tree.get(i, {})) for i in range(max(tree) + 1))
    return nnx.Dict({name: _module(part) for name, part in tree.items()})


Path = tuple[str | int, ...]


def factors(adapters: Mapping[str, Any]) -> dict[Path, Factors]:
    """The adapters in a nested dict of parameters, by the paths of their layers."""
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(adapters))
    paths = sorted({path[:-2] for path in flat if LORA in path}, key=str)
    return {path: Factors(flat[*path, LORA, "down"], flat[*path, LORA, "up"]) for path in paths}


def tree(adapters: Mapping[Path, Factors]) -> dict[str, Any]:
    """The inverse of `factors`."""
    flat = {
        (*path, LORA, name): value
        for path, pair in adapters.items()
        for name, value in pair._asdict().items()
    }
    return traverse_util.unflatten_dict(flat)


def adapted(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """A network's parameters together with those of its adapters; both are nested dicts."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(adapters)
    return traverse_util.unflatten_dict(flat)


def without(params: Mapping[str, Any]) -> dict[str, Any]:
    """A network's parameters without those of its adapters."""
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(params))
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if LORA not in path})


def merged(params: Mapping[str, Any], adapters: Mapping[Path, Factors]) -> dict[str, Any]:
    """A network's parameters with the adapters, of scale 1, made part of its kernels."""
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(params))
    for path, pair in adapters.items():
        kernel = flat[*path, "kernel"]
        change = Factors(*(jnp.asarray(x, jnp.float32) for x in pair)).product
        flat[*path, "kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)
