"""Images larger than the network's training size, and tileable images, by overlapping windows.

At every step the windows of x are denoised independently, and their estimates of x0 are averaged
(Bar-Tal et al. 2023, MultiDiffusion, eq. 5; a solver's step is affine in the estimate, so averaging
either is the same). Weights fall off smoothly toward the edges of a window, where the network has
the least context. Along an axis that wraps, windows continue at the other side and start at a
random offset at each time (Frolov et al. 2024, SpotDiffusion, section 3); they need not overlap
there. A window that covers all of an axis has no offset until the layout has formed (t < 0.5):
under random offsets a network with absolute position embeddings renders only background.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxdiff.diffusion.process import Images
from jaxdiff.sampling.solver import Scalar, State, StatefulDenoiser

ROLL_BELOW_T = 0.5
"""Windows that cover all of an axis that wraps have random offsets below this time. The shipped
model renders 8 of 8 single-object prompts as tiles with 0.5, 7 with 0.7, and 3 or 4 with 1; with
0.3 seams remain (30 steps, 2026-11-28)."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The division of an image into windows.

    Attributes:
      height: of a window, in latents.
      width: likewise.
      overlap: least overlap of neighbours, as a fraction of a window, in [0, 1).
      wrap: whether windows continue at the other side, vertically and horizontally.
      at_a_time: windows that are denoised together.
    """

    height: int
    width: int
    overlap: float = 0.5
    wrap: tuple[bool, bool] = (False, False)
    at_a_time: int = 1


def windowed(
    denoiser: StatefulDenoiser, windows: Windows, height: int, width: int
) -> StatefulDenoiser:
    """Return a denoiser of images of this size, given a denoiser of windows.

    Windows share one state: denoisers with a state per image are not supported.
    """
    rows, row_weights = _cut(height, windows.height, windows.overlap, windows.wrap[0])
    columns, column_weights = _cut(width, windows.width, windows.overlap, windows.wrap[1])
    if len(rows) == len(columns) == 1 and not any(windows.wrap):
        return denoiser
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    down, across = np.transpose(places)
    cuts = jnp.asarray(rows[down])[:, :, None], jnp.asarray(columns[across])[:, None, :]
    weights = row_weights[down][:, :, None] * column_weights[across][:, None, :]
    weights = jnp.asarray(weights[:, None, :, :, None])

    def denoise(x: Images, t: Scalar, state: State) -> tuple[Images, State]:
        rolls = (t < ROLL_BELOW_T) | np.array([len(rows) > 1, len(columns) > 1])
        down, across = _offsets(t, windows.wrap, height, width) * rolls
        moved = (cuts[0] + down) % height, (cuts[1] + across) % width

        def one(cut: tuple[Int[Array, "h 1"], Int[Array, "1 w"]]) -> Images:
            return denoiser.denoise(x[:, cut[0], cut[1]], t, state)[0]

        estimates = weights * jax.lax.map(one, moved, batch_size=windows.at_a_time)

        def add(i: Int[Array, ""], total: Images) -> Images:
            return total.at[:, moved[0][i], moved[1][i]].add(estimates[i])

        return jax.lax.fori_loop(0, len(places), add, jnp.zeros_like(x)), state

    return StatefulDenoiser(denoise=denoise, init_state=denoiser.init_state)


def _offsets(t: Scalar, wrap: tuple[bool, bool], height: int, width: int) -> Int[Array, "2"]:
    """Return the offset of the windows at a time, pseudo-random along the axes that wrap."""
    key = jax.random.fold_in(jax.random.key(0), (t * 2**20).astype(jnp.int32))
    return jax.random.randint(key, (2,), 0, jnp.array([height, width])) * jnp.array(wrap)


def _cut(
    length: int, side: int, overlap: float, wraps: bool
) -> tuple[Int[np.ndarray, "k s"], Float32[np.ndarray, "k s"]]:
    """Return the positions in each of k windows, and their weights there, which sum to 1."""
    side = min(side, length)
    stride = max(1, math.floor(side * (1 - overlap)))
    if side == length:
        starts = np.zeros(1, int)
    elif wraps:
        count = math.ceil(length / stride)
        starts = np.arange(count) * length // count
    else:
        count = math.ceil((length - side) / stride) + 1
        starts = np.linspace(0, length - side, count).round().astype(int)
    positions = (starts[:, None] + np.arange(side)) % length
    bump = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    np.add.at(total, positions, np.broadcast_to(bump, positions.shape))
    return positions, (bump / total[positions]).astype(np.float32)
