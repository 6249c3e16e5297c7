"""Train a denoiser, its adapters or new tokens, on pixels or on an autoencoder's latents."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, NotNegative, Text
from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.diffusion.distillation import ConsistencyDistillation
from jaxdiff.diffusion.losses import loss_by_level
from jaxdiff.diffusion.objectives import Denoising, LossInputs, Objective, Predictor
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.sharding import split_tokens
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioner, Conditioning, TextInputs
from jaxdiff.models.lora import LoraConfig, init_adapters, scale_adapters
from jaxdiff.models.text_to_image import Part, TextToImage, from_uint8, merge_params
from jaxdiff.training.tasks.base import Batch, Metrics, Path, PretrainedPart, Task

AnyObjective = Denoising | ConsistencyDistillation | Objective

DENOISER, AUTOENCODER = ("denoiser",), ("autoencoder",)


@checked
@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Sources of initial weights: folders, `shipped:NAME` or hub ids.

    Attributes:
      denoiser: None initialises it.
      text_encoders: None initialises them; their tokenizers come from the same model.
      autoencoder: required by models that work on latents.
    """

    denoiser: str | None = None
    text_encoders: str | None = None
    autoencoder: str | None = None


@checked
@dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """Textual inversion: train the embedding of a new token alone (Gal et al. 2022).

    Attributes:
      word: spelling in captions and prompts; without spaces, and not yet in the vocabulary.
      initial: words whose embeddings initialise it.
      vectors: number of its tokens.

    Raises:
      UserError: `vectors` is below 1, or `initial` is empty.
    """

    word: str = "<my-thing>"
    initial: Annotated[str, Text()] = "thing"
    vectors: Count = 1

    def first_ids(self, tokenizer: Any) -> Int[np.ndarray, " n"]:
        """Return the ids of the tokens whose embeddings initialise it."""
        ids = tokenizer([self.initial])[0]
        known = ids[1 : int(np.argmax(ids == tokenizer.end_id))]
        return np.resize(known, self.vectors)


