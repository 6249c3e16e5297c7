"""jaxdiff's DiT in plain PyTorch, with the same weights, as a baseline for timing.

Supports what most recipes use: text by cross-attention, no bottleneck. Its modules correspond to
those of `jaxdiff.models.denoisers.dit`; PyTorch's kernels are their transposes.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.dit import DiTConfig

EPSILON = 1e-6  # of nnx.RMSNorm


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int, source_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(source_width, width, bias=False)
        self.v = nn.Linear(source_width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=EPSILON)
        self.k_norm = nn.RMSNorm(width // heads, eps=EPSILON)

    def forward(
        self, x: Tensor, source: Tensor, *, rope: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x [b, n, d] to the source [b, m, e] where the mask [b, m] is true."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _apply_rope(q, rope), _apply_rope(k, rope)
        allowed = None if mask is None else mask[:, None, None, :]
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(y.transpose(1, 2).flatten(2))


def _apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + k/2]) by the angles whose cosines and sines are `rope`."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), then W3."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Self-attention, cross-attention, SwiGLU; the first and last are modulated and gated."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.RMSNorm(width, eps=EPSILON, elementwise_affine=False)
        self.attention = Attention(width, config.heads, width)
        self.cross_norm = nn.RMSNorm(width, eps=EPSILON)
        self.cross = Attention(width, config.heads, config.text_width)
        self.mlp = SwiGLU(width, config.hidden)

    def forward(self, x: Tensor, cond: Tensor, text: Tensor, mask: Tensor, rope: Tensor) -> Tensor:
        """Return the same shape as x."""
        parts = self.modulation(cond)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, rope=rope)
        x = x + self.cross(self.cross_norm(x), text, mask=mask)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class TorchDiT(nn.Module):
    """The same network as `DiT(config)`.

    Raises:
      UserError: the config has joint attention to the text, or a bottleneck.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        if config.text != "cross" or config.bottleneck is not None:
            raise UserError(
                "The PyTorch DiT supports text by cross-attention and no bottleneck only: "
                "set task.denoiser.text to cross and task.denoiser.bottleneck to None."
            )
        self.config = config
        width, patch = config.width, config.patch_size**2 * config.channels
        self.patch = nn.Linear(patch, width)
        self.time1, self.time2 = nn.Linear(width, width), nn.Linear(width, width)
        self.pooled = nn.Linear(config.pooled_width, width)
        self.words = nn.Linear(config.text_width, width)
        self.text_norm = nn.RMSNorm(config.text_width, eps=EPSILON)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(width, eps=EPSILON, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """Predict [b, h, w, c] from x [b, h, w, c], t [b] in [0, 1] and text features."""
        config, p = self.config, self.config.patch_size
        rows, columns = x.shape[1] // p, x.shape[2] // p
        h = x.unflatten(1, (rows, p)).unflatten(3, (columns, p)).transpose(2, 3).flatten(1, 2)
        positions = _positions(rows, columns, config.width, x.device)
        h = self.patch(h.flatten(2)) + positions
        rope = _rope(rows, columns, config.width // config.heads, x.device)

        cond = self.time2(functional.silu(self.time1(_fourier(t, config.width, 1000.0))))
        words = self.text_norm(tokens)
        number = mask.sum(1, keepdim=True)
        total = 2 * (words * mask[..., None]).sum(1) / number.sqrt()
        cond = functional.silu(cond + self.pooled(pooled) + self.words(total))
        for block in self.blocks:
            h = block(h, cond, words, mask, rope)
        shift, scale = self.final_modulation(cond)[:, None].chunk(2, dim=-1)
        out = self.final(self.final_norm(h) * (1 + scale) + shift).float()
        out = out.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _fourier(t: Tensor, width: int, scale: float) -> Tensor:
    exponents = torch.arange(width // 2, device=t.device) / (width // 2)
    angles = scale * t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _grid(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    return row, torch.arange(columns, device=device).repeat(rows)


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    axes = _grid(rows, columns, device)
    return torch.cat([_fourier(axis, width // 2, 1.0) for axis in axes], dim=-1)


def _rope(rows: int, columns: int, head: int, device: torch.device) -> Tensor:
    """Cosines and sines of the axial rotary angles, [2, n, head / 2]."""
    each = head // 4
    frequencies = 100.0 ** (-torch.arange(each, device=device) / each)
    angles = torch.cat([a[:, None] * frequencies for a in _grid(rows, columns, device)], dim=-1)
    angles = functional.pad(angles, (0, head // 2 - angles.shape[1]))
    return torch.stack([angles.cos(), angles.sin()])


def to_torch_names(params: dict[str, Any]) -> dict[str, Tensor]:
    """Convert the parameters of `DiT`, a nested dict of arrays, to those of `TorchDiT`."""
    tensors: dict[str, Tensor] = {}

    def walk(tree: dict[str, Any], path: tuple[str, ...]) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, name))
                continue
            array = np.asarray(value, np.float32)
            if name == "kernel":
                array = array.swapaxes(-1, -2)
            leaf = "bias" if name == "bias" else "weight"
            if path[0] == "blocks":
                for i, layer in enumerate(array):
                    tensors[".".join(("blocks", str(i), *path[1:], leaf))] = _tensor(layer)
            else:
                tensors[".".join((*path, leaf))] = _tensor(array)

    walk(params, ())
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
