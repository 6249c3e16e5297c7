"""Feature networks of metrics: published ones, and the CLIP that comes with jaxdiff."""

import abc
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.distributed.replicas import local_mesh, per_replica, replicate
from jaxdiff.errors import UserError
from jaxdiff.evaluation.resizing import (
    Pixels,
    pillow_bicubic,
    pytorch_bilinear,
    tensorflow_bilinear,
)
from jaxdiff.io.text import read_json
from jaxdiff.models.image_encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, Dinov2Config
from jaxdiff.models.image_encoders.inception import FEATURES, IMAGE_SIZE, InceptionV3
from jaxdiff.models.layers import bind_build, bind_init, bind_params, cast
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipVision
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.pipelines.auxiliary_models import clip_image_vectors, load_clip
from jaxdiff.pretrained.bundle import weights_fingerprint
from jaxdiff.pretrained.dinov2_folder import is_dinov2_config, read_dinov2_folder
from jaxdiff.pretrained.inception_file import inception_from_torch, open_tensors
from jaxdiff.pretrained.load import load_bundle, model_folder

Measure = Literal["frechet", "kernel", "mmd", "precision_recall"]

# Images that a device embeds at a time. It is no option: features of another batch size may differ
# in their last bits.
_BATCH = {"cpu": 8, "accelerator": 64}
_THREADS = 8  # that read and resize images

DINOV2_SIZE = 224


