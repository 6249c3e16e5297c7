"""Rows to batches of one size, and these to devices, several steps at a time where one looks on."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.errors import UserError
from jaxdiff.pipelines.inputs import Rows
from jaxdiff.pipelines.program import Steps


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What is to be seen of images on their way; it changes none of their bits.

    Attributes:
      every: steps between two looks.
      show: is told which images of the call are under way, and how they would come out as of now,
        uint8 [n, h, w, 3].
      decoder: a `Pipeline` whose autoencoder decodes them (`with_autoencoder`, a tiny one); the
        pipeline that draws by default.

    Raises:
      UserError: every is less than 1.
    """

    every: int
    show: Callable[[Sequence[int], UInt8[np.ndarray, "n h w 3"]], None]
    decoder: Any = None

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"every is {self.every}: expected a number of steps, 1 or more.")


def in_full_batches(
    call: Callable[..., Any],
    size: int,
    *rows: np.ndarray,
    seen: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """What a call gives of all rows, `size` at a time, the last of them filled up.

    Args:
      call: takes as many arrays as there are `rows`, and gives one with as many rows as each.
      size: of a batch: another one would compile a program of its own.
      rows: arrays of the same length.
      seen: is told how many rows were handed over so far.
    """
    made = []
    for start in range(0, len(rows[0]), size):
        parts = [array[start : start + size] for array in rows]
        made.append((call(*(np.resize(p, (size, *p.shape[1:])) for p in parts)), len(parts[0])))
        seen(start + len(parts[0]))
    return np.concatenate([np.asarray(one)[:count] for one, count in made])


class Batch(NamedTuple):
    """Images that one device draws at a time: at most as many as it can, of the same steps."""

    images: Sequence[int]
    num_steps: int
    first: int


def batches(num_steps: Sequence[int], first: Sequence[int], size: int) -> list[Batch]:
    """Images of the same number of steps together, those with most steps before others.

    Devices whose batches follow one another so have about as much to do.
    """
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, kind in enumerate(zip(num_steps, first, strict=True)):
        kinds.setdefault(kind, []).append(i)
    ordered = sorted(kinds.items(), key=lambda kind: kind[0][1] - kind[0][0])
    return [
        Batch(images[i : i + size], *kind)
        for kind, images in ordered
        for i in range(0, len(images), size)
    ]


def draw_batches(
    program: Any,
    weights: Any,
    rows: Rows,
    found: Sequence[Batch],
    size: int,
    devices: int,
    look: tuple[int, Callable[[Sequence[int], Float[np.ndarray, "n h w c"]], None]] | None = None,
) -> Float[np.ndarray, "n k h w 3"]:
    """What `drawing.compiled` draws of all rows.

    Args:
      program: of `drawing.compiled`.
      weights: on all devices.
      rows: what it needs to know of each image.
      found: the batches that they form.
      size: images of a full batch; others are filled up.
      devices: how many there are.
      look: after how many steps to look, and who: which images, and their estimates of x0.
    """
    made = []
    for start in range(0, len(found), devices):
        some = found[start : start + devices]
        part = _filled(rows, some, size, devices)
        run = _whole(some, devices)
        state, drawn = _blank(program, weights, part, run), None
        for steps in _parts(run, None if look is None else look[0]):
            images, state = program(weights, part, steps, state)
            # Black but for those whose last step this was.
            drawn = images if drawn is None else drawn + np.asarray(images)
            if look is not None:
                # The shape is [device, snapshot, image, h, w, c].
                estimates = zip(some, np.asarray(state[-1])[:, -1], strict=False)
                x0 = [one[: len(batch.images)] for batch, one in estimates]
                look[1]([i for batch in some for i in batch.images], np.concatenate(x0))
        made.append((some, drawn))
    return _in_order(made, size, len(rows["seeds"]))


def _filled(rows: Rows, some: Sequence[Batch], size: int, devices: int) -> Rows:
    """Rows of some batches, one after the other; devices that have none get the first again."""
    each = [np.resize(batch.images, size) for batch in some]
    index = np.concatenate([*each, *[each[0]] * (devices - len(some))])
    return {name: values[index] for name, values in rows.items()}


def _whole(some: Sequence[Batch], devices: int) -> Steps:
    """All steps of each batch; none on devices that have no batch."""
    idle = devices - len(some)
    num_steps = np.array([b.num_steps for b in some] + [some[0].num_steps] * idle, np.int32)
    first = np.array([b.first for b in some] + [some[0].first] * idle, np.int32)
    end = np.where(np.arange(devices) < len(some), num_steps, first).astype(np.int32)
    return Steps(num_steps, first, first, end)


def _parts(steps: Steps, every: int | None) -> Iterator[Steps]:
    """The same steps, so many at a time, each device from where it was."""
    longest = int(np.max(steps.end - steps.begin))
    every = longest if every is None else every
    for taken in range(0, longest, every):
        begin = np.minimum(steps.begin + taken, steps.end)
        yield steps._replace(begin=begin, end=np.minimum(begin + every, steps.end))


def _blank(program: Any, weights: Any, rows: Rows, steps: Steps) -> Any:
    """A state of the right shape. jit remembers what it is for arguments of the same shapes."""
    state = program.eval_shape(weights, rows, steps, None)[1]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)


def _in_order(
    made: Sequence[tuple[Sequence[Batch], jax.Array]], size: int, n: int
) -> Float[np.ndarray, "n k h w 3"]:
    """Cut and put together on the host, where a new number of images compiles nothing."""
    pairs = [
        (batch.images, images[i * size : i * size + len(batch.images)])
        for some, images in ((some, np.asarray(images)) for some, images in made)
        for i, batch in enumerate(some)
    ]
    order = list(itertools.chain.from_iterable(images for images, _ in pairs))
    assert len(order) == n
    drawn = np.concatenate([images for _, images in pairs])
    return drawn[np.argsort(order)]
