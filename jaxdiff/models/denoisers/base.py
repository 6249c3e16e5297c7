"""Interface of denoiser configs."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxdiff.models.layers import Remat


class Denoiser(abc.ABC):
    """Config of a denoising network; a network's own is a frozen dataclass that inherits it.

    The module that `build` makes is called as `network(x_t, t, cond)`, with x_t [b, h, w, c], t [b]
    in [0, 1] and a `Conditioning`, and returns a float32 prediction [b, h, w, c]. It ignores fields
    of the conditioning that it does not need, and computes in the type of its weights.

    A module with the methods of `sampling.feature_cache.SplitNetwork` supports `Sampler.cache`.

    `mesh.tensor` and `mesh.fsdp` shard kernels by the names of their axes (`models.layers.Dense`,
    `models.convolutions.Conv`); without names `fsdp` shards them by size. Under `mesh.context`
    other convolutions than `Conv` need `distributed.sharding.gather_kernel`.

    Attributes:
      channels: of the latents: 3 for pixels, else the autoencoder's.
      remat: what blocks keep for the backward pass.
      text_width: width of the text tokens that it reads; None for any.
      pooled_width: width of the pooled text vector that it reads; None for any, or none.
      guidance_embedding: whether it reads the guidance scale, `Conditioning.guidance`, in place of
        classifier-free guidance.
      max_references: most reference images that it reads as tokens; `reference_tokens` makes them.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    channels: int
    remat: Remat = "none"
    text_width: int | None = None
    pooled_width: int | None = None
    guidance_embedding: bool = False
    max_references: int = 0

    @abc.abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Initialise the network."""

    @abc.abstractmethod
    def flops(self, *, height: int, width: int, text_length: int) -> float:
        """FLOPs of one evaluation for one image of height x width positions of x_t.

        Where `max_references` is above 0, the argument `reference_tokens` is their number.
        """

    @property
    def size_multiple(self) -> int:
        """Sides of x_t must be multiples of this."""
        return 1

    def num_tokens(self, *, height: int, width: int) -> int:
        """Image tokens that the network makes of height x width positions of x_t.

        Time grids and time samplers may depend on it.
        """
        return height * width // self.size_multiple**2

    def reference_tokens(
        self, latents: Sequence[Float[Array, "b _ _ c"]]
    ) -> tuple[Float[Array, "b m r"], Int[Array, "b m axes"]]:
        """Return `Conditioning.reference` and its positions for latents of reference images.

        Called only, and to be defined, where `max_references` is above 0.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no reference_tokens.")

    @property
    def extra_channels(self) -> int:
        """Channels of `Conditioning.concat`, such as an inpainting network's mask and latents."""
        return 0

    @property
    def wraps(self) -> bool:
        """Whether circular padding (`wrap_convolutions`) is enough for tileable images.

        True for convolutional networks without position embeddings.
        """
        return False
