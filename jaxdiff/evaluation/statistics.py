"""Statistics of a set of features: moments in float64, features, and what they are of.

Files are safetensors with provenance. The .npz files of ADM's evaluator and of pytorch-fid are read
too, without pickles.
"""

import hashlib
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.evaluation.distances import Moments, Vectors
from jaxdiff.io.text import parse_json
from jaxdiff.pretrained.safetensors_io import TensorFiles, write_tensors

FEATURES_KEPT = 50_000
"""Vectors that statistics hold for distances other than Frechet's, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of a set of images.

    Attributes:
      count: images; 0 where a file does not say.
      moments: mean and covariance of all features.
      features: of all images, or of some evenly spread; None where a file lacks them.
      network: what `FeatureNetwork.provenance` says of the network; {} where a file lacks it.
      data: name of the images.
    """

    count: int
    moments: Moments
    features: Vectors | None
    network: Mapping[str, str]
    data: str

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the count, the moments and the features."""
        digest = hashlib.sha256(str(self.count).encode())
        for array in (*self.moments, self.features):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def collect(
    parts: Iterable[Vectors], network: Mapping[str, str], data: str, total: int
) -> Statistics:
    """Return the statistics of features that come in parts.

    Moments are merged part by part (Chan et al. 1983, eq. 2.1), so that they depend on the parts'
    features and sizes alone.

    Args:
      parts: features in their order.
      network: their provenance.
      data: name of the images.
      total: images at most, by which features are left out.

    Raises:
      UserError: fewer than two images.
    """
    count, mean, scatter, kept = 0, 0.0, 0.0, []
    for part in parts:
        x = part.astype(np.float64)
        if not len(x):
            continue
        centre = x.mean(axis=0)
        shift, merged = centre - mean, count + len(x)
        mean = mean + shift * (len(x) / merged)
        scatter = scatter + (x - centre).T @ (x - centre)
        scatter = scatter + np.outer(shift, shift) * (count * len(x) / merged)
        places = np.arange(count - 1, merged) * FEATURES_KEPT // max(total, FEATURES_KEPT)
        kept.append(part[np.diff(places) > 0])
        count = merged
    if count < 2:
        raise UserError(f"{data} has {count} usable images: expected at least 2; give others.")
    moments = Moments(np.asarray(mean), np.asarray(scatter) / (count - 1))
    return Statistics(
        count=count, moments=moments, features=np.concatenate(kept), network=network, data=data
    )


def write_statistics(path: epath.PathLike, statistics: Statistics, **provenance: str) -> None:
    """Write a safetensors file, with the network, the data and further provenance as metadata."""
    assert statistics.features is not None
    tensors = {
        "mean": statistics.moments.mean,
        "covariance": statistics.moments.covariance,
        "features": statistics.features,
    }
    about = {"data": statistics.data, "count": statistics.count, "network": statistics.network}
    write_tensors(path, tensors, statistics=json.dumps(about), **provenance)


def read_statistics(path: epath.PathLike) -> Statistics:
    """Read a file that `write_statistics` wrote.

    Raises:
      UserError: it is missing, damaged or of another kind.
    """
    tensors = TensorFiles([epath.Path(path)])
    about = parse_json(tensors.metadata.get("statistics", "null"), epath.Path(path))
    if not _is_provenance(about) or not {"mean", "covariance", "features"} <= set(tensors):
        raise UserError(
            f"{path} holds no statistics of images: expected a file that jaxdiff evaluate "
            "--reference wrote; write it again."
        )
    moments = _moments(path, np.array(tensors["mean"]), np.array(tensors["covariance"]))
    features = np.array(tensors["features"])
    if features.shape[1:] != moments.mean.shape or not np.isfinite(features).all():
        raise UserError(
            f"{path}: features are {features.shape} for a mean of {moments.mean.shape}, or not "
            "finite: expected a vector for each image; write it again."
        )
    return Statistics(
        count=about["count"],
        moments=moments,
        features=features,
        network=about["network"],
        data=about["data"],
    )


def _is_provenance(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and type(about.get("count")) is int
        and about["count"] > 1
        and isinstance(about.get("data"), str)
        and isinstance(about.get("network"), dict)
        and all(isinstance(value, str) for value in about["network"].values())
    )


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file of ADM or pytorch-fid.

    Returns:
      `mu` [d] and `sigma` [d, d] of Inception features, or images as `arr_0`, uint8 [n, h, w, 3],
      or all of them.

    Raises:
      UserError: it cannot be read, holds pickles, or has neither.
    """
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {
                name: _read_array(archive, f"{name}.npy")
                for name in ("mu", "sigma", "arr_0")
                if name in names
            }
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        RuntimeError,
        SyntaxError,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path} is not a readable .npz file ({error}): expected mu and sigma, or images as "
            "arr_0, and no pickles."
        ) from error
    images = arrays.get("arr_0")
    if images is not None and not _are_images(images):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} {images.shape}: expected uint8 [n, h, w, 3]; give "
            "the file of images."
        )
    if images is None and not {"mu", "sigma"} <= set(arrays):
        raise UserError(f"{path} has neither mu and sigma nor arr_0: give statistics or images.")
    return arrays


def moments_of_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> Moments | None:
    """Return the moments in the arrays of `read_npz`; None where they have images alone.

    Raises:
      UserError: their shapes do not fit, or they hold NaN.
    """
    if "mu" not in arrays or "sigma" not in arrays:
        return None
    return _moments(path, arrays["mu"], arrays["sigma"])


def _moments(path: epath.PathLike, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    numbers = all(x.dtype.kind in "fiu" for x in (mean, covariance))
    shapes = mean.ndim == 1 and covariance.shape == (mean.size, mean.size) != (0, 0)
    if not numbers or not shapes or not all(np.isfinite(x).all() for x in (mean, covariance)):
        raise UserError(
            f"{path}: the covariance is {covariance.dtype} {covariance.shape} for a mean of "
            f"{mean.dtype} {mean.shape}, or not finite: expected a square matrix of finite "
            "numbers; give another copy."
        )
    covariance = covariance.astype(np.float64)
    return Moments(mean.astype(np.float64), (covariance + covariance.T) / 2)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an .npy member, which may not claim more numbers than it has bytes for.

    Raises `ValueError` and others for damaged ones, and for pickles.
    """
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version not in read:
            raise ValueError(f"{name} has version {version}")
        shape, _, dtype = read[version](member)
        if math.prod(shape) * dtype.itemsize > archive.getinfo(name).file_size:
            raise ValueError(f"{name} is shorter than its shape {shape}")
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _are_images(x: np.ndarray) -> bool:
    return x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3 and 0 not in x.shape


def network_fits(statistics: Statistics, network: Mapping[str, str], width: int) -> str | None:
    """Return how the network of statistics differs from another one; None if it does not."""
    if len(statistics.moments.mean) != width:
        return f"has features of {len(statistics.moments.mean)} numbers and not {width}"
    for key, value in statistics.network.items():
        if network.get(key) != value:
            return f"was computed with the {key} {value} and not {network.get(key)}"
    return None
