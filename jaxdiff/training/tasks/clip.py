"""Training CLIP: images and captions that belong together end up close (Radford et al. 2021)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipEmbeddings
from jaxdiff.training.tasks.base import Batch, Metrics, Task, from_uint8


@dataclass(frozen=True, kw_only=True)
class ClipTask(Task):
    """Which caption of the batch belongs to which image, asked in both directions.

    Every other pair of the whole batch is a negative, over all devices; with gradient accumulation
    those of the same micro-batch are.

    Attributes:
      model: the two towers.
      mask_equal_captions: an image whose caption has the same tokens as another's is then no
        negative for it: nothing could tell which of the two was meant.
    """

    model: ClipConfig
    mask_equal_captions: bool = True

    def build(self, rngs: nnx.Rngs) -> Clip:
        """The module that is trained, freshly drawn."""
        return Clip(self.model, rngs=rngs)

    def loss(
        self, model: Clip, frozen: PyTree, batch: Batch, key: Key[Array, ""], task_state: tuple[()]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The contrastive loss in nats, log(batch) at chance, and the share of right answers."""
        ids = batch["tokens"]
        embeddings = model(from_uint8(batch["image"]), ids)
        ignored = _equal_to_another(ids) if self.mask_equal_captions else None
        loss, to_text, to_image = contrastive_loss(embeddings, ignored)
        return loss, {
            "loss": loss,
            "accuracy_image_to_text": to_text,
            "accuracy_text_to_image": to_image,
            "logit_scale": embeddings.logit_scale,
        }


def contrastive_loss(
    embeddings: ClipEmbeddings, ignored: Bool[Array, "b b"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Symmetric cross-entropy of image i with text i (Radford et al. 2021, figure 3).

        l_ij = logit_scale <image_i, text_j>
        loss = -1/2b sum_i (log softmax_j l_ij + log softmax_j l_ji) at j = i

    Args:
      embeddings: as many images as texts, in the same order.
      ignored: the pairs (image, text) that count neither way; never those on the diagonal.

    Returns:
      The loss, and the shares of images and of texts whose partner is the nearest.
    """
    # Cosines are multiplied by up to 100: the three digits of bfloat16 products would not do.
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
    """True where two different captions of the batch have the same tokens."""
    equal = jnp.all(ids[:, None] == ids[None, :], axis=-1)
    return equal & ~jnp.eye(len(ids), dtype=bool)
