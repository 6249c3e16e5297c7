"""Features of many images, in parts: spread over hosts and devices, and resumable.

Neither the parts nor the features depend on the number of hosts or devices. With a folder, each
part is saved, and read by a later run of the same images, network and settings.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Float32

from jaxdiff.config.serialization import to_json
from jaxdiff.data.bad_records import RecordError
from jaxdiff.distributed.multihost import gather_rows, is_host0, rows_of_host
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext
from jaxdiff.evaluation.features import FeatureNetwork, clip_score_network
from jaxdiff.evaluation.image_sets import ImageSet, Pixels
from jaxdiff.pretrained.bundle import weights_fingerprint
from jaxdiff.pretrained.safetensors_io import TensorFiles, write_tensors

PART = 1024  # images

Part = Float32[np.ndarray, "n d"]


@dataclass(frozen=True)
class _PartCache:
    """Saved parts of one set of images.

    Attributes:
      folder: of the files, which host 0 writes; None saves nothing.
      key: identifies the images, the network and the settings.
    """

    folder: epath.Path | None
    key: str

    def part(self, index: int, shape: tuple[int, int], compute: Callable[[], Part]) -> Part:
        """Return a part of `shape` that was saved, or compute and save it."""
        stored = self._read(index, shape) if is_host0() else None
        if _on_all_hosts(np.int32(stored is not None)):
            return _on_all_hosts(np.zeros(shape, np.float32) if stored is None else stored)
        part = compute()
        if self.folder is not None and is_host0():
            with contextlib.suppress(UserError):  # a full disk costs the resumption only
                write_tensors(self._path(index), {"features": part}, key=self.key)
        return part

    def _path(self, index: int) -> epath.Path:
        assert self.folder is not None
        return self.folder / f"part_{self.key[:16]}_{index:05d}.safetensors"

    def _read(self, index: int, shape: tuple[int, int]) -> Part | None:
        if self.folder is None or not self._path(index).exists():
            return None
        try:
            tensors = TensorFiles([self._path(index)])
        except UserError:  # damaged: compute it again
            return None
        matches = tensors.metadata.get("key") == self.key
        if not matches or tensors.shapes.get("features") != shape:
            return None
        return np.array(tensors["features"])


def remove_parts(folder: epath.Path) -> None:
    """Remove the saved parts, and the folder if it is empty then."""
    for file in folder.glob("part_*.safetensors"):
        file.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _key(*parts: Any) -> str:
    """Return SHA-256, in hex, of what features depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def image_features(
    network: FeatureNetwork, images: ImageSet, folder: epath.Path | None = None
) -> Iterator[Part]:
    """Yield the features of a set of images, without those of unusable ones.

    Each host reads its share of a part. Parts are saved in `folder`, if there is one.
    """
    cache = _PartCache(folder, _key(network.provenance, images.fingerprint) if folder else "")
    for index, start in enumerate(range(0, len(images), PART)):
        count = min(PART, len(images) - start)

        def compute(start: int = start, count: int = count) -> Part:
            indices = range(start, start + count)[rows_of_host(count)]
            return gather_rows(_features_or_nan(network, images, indices), count)

        part = cache.part(index, (count, network.width), compute)
        yield part[~np.isnan(part[:, 0])]


def _features_or_nan(network: FeatureNetwork, images: ImageSet, indices: range) -> Part:
    """Return a row for each image, NaN for an unusable one; images are read as they are needed."""
    usable: list[int] = []

    def read() -> Iterator[Pixels]:
        for row, index in enumerate(indices):
            try:
                image = images[index]
            except RecordError:
                continue
            usable.append(row)
            yield image

    found = network(read())
    features = np.full((len(indices), network.width), np.nan, np.float32)
    features[usable] = found
    return features


def generated_features(
    context: EvalContext, network: FeatureNetwork, prompts: Sequence[str]
) -> Iterator[Part]:
    """Yield the features of generated images; image i has the prompt and the seed of number i.

    Where each host has the model, it samples its share of a part; on a mesh over hosts all sample
    together. Parts are saved in the context's folder for them, if there is one.
    """
    key = ""
    if context.parts is not None:
        weights = weights_fingerprint(context.params)
        how = to_json(context.spec), vars(context.generation), weights
        clip = context.generation.used_clip
        clip_weights = clip and clip_score_network(clip).provenance["weights"]
        key = _key(network.provenance, list(prompts), how, clip_weights)
    cache = _PartCache(context.parts, key)
    for index, start in enumerate(range(0, len(prompts), PART)):
        texts = prompts[start : start + PART]

        def compute(start: int = start, texts: Sequence[str] = texts) -> Part:
            return gather_rows(network(context.generate_share(texts, start)), len(texts))

        yield cache.part(index, (len(texts), network.width), compute)


def _on_all_hosts(value: np.ndarray | np.int32) -> Any:
    """Return host 0's value."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)
