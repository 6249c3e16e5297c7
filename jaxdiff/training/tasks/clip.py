"""Train CLIP by contrastive learning of images and captions (Radford et al. 2021)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.layers import bind_init, bind_params, init_params, param_axes
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipEmbeddings
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.training.tasks.base import Batch, Metrics, Task


@checked
@dataclass(frozen=True, kw_only=True)
class ClipTask(Task):
    """The contrastive task: match the captions of a batch to its images, and the reverse.

    All other pairs of the batch, over all devices, are negatives; with gradient accumulation, those
    of the micro-batch.

    Attributes:
      model: text and image encoder.
      mask_equal_captions: exclude pairs with equal captions from the negatives.
    """

    model: ClipConfig
    mask_equal_captions: bool = True

    def init_params(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise both encoders."""
        return init_params(lambda rngs: Clip(self.model, rngs=rngs), rngs)

    def param_axes(self) -> dict[str, Any]:
        """Return the axes of both encoders' parameters."""
        return param_axes(bind_init(Clip, self.model))

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: RowKeys,
        task_state: tuple[()],
        ema: PyTree,
    ) -> tuple[Float[Array, ""], Metrics, tuple[()]]:
        """Return the contrastive loss in nats, log(batch) at chance, and the accuracies."""
        ids = batch["text"].ids["text"]
        model = bind_params(bind_init(Clip, self.model), params)
        embeddings = model(from_uint8(batch["image"]), ids)
        ignored = _equal_to_another(ids) if self.mask_equal_captions else None
        loss, to_text, to_image = contrastive_loss(embeddings, ignored)
        metrics = {
            "loss": loss,
            "accuracy_image_to_text": to_text,
            "accuracy_text_to_image": to_image,
            "logit_scale": embeddings.logit_scale,
        }
        return loss, metrics, task_state

    @property
    def conditioner(self) -> ClipConditioner:
        """The conditioner of the text encoder, which is named `text`."""
        return ClipConditioner(text=ClipTextEncoder(model=self.model.text))

    def flops_per_image(self, size: int, *, latents: bool = False, text: bool = False) -> float:
        """Return the FLOPs of one image and its caption, forward and backward."""
        return 3 * (self.model.text.flops() + self.model.vision.flops())


def contrastive_loss(
    embeddings: ClipEmbeddings, ignored: Bool[Array, "b b"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Symmetric cross-entropy of image i with text i (Radford et al. 2021, figure 3).

        l_ij = logit_scale <image_i, text_j>
        loss = -1/2b sum_i (log softmax_j l_ij + log softmax_j l_ji) at j = i

    Args:
      embeddings: as many images as texts, in the same order.
      ignored: the pairs (image, text) to leave out; never those on the diagonal.

    Returns:
      The loss, and the fractions of images and of texts that are closest to their partner.
    """
    # Cosines are multiplied by up to 100: bfloat16 products are too coarse.
    cosines = jnp.matmul(embeddings.image, embeddings.text.T, precision=jax.lax.Precision.HIGHEST)
    logits = embeddings.logit_scale * cosines
    if ignored is not None:
        logits = jnp.where(ignored, -jnp.inf, logits)
    images, texts = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    loss = jnp.mean((images + texts) / 2 - jnp.diagonal(logits))
    right = jnp.arange(len(logits))
    to_text, to_image = (jnp.mean(jnp.argmax(logits, axis=axis) == right) for axis in (1, 0))
    return loss, to_text, to_image


def _equal_to_another(ids: Int[Array, "b n"]) -> Bool[Array, "b b"]:
    """Return a mask of pairs of different captions with the same tokens."""
    equal = jnp.all(ids[:, None] == ids[None, :], axis=-1)
    return equal & ~jnp.eye(len(ids), dtype=bool)
