"""Count the FLOPs of matrix products and convolutions of an optimized XLA program.

A TPU's compiler turns products into convolutions; batch dimensions of a product become dimensions
of its window. Only positions of a window that meet an element count, as in XLA's `HloCostAnalysis`.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.planning.hlo import Instruction, Program, arrays

_SUBLANES = 8
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# Products over all pairs of queries and keys in each kernel of JAX's splash attention, by name.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Libraries of GPUs by the start of their calls' targets. Of convolutions, the places of input,
# kernel and output among operands, -1 for the result.
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_CUDNN_CONVOLUTIONS = {
    "__cudnn$convForward": (0, 1, -1),
    "__cudnn$convBiasActivationForward": (0, 1, -1),
    "__cudnn$convBackwardInput": (-1, 1, 0),
    "__cudnn$convBackwardFilter": (0, -1, 1),
}
_CUDNN_ATTENTION = "__cudnn$fmha"


class Product(NamedTuple):
    """`batch` products of an m x k by a k x n matrix."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        """Twice the number of multiplications."""
        return 2.0 * self.batch * self.m * self.n * self.k

    def padded_flops(self, side: int) -> float:
        """Return the FLOPs of a matrix unit of `side` x `side`, which works on whole tiles.

        One matrix is held in the unit in tiles of its side; rows of the other pass by in eights.
        """
        if side == 1:
            return self.flops
        m, n = self.m, self.n
        held = min(_up(m, _SUBLANES) * _up(n, side), _up(n, _SUBLANES) * _up(m, side))
        return 2.0 * self.batch * held * _up(self.k, side)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded_flops(
    program: Program, instruction: Instruction, types: Mapping[str, str], side: int
) -> float:
    """Return the FLOPs of all products of an instruction, or in its fusion, on whole tiles.

    Of kernels, those of splash attention, cuBLAS and cuDNN count.
    """
    if instruction.opcode in ("dot", "convolution"):
        shapes = [arrays(types[name])[0].shape for name in instruction.operands[:2]]
        make = _dot if instruction.opcode == "dot" else _convolution
        product = make(instruction, shapes[0], shapes[1], arrays(instruction.result)[0].shape)
        return product.padded_flops(side)
    if instruction.opcode == "custom-call":
        product = _library_product(instruction, types)
        if product is not None:
            return product.padded_flops(side)
        count = next((n for k, n in _KERNELS.items() if instruction.name.startswith(k)), 0)
        given = [types[name] for name in instruction.operands if name in types]
        shapes = [arrays(type_)[0].shape for type_ in given if type_.startswith(("bf16", "f"))]
        # Those of the mask's blocks before them are integers; one image has no axis of its own.
        queries, keys = [*(shape for shape in shapes if len(shape) > 2), (0,) * 3, (0,) * 3][:2]
        *batch, length, width = queries
        return count * Product(math.prod(batch), length, keys[-2], width).padded_flops(side)
    inside = program.inside(instruction)
    types = {i.name: i.result for i in inside}
    return sum(padded_flops(program, i, types, side) for i in inside)


def _library_product(instruction: Instruction, types: Mapping[str, str]) -> Product | None:
    """Return the product of a call of cuBLAS or cuDNN; None for other calls."""
    found = _TARGET.search(instruction.attributes)
    target = found[1] if found else ""
    if not target.startswith((*_CUBLAS, *_CUDNN_CONVOLUTIONS, _CUDNN_ATTENTION)):
        return None
    shapes = [arrays(types[name])[0].shape for name in instruction.operands]
    shapes.append(arrays(instruction.result)[0].shape)
    if target.startswith(_CUBLAS):
        return _dot(instruction, shapes[0], shapes[1], shapes[-1])
    for start, places in _CUDNN_CONVOLUTIONS.items():
        if target.startswith(start):
            return _convolution(instruction, *(shapes[place] for place in places))
    (images, length, heads, width), keys = shapes[0], shapes[1][1]
    count = 5 if "Backward" in target else 2  # products over all pairs
    return Product(count * images * heads, length, keys, width)


def _dot(
    instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> Product:
    def sizes(shape: tuple[int, ...], name: str) -> int:
        # XLA's own, or in the JSON that cuBLAS is called with.
        pattern = rf'{name}_dim(?:s=\{{|ensions":\[)([\d,"]*)[\]}}]'
        found = re.search(pattern, instruction.attributes)
        return math.prod(shape[int(i)] for i in re.findall(r"\d+", found[1])) if found else 1

    batch, k = sizes(lhs, "lhs_batch"), sizes(lhs, "lhs_contracting")
    return Product(batch, math.prod(lhs) // (batch * k), math.prod(rhs) // (batch * k), k)


def _convolution(
    instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> Product:
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None
    window = _WINDOW.search(instruction.attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(c for c in labels[3] if c.isdigit())
    options = {key: value.split("x") for key, value in given.items()}
    batch, rows, taps = 1, out[labels[3].index("b")], 1.0
    for place, label in enumerate(spatial):
        positions = out[labels[3].index(label)]
        size = rhs[labels[2].index(label)]
        here = {key: value[place] for key, value in options.items()}
        met = _met(here, lhs[labels[1].index(label)], size, positions)
        if met == positions and min(positions, size) > 1:
            batch *= positions  # each position meets one element of its own
        else:
            rows, taps = rows * positions, taps * met / positions
    inputs = rhs[labels[2].index("i")]
    return Product(batch, rows, out[labels[3].index("f")], max(round(inputs * taps), 1))


def _met(window: Mapping[str, str], width: int, size: int, positions: int) -> int:
    """Return how often, over all positions, an element of a window meets one of the input."""
    stride = int(window.get("stride", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    dilated, spread = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    end = (width - 1) * dilated
    return sum(
        0 <= at <= end and at % dilated == 0
        for position in range(positions)
        for at in range(position * stride - low, position * stride - low + size * spread, spread)
    )
