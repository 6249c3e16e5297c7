"""The test of installed metrics: features and distances of fixed images against stored values.

Weights that come with jaxdiff, or random ones that NumPy's frozen generator makes, are enough to
find a resizing, a layer or a distance that this machine computes otherwise. The values of the FID
Inception agree with torch-fidelity's network with the same weights.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import UInt8

from jaxdiff.errors import UserError
from jaxdiff.evaluation.feature_distance import measure
from jaxdiff.evaluation.features import ClipFeatures, dinov2_network, inception_network
from jaxdiff.evaluation.image_sets import ImageArray
from jaxdiff.evaluation.reference import set_statistics
from jaxdiff.models.image_encoders.dinov2 import Dinov2Config
from jaxdiff.models.image_encoders.inception import InceptionV3
from jaxdiff.models.layers import abstract_params, bind_build, bind_init
from jaxdiff.pretrained.key_mapping import Path, flatten_params

TOLERANCE = 1e-3  # relative; float32 on another device differs by about 1e-5

STORED = {
    "frechet_shipped_produce_clip": 14.61264789,
    "kernel_shipped_produce_clip": 0.2174996724,
    "mmd_shipped_produce_clip": 0.01982510004,
    "precision_shipped_produce_clip": 0.63125,
    "recall_shipped_produce_clip": 0.65625,
    "inception, mean": 2.670963487,
    "inception, deviation": 3.694410656,
    "inception, first image": -36.5561521,
    "inception, PyTorch, mean": 2.666937623,
    "inception, PyTorch, deviation": 3.692416692,
    "inception, PyTorch, first image": -36.80807196,
    "dinov2, mean": -0.0935482434,
    "dinov2, deviation": 1.064853161,
    "dinov2, first image": -1.522339564,
}
"""Values computed on a CPU, 2026-11-29 and 2026-12-01."""


def fixed_images(count: int, first: int = 0, size: int = 48) -> UInt8[np.ndarray, "n h w 3"]:
    """Return images of waves, by integer arithmetic."""
    i = np.arange(first, first + count)[:, None, None, None]
    y, x, c = np.ogrid[:size, :size, :3]
    return ((x * (i % 7 + 1) + y * (i % 5 + 2) + c * i * 37 + i * 11) % 256).astype(np.uint8)


def fixed_inception() -> dict[str, Any]:
    """Return random parameters of the FID Inception, of activations of about unit size."""
    return _fixed_params(bind_init(InceptionV3))


def fixed_dinov2() -> tuple[Dinov2Config, dict[str, Any]]:
    """Return a small DINOv2 and random parameters, whose positions are interpolated."""
    config = Dinov2Config(image_size=84, width=32, depth=2, heads=4, mlp_ratio=2)
    return config, _fixed_params(bind_build(config))


def _fixed_params(build: Callable[..., Any]) -> dict[str, Any]:
    rng = np.random.RandomState(0)
    flat = {}
    for path, shape in sorted(_shapes(build).items()):
        value = rng.randn(*shape).astype(np.float32)
        if path[-1] == "kernel":
            value *= np.float32((2 / np.prod(shape[:-1])) ** 0.5)
        elif path[-1] in ("scale", "variance"):
            value = np.abs(1 + value / 4)
        else:
            value *= np.float32(0.2)
        flat[path] = value
    return traverse_util.unflatten_dict(flat)


def _shapes(build: Callable[..., Any]) -> dict[Path, tuple[int, ...]]:
    flat = flatten_params(abstract_params(build))
    return {path: leaf.shape for path, leaf in flat.items()}


def feature_values(network: str, features: np.ndarray) -> dict[str, float]:
    """Return a few sums of a network's features, each of all numbers."""
    weights = np.cos(np.arange(features.shape[1]))
    return {
        f"{network}, mean": float(features.mean(dtype=np.float64)),
        f"{network}, deviation": float(features.std(dtype=np.float64)),
        f"{network}, first image": float(features[0].astype(np.float64) @ weights),
    }


def self_test(log: Callable[[str], None]) -> None:
    """Compare the metrics of this installation with the stored values.

    Args:
      log: called with a line for each value.

    Raises:
      UserError: one differs.
    """
    found = _values()
    wrong = []
    for name, stored in STORED.items():
        differs = abs(found[name] - stored) > TOLERANCE * abs(stored)
        log(f"{name:<52}{found[name]:>14.7g}{stored:>14.7g}  {'differs' if differs else 'equal'}")
        wrong += [name] * differs
    if wrong:
        raise UserError(
            f"the metrics of this installation differ from the stored values: {', '.join(wrong)}; "
            "do not compare its figures with others; check the versions of JAX, NumPy and Pillow."
        )


def _values() -> dict[str, float]:
    clip = ClipFeatures().load()
    ours, theirs = (
        set_statistics(clip, ImageArray(fixed_images(160, first), "waves")) for first in (0, 400)
    )
    images, params = fixed_images(3), fixed_inception()
    return {
        **measure(clip, ours, theirs, few=True).scalars,
        **feature_values("inception", inception_network(params, "tensorflow")(images)),
        **feature_values("inception, PyTorch", inception_network(params, "pytorch")(images)),
        **feature_values("dinov2", dinov2_network(*fixed_dinov2())(images)),
    }
