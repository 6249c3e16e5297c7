"""The kinds of adapters in LoRA files, as changes of a layer's weights W in PyTorch's layout.

    LoRA    W + s B A                     Hu et al. 2021; LoCon's Tucker form has a kernel between
    LoHa    W + s (A1 B1) * (A2 B2)       Hyeon-Woo et al. 2022, the elementwise product
    LoKr    W + s kron(W1, W2)            Yeh et al. 2024, each whole or of low rank
    diff    W + D                         differences of weights, also of norms and biases
    DoRA    m (W + D) / norm(W + D)       Liu et al. 2024, where D is one of the above

The scale s is alpha / rank.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.lora import Factors
from jaxdiff.pretrained.lora_layers import Layer
from jaxdiff.pretrained.lora_scale import PeftConfig
from jaxdiff.pretrained.safetensors_io import Shape

Apply = Callable[[np.ndarray, float], np.ndarray]
"""From a parameter in PyTorch's layout, and a factor on the effect, to the changed parameter."""

_KINDS = {"LoRA": ("down", "up", "mid"), "LoHa": ("hada_",), "LoKr": ("lokr_",), "diff": ("diff",)}
"""Roles that mark each kind; one that ends in `_` is the beginning of several."""
_EPSILON = float(np.finfo(np.float32).eps)

