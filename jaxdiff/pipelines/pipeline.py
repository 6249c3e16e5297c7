"""What a user loads: prompts in, images out."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff.distributed.replicate import drawing_mesh, on_all
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.components import Latents
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.pipelines import inputs as asked
from jaxdiff.pipelines import lora as adapters
from jaxdiff.pipelines import textual_inversion
from jaxdiff.pipelines.auxiliary_models import choose, read_clip, read_weak
from jaxdiff.pipelines.batching import Preview, batches, draw_batches
from jaxdiff.pipelines.edit import ImageEdits
from jaxdiff.pipelines.editing import slerp
from jaxdiff.pipelines.inputs import Integer, Number
from jaxdiff.pipelines.program import Drawing, compiled, reads_mask
from jaxdiff.pipelines.prompt_weights import parse, plain, rows_of
from jaxdiff.pipelines.sizes import images_at_a_time, size_of_ratio
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.diffusers import read_autoencoder
from jaxdiff.pretrained.embeddings import read_embedding
from jaxdiff.pretrained.load import model_folder, read_bundle, weights_fingerprint
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.sampling.multidiffusion import Windows
from jaxdiff.sampling.solvers_ode import Solver
from jaxdiff.training.step import ComputeType, cast, structure
from jaxdiff.training.tasks.diffusion import DiffusionTask

DEFAULT_MODEL = "shipped:produce"


def load(
    model: epath.PathLike = DEFAULT_MODEL,
    *,
    dtype: ComputeType | None = None,
    devices: Sequence[Any] | None = None,
) -> "Pipeline":
    """A trained text-to-image model, ready to sample.

    Args:
      model: folder of a run, of an exported model or of a Stable Diffusion checkpoint in the form
        of diffusers, `shipped:NAME`, or the id OWNER/NAME of a model of the Hugging Face hub.
      dtype: what to compute in; by default the type of the weights, but float32 on a CPU, which
        has no units for less.
      devices: to draw on, each a share of the images; by default all of this process.

    Raises:
      UserError: there is no such model, or it is no text-to-image model.
    """
    return Pipeline(read_bundle(model), dtype=dtype, devices=devices)


class Best(NamedTuple):
    """The images that a CLIP chose, one for each prompt."""

    images: np.ndarray  # [n, h, w, 3]
    seeds: np.ndarray  # uint32 [n], which draw them again
    scores: np.ndarray  # [n of], those of all that were drawn, cosines


class Pipeline(ImageEdits):
    """A tokenizer, a text encoder, a denoiser and, for latents, an autoencoder.

    `pipeline(prompts)` gives images. Prompts, seeds, guidance scales and the number of steps are
    arguments of one compiled loop: changing them, or how many there are, compiles nothing. To the
    last bit, an image depends on its prompt, its seed and its settings alone, not on its place, on
    what else is drawn, or on the number of devices.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        dtype: ComputeType | None = None,
        devices: Sequence[Any] | None = None,
    ):
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
        self._mesh = drawing_mesh(devices)
        self.weights = on_all(weights if dtype is None else cast(weights, dtype), self._mesh)
        self._graphdef = structure(task)
        self._weak = functools.lru_cache(maxsize=2)(
            lambda model: read_weak(model, self.bundle, self.dtype, self._mesh)
        )

    @property
    def bundle(self) -> Bundle:
        """The model that was loaded, in the type that it computes in."""
        return Bundle(self.config, **self.weights, tokenizer=self.tokenizer)

    @property
    def devices(self) -> list[Any]:
        """Where it draws."""
        return list(self._mesh.devices.flat)

    def _changed(self, bundle: Bundle) -> "Pipeline":
        return Pipeline(bundle, dtype=self.dtype, devices=self.devices)

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
        return self._changed(put(textual_inversion.settled(self.bundle), new))

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
        return self._changed(textual_inversion.with_word(self.bundle, new))

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
        return self._changed(self.bundle._replace(config=config, frozen=frozen))

    def seamless(self, *, down: bool = True, across: bool = True) -> "Pipeline":
        """The same model drawing tiles: images that go on at their other side, as on a wallpaper.

        The convolutions of the autoencoder and of Stable Diffusion's U-Net, which have no idea of
        place, go around. Other networks have one: once things are in their places they see the
        image from elsewhere at each step, so that its edge is nowhere.
        """
        sampling = dataclasses.replace(self.config.sampling, seamless=(down, across))
        config = dataclasses.replace(self.config, sampling=sampling)
        return self._changed(self.bundle._replace(config=config))

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
        num_steps: Integer | Iterable[Integer] | None = None,
        guidance_scale: Number | Iterable[Number] | None = None,
        solver: Solver | None = None,
        size: tuple[int, int] | None = None,
        latents: np.ndarray | jax.Array | None = None,
        output: Literal["uint8", "float", "latents"] = "uint8",
        batch_size: int | None = None,
        num_snapshots: int = 0,
        decode_by: VaeMode = "whole",
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: Number | Iterable[Number] | None = None,
        toward: Sequence[str] | None = None,
        share: Number | Iterable[Number] = 0.5,
        clip: ClipGuidance | None = None,
        guidance: Guidance | None = None,
        weak: Autoguidance | None = None,
        repeats: int = 1,
        overlap: Number | None = None,
        preview: Preview | None = None,
    ) -> np.ndarray:
        """Draws one image for each prompt.

        Args:
          prompts: n texts; what is longer than the encoder takes is cut off (`truncated` tells).
            Words may have a weight, `a (red:1.3) pea`, and a prompt may be composed of several,
            `"a pea":1 "red":-0.5`.
          negative_prompt: what to steer away from, one for all or one each; "" by default.
          seeds: one each, or one for all, from 0 to 2**32 - 1; 0 to n - 1 by default.
          num_steps: of the solver, one for all or one each; the recipe's by default.
          guidance_scale: one for all or one each; the recipe's by default.
          solver: the recipe's by default; another one compiles a loop of its own.
          size: width and height; the training images' by default.
          latents: initial noise [n, h, w, c] of unit variance, in the place of the seeds' own.
          output: "uint8", "float" for float32 in [0, 1], or "latents" for what is modelled, as the
            loop leaves it (pixels from -1 to 1 or latents).
          batch_size: images that each device draws at a time, whatever their number, the last
            batch filled up; by default chosen for the size and the kind of device. Another one
            compiles a loop of its own, whose sums are rounded differently: by about 1e-5 of an
            image's range.
          num_snapshots: return that many estimates of the image on the way instead.
          decode_by: what the autoencoder decodes at a time: the "whole" batch, one of its "images",
            or one of their "tiles", for images that are too large otherwise.
          image: to start from, uint8 [n, h, w, 3] or one for all, whose size is that of the result.
          mask: 1 where the image is drawn anew, [n, h, w] or one for all; where it is 0 every pixel
            is kept as it is. All of the image is drawn anew by default.
          strength: how far an image is taken back to noise, from 0 to 1, and so how much it may
            change, one for all or one each; 0.6 by default, 1 with a mask.
          toward: other prompts, one for all or one each, to mix into the prompts.
          share: of these in the mixture, one for all or one each.
          clip: a second model that steers every step toward the prompts.
          guidance: how the guidance scale acts; as the recipe says by default.
          weak: a weaker model, away from which every step is steered.
          repeats: how often each step is taken, going back up by fresh noise in between: what is
            drawn then comes to fit what a mask keeps, or what a CLIP asks for.
          overlap: of the windows, of the training images' size, through which the image is drawn
            (`jaxdiff.sampling.multidiffusion`), as a share of their sides; the whole by default.
          preview: who is shown the images on their way, and how often.

        Returns:
          Images [n, h, w, 3], or latents; with snapshots, [num_snapshots, n, h, w, 3], the last one
          of the last step.

        Raises:
          UserError: lengths or shapes that do not fit, no step to take, a seed out of range, no
            prompt, one text where a list of them is expected, a malformed weight in a prompt, or
            a second model that does not fit.
        """
        settings = self.config.sampling
        prompts = asked.texts("prompts", prompts)
        n = len(prompts)
        if n == 0:
            raise UserError("There is no prompt: give at least one.")
        if repeats < 1:
            raise UserError(f"repeats is {repeats}: expected 1 or more.")
        if reads_mask(self.task.denoiser) and (image is None or mask is None):
            raise UserError(
                f"{self.config.name} is for inpainting: give an image and a mask, 1 where it is to "
                "be drawn anew."
            )
        if decode_by == "tiles" and any(settings.seamless):
            raise UserError(
                'A seamless image has no tiles with edges: give decode_by="images" or "whole".'
            )
        steps = asked.steps_of_each(settings.num_steps if num_steps is None else num_steps, n)
        images, size = asked.images_and_size(image, size, self.image_size, n)
        shape = self._shape(*size)
        batch_size = images_at_a_time(*size) if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: expected at least 1.")
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        of_images, first = asked.image_rows(images, mask, strength, steps)
        rows = {
            **self._text_rows(prompts, negative_prompt, toward, share),
            "scale": np.asarray(asked.one_each("guidance_scale", scale, n), np.float32),
            "seeds": asked.seed_array(
                asked.one_each("seeds", range(n) if seeds is None else seeds, n)
            ),
            **of_images,
            **asked.noise_rows(latents, n, shape),
        }
        guidance = guidance or settings.guidance
        guidance.check_steps(min(steps))
        drawing = Drawing(
            task=self.task,
            graphdef=self._graphdef,
            settings=settings,
            solver=solver or settings.solver,
            guidance=guidance,
            shape=shape,
            mesh=self._mesh,
            decode_by=None if output == "latents" else decode_by,
            repeats=repeats,
            windows=self._windows(size, overlap, batch_size, guidance),
            num_snapshots=num_snapshots,
        )
        drawing, weights = self._with_second_models(drawing, rows, prompts, clip, weak)
        look = None
        if preview is not None:
            shown, decoder = preview.show, preview.decoder or self
            look = preview.every, lambda which, x0: shown(which, decoder.decode(x0, batch_size))
        found = batches(steps, first, batch_size)
        program = compiled(drawing)
        made = draw_batches(program, weights, rows, found, batch_size, self._mesh.size, look)
        made = made.swapaxes(0, 1) if num_snapshots else made[:, 0]
        return np.rint(made * 255).astype(np.uint8) if output == "uint8" else made

    def _text_rows(
        self,
        prompts: list[str],
        negative_prompt: Sequence[str] | None,
        toward: Sequence[str] | None,
        share: Number | Iterable[Number],
    ) -> asked.Rows:
        n = len(prompts)
        negative = [""] if negative_prompt is None else negative_prompt
        negative = asked.one_each("negative_prompt", asked.texts("negative_prompt", negative), n)
        rows = rows_of(self.tokenizer, prompts, composed=True)
        rows |= rows_of(self.tokenizer, negative, "negative_")
        if toward is not None:
            others = asked.one_each("toward", asked.texts("toward", toward), n)
            rows |= rows_of(self.tokenizer, others, "toward_")
            rows["share"] = np.asarray(asked.one_each("share", share, n), np.float32)
        return rows

    def _with_second_models(
        self,
        drawing: Drawing,
        rows: asked.Rows,
        prompts: list[str],
        clip: ClipGuidance | None,
        weak: Autoguidance | None,
    ) -> tuple[Drawing, Any]:
        """The program's models and weights; what a second one is told of goes into the rows."""
        n, weights = len(prompts), self.weights
        if clip is not None:
            model, clip_weights, tokenizer = read_clip(clip.model, self._mesh)
            weights = {**weights, "clip": clip_weights}
            rows["clip_ids"] = tokenizer([plain(prompt) for prompt in prompts])
            rows["clip_scale"] = np.full(n, clip.scale, np.float32)
            drawing = dataclasses.replace(drawing, clip=clip, clip_model=model)
        if weak is not None:
            weaker = self._weak(weak.model)
            weights = {**weights, "weak": weaker.weights}
            rows["weak_scale"] = np.full(n, weak.scale, np.float32)
            drawing = dataclasses.replace(drawing, weak=weaker.kind)
        return drawing, weights

    def best(
        self,
        prompts: Sequence[str],
        *,
        of: int = 4,
        clip: str = "shipped:produce_clip",
        seeds: Integer | Iterable[Integer] | None = None,
        **arguments,
    ) -> Best:
        """Draws several images for each prompt and keeps the one that a CLIP finds closest to it.

        Args:
          prompts: n texts.
          of: how many images are drawn for each.
          clip: which one, as `ClipGuidance` names it.
          seeds: of the first image of each prompt, one for all or one each, the others counting up;
            by default none is drawn twice.
          arguments: others that `pipeline(prompts)` takes, one for all, and no output or snapshots.

        Raises:
          UserError: `of` is less than 1, or what `pipeline(prompts)` raises.
        """
        if of < 1:
            raise UserError(f"of is {of}: expected how many images to choose from, 1 or more.")
        prompts = asked.texts("prompts", prompts)
        n = len(prompts)
        first = asked.one_each("seeds", range(0, n * of, of) if seeds is None else seeds, n)
        tried = asked.seed_array([seed + i for seed in first for i in range(of)])
        repeated = [prompt for prompt in prompts for _ in range(of)]
        images = self(repeated, seeds=tried.tolist(), **arguments)
        rows, scores = choose(clip, images, repeated, of)
        return Best(images[rows], tried[rows], scores)

    def noise(
        self,
        seeds: Sequence[Integer],
        *,
        toward: Integer | Iterable[Integer] | None = None,
        amount: Number | Iterable[Number] = 0.1,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The noise that images start from, for `latents`, [n, h, w, c].

        Args:
          seeds: n of them.
          toward: other seeds, one for all or one each, toward whose noise it is turned (what web
            UIs call a variation seed).
          amount: how far, one for all or one each: 0 is the seed's own noise, 1 the other one's.
          size: width and height of the image; the training images' by default.

        Raises:
          UserError: a seed out of range, lengths or a size that do not fit.
        """
        shape = self._shape(*(size or (self.image_size, self.image_size)))
        own = np.asarray(noise_from_seeds(jnp.asarray(asked.seed_array(list(seeds))), shape))
        if toward is None:
            return own
        others = asked.seed_array(asked.one_each("toward", toward, len(own)))
        shares = asked.one_each("amount", amount, len(own))
        other = np.asarray(noise_from_seeds(jnp.asarray(others), shape))
        return np.stack([slerp(*each) for each in zip(own, other, shares, strict=True)])

    def truncated(self, prompt: str) -> bool:
        """Whether the end of a prompt is cut off because the text encoder takes no more."""
        return any(self.tokenizer.truncated(part.text) for part in parse(prompt))

    def size_of(self, ratio: str) -> tuple[int, int]:
        """The size that this model draws best of an aspect ratio such as "16:9".

        Raises:
          UserError: no such ratio, or one too far from square.
        """
        side = self.task.downsampling * self.task.denoiser.size_multiple
        return size_of_ratio(ratio, self.image_size**2, side)

    def _windows(
        self,
        size: tuple[int, int],
        overlap: Number | None,
        batch_size: int,
        guidance: Guidance,
    ) -> Windows | None:
        """How the denoiser sees an image of this size; None is all of it at once."""
        wrap, denoiser = self.config.sampling.seamless, self.task.denoiser
        if overlap is None and (not any(wrap) or isinstance(denoiser, UNet2DConditionConfig)):
            return None
        if reads_mask(denoiser):
            raise UserError(
                f"{self.config.name} is for inpainting and draws the whole at once: leave out "
                "overlap."
            )
        width, height = size if overlap is None else (self.image_size, self.image_size)
        if not any(wrap) and size[0] <= width and size[1] <= height:
            return None
        if guidance.remembers:
            raise UserError(
                "apg.momentum remembers the whole image, and this one is drawn through windows: "
                "leave it out."
            )
        rows, columns, _ = self._shape(width, height)
        together = images_at_a_time(width, height) // batch_size
        return Windows(
            height=rows,
            width=columns,
            overlap=0.0 if overlap is None else float(overlap),
            wrap=wrap,
            at_a_time=max(1, together),
        )

    def _shape(self, width: int, height: int) -> tuple[int, int, int]:
        side = self.task.downsampling * self.task.denoiser.size_multiple
        if width % side or height % side or min(width, height) < side:
            raise UserError(
                f"size {width}x{height} cannot be drawn by this model: both must be multiples of "
                f"{side}; its own size is {self.image_size}x{self.image_size}."
            )
        return self.task.shape(height, width)
