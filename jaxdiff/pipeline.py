"""What a user loads: prompts in, images out."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jaxdiff import adapters, inversion
from jaxdiff.bundle import model_folder, read_bundle, weights_fingerprint
from jaxdiff.errors import UserError
from jaxdiff.model import Bundle
from jaxdiff.models.layers import any_rngs
from jaxdiff.models.tiling import Pieces
from jaxdiff.models.unet2d_condition import UNet2DConditionConfig
from jaxdiff.pretrained.diffusers_folder import read_autoencoder
from jaxdiff.pretrained.embeddings import read_embedding
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.sampling.guidance import ClassifierFree
from jaxdiff.sampling.sampler import noise_from_seeds, sample
from jaxdiff.sampling.settings import check_num_steps
from jaxdiff.sampling.solvers import Solver
from jaxdiff.training.diffusion import NEGATIVE_BEAUTY, DiffusionTask, Latents, whole
from jaxdiff.training.step import ComputeType, cast
from jaxdiff.training.task import from_uint8

DEFAULT_MODEL = "shipped:produce"
LARGEST_SEED = 2**32 - 1

Integer = int | np.integer
Number = Integer | float | np.floating

# Pixels drawn at a time unless a caller says otherwise, and the most images that may be. On two CPU
# cores 4 images of 64x64 at a time take 0.15 s each, 1 at a time 0.22 s and 16 at a time 0.12 s.
PIXELS_AT_A_TIME = {"cpu": (2**14, 4), "accelerator": (2**20, 64)}


def load(model: epath.PathLike = DEFAULT_MODEL, *, dtype: ComputeType | None = None) -> "Pipeline":
    """A trained text-to-image model, ready to sample.

    Args:
      model: folder of a run, of an exported model or of a Stable Diffusion checkpoint in the form
        of diffusers, `shipped:NAME`, or the id OWNER/NAME of a model of the Hugging Face hub.
      dtype: what to compute in; by default the type of the weights, but float32 on a CPU, which
        has no units for less.

    Raises:
      UserError: there is no such model, or it is no text-to-image model.
    """
    return Pipeline(read_bundle(model), dtype=dtype)


class Pipeline:
    """A tokenizer, a text encoder, a denoiser and, for latents, an autoencoder.

    `pipeline(prompts)` gives images. Prompts, seeds, guidance scales and the number of steps are
    arguments of one compiled loop: changing them, or how many there are, compiles nothing. To the
    last bit, an image depends on its prompt, its seed and its settings alone, not on its place or
    on what else is drawn.
    """

    def __init__(self, bundle: Bundle, *, dtype: ComputeType | None = None):
        task = bundle.config.task
        if not isinstance(task, DiffusionTask) or bundle.tokenizer is None:
            raise UserError(
                f"{bundle.config.name} is no text-to-image model but a {type(task).__name__}; "
                "give the folder of a diffusion run."
            )
        self.task = task
        self.config = bundle.config
        self.tokenizer = bundle.tokenizer
        weights = {"params": bundle.params, "frozen": bundle.frozen}
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        self.dtype: ComputeType | None = dtype
        self.weights = jax.device_put(weights if dtype is None else cast(weights, dtype))
        self._graphdef = nnx.split(nnx.eval_shape(lambda: task.build(any_rngs())))[0]

    @property
    def bundle(self) -> Bundle:
        """The model that was loaded, in the type that it computes in."""
        return Bundle(self.config, **self.weights, tokenizer=self.tokenizer)

    def with_lora(
        self, file: epath.PathLike, *, scale: float = 1.0, merge: bool = False
    ) -> "Pipeline":
        """The same model with the adapters of a LoRA file, beside any that it has already.

        Args:
          file: safetensors as diffusers, PEFT or kohya's scripts write them, for Stable Diffusion.
          scale: how much they count; 1 is as they were trained.
          merge: whether to add them to the weights, which costs nothing when drawing and compiles
            nothing anew, or to keep them apart, which leaves the weights exact.

        Raises:
          UserError: the file cannot be read, or is for another model.
        """
        new = adapters.scaled(read_lora(file, self.task), scale)
        put = adapters.merge if merge else adapters.attach
        return Pipeline(put(inversion.settled(self.bundle), new), dtype=self.dtype)

    def with_embedding(self, file: epath.PathLike, *, word: str | None = None) -> "Pipeline":
        """The same model with one more word, of a file of textual inversion.

        Args:
          file: safetensors as diffusers or the web UIs write them.
          word: what prompts call it; by default what the file says, or the file's name.

        Raises:
          UserError: the file cannot be read, is for another model, or the word is there already.
        """
        new = read_embedding(file, self.task)
        new = new if word is None else new._replace(word=word)
        return Pipeline(inversion.with_word(self.bundle, new), dtype=self.dtype)

    def with_autoencoder(self, folder: epath.PathLike) -> "Pipeline":
        """The same model with another autoencoder of its latents, such as a tiny one for previews.

        Args:
          folder: with `config.json` and weights of diffusers' AutoencoderKL or AutoencoderTiny, or
            the id OWNER/NAME of such a model of the Hugging Face hub.

        Raises:
          UserError: it cannot be read, or its latents have another shape.
        """
        model, params = read_autoencoder(model_folder(folder))
        own = self.task.latents
        if own is None or (own.model.latent_channels, own.model.downsampling) != (
            model.latent_channels,
            model.downsampling,
        ):
            raise UserError(
                f"The autoencoder in {folder} has latents of {model.latent_channels} channels, one "
                f"for {model.downsampling} pixels: not those that {self.config.name} draws."
            )
        task = dataclasses.replace(self.task, latents=Latents(model=model, pretrained=str(folder)))
        config = dataclasses.replace(self.config, task=task)
        frozen = {**self.weights["frozen"], "autoencoder": params}
        return Pipeline(self.bundle._replace(config=config, frozen=frozen), dtype=self.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, in hex."""
        return weights_fingerprint(self.weights)

    @property
    def image_size(self) -> int:
        """Side of the images that the model was trained on, the default of `size`."""
        return self.config.data.transforms.size

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: Sequence[str] | None = None,
        seeds: Integer | Iterable[Integer] | None = None,
        num_steps: int | None = None,
        guidance_scale: Number | Iterable[Number] | None = None,
        solver: Solver | None = None,
        size: tuple[int, int] | None = None,
        latents: np.ndarray | jax.Array | None = None,
        output: Literal["uint8", "float"] = "uint8",
        batch_size: int | None = None,
        num_snapshots: int = 0,
        decode_by: Pieces = "whole",
    ) -> np.ndarray:
        """Draws one image for each prompt.

        Args:
          prompts: n texts; what is longer than the encoder takes is cut off (`truncated` tells).
          negative_prompt: what to steer away from, one for all or one each; "" by default.
          seeds: one each, or one for all, from 0 to 2**32 - 1; 0 to n - 1 by default.
          num_steps: of the solver; the recipe's by default.
          guidance_scale: one for all or one each; the recipe's by default.
          solver: the recipe's by default; another one compiles a loop of its own.
          size: width and height; the training images' by default.
          latents: initial noise [n, h, w, c] of unit variance, in the place of the seeds' own.
          output: "uint8", or "float" for float32 in [0, 1].
          batch_size: images drawn at a time, whatever their number, the last batch filled up; by
            default chosen for the size and the kind of device. Another one compiles a loop of its
            own, whose sums are rounded differently: by about 1e-5 of an image's range.
          num_snapshots: return that many estimates of the image on the way instead.
          decode_by: what the autoencoder decodes at a time: the "whole" batch, one of its "images",
            or one of their "tiles", for images that are too large otherwise.

        Returns:
          Images [n, h, w, 3]; with snapshots, [num_snapshots, n, h, w, 3], the last one
          of the last step.

        Raises:
          UserError: lengths or shapes that do not fit, no step to take, a seed out of range, no
            prompt, or one text where a list of them is expected.
        """
        settings, denoiser = self.config.sampling, self.task.denoiser
        if isinstance(denoiser, UNet2DConditionConfig) and denoiser.in_channels > denoiser.channels:
            raise UserError(
                f"{self.config.name} is for inpainting: beside the noise it reads a mask and the "
                "rest of the image, which cannot be given yet; take the model it was made from."
            )
        prompts = _texts("prompts", prompts)
        n = len(prompts)
        if n == 0:
            raise UserError("There is no prompt: give at least one.")
        num_steps = settings.num_steps if num_steps is None else num_steps
        check_num_steps(num_steps)
        size = size or (self.image_size, self.image_size)
        shape = self._shape(*size)
        negative = [""] if negative_prompt is None else _texts("negative_prompt", negative_prompt)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        rows = {
            "ids": self.tokenizer(prompts),
            "negative_ids": self.tokenizer(_one_each("negative_prompt", negative, n)),
            "scale": np.asarray(_one_each("guidance_scale", scale, n), np.float32),
            "seeds": _seeds(_one_each("seeds", range(n) if seeds is None else seeds, n)),
        }
        if latents is not None:
            rows["noise"] = np.asarray(latents, np.float32)
            if rows["noise"].shape != (n, *shape):
                raise UserError(
                    f"latents are of shape {rows['noise'].shape}: expected {(n, *shape)} for {n} "
                    "prompts."
                )
        batch_size = _batch_size(*size) if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: expected at least 1.")
        solver = solver or settings.solver
        draw = _compiled(self.task, self._graphdef, self.config, solver, shape, decode_by)
        batches = []
        for start in range(0, n, batch_size):
            part = {k: v[start : start + batch_size] for k, v in rows.items()}
            count = len(part["seeds"])
            part = {k: np.resize(v, (batch_size, *v.shape[1:])) for k, v in part.items()}
            images = draw(self.weights, part, np.int32(num_steps), num_snapshots)
            batches.append((images, count))
        # Cut on the host, where a new number of images compiles nothing.
        drawn = [np.asarray(images)[..., :count, :, :, :] for images, count in batches]
        images = np.concatenate(drawn, axis=-4)
        return images if output == "float" else np.rint(images * 255).astype(np.uint8)

    def autoencode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, h, w, 3] to latents and back: the best that this model could draw.

        Those of a model that works on pixels come back as they are.
        """
        if self.task.latents is None:
            return images
        size = _batch_size(*images.shape[2:0:-1])
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        back = [
            _autoencoder(self.task)(self.weights["frozen"], np.resize(x, (size, *x.shape[1:])))
            for x in parts
        ]
        return np.concatenate([np.asarray(y)[: len(x)] for x, y in zip(parts, back, strict=True)])

    def truncated(self, prompt: str) -> bool:
        """Whether the end of a prompt is cut off because the text encoder takes no more."""
        return self.tokenizer.truncated(prompt)

    def _shape(self, width: int, height: int) -> tuple[int, int, int]:
        side = self.task.downsampling * self.task.denoiser.smallest
        if width % side or height % side or min(width, height) < side:
            raise UserError(
                f"size {width}x{height} cannot be drawn by this model: both must be multiples of "
                f"{side}; its own size is {self.image_size}x{self.image_size}."
            )
        return self.task.shape(height, width)


def _batch_size(width: int, height: int) -> int:
    pixels, most = PIXELS_AT_A_TIME["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    return max(1, min(most, pixels // (width * height)))


def _texts(name: str, values: Sequence[str]) -> list[str]:
    """A list of texts; one text alone would be taken letter by letter."""
    if isinstance(values, str):
        raise UserError(f"{name} is one text: expected a list of them, [{values!r}].")
    return list(values)


def _seeds(values: list[int]) -> np.ndarray:
    """Seeds uint32 [n]."""
    wrong = [seed for seed in values if not 0 <= seed <= LARGEST_SEED]
    if wrong:
        raise UserError(f"seed {wrong[0]} is out of range: expected 0 to {LARGEST_SEED}.")
    return np.asarray(values, np.uint32)


def _one_each(name: str, values: Any, n: int) -> list[Any]:
    """A list of n values, of which one, by itself or in a list, may stand for all."""
    alone = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    values = [values] if alone else list(values)
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise UserError(f"{name} has {len(values)} values for {n} prompts: give one, or one each.")
    return values


@functools.lru_cache(maxsize=16)
def _autoencoder(task: DiffusionTask):
    """The jitted way from images to latents, without their noise, and back."""

    @jax.jit
    def autoencode(frozen, images):
        back = jnp.clip(task.decode(frozen, task.encode(frozen, from_uint8(images))), -1, 1)
        return jnp.rint((back + 1) * 127.5).astype(jnp.uint8)

    return autoencode


@functools.lru_cache(maxsize=16)
def _compiled(
    task: DiffusionTask,
    graphdef,
    config,
    solver: Solver,
    shape: tuple[int, int, int],
    decode_by: Pieces,
):
    """The jitted loop for one solver and one shape; the batch size and snapshots are static too."""
    settings = config.sampling
    size = shape[0] * task.downsampling, shape[1] * task.downsampling
    guidance = ClassifierFree(
        prediction=task.objective.prediction,
        schedule=task.objective.schedule,
        threshold=settings.threshold,
        interval=settings.interval,
        rescale=settings.rescale,
    )

    @functools.partial(jax.jit, static_argnums=3)
    def draw(weights, rows, num_steps, num_snapshots):
        model = nnx.merge(graphdef, weights["params"])
        frozen = weights["frozen"]
        framing = whole(*size, len(rows["ids"]))
        denoise = guidance.denoiser(
            task.network(model, frozen),
            task.features(model, frozen, rows["ids"], framing),
            task.features(model, frozen, rows["negative_ids"], framing, NEGATIVE_BEAUTY),
            rows["scale"],
        )
        noise = rows["noise"] if "noise" in rows else noise_from_seeds(rows["seeds"], shape)
        sampled = sample(
            denoise,
            solver,
            task.objective.schedule,
            settings.grid,
            num_steps,
            noise,
            rows["seeds"],
            unit_noise=settings.unit_noise,
            num_snapshots=num_snapshots,
        )
        x = sampled.snapshots if num_snapshots else sampled.images[None]
        images = task.decode(frozen, x.reshape(-1, *shape), decode_by)
        images = images.reshape(*x.shape[:2], *images.shape[1:])
        images = jnp.clip(images / 2 + 0.5, 0, 1)
        return images if num_snapshots else images[0]

    return draw
