"""A small classifier of photographs, whose features a Frechet distance compares.

Features of Inception are made for larger images and need a download. Those of a classifier of the
same photographs need neither; their distances compare with no others.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxdiff.models.convolutions import Conv, fan_in_linear
from jaxdiff.models.layers import bind_params, init_params, rngs_from_seed
from jaxdiff.models.text_to_image import from_uint8

Photos = UInt8[np.ndarray, "n h w 3"]
Labels = Int[np.ndarray, " n"]
Params = Any

WIDTHS = (48, 96)
FEATURES = WIDTHS[-1]
GROUPS = 8
BATCH = 64
PEAK = 3e-3  # learning rate
WEIGHT_DECAY = 0.05
SHIFT = 4  # pixels by which training moves an image, at most


class _Block(nnx.Module):
    """Two convolutions, each after a norm and SiLU, and a shortcut."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.GroupNorm(width, GROUPS, rngs=rngs) for _ in range(2)])
        self.convs = nnx.List([Conv(width, width, 3, 1, rngs) for _ in range(2)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(jax.nn.silu(norm(y)))
        return x + y


class Classifier(nnx.Module):
    """A residual network with a quarter of the image's resolution at its end."""

    def __init__(self, classes: int, rngs: nnx.Rngs):
        first, last = WIDTHS
        self.stem = Conv(3, first, 3, 2, rngs)
        self.fine = _Block(first, rngs)
        self.down = Conv(first, last, 3, 2, rngs)
        self.coarse = _Block(last, rngs)
        self.norm = nnx.GroupNorm(last, GROUPS, rngs=rngs)
        self.head = fan_in_linear(last, classes, rngs)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return the penultimate layer, the mean over the positions, for images in [-1, 1]."""
        x = self.coarse(self.down(self.fine(self.stem(images))))
        return jnp.mean(jax.nn.silu(self.norm(x)), axis=(1, 2))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b k"]:
        """Return the logits of the classes."""
        return self.head(self.features(images))


def _network(params: Params) -> Any:
    classes = params["head"]["bias"].shape[-1]
    return bind_params(lambda: Classifier(classes, nnx.Rngs(0)), params)


def train_classifier(
    photos: Photos,
    labels: Labels,
    *,
    epochs: int,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Params:
    """Train on photographs, mirrored and moved by some pixels; the same seed gives the same bits.

    Args:
      photos: at least a batch of 64.
      labels: classes, from 0.
      epochs: passes over the photographs.
      seed: of initialisation and order.
      log: called with one line every 100 steps.
    """
    classes, steps = int(labels.max()) + 1, epochs * (len(photos) // BATCH)
    params = init_params(lambda rngs: Classifier(classes, rngs), rngs_from_seed(seed))
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps)
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)

    def loss_of(params: Params, images: Array, wanted: Array) -> Array:
        logits = _network(params)(from_uint8(images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    @jax.jit
    def step(params: Params, state: Any, images: Array, wanted: Array) -> tuple[Any, Any, Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, images, wanted)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for number, rows in enumerate(_batches(len(photos), epochs, seed), 1):
        images = _augment(photos[rows], np.random.default_rng((seed, number)))
        params, state, loss = step(params, state, images, labels[rows])
        if number % 100 == 0:
            log(f"classifier: step {number} of {steps}, loss {float(loss):.3f}")
    return jax.device_get(params)


def _batches(count: int, epochs: int, seed: int) -> Iterator[Int[np.ndarray, " b"]]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)
        yield from np.split(order[: count // BATCH * BATCH], count // BATCH)


def _augment(photos: Photos, rng: np.random.Generator) -> Photos:
    """Mirror half of the photographs, and move each; the border is reflected."""
    height, width = photos.shape[1:3]
    padded = np.pad(photos, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    moves, mirrored = (
        rng.integers(0, 2 * SHIFT + 1, (len(photos), 2)),
        rng.random(len(photos)) < 0.5,
    )
    out = np.empty_like(photos)
    for i, (down, across) in enumerate(moves):
        cut = padded[i, down : down + height, across : across + width]
        out[i] = cut[:, ::-1] if mirrored[i] else cut
    return out


@jax.jit
def _features(params: Params, images: Array) -> Array:
    return _network(params).features(from_uint8(images))


def features_of(params: Params, images: Photos) -> Float32[np.ndarray, "n d"]:
    """Return the features of images; batches of one size make each independent of the others."""
    made = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        full = np.resize(batch, (BATCH, *batch.shape[1:]))
        made.append(np.asarray(_features(params, full))[: len(batch)])
    return np.concatenate(made)


def accuracy(params: Params, photos: Photos, labels: Labels) -> float:
    """Return the fraction of photographs that are classified as labelled."""
    head = params["head"]
    logits = features_of(params, photos) @ head["kernel"] + head["bias"]
    return float(np.mean(logits.argmax(axis=1) == labels))
