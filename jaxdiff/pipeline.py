"""What a user loads: prompts in, images out."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jaxdiff.bundle import Bundle, read_bundle, weights_fingerprint
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance import ClassifierFree
from jaxdiff.sampling.sampler import noise_from_seeds, sample
from jaxdiff.sampling.settings import check_num_steps
from jaxdiff.sampling.solvers import Solver
from jaxdiff.training.diffusion import DiffusionTask

SHIPPED = epath.Path(__file__).parent / "weights" / "produce"


def load(model: str | None = None) -> "Pipeline":
    """A trained text-to-image model, ready to sample.

    Args:
      model: folder of a run or of an exported model; None is the model that ships with jaxdiff.

    Raises:
      UserError: the folder holds no text-to-image model.
    """
    return Pipeline(read_bundle(model or SHIPPED))


class Pipeline:
    """A tokenizer, a text encoder, a denoiser and, for latents, an autoencoder.

    `pipeline(prompts)` gives images. Prompts, seeds, guidance scales and the number of steps are
    arguments of one compiled loop: changing them compiles nothing. An image depends on its prompt, its
    seed and its settings, not on what else is drawn with it.
    """

    def __init__(self, bundle: Bundle):
        task = bundle.config.task
        if not isinstance(task, DiffusionTask) or bundle.tokenizer is None:
            raise UserError(
                f"{bundle.config.name} is no text-to-image model but a {type(task).__name__}; "
                "give the folder of a diffusion run."
            )
        self.task = task
        self.config = bundle.config
        self.tokenizer = bundle.tokenizer
        self.weights = jax.device_put({"params": bundle.params, "frozen": bundle.frozen})
        self._graphdef = nnx.split(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))))[0]

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
        seeds: Sequence[int] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        solver: Solver | None = None,
        size: tuple[int, int] | None = None,
        latents: np.ndarray | None = None,
        output: Literal["uint8", "float"] = "uint8",
        batch_size: int = 16,
        num_snapshots: int = 0,
    ) -> np.ndarray:
        """Draws one image for each prompt.

        Args:
          prompts: n texts; what is longer than the encoder takes is cut off (`truncated` tells).
          negative_prompt: what to steer away from, one for all or one each; "" by default.
          seeds: one each, from 0 to 2**32 - 1; 0 to n - 1 by default.
          num_steps: of the solver; the recipe's by default.
          guidance_scale: one for all or one each; the recipe's by default.
          solver: the recipe's by default; another one compiles a loop of its own.
          size: width and height; the training images' by default.
          latents: initial noise [n, h, w, c] of unit variance, in the place of the seeds' own.
          output: "uint8", or "float" for float32 in [0, 1].
          batch_size: images drawn at a time; a power of two.
          num_snapshots: also return that many estimates of the image on the way.

        Returns:
          Images [n, h, w, 3]; with snapshots, [num_snapshots, n, h, w, 3], the last the image.

        Raises:
          UserError: lengths or shapes that do not fit, no step to take, an empty list.
        """
        settings = self.config.sampling
        n = len(prompts)
        if n == 0:
            raise UserError("There is no prompt: give at least one.")
        num_steps = settings.num_steps if num_steps is None else num_steps
        check_num_steps(num_steps)
        negative = _one_each("negative_prompt", negative_prompt or [""], n)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        scales = _one_each("guidance_scale", [scale] if np.isscalar(scale) else scale, n)
        seeds = _one_each("seeds", range(n) if seeds is None else seeds, n)
        shape = self._shape(size)
        if latents is not None and latents.shape != (n, *shape):
            raise UserError(
                f"latents are of shape {latents.shape}: expected {(n, *shape)} for {n} prompts."
            )
        rows = {
            "ids": self.tokenizer(list(prompts)),
            "negative_ids": self.tokenizer(negative),
            "scale": np.asarray(scales, np.float32),
            "seeds": np.asarray(seeds, np.uint32),
        }
        if latents is not None:
            rows["noise"] = np.asarray(latents, np.float32)
        draw = _compiled(self.task, self._graphdef, self.config, solver or settings.solver, shape)
        batches = []
        for start in range(0, n, batch_size):
            part = {k: v[start : start + batch_size] for k, v in rows.items()}
            count = len(part["seeds"])
            padded = min(batch_size, 1 << (count - 1).bit_length())
            part = {k: np.resize(v, (padded, *v.shape[1:])) for k, v in part.items()}
            images = draw(self.weights, part, np.int32(num_steps), num_snapshots)
            batches.append(images[..., :count, :, :, :])
        images = np.concatenate(jax.device_get(batches), axis=-4)
        return images if output == "float" else np.rint(images * 255).astype(np.uint8)

    def truncated(self, prompt: str) -> bool:
        """Whether the end of a prompt is cut off because the text encoder takes no more."""
        return self.tokenizer.truncated(prompt)

    def _shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        width, height = size or (self.image_size, self.image_size)
        factor = self.task.latents.model.downsampling if self.task.latents else 1
        side = factor * self.task.denoiser.patch_size
        if width % side or height % side or min(width, height) < side:
            raise UserError(
                f"size {width}x{height} cannot be drawn by this model: both must be multiples of "
                f"{side}; its own size is {self.image_size}x{self.image_size}."
            )
        return self.task.shape(height, width)


def _one_each(name: str, values: Sequence[Any], n: int) -> list[Any]:
    """A list of n values, of which one may stand for all."""
    values = list(values)
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise UserError(f"{name} has {len(values)} values for {n} prompts: give one, or one each.")
    return values


@functools.lru_cache(maxsize=16)
def _compiled(task: DiffusionTask, graphdef, config, solver: Solver, shape: tuple[int, int, int]):
    """The jitted loop for one solver and one shape; the batch size and snapshots are static too."""
    settings = config.sampling
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
        denoise = guidance.denoiser(
            model.denoiser,
            task.features(model, frozen, rows["ids"]),
            task.features(model, frozen, rows["negative_ids"]),
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
            num_snapshots=num_snapshots,
        )
        x = sampled.snapshots if num_snapshots else sampled.images[None]
        images = task.decode(frozen, x.reshape(-1, *shape))
        images = images.reshape(*x.shape[:2], *images.shape[1:])
        images = jnp.clip(images / 2 + 0.5, 0, 1)
        return images if num_snapshots else images[0]

    return draw