@checked
@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Which parameters a run trains; the others are frozen.

    Attributes:
      denoiser: the whole denoiser, unless `lora` or `inversion` replace it.
      text_encoders: the whole text encoders. Randomly initialised text encoders that are trained
        jointly tend to collapse: start from trained ones.
      lora: adapters of the denoiser.
      text_lora: adapters of the text encoders, in place of their weights.
      inversion: a new token, in place of the denoiser's weights.
    """

    denoiser: bool = True
    text_encoders: bool = False
    lora: LoraConfig | None = None
    text_lora: LoraConfig | None = None
    inversion: TextualInversion | None = None

    def includes(self, path: Path) -> bool:
        """Whether the part of a model at `path` is trained as a whole."""
        if path == DENOISER:
            return self.denoiser and self.lora is None and self.inversion is None
        return path[0] == "text_encoders" and self.text_encoders and self.text_lora is None

    @property
    def trains_text(self) -> bool:
        """Whether encoded text changes in training."""
        return self.text_encoders or self.text_lora is not None or self.inversion is not None


@checked
@dataclass(frozen=True, kw_only=True)
class DiffusionTask(Task):
    """Train a text-to-image model, or a part of one.

    Attributes:
      model: the specification.
      pretrained: sources of the model's initial weights.
      trainable: parameters that are trained.
      objective: the loss.
      curriculum: low noise levels first; None samples all levels from the start.
      guidance: the guidance scale of all images, for networks that read one, such as FLUX.1-dev; at
        1, as in diffusers' training script, a guided model is the conditional one.

    Raises:
      UserError: frozen weights have no source, options of `trainable` conflict, or `guidance` is
        set for a network that reads none.
    """

    model: TextToImage
    pretrained: Pretrained = field(default_factory=Pretrained)
    trainable: Trainable = field(default_factory=Trainable)
    objective: AnyObjective = field(default_factory=Denoising)
    curriculum: NoiseCurriculum | None = None
    guidance: NotNegative = 1.0

    def __post_init__(self):
        trainable, pretrained = self.trainable, self.pretrained
        if self.guidance != 1 and not self.model.denoiser.guidance_embedding:
            raise UserError(
                f"task.guidance is {self.guidance:g} but the denoiser reads no guidance scale: "
                "expected 1; set it for networks with a guidance embedding, such as FLUX.1-dev."
            )
        trains_denoiser = trainable.includes(DENOISER)
        if pretrained.denoiser is None and (not trains_denoiser or self.objective.uses_teacher):
            raise UserError(
                "LoRA, textual inversion and objectives with a teacher need a trained denoiser: "
                "name its model in task.pretrained.denoiser."
            )
        if trainable.text_lora is not None and pretrained.text_encoders is None:
            raise UserError(
                "LoRA adapts text encoders that are trained already: name their model in "
                "task.pretrained.text_encoders."
            )
        if trainable.inversion is not None:
            self.model.conditioner.check_new_tokens()
        if trainable.inversion is not None and (trainable.text_encoders or trainable.text_lora):
            raise UserError(
                "Textual inversion learns a token for frozen text encoders: set "
                "task.trainable.text_encoders to False and leave task.trainable.text_lora out."
            )
        if self.model.autoencoder is not None and pretrained.autoencoder is None:
            raise UserError(
                "The model works on an autoencoder's latents: name a trained autoencoder in "
                "task.pretrained.autoencoder."
            )

    def _folder(self, path: Path) -> str | None:
        return getattr(self.pretrained, path[0])

    def _part(self, part: Part, source: Path | None = None) -> PretrainedPart:
        return PretrainedPart(self._folder(part.path), part.build, source)

    def init_params(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the parameters that are trained."""
        model, trainable = self.model, self.trainable
        params: dict[str, Any] = {}
        if trainable.text_encoders and trainable.text_lora is None:
            params["text_encoders"] = model.init_text_encoders(rngs)
        adapters: dict[str, Any] = {}
        if trainable.text_lora is not None:
            adapters["text_encoders"] = {
                name: init_adapters(encoder.build(rngs=rngs), trainable.text_lora, rngs)
                for name, encoder in model.conditioner.encoders.items()
            }
        if trainable.inversion is not None:
            params["added_tokens"] = {
                name: jnp.zeros((trainable.inversion.vectors, encoder.width))
                for name, encoder in model.conditioner.encoders.items()
            }
        if trainable.lora is not None:
            adapters["denoiser"] = init_adapters(
                model.denoiser.build(rngs=rngs), trainable.lora, rngs
            )
        elif trainable.includes(DENOISER):
            params["denoiser"] = model.init_denoiser(rngs)
        return params | ({"adapters": adapters} if adapters else {})

    def param_axes(self) -> dict[str, Any]:
        """Return the axes of the model's parameters."""
        return self.model.param_axes()

    @property
    def splits_tokens(self) -> bool:
        """True: a denoiser's images are split over `mesh.context`."""
        return True

    @property
    def by_row(self) -> bool:
        """Whether the objective's loss is a mean over images."""
        return self.objective.by_row

    def frozen_parts(self) -> dict[Path, PretrainedPart]:
        """Return the parts that are not trained, and the teacher."""
        parts = {
            part.path: self._part(part)
            for part in self.model.parts
            if not self.trainable.includes(part.path)
        }
        if self.objective.uses_teacher:
            parts["teacher", "denoiser"] = self._part(self.model.parts[0], source=("denoiser",))
        return parts

    def initial_parts(self) -> dict[Path, PretrainedPart]:
        """Return the trained parts that start from another model's weights."""
        return {
            part.path: self._part(part)
            for part in self.model.parts
            if self.trainable.includes(part.path) and self._folder(part.path) is not None
        }

    def init_from_frozen(self, frozen: PyTree, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        """Initialise a new token's embeddings from those of `trainable.inversion.initial`.

        Raises:
          UserError: a tokenizer has other ids than its text encoder.
        """
        inversion = self.trainable.inversion
        if inversion is None:
            return {}
        added = {}
        for name in self.model.conditioner.encoders:
            tokenizer = tokenizers[name]
            table = jax.device_get(frozen["text_encoders"][name]["token_embedding"])
            if len(table) + inversion.vectors != tokenizer.vocab_size:
                raise UserError(
                    f"The tokenizer has {tokenizer.vocab_size - inversion.vectors} tokens and the "
                    f"text encoder {len(table)}: new tokens need equal numbers."
                )
            added[name] = np.asarray(table[inversion.first_ids(tokenizer)], np.float32)
        return {"added_tokens": added}

    def model_params(self, params: PyTree, frozen: PyTree) -> dict[str, Any]:
        """Merge trained and frozen parameters of the model; multiply adapters by their scale."""
        trainable, params = self.trainable, dict(params)
        if "adapters" in params:
            adapters = dict(params["adapters"])
            if trainable.lora is not None:
                adapters["denoiser"] = scale_adapters(adapters["denoiser"], trainable.lora)
            if trainable.text_lora is not None:
                adapters["text_encoders"] = {
                    name: scale_adapters(tree, trainable.text_lora)
                    for name, tree in adapters["text_encoders"].items()
                }
            params["adapters"] = adapters
        parts = {k: v for k, v in frozen.items() if k not in ("teacher", "absent_text")}
        return merge_params(parts, params)

    def init_state(self) -> Any:
        """Return the curriculum at its first level, and the objective's state."""
        state = self.objective.init_state()
        return (self.curriculum.init(), state) if self.curriculum else ((), state)

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: RowKeys,
        task_state: Any,
        ema: PyTree,
    ) -> tuple[Float[Array, ""], Metrics, Any]:
        """Return the objective's mean over the batch, and its sums by noise level."""
        encode_keys, loss_keys = keys.split()
        curriculum, state = task_state
        full = self.model_params(params, frozen)
        cond = self._cond(full, batch)
        max_t = self.curriculum.max_t(curriculum) if self.curriculum else 1.0
        objective = self.objective
        x0 = self.x0(full, batch, encode_keys)
        outputs = objective.loss(
            LossInputs(
                model=self._predictor(full),
                prediction=self.model.prediction,
                schedule=self.model.schedule,
                x0=split_tokens(x0),
                cond=cond,
                keys=loss_keys,
                max_t=max_t,
                uncond=self._uncond(full, frozen, batch) if objective.uses_uncond else None,
                teacher=self._predictor(frozen["teacher"]) if objective.uses_teacher else None,
                ema=self._ema(ema, params, frozen) if objective.uses_ema else None,
                state=state,
                row_weights=batch.get("row_weights"),
                num_tokens=self.model.denoiser.num_tokens(height=x0.shape[1], width=x0.shape[2]),
            )
        )
        sums, counts = loss_by_level(outputs.loss, outputs.t)
        loss = jnp.mean(outputs.loss)
        metrics = {"loss": loss, "loss_by_level_sum": sums, "loss_by_level_count": counts}
        if self.curriculum:
            metrics["max_t"] = jnp.asarray(max_t)
        return loss, {**metrics, **outputs.metrics}, (curriculum, outputs.state)

    def next_state(self, task_state: Any, metrics: Metrics) -> Any:
        """Return the state with the curriculum after this step's loss."""
        curriculum, state = task_state
        if self.curriculum:
            curriculum = self.curriculum.update(curriculum, metrics["loss"])
        return curriculum, state

    def _ema(self, ema: PyTree, params: PyTree, frozen: PyTree) -> Predictor:
        """Return the averaged model in the compute type, without gradients."""
        average = jax.tree.map(lambda average, like: average.astype(like.dtype), ema, params)
        return self._predictor(self.model_params(jax.lax.stop_gradient(average), frozen))

    def _predictor(self, params: PyTree) -> Predictor:
        network: Any = self.model.network(params)

        def predict(x_t, t, cond, next_t=None):
            return network(x_t, t, cond) if next_t is None else network(x_t, t, cond, next_t)

        return predict

    def _cond(self, params: PyTree, batch: Batch) -> Conditioning:
        inputs: TextInputs = batch["text"]
        if "text_features" in batch:
            cond = self.model.conditioner.unpack(batch["text_features"], params, inputs)
        else:
            cond = self.model.encode_text(params, inputs)
        return self._attach(cond, params, batch)

    def _uncond(self, params: PyTree, frozen: PyTree, batch: Batch) -> Conditioning:
        """Return the conditioning of absent prompts for the images of a batch."""
        cond, count = self.model.encode_text(params, frozen["absent_text"]), len(batch["size_crop"])
        repeat = lambda x: jnp.broadcast_to(x, (count, *x.shape[1:]))  # noqa: E731
        return self._attach(jax.tree.map(repeat, cond), params, batch)

    def _attach(self, cond: Conditioning, params: PyTree, batch: Batch) -> Conditioning:
        """Add sizes and crops, the guidance scale for networks that read one, and references.

        As in sampling, references are encoded to the mode, and stay where the prompt is absent.
        """
        size_crop, denoiser = batch["size_crop"].astype(jnp.float32), self.model.denoiser
        guidance = jnp.full(len(size_crop), self.guidance) if denoiser.guidance_embedding else None
        cond = cond._replace(size_crop=size_crop, guidance=guidance)
        if "references" not in batch:
            return cond
        latents = [split_tokens(self._latents(params, x)) for x in batch["references"]]
        tokens, positions = denoiser.reference_tokens(latents)
        return cond._replace(reference=tokens, reference_positions=positions)

    def x0(self, params: PyTree, batch: Batch, keys: RowKeys) -> Float[Array, "b i j c"]:
        """Encode a batch of images, or read its cached latents; `keys` sample z in both."""
        return self._latents(params, batch["latents" if "latents" in batch else "image"], keys)

    def _latents(
        self, params: PyTree, x: Array, keys: RowKeys | None = None
    ) -> Float[Array, "b i j c"]:
        """Return latents of images, uint8, or of cached moments; without keys, the mode."""
        if x.dtype == jnp.uint8:
            return self.model.encode(params, from_uint8(x), keys)
        return self.model.latents_from_moments(params, x, keys)

    def constants(self, tokenizers: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the inputs of an absent prompt, if the objective uses them."""
        if not self.objective.uses_uncond:
            return {}
        conditioner = self.model.conditioner
        if tokenizers is None:
            return {"absent_text": conditioner.abstract_inputs(1)}
        return {"absent_text": conditioner.tokenize(tokenizers, [None])}

    @property
    def conditioner(self) -> Conditioner:
        """The conditioner of the model."""
        return self.model.conditioner

    def check_tokenizers(self, tokenizers: Mapping[str, Any]) -> None:
        """Raise `UserError` for tokenizers that do not fit the text encoders."""
        inversion = self.trainable.inversion
        added = inversion.vectors if inversion else 0
        self.model.conditioner.check_tokenizers(tokenizers, added)

    def denoiser_flops(self, size: int, references: int = 0) -> float:
        """Return the FLOPs of one denoiser evaluation for one image of side `size`, in pixels.

        There are `references` of the same size.
        """
        height, width, _ = self.model.latent_shape(size, size)
        length, denoiser = self.model.conditioner.text_length, self.model.denoiser
        tokens = references * denoiser.num_tokens(height=height, width=width)
        further: dict[str, Any] = {"reference_tokens": tokens} if tokens else {}
        return denoiser.flops(height=height, width=width, text_length=length, **further)

    def flops_per_image(
        self, size: int, *, latents: bool = False, text: bool = False, references: int = 0
    ) -> float:
        """Return the FLOPs of one image in a training step; frozen parts get no gradient.

        It has `references` of its size.
        """
        trainable, denoiser = self.trainable, self.denoiser_flops(size, references)
        # Adapters and new tokens need the gradients of layers' inputs, not those of their kernels.
        total = 3 * denoiser if trainable.includes(DENOISER) else 2 * denoiser
        if not text:
            passes = 3 if trainable.text_encoders and trainable.text_lora is None else 2
            total += self.model.conditioner.flops() * (passes if trainable.trains_text else 1)
        if self.model.autoencoder is not None and not latents:
            encoded = self.model.autoencoder.encode_flops(height=size, width=size)
            total += (1 + references) * encoded
        return total
