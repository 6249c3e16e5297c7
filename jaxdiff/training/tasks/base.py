"""The interface between the training loop and tasks."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.models.conditioning import Conditioner
from jaxdiff.training.tasks.captions import CaptionTokenizer

Batch = Mapping[str, Any]  # as `jaxdiff.data.loader.make_dataset` returns it
Metrics = dict[str, jax.Array]
Path = tuple[str, ...]

SUM, COUNT = "_sum", "_count"
"""A metric x_sum is logged as x: its total since the last line over that of x_count."""


def means(totals: Mapping[str, Any], steps: float) -> dict[str, np.ndarray]:
    """Return the means of metrics, given their totals over so many steps or batches.

    The mean of x_sum is that over x_count, and NaN where the count is 0.
    """
    found = {}
    for name, total in totals.items():
        if name.endswith(SUM):
            count = totals[name.removesuffix(SUM) + COUNT]
            empty = np.full_like(total, np.nan)
            found[name.removesuffix(SUM)] = np.divide(total, count, out=empty, where=count > 0)
        elif not name.endswith(COUNT):
            found[name] = np.asarray(total / steps)
    return found


class PretrainedPart(NamedTuple):
    """A part of a model that may come from a trained model: its folder, and its module."""

    folder: str | None  # a run, an exported or published model; None initialises it
    build: Callable[[], nnx.Module]
    source: Path | None = None  # where the trained model has it, if elsewhere


class Task(abc.ABC):
    """A model, its loss, and state that is carried from step to step.

    A task is a frozen dataclass that inherits from this class. By default every part is initialised
    and trained, and there is no state.

    Parameters are nested dicts. Frozen ones form a separate tree, which checkpoints do not contain.

    Attributes:
      model: the specification of the model that is trained.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    model: Any

    @abc.abstractmethod
    def init_params(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the parameters that are trained."""

    def param_axes(self) -> dict[str, Any]:
        """Return the axis names of trained and frozen parameters, which determine their sharding.

        A nested dict of `jaxdiff.distributed.sharding.Axes`, as `models.layers.param_axes` returns
        it. Parameters without an entry are sharded by size, over `mesh.fsdp` alone.
        """
        return {}

    @property
    def splits_tokens(self) -> bool:
        """Whether `loss` splits images over `mesh.context`, by `split_tokens`."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether loss and metrics are means over rows, and the next state is independent of them.

        The gradients of micro-batches are then reduced over the devices once. Means over parts of a
        batch must be those of the batch, up to the metrics that are sums over rows.
        """
        return False

    def frozen_parts(self) -> dict[Path, PretrainedPart]:
        """Return the frozen parts, by their path in the tree of parameters."""
        return {}

    def initial_parts(self) -> dict[Path, PretrainedPart]:
        """Return the trained parts that start from another model's weights, by their path.

        The path () stands for all that is trained.
        """
        return {}

    def model_params(self, params: PyTree, frozen: PyTree) -> dict[str, Any]:
        """Return the parameters of `model`, of trained and frozen ones."""
        return dict(params)

    def init_from_frozen(self, frozen: PyTree, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        """Return trained parameters whose initial values depend on frozen ones, on the host."""
        return {}

    def next_state(self, task_state: PyTree, metrics: Metrics) -> PyTree:
        """Return the next state, given the metrics of the whole batch."""
        return task_state

    def constants(self, tokenizers: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return arrays to add to the frozen parameters; for None, shapes and types alone."""
        return {}

    def init_state(self) -> PyTree:
        """Return the initial state, a tree of arrays; () for none."""
        return ()

    @abc.abstractmethod
    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: RowKeys,
        task_state: PyTree,
        ema: PyTree,
    ) -> tuple[Float[Array, ""], Metrics, PyTree]:
        """Return the mean loss over the batch, metrics (the loss as "loss") and the next state.

        Trained and frozen parameters are in the compute type, `ema` is float32.
        """

    @property
    def conditioner(self) -> Conditioner | None:
        """The conditioner that tokenizes captions; None for a task without text."""
        return None

    def tokenize(self, tokenizers: Mapping[str, Any]) -> Callable[[list[str]], Any] | None:
        """Return the function from captions to the `TextInputs` of batches; None for no text."""
        return None if self.conditioner is None else CaptionTokenizer(self.conditioner, tokenizers)

    def abstract_text(self, batch_size: int) -> Any:
        """Return shapes and types of the tokenized captions of a batch; None for no text."""
        return None if self.conditioner is None else self.conditioner.abstract_inputs(batch_size)

    def check_tokenizers(self, tokenizers: Mapping[str, Any]) -> None:
        """Raise `UserError` for tokenizers that do not fit the model."""
        if self.conditioner is not None:
            self.conditioner.check_tokenizers(tokenizers)

    @abc.abstractmethod
    def flops_per_image(self, size: int, *, latents: bool = False, text: bool = False) -> float:
        """Return the FLOPs of one image of side `size`, in pixels, in a training step.

        Cached `latents` save the autoencoder, and cached `text` features the text encoders.
        """
