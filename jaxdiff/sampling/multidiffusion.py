"""Images larger than the network's training size, and tileable images, by overlapping windows.

At every step the windows of x are denoised independently, and their estimates of x0 are averaged
(Bar-Tal et al. 2023, MultiDiffusion, eq. 5, whose least-squares solution for a solver's step is
that of its estimate, as the step is affine in it). Weights fall off smoothly toward the edges of a
window, where the network sees the least context. Along an axis that wraps, windows continue at the
other side and begin at another offset at each time, so that none of their edges stays in one place
(Frolov et al. 2024, SpotDiffusion, section 3); there they need not overlap. A window that covers
all of an axis keeps its place until the layout has formed (t < 0.5): a network with absolute
position embeddings that sees the image from another offset at every time would otherwise agree with
itself on the background alone.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxdiff.diffusion.process import Images
from jaxdiff.errors import UserError
from jaxdiff.sampling.solver import Scalar, State, StatefulDenoiser

ROLL_BELOW_T = 0.5
"""The time below which a window that covers all of an axis that wraps has random offsets along it.
Of 8 prompts for one object the shipped model, a flow, renders 7 as tiles with offsets below 0.7,
and all below 0.5, in 30 steps; 3 or 4 with offsets at all times, in 12 to 100. Below 0.3 seams
remain (2026-11-28)."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How an image is divided into windows.

    Attributes:
      height: of a window, in latents, or pixels where the model works on those.
      width: likewise.
      overlap: the smallest fraction of a window that its neighbour covers too.
      wrap: whether windows continue at the other side, vertically and horizontally.
      at_a_time: windows that are denoised together.

    Raises:
      UserError: an overlap outside [0, 1).
    """

    height: int
    width: int
    overlap: float = 0.5
    wrap: tuple[bool, bool] = (False, False)
    at_a_time: int = 1

    def __post_init__(self):
        if not 0 <= self.overlap < 1:
            raise UserError(
                f"overlap is {self.overlap}: expected the fraction of a window that the next "
                "one covers too, from 0 to less than 1, such as 0.5."
            )


def windowed(
    denoiser: StatefulDenoiser, windows: Windows, height: int, width: int
) -> StatefulDenoiser:
    """Return a denoiser of images of this size, given one of windows; the same if one is enough.

    Windows share one state: a denoiser with a state of its own for each image cannot be windowed.
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
