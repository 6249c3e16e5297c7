"""What a user loads: prompts in, images out."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jaxdiff import adapters, inversion
from jaxdiff.bundle import model_folder, read_bundle, weights_fingerprint
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.drawing import compiled, reads_mask
from jaxdiff.editing import check_images, check_masks, first_step, slerp
from jaxdiff.errors import UserError
from jaxdiff.model import Bundle
from jaxdiff.models.clip import ClipConfig
from jaxdiff.models.layers import any_rngs
from jaxdiff.models.tiling import Pieces
from jaxdiff.pretrained.diffusers_folder import read_autoencoder
from jaxdiff.pretrained.embeddings import read_embedding
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.sampling.clip_guidance import ClipGuidance
from jaxdiff.sampling.sampler import noise_from_seeds
from jaxdiff.sampling.settings import check_num_steps
from jaxdiff.sampling.solvers import Solver
from jaxdiff.training.clip import ClipTask
from jaxdiff.training.diffusion import DiffusionTask, Latents
from jaxdiff.training.step import ComputeType, cast
from jaxdiff.training.task import from_uint8

DEFAULT_MODEL = "shipped:produce"
LARGEST_SEED = 2**32 - 1
IMAGE_STRENGTH = 0.6

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
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        toward: Sequence[str] | None = None,
        share: Number | Iterable[Number] = 0.5,
        clip: ClipGuidance | None = None,
        repeats: int = 1,
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
          image: to start from, uint8 [n, h, w, 3] or one for all, whose size is that of the result.
          mask: 1 where the image is drawn anew, [n, h, w] or one for all; where it is 0 every pixel
            is kept as it is. All of the image is drawn anew by default.
          strength: how far an image is taken back to noise, from 0 to 1, and so how much it may
            change; 0.6 by default, 1 with a mask.
          toward: other prompts, one for all or one each, to mix into the prompts.
          share: of these in the mixture, one for all or one each.
          clip: a second model that steers every step toward the prompts.
          repeats: how often each step is taken, going back up by fresh noise in between: what is
            drawn then comes to fit what a mask keeps, or what a CLIP asks for.

        Returns:
          Images [n, h, w, 3]; with snapshots, [num_snapshots, n, h, w, 3], the last one
          of the last step.

        Raises:
          UserError: lengths or shapes that do not fit, no step to take, a seed out of range, no
            prompt, or one text where a list of them is expected.
        """
        settings, denoiser = self.config.sampling, self.task.denoiser
        if reads_mask(denoiser) and (image is None or mask is None):
            raise UserError(
                f"{self.config.name} is for inpainting: give an image and a mask, 1 where it is to "
                "be drawn anew."
            )
        if image is None and (mask is not None or strength is not None):
            raise UserError("mask and strength are about an image: give image as well.")
        prompts = _texts("prompts", prompts)
        n = len(prompts)
        if n == 0:
            raise UserError("There is no prompt: give at least one.")
        num_steps = settings.num_steps if num_steps is None else num_steps
        check_num_steps(num_steps)
        images = None if image is None else check_images(image, n)
        size = _one_size(size, images) or (self.image_size, self.image_size)
        shape = self._shape(*size)
        negative = [""] if negative_prompt is None else _texts("negative_prompt", negative_prompt)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        rows = {
            "ids": self.tokenizer(prompts),
            "negative_ids": self.tokenizer(_one_each("negative_prompt", negative, n)),
            "scale": np.asarray(_one_each("guidance_scale", scale, n), np.float32),
            "seeds": _seeds(_one_each("seeds", range(n) if seeds is None else seeds, n)),
        }
        if toward is not None:
            others = _one_each("toward", _texts("toward", toward), n)
            rows["toward"] = self.tokenizer(others)
            rows["share"] = np.asarray(_one_each("share", share, n), np.float32)
        first = 0
        if images is not None:
            rows["image"] = images
            if mask is not None:
                rows["mask"] = check_masks(mask, images.shape)
            default = IMAGE_STRENGTH if mask is None else 1.0
            first = first_step(default if strength is None else strength, num_steps)
        if repeats < 1:
            raise UserError(f"repeats is {repeats}: expected 1 or more.")
        if latents is not None:
            rows["noise"] = np.asarray(latents, np.float32)
            if rows["noise"].shape != (n, *shape):
                raise UserError(
                    f"latents are of shape {rows['noise'].shape}: expected {(n, *shape)} for {n} "
                    "prompts."
                )
        batch_size = images_at_a_time(*size) if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: expected at least 1.")
        solver = solver or settings.solver
        weights, clip_model = self.weights, None
        if clip is not None:
            clip_model, clip_weights, tokenizer = _clip(clip.model)
            weights = {**weights, "clip": clip_weights}
            rows["clip_ids"] = tokenizer(prompts)
            rows["clip_scale"] = np.full(n, clip.scale, np.float32)
            clip = dataclasses.replace(clip, model="", scale=0.0)  # other ones compile nothing
        draw = compiled(
            self.task,
            self._graphdef,
            settings,
            solver,
            shape,
            decode_by,
            clip,
            clip_model,
            repeats,
        )
        made = _in_batches(
            lambda part: draw(weights, part, np.int32(num_steps), np.int32(first), num_snapshots),
            rows,
            batch_size,
        )
        return made if output == "float" else np.rint(made * 255).astype(np.uint8)

    def between(
        self, prompts: tuple[str, str], frames: int, *, seeds: tuple[int, int] = (0, 0), **arguments
    ) -> np.ndarray:
        """Images on the way from one prompt and seed to another, both of them included.

        Args:
          prompts: where it begins and where it ends; the same twice, to walk through seeds alone.
          frames: how many images, 2 or more.
          seeds: of the noise at both ends, between which it turns from one to the other.
          arguments: others that `pipeline(prompts)` takes.

        Returns:
          Images [frames, h, w, 3].

        Raises:
          UserError: fewer than 2 frames, or what `pipeline(prompts)` raises.
        """
        if frames < 2:
            raise UserError(f"frames is {frames}: expected at least 2, for both ends.")
        shares = np.linspace(0, 1, frames)
        shape = self._shape(*(arguments.get("size") or (self.image_size, self.image_size)))
        one, other = np.asarray(noise_from_seeds(jnp.asarray(_seeds(list(seeds))), shape))
        return self(
            [prompts[0]] * frames,
            toward=[prompts[1]],
            share=shares,
            seeds=seeds[0],
            latents=np.stack([slerp(one, other, share) for share in shares]),
            **arguments,
        )

    def autoencode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, h, w, 3] to latents and back: the best that this model could draw.

        Those of a model that works on pixels come back as they are.
        """
        if self.task.latents is None:
            return images
        size = images_at_a_time(*images.shape[2:0:-1])
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


def _in_batches(
    draw: Callable[[dict[str, np.ndarray]], jax.Array], rows: dict[str, np.ndarray], size: int
) -> np.ndarray:
    """What is drawn of all rows, `size` at a time, the last of them filled up."""
    batches = []
    for start in range(0, len(rows["seeds"]), size):
        part = {k: v[start : start + size] for k, v in rows.items()}
        count = len(part["seeds"])
        part = {k: np.resize(v, (size, *v.shape[1:])) for k, v in part.items()}
        batches.append((draw(part), count))
    # Cut on the host, where a new number of images compiles nothing.
    drawn = [np.asarray(made)[..., :count, :, :, :] for made, count in batches]
    return np.concatenate(drawn, axis=-4)


@functools.lru_cache(maxsize=2)
def _clip(model: str) -> tuple[ClipConfig, Any, Tokenizer]:
    """Sizes, weights and tokenizer of a CLIP.

    Raises:
      UserError: there is no such model, or it is none.
    """
    bundle = read_bundle(model)
    task = bundle.config.task
    if not isinstance(task, ClipTask) or bundle.tokenizer is None:
        raise UserError(f"{model} is no CLIP but a {type(task).__name__}: give one in clip.model.")
    return task.model, jax.device_put(bundle.params), bundle.tokenizer


def _one_size(size: tuple[int, int] | None, images: np.ndarray | None) -> tuple[int, int] | None:
    """The width and height asked for, and those of the images, which must not differ."""
    own = None if images is None else (images.shape[2], images.shape[1])
    if size is not None and own is not None and size != own:
        raise UserError(
            f"size is {size[0]}x{size[1]} but image is {own[0]}x{own[1]}: leave out size, or "
            "resize the image."
        )
    return size or own


def images_at_a_time(width: int, height: int) -> int:
    """The batch size unless a caller says otherwise: for the size, and the kind of device."""
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