class FeatureNetwork(NamedTuple):
    """A network on the devices of this host.

    Attributes:
      label: ends the names of figures that have no published name.
      published: names of figures, by measure.
      usual: the measures for which the network is known.
      width: numbers of a feature.
      provenance: network, weights (SHA-256) and resizing; figures of other ones are not comparable.
      prepare: maps an image to the network's input, on the host.
      embed: maps a batch of inputs to features, float32.
      batch_size: of all devices.
    """

    label: str
    published: Mapping[str, str]
    usual: tuple[Measure, ...]
    width: int
    provenance: Mapping[str, str]
    prepare: Callable[[Pixels], np.ndarray]
    embed: Callable[[np.ndarray], jax.Array]
    batch_size: int

    def __call__(self, images: Iterable[Pixels]) -> Float32[np.ndarray, "n d"]:
        """Return the features of images of any sizes; a few of them are in memory at a time."""
        made: list[tuple[jax.Array, int]] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            inputs = (x for few in _batches(images, _THREADS) for x in pool.map(self.prepare, few))
            for batch in _batches(inputs, self.batch_size):
                full = np.resize(np.stack(batch), (self.batch_size, *batch[0].shape))
                made.append((self.embed(full), len(batch)))
        features = [np.asarray(x, np.float32)[:count] for x, count in made]
        return np.concatenate([np.zeros((0, self.width), np.float32), *features])

    def name_of(self, measure: str) -> str:
        """Return the name of a figure."""
        return self.published.get(measure, f"{measure}_{self.label}")


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Features(abc.ABC):
    """Interface of feature networks in recipes: frozen dataclasses that inherit it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abc.abstractmethod
    def load(self) -> FeatureNetwork:
        """Load the network.

        Raises:
          UserError: its weights are missing or of another kind.
        """


def _on_devices(
    call: Callable[[PyTree, jax.Array], jax.Array], params: PyTree
) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """Return the compiled function of a batch, and the size of a batch."""
    mesh = local_mesh()
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"

    def features(params: PyTree, images: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # which TPUs and GPUs would round
            return call(params, images)

    program = per_replica(features, mesh)
    placed = replicate(cast(params, "float32"), mesh)
    return functools.partial(program, placed), _BATCH[kind] * num_replicas(mesh)


@checked
@dataclass(frozen=True, kw_only=True)
class InceptionFeatures(Features):
    """The FID Inception: figures `fid`, `kid`, `precision` and `recall`.

    Attributes:
      weights: safetensors of pytorch-fid's or torch-fidelity's weights: a file, a folder with
        `model.safetensors`, or OWNER/NAME.
      resize: as TensorFlow 1, ADM's evaluator and torch-fidelity, or as PyTorch and pytorch-fid.
    """

    weights: str
    resize: Literal["tensorflow", "pytorch"] = "tensorflow"

    def load(self) -> FeatureNetwork:
        """Load the network."""
        return _load_inception(self.weights, self.resize)


@functools.lru_cache(maxsize=2)
def _load_inception(weights: str, resize: str) -> FeatureNetwork:
    return inception_network(inception_from_torch(open_tensors(model_folder(weights))), resize)


def inception_network(params: PyTree, resize: str) -> FeatureNetwork:
    """Return the FID Inception with these parameters."""
    bilinear = tensorflow_bilinear if resize == "tensorflow" else pytorch_bilinear
    # As in their code: (x - 128) / 128, or 2 (x / 255) - 1.
    shift, scale = (128.0, 128.0) if resize == "tensorflow" else (127.5, 127.5)
    build = bind_init(InceptionV3)
    embed, batch_size = _on_devices(lambda p, x: bind_params(build, p)(x), params)
    return FeatureNetwork(
        label="inception" if resize == "tensorflow" else "inception_pytorch_resize",
        published={
            "frechet": "fid",
            "kernel": "kid",
            "precision": "precision",
            "recall": "recall",
        },
        usual=("frechet", "kernel", "precision_recall"),
        width=FEATURES,
        provenance={
            "network": "FID Inception-v3",
            "weights": weights_fingerprint(params),
            "resizing": f"bilinear as {resize}",
        },
        prepare=lambda image: (bilinear(image, IMAGE_SIZE) - shift) / scale,
        embed=embed,
        batch_size=batch_size,
    )


@checked
@dataclass(frozen=True, kw_only=True)
class Dinov2Features(Features):
    """DINOv2: figures `fd_dinov2` (Stein et al. 2023), and others of the same features.

    The published figures are of ViT-L/14; those of other sizes have width and depth in their names,
    such as `fd_dinov2_384x12` of ViT-S/14.

    Attributes:
      model: a folder of transformers, or OWNER/NAME.
    """

    model: str = "facebook/dinov2-large"

    def load(self) -> FeatureNetwork:
        """Load the network."""
        return _load_dinov2(self.model)


@functools.lru_cache(maxsize=2)
def _load_dinov2(model: str) -> FeatureNetwork:
    return dinov2_network(*read_dinov2_folder(model_folder(model)))


def dinov2_network(config: Dinov2Config, params: PyTree) -> FeatureNetwork:
    """Return a DINOv2 with these parameters; figures of another than ViT-L/14 have its size."""
    is_published = (config.width, config.depth, config.patch_size) == (1024, 24, 14)
    label = "dinov2" if is_published else f"dinov2_{config.width}x{config.depth}"
    build = bind_build(config)
    embed, batch_size = _on_devices(lambda p, x: bind_params(build, p)(x), params)
    mean, std = (255 * np.array(x, np.float32) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return FeatureNetwork(
        label=label,
        published={"frechet": f"fd_{label}", "kernel": f"kd_{label}"},
        usual=("frechet", "kernel", "precision_recall"),
        width=config.width,
        provenance={
            "network": f"DINOv2, width {config.width}, depth {config.depth}",
            "weights": weights_fingerprint(params),
            "resizing": f"bicubic as Pillow to {DINOV2_SIZE}",
        },
        prepare=lambda x: (
            (pillow_bicubic(x, DINOV2_SIZE, crop=False) / np.float32(255) - mean) / std
        ),
        embed=embed,
        batch_size=batch_size,
    )


@checked
@dataclass(frozen=True, kw_only=True)
class ClipFeatures(Features):
    """Image embeddings of a CLIP: `cmmd` of openai/clip-vit-large-patch14-336.

    Figures of another CLIP have its name, such as `frechet_shipped_produce_clip`.

    Attributes:
      model: folder of a CLIP, `shipped:NAME`, or OWNER/NAME.
    """

    model: str = "shipped:produce_clip"

    def load(self) -> FeatureNetwork:
        """Load the network."""
        return _load_clip(self.model)


@functools.lru_cache(maxsize=2)
def _load_clip(model: str) -> FeatureNetwork:
    bundle = load_bundle(model)
    if not isinstance(bundle.spec, ClipConfig):
        raise UserError(
            f"{model} is of type {type(bundle.spec).__name__}: expected a CLIP; give the folder or "
            "the hub's id of one, or shipped:produce_clip."
        )
    return clip_network(bundle.spec, bundle.params["vision"], model)


def clip_network(spec: ClipConfig, params: PyTree, model: str) -> FeatureNetwork:
    """Return the image encoder of a CLIP with these parameters."""
    config, build = spec.vision, bind_init(ClipVision, spec.vision)
    is_cmmd = (config.image_size, config.patch_size, config.width) == (336, 14, 1024)
    embed, batch_size = _on_devices(
        lambda p, x: bind_params(build, p)(from_uint8(x)).pooled.astype(jnp.float32), params
    )
    name = "clip_l_14_336" if is_cmmd else re.sub(r"\W+", "_", model.rstrip("/").split("/")[-1])
    return FeatureNetwork(
        label=name,
        published={"mmd": "cmmd"} if is_cmmd else {},
        usual=("mmd",) if is_cmmd else ("frechet", "kernel", "mmd", "precision_recall"),
        width=config.projection_dim or config.width,
        provenance={
            "network": f"CLIP image encoder, width {config.width}, depth {config.depth}",
            "weights": weights_fingerprint(params),
            "resizing": f"bicubic as Pillow to {config.image_size}, centre crop",
        },
        prepare=lambda x: pillow_bicubic(x, config.image_size, crop=True),
        embed=embed,
        batch_size=batch_size,
    )


@functools.lru_cache(maxsize=2)
def clip_score_network(model: str) -> FeatureNetwork:
    """Load the image encoder of a CLIP, with unit vectors of images resized as for guidance.

    Raises:
      UserError: there is no such CLIP.
    """
    clip = load_clip(model, local_mesh())
    config = clip.config.vision
    embed, batch_size = _on_devices(
        functools.partial(clip_image_vectors, clip.config), clip.params["vision"]
    )
    return FeatureNetwork(
        label="clip",
        published={},
        usual=(),
        width=config.projection_dim or config.width,
        provenance={
            "network": f"CLIP, width {config.width}, depth {config.depth}",
            "weights": weights_fingerprint(clip.params),
            "resizing": f"bilinear as JAX to {config.image_size}",
        },
        prepare=lambda x: x,
        embed=embed,
        batch_size=batch_size,
    )


AnyFeatures = InceptionFeatures | Dinov2Features | ClipFeatures


def features_of(model: str, resize: Literal["tensorflow", "pytorch"] | None = None) -> AnyFeatures:
    """Return the kind of feature network that a file, a folder or a model of the hub is.

    Raises:
      UserError: it is none of them, or `resize` has no effect on it.
    """
    root = model_folder(model)
    config = root / "config.json"
    data = read_json(config, "the folder of a feature network") if config.exists() else None
    if data is None:
        return InceptionFeatures(weights=model, resize=resize or "tensorflow")
    if resize is not None:
        raise UserError(
            f"--resize has no effect on {model}, whose resizing is fixed: expected the weights of "
            "the FID Inception in --features; leave it out."
        )
    return Dinov2Features(model=model) if is_dinov2_config(data) else ClipFeatures(model=model)