_TO_OURS = {0: (), 1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_TO_THEIRS = {0: (), 1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


class Effect(NamedTuple):
    """What an adapter changes: the kernel by two factors, or parameters of the layer by name."""

    kind: str
    pair: Factors | None
    changes: Mapping[str, Apply]


def to_ours(value: np.ndarray) -> np.ndarray:
    """Permute a parameter from PyTorch's layout to ours."""
    return value.transpose(_TO_OURS[value.ndim])


def to_theirs(value: np.ndarray) -> np.ndarray:
    """Permute a parameter from our layout to PyTorch's."""
    return value.transpose(_TO_THEIRS[value.ndim])


class Adapter:
    """The tensors of one adapter.

    Args:
      file: for messages.
      layer: that it changes.
      module: the layer's name in PEFT's patterns.
      tensors: by role.
      config: of PEFT, if there is one.
    """

    def __init__(
        self,
        file: object,
        layer: Layer,
        module: str,
        tensors: Mapping[str, np.ndarray],
        config: PeftConfig | None,
    ):
        self._file, self._layer, self._module = file, layer, module
        self._tensors, self._config = dict(tensors), config
        ours = layer.shapes.get(layer.weight, ())
        self._shape: Shape = tuple(ours[axis] for axis in _TO_THEIRS[len(ours)])
        for role, value in tensors.items():
            is_alpha = role == "alpha" and jnp.issubdtype(value.dtype, jnp.integer)
            if not (is_alpha or jnp.issubdtype(value.dtype, jnp.floating)):
                raise self._error(f"has {role} in {value.dtype}", "numbers with a fraction")
            if not np.isfinite(_float32(value)).all():
                raise self._error(f"has a NaN or an infinity in {role}", "finite numbers")

    def read(self) -> Effect:
        """Return the adapter's effect.

        Raises:
          UserError: tensors are missing, left over, or of another shape.
        """
        kinds = [kind for kind, roles in _KINDS.items() if any(map(self._has, roles))]
        if len(kinds) > 1:
            raise self._error(f"has both {kinds[0]} and {kinds[1]}", "one of them")
        kind, pair = kinds[0] if kinds else "bias", None
        changes: dict[str, Apply] = {}
        scale = 1.0
        if kinds and (self._shape == () or (len(self._shape) == 1 and kind != "diff")):
            raise self._error(f"has {kind} of a layer without a matrix", "a linear layer")
        if kind == "LoRA":
            pair, scale = self._lora()
            delta = functools.partial(_product, pair, self._shape)
        elif kinds:
            delta = {"LoHa": self._loha, "LoKr": self._lokr, "diff": self._diff}[kind]()
            changes[self._layer.weight] = lambda weight, factor: weight + factor * delta()
        if self._has("magnitude") or self._has("dora_scale"):
            if kind == "bias":
                raise self._error("has a magnitude alone", "an adapter with it")
            kind, pair = "DoRA", None
            changes[self._layer.weight] = self._dora(delta)
        for role, factor in (("up_bias", scale), ("diff_b", 1.0)):
            if self._has(role):
                changes["bias"] = self._bias(role, factor)
        if self._tensors:
            raise self._error(f"has {', '.join(self._tensors)} without its adapter", "both")
        if pair is None:
            return Effect(kind, None, changes)
        return Effect(kind, Factors(*(to_ours(x) for x in pair)), changes)

    def _lora(self) -> tuple[Factors, float]:
        """Return the factors with their scale, [rank, in, ...] and [out, rank, ...]."""
        outputs, inputs, *window = self._shape
        ones = [1] * len(window)
        rank, inner = self._size("down", 0), None
        if self._has("mid"):
            inner = self._size("mid", 0)
            mid = _float32(self._take("mid", inner, rank, *window))
            down = _float32(self._take("down", rank, inputs))
            down = np.einsum("pq...,qi->pi...", mid, down)
        else:
            down = _float32(self._take("down", rank, inputs, *window))
        up = _float32(self._take("up", outputs, inner or rank, *ones))
        if self._config is not None:
            self._check_config(self._config)
        scale = self._scale(rank, self._config)
        with np.errstate(over="ignore"):
            up = up * np.float32(scale)
        if not np.isfinite(up).all():
            raise self._error(f"has a scale of {scale:g}, too large a number", "alpha / rank")
        return Factors(down, up), scale

    def _check_config(self, config: PeftConfig) -> None:
        for role, stated in (("magnitude", config.dora), ("up_bias", config.bias)):
            if self._has(role) != stated:
                has = "no" if stated else "a"
                raise self._error(
                    f"has {has} {role}, other than {config.what} states", "its config"
                )

    def _loha(self) -> Callable[[], np.ndarray]:
        outputs, inputs, *window = self._shape
        sides = []
        for i in (1, 2):
            if self._has("hada_t1") or self._has("hada_t2"):
                rank = self._size(f"hada_t{i}", 0)
                shapes = (rank, rank, *window), (rank, outputs), (rank, inputs)
                core = self._take(f"hada_t{i}", *shapes[0])
            else:
                rank = self._size(f"hada_w{i}_b", 0)
                shapes = (), (outputs, rank), (rank, inputs * math.prod(window))
                core = None
            a, b = (self._take(f"hada_w{i}_{x}", *shapes["_ab".index(x)]) for x in "ab")
            sides.append((core, a, b, rank))
        scale = self._scale(sides[0][-1], None)
        first, second = (side[:3] for side in sides)
        return lambda: (scale * _low_rank(*first) * _low_rank(*second)).reshape(self._shape)

    def _lokr(self) -> Callable[[], np.ndarray]:
        outputs, inputs, *window = self._shape
        rows = self._size("lokr_w1" if self._has("lokr_w1") else "lokr_w1_a", 0)
        columns = self._size("lokr_w1" if self._has("lokr_w1") else "lokr_w1_b", 1)
        if outputs % rows or inputs % columns:
            raise self._error(f"has LoKr of {rows} times {columns} blocks", "divisors of its size")
        first, rank1 = self._kronecker(1, rows, columns, [])
        second, rank2 = self._kronecker(2, outputs // rows, inputs // columns, window)
        rank = rank2 or rank1
        alpha = self._scale(rank or 1, None)  # of two whole factors without effect
        scale = alpha if rank else 1.0

        def delta() -> np.ndarray:
            blocks = np.einsum("ab,cd...->acbd...", first(), second())
            return (scale * blocks).reshape(self._shape)

        return delta

    def _kronecker(
        self, i: int, rows: int, columns: int, window: list[int]
    ) -> tuple[Callable[[], np.ndarray], int | None]:
        """Return one factor of LoKr, and its rank unless it is whole."""
        shape = (rows, columns, *window)
        if self._has(f"lokr_w{i}"):
            whole = self._take(f"lokr_w{i}", *shape)
            return lambda: _float32(whole).reshape(shape), None
        rank, core = self._size(f"lokr_w{i}_b", 0), None
        sizes = (rows, rank), (rank, columns * math.prod(window))
        if i == 2 and self._has("lokr_t2"):
            core = self._take("lokr_t2", rank, rank, *window)
            sizes = (rank, rows), (rank, columns)
        a, b = (self._take(f"lokr_w{i}_{x}", *size) for x, size in zip("ab", sizes, strict=True))
        return lambda: _low_rank(core, a, b).reshape(shape), rank

    def _diff(self) -> Callable[[], np.ndarray]:
        value = self._take("diff", *self._shape)
        return lambda: _float32(value)

    def _bias(self, role: str, factor: float) -> Apply:
        shape = self._layer.shapes.get("bias")
        if shape is None:
            raise self._error(f"has {role}", "no bias, as in the model")
        value = _float32(self._take(role, *shape)) * np.float32(factor)
        return lambda bias, scale: bias + scale * value

    def _dora(self, delta: Callable[[], np.ndarray]) -> Apply:
        """Return DoRA's change: PEFT scales the delta, LyCORIS the whole effect."""
        ones = [1] * (len(self._shape) - 2)
        if self._has("magnitude"):
            outputs = self._shape[0]
            given = self._tensors["magnitude"].shape
            wanted = (1, outputs, *ones) if len(given) > 1 and given[0] == 1 else (outputs,)
            magnitude = _float32(self._take("magnitude", *wanted)).reshape(-1, 1, *ones)
            return lambda weight, scale: _unit(weight + scale * delta(), 0) * magnitude
        given = (*self._tensors["dora_scale"].shape, 1, 1)
        axis = 1 if given[0] == 1 and given[1] == self._shape[1] else 0
        if axis and self._layer.parts:  # norms over rows of several layers of ours
            raise self._error("has a dora_scale of its inputs", "one of its outputs")
        wanted = (1, self._shape[1], *ones) if axis else (self._shape[0], 1, *ones)
        magnitude = _float32(self._take("dora_scale", *wanted))

        def change(weight: np.ndarray, scale: float) -> np.ndarray:
            full = _unit(weight + delta(), axis) * magnitude
            return weight + scale * (full - weight)

        return change

    def _has(self, role: str) -> bool:
        return any(x == role or (role[-1] == "_" and x.startswith(role)) for x in self._tensors)

    def _size(self, role: str, axis: int) -> int:
        """Return a rank, or another size that the tensors determine."""
        shape = self._tensors[role].shape if role in self._tensors else None
        if shape is None:
            raise UserError(
                f"{self._file} has half a pair for {self._name} (no {role}): expected both; copy "
                "it again."
            )
        shape = (*shape, 1, 1)
        if not shape[axis]:
            raise self._error(f"has {role} of shape {shape[:-2]}", "a rank of at least 1")
        return shape[axis]

    def _take(self, role: str, *shape: int) -> np.ndarray:
        """Return a tensor of this shape; ones at its end may be missing or left over."""
        self._size(role, 0)
        value = self._tensors.pop(role)
        if _trimmed(value.shape) != _trimmed(shape):
            raise UserError(
                f"{self._file}: {role} of the adapter of {self._name} is {value.shape}, expected "
                f"{shape}; load the model that it was trained on."
            )
        return value.reshape(shape)

    def _scale(self, rank: int, config: PeftConfig | None) -> float:
        """Return the scale by the tensor alpha or by PEFT's config, by default 1."""
        if config is None and self._config is not None:
            raise self._error(f"has no LoRA, which {self._config.what} states", "its own config")
        stated = None if config is None else config.scale(self._module, rank)
        alpha = self._tensors.pop("alpha", None)
        if alpha is None:
            return 1.0 if stated is None else stated
        if alpha.size != 1:
            raise self._error(f"has alpha of shape {alpha.shape}", "one number")
        scale = float(_float32(alpha).reshape(())) / rank
        if config is not None and not math.isclose(scale, stated or 0, rel_tol=1e-3):
            raise self._error(f"has a scale of {scale:g}", f"{stated:g} by {config.what}")
        return scale

    @property
    def _name(self) -> str:
        return ".".join(map(str, self._layer.path))

    def _error(self, wrong: str, expected: str) -> UserError:
        return UserError(
            f"{self._file}: the adapter of {self._name} {wrong}: expected {expected}; use another "
            "file."
        )


def _float32(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinity, which is refused
        return np.asarray(value).astype(np.float32)


def _trimmed(shape: Shape) -> Shape:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _low_rank(core: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a @ b, or a kernel by Tucker's form with the core [rank, rank, height, width]."""
    a, b = _float32(a), _float32(b)
    return a @ b if core is None else np.einsum("pq...,po,qi->oi...", _float32(core), a, b)


def _product(pair: Factors, shape: Shape) -> np.ndarray:
    down, up = pair
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(shape)


def _unit(weight: np.ndarray, axis: int) -> np.ndarray:
    """Divide a weight by its norms, one for each index of `axis`."""
    others = tuple(x for x in range(weight.ndim) if x != axis)
    return weight / (np.sqrt(np.square(weight).sum(others, keepdims=True)) + _EPSILON)
