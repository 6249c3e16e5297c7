"""What a pipeline does with whole images: finds their noise, varies, blends, enlarges them."""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.distributed.replicate import per_device
from jaxdiff.errors import UserError
from jaxdiff.pipelines.batching import in_full_batches
from jaxdiff.pipelines.editing import check_images, enlarged, slerp
from jaxdiff.pipelines.sizes import images_at_a_time
from jaxdiff.sampling.ddim_inversion import DDIMInverse
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.base import from_uint8
from jaxdiff.training.tasks.diffusion import DiffusionTask

UPSCALE_STRENGTH = 0.35


class ImageEdits(abc.ABC):
    """The part of `Pipeline` that is made of what it draws."""

    config: Config
    task: DiffusionTask
    weights: Any
    _mesh: Mesh

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[str], **arguments: Any) -> np.ndarray:
        """Draws images."""

    @abc.abstractmethod
    def noise(self, seeds: Sequence[int], **arguments: Any) -> np.ndarray:
        """The noise that images start from."""

    def invert(
        self,
        images: np.ndarray,
        prompts: Sequence[str] | None = None,
        *,
        rounds: int = 1,
        guidance_scale: float = 1.0,
        **arguments: Any,
    ) -> np.ndarray:
        """The noise that images come from, by DDIM inversion (`jaxdiff.sampling.ddim_inversion`).

        `pipeline(prompts, latents=pipeline.invert(images, prompts), solver=DDIM(),
        guidance_scale=1)`, with as many steps, gives the images back about as the autoencoder does.

        Args:
          images: uint8 [n, h, w, 3] or one image.
          prompts: what they show, one for all or one each; "" by default.
          rounds: evaluations in each step: more come nearer to what a step of DDIM undoes.
          guidance_scale: strong guidance goes where there is no way back.
          arguments: others that `pipeline(prompts)` takes, such as num_steps.

        Returns:
          Noise [n, h, w, c] of about unit variance, for `latents`.

        Raises:
          UserError: images of another kind, or what `pipeline(prompts)` raises.
        """
        n = 1 if np.ndim(images) == 3 else len(images)
        prompts = [""] if prompts is None else prompts
        prompts = list(prompts) * n if len(prompts) == 1 else prompts
        return self(
            prompts,
            image=check_images(images, n),
            strength=1.0,  # all the way
            solver=DDIMInverse(rounds=rounds),
            guidance_scale=guidance_scale,
            output="latents",
            **arguments,
        )

    def variations(
        self,
        image: np.ndarray,
        amount: float | Sequence[float] = 0.3,
        *,
        prompt: str | Sequence[str] = "",
        seeds: Sequence[int] = (0, 1, 2, 3),
        guidance_scale: float | Sequence[float] = 1.0,
        **arguments: Any,
    ) -> np.ndarray:
        """Images like this one: its noise, turned toward that of seeds.

        Args:
          image: uint8 [h, w, 3], or one each [n, h, w, 3].
          amount: how far, one for all or one each: 0 is the image as it is drawn from its own
            noise, 1 what the seed draws.
          prompt: what it shows, or what the variations are to show; one for all or one each.
          seeds: n of them.
          guidance_scale: of the drawing; the noise is looked for without.
          arguments: others that `pipeline(prompts)` takes.

        Returns:
          Images [n, h, w, 3].

        Raises:
          UserError: what `invert` and `pipeline(prompts)` raise.
        """
        n, (height, width) = len(seeds), np.shape(image)[-3:-1]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        own = self.invert(image, prompts, **arguments)
        noises = self.noise(seeds, size=(width, height))
        each = zip(
            np.broadcast_to(own, noises.shape), noises, np.broadcast_to(amount, n), strict=True
        )
        return self(
            prompts * n if len(prompts) == 1 else prompts,
            latents=np.stack([slerp(*one) for one in each]),
            seeds=seeds,
            size=(width, height),
            solver=DDIM(),
            guidance_scale=guidance_scale,
            **arguments,
        )

    def between(
        self,
        prompts: tuple[str, str],
        frames: int,
        *,
        seeds: tuple[int, int] = (0, 0),
        images: np.ndarray | None = None,
        **arguments: Any,
    ) -> np.ndarray:
        """Images on the way from one prompt and seed, or image, to another, both of them included.

        Args:
          prompts: where it begins and where it ends; the same twice, to walk through seeds alone.
          frames: how many images, 2 or more.
          seeds: of the noise at both ends, between which it turns from one to the other.
          images: uint8 [2, h, w, 3] whose noise is at the ends instead, and which the prompts
            describe or "" says nothing of.
          arguments: others that `pipeline(prompts)` takes.

        Returns:
          Images [frames, h, w, 3].

        Raises:
          UserError: fewer than 2 frames, or what `pipeline(prompts)` raises.
        """
        if frames < 2:
            raise UserError(f"frames is {frames}: expected at least 2, for both ends.")
        if images is None:
            one, other = self.noise(seeds, size=arguments.get("size"))
        else:
            one, other = self.invert(check_images(images, 2), prompts, **arguments)
            exact = {"solver": DDIM(), "guidance_scale": 1.0, "size": images.shape[2:0:-1]}
            arguments = exact | arguments
        shares = np.linspace(0, 1, frames)
        return self(
            [prompts[0]] * frames,
            toward=[prompts[1]],
            share=shares,
            seeds=seeds[0],
            latents=np.stack([slerp(one, other, share) for share in shares]),
            **arguments,
        )

    def upscaled(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        factor: int = 2,
        strength: float | Sequence[float] = UPSCALE_STRENGTH,
        overlap: float = 0.5,
        **arguments: Any,
    ) -> np.ndarray:
        """Images enlarged, and their detail drawn anew through windows of the native size.

        Args:
          images: uint8 [n, h, w, 3], or one image for all prompts.
          prompts: what they show, n of them.
          factor: by which their sides get longer.
          strength: how far they are taken back to noise, from 0 to 1, one for all or one each: the
            more, the more detail, but each window then draws things of its own.
          overlap: of the windows, as a share of their sides.
          arguments: others that `pipeline(prompts)` takes; by default the autoencoder works by
            tiles, if they are smaller than the images.

        Returns:
          Images [n, factor * h, factor * w, 3].

        Raises:
          UserError: a factor below 1, or what `pipeline(prompts)` raises.
        """
        if factor < 1:
            raise UserError(f"factor is {factor}: expected 1 or more, such as 2.")
        by = "images" if any(self.config.sampling.seamless) else "tiles"
        return self(
            prompts,
            image=enlarged(check_images(images, len(prompts)), factor),
            strength=strength,
            overlap=overlap,
            **({"decode_by": by} | arguments),
        )

    def autoencode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, h, w, 3] to latents and back: the best that this model could draw.

        Those of a model that works on pixels come back as they are.
        """
        if self.task.latents is None:
            return images
        size = images_at_a_time(*images.shape[2:0:-1]) * self._mesh.size
        autoencode = functools.partial(_autoencoder(self.task, self._mesh), self.weights)
        return in_full_batches(autoencode, size, images)

    def decode(self, latents: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Images uint8 [n, h, w, 3] of what the denoiser models, [n, i, j, c]: latents, or pixels.

        Args:
          latents: as the denoiser estimates them.
          batch_size: images decoded at a time; chosen for the size by default.
        """
        height, width = (side * self.task.downsampling for side in latents.shape[1:3])
        size = (batch_size or images_at_a_time(width, height)) * self._mesh.size
        decode = functools.partial(_decoder(self.task, self._mesh), self.weights)
        return in_full_batches(decode, size, latents)


@functools.lru_cache(maxsize=16)
def _autoencoder(task: DiffusionTask, mesh: Mesh) -> Any:
    """The jitted way from images to latents, without their noise, and back."""

    def autoencode(weights, images):
        frozen = weights["frozen"]
        return _levels(task.decode(frozen, task.encode(frozen, from_uint8(images))))

    return per_device(autoencode, mesh)


@functools.lru_cache(maxsize=16)
def _decoder(task: DiffusionTask, mesh: Mesh) -> Any:
    """The jitted way from latents to images."""
    return per_device(lambda weights, x0: _levels(task.decode(weights["frozen"], x0)), mesh)


def _levels(images: jax.Array) -> jax.Array:
    return jnp.rint((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
