"""The folder of one run: which recipe it holds, and whether this one may go on in it."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from etils import epath

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.base import Source
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.multihost import broadcast_text, run_on_host0, sum_over_hosts
from jaxdiff.errors import UserError
from jaxdiff.pretrained.load import (
    CACHE,
    CHECKPOINTS,
    CONFIG,
    FROZEN,
    MODEL,
    make_folder,
    read_config,
    read_tokenizer,
    write_config,
)
from jaxdiff.training import checkpoint_folder
from jaxdiff.training.metrics import RECORDS, TENSORBOARD, WANDB_ID
from jaxdiff.training.recipe import Config, differences
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask

# Keys that say how a run is carried out and looked at, not what it computes.
_FREE = (
    "name",
    "mesh",
    "sampling",
    "eval_samples",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.sample_every",
    "train.max_nonfinite",
    "train.wandb",
)
# What a run leaves in its folder, the checkpoints first: what is left of a removal that was cut
# short is a run without checkpoints, which starts anew under the same recipe.
_OF_A_RUN = (
    CHECKPOINTS,
    FROZEN,
    CACHE,
    "samples",
    TENSORBOARD,
    WANDB_ID,
    RECORDS,
    "summary.json",
    "evaluation.json",
    "tokenizer.json",
    CONFIG,
)


def open_run(
    config: Config, out: epath.Path, *, fresh: bool, say: Callable[[str], None]
) -> Tokenizer:
    """Makes the run's folder, or goes on in it; writes its recipe and its tokenizer.

    Raises:
      UserError: the folder cannot be made, or is not the same on all hosts; it holds a run of
        another recipe (the differing keys are named), an exported model, or checkpoints of nobody
        knows what.
    """
    run_on_host0(lambda: _prepare(config, out, fresh, say))
    _check_shared(out)
    return Tokenizer.load(str(out))


def _prepare(config: Config, out: epath.Path, fresh: bool, say: Callable[[str], None]) -> None:
    """What the first host does in the folder."""
    make_folder(out)
    if (out / MODEL).exists():
        raise UserError(f"{out} holds an exported model, which is no run: choose another --out.")
    # A run that was stopped before its first checkpoint, by a mistake in its recipe for instance,
    # has nothing to keep: it may start anew as another one.
    begun = (out / CHECKPOINTS).exists() and any((out / CHECKPOINTS).iterdir())
    there = read_config(out) if (out / CONFIG).exists() and not fresh else None
    if fresh or (there is not None and not begun and differences(config, there)):
        _remove_run(out)
    elif there is not None:
        _check_same(config, there, out)
    elif (out / CHECKPOINTS).exists():
        raise UserError(
            f"{out} holds checkpoints but no {CONFIG}, so it cannot be told of which recipe they "
            "are; restore that file, choose another --out, or start anew with --fresh."
        )
    tokenizer = _tokenizer(config, out, say)
    _check_text(config, tokenizer)
    tokenizer.save(str(out))
    write_config(out, config)


def _check_shared(out: epath.Path) -> None:
    """Raises `UserError` unless all hosts see the same folder, as they must to save into it."""
    if jax.process_count() == 1:
        return
    sign = out / f".shared-{broadcast_text(uuid.uuid4().hex)}"
    run_on_host0(sign.touch)
    blind = sum_over_hosts(not sign.exists())
    run_on_host0(sign.unlink)
    if blind:
        raise UserError(
            f"{out} is not the same folder on all hosts, {blind} of {jax.process_count()} do not "
            "see it: give an --out on storage that they share, such as gs://."
        )


@contextlib.contextmanager
def told_if_full(out: epath.Path) -> Iterator[None]:
    """Makes a `UserError` of a disk that takes nothing more, whatever was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{out} cannot be written to ({os.strerror(error.errno)}): make room or write access "
            "there and run the same command again, which goes on from the last checkpoint."
        ) from error


def _remove_run(out: epath.Path) -> None:
    for name in _OF_A_RUN:
        path = out / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _check_same(config: Config, there: Config, out: epath.Path) -> None:
    steps = checkpoint_folder.steps(checkpoint_folder.absolute(out / CHECKPOINTS))
    taken = max(steps, default=0)
    if config.train.steps < taken:
        raise UserError(
            f"{out} holds a run that has taken {taken} steps, but train.steps is "
            f"{config.train.steps}: give {taken} or more, choose another --out, or start anew with "
            "--fresh, which removes that run."
        )
    # A run of another length goes through the same states as long as its learning rates are equal.
    free = (*_FREE, "train.steps") if _same_learning_rates(config, there, taken) else _FREE
    differing = [
        line
        for line in differences(config, there)
        if not any(line.split(" ")[0] == key or line.startswith(key + ".") for key in free)
    ]
    if differing:
        raise UserError(
            f"{out} holds a run of another recipe: {'; '.join(differing[:5])}"
            f"{' ...' if len(differing) > 5 else ''}. Choose another --out, or start anew with "
            "--fresh, which removes that run."
        )


def _same_learning_rates(config: Config, there: Config, taken: int) -> bool:
    """Whether the two lengths of the run make no difference to the `taken` updates made so far."""

    def factors(steps: int):
        factor = config.optimizer.schedule.factor
        return jax.vmap(lambda step: factor(step, steps))(jnp.arange(taken))

    ours, theirs = config.train.steps, there.train.steps
    return ours == theirs or bool(jnp.array_equal(factors(ours), factors(theirs)))


def _check_text(config: Config, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if the tokenizer's ids or lengths are more than the text encoder takes."""
    task = config.task
    if isinstance(task, AutoencoderTask):
        return
    text = task.model.text if isinstance(task, ClipTask) else task.text.model
    new = task.inversion.vectors if isinstance(task, DiffusionTask) and task.inversion else 0
    vocab_size = tokenizer.vocab_size - new
    if tokenizer.length != text.length or vocab_size > text.vocab_size:
        raise UserError(
            f"The tokenizer gives {tokenizer.length} tokens out of {vocab_size}, but the "
            f"text encoder takes {text.length} out of {text.vocab_size}: make tokenizer.length and "
            "tokenizer.vocab_size fit the encoder's length and vocab_size."
        )


def _tokenizer(config: Config, out: epath.Path, say: Callable[[str], None]) -> Tokenizer:
    """The run's own tokenizer, its text encoder's, the recipe's, or one trained on its captions."""
    settings, task = config.tokenizer, config.task
    if (out / "tokenizer.json").exists():
        return Tokenizer.load(str(out))
    if isinstance(task, DiffusionTask) and task.text.pretrained is not None:
        tokenizer, new = read_tokenizer(task.text.pretrained), task.inversion
        return tokenizer.with_word(new.word, new.vectors) if new else tokenizer
    if settings.path is not None:
        return Tokenizer.load(settings.path, length=settings.length)
    source = config.data.source
    source.check()
    count = min(settings.records, len(source))
    # Spread over the data, which may be sorted.
    indices = [i * len(source) // count for i in range(count)]
    say(f"Training a tokenizer on the captions of {count} records.")
    return Tokenizer.train(
        _captions(source, indices), vocab_size=settings.vocab_size, length=settings.length
    )


def _captions(source: Source, indices: Iterable[int]) -> Iterator[str]:
    """The captions of these records; records and captions that cannot be used are passed over.

    Raises:
      UserError: nothing is left.
    """
    found, last = 0, "they are empty"
    for index in indices:
        try:
            record = source[index]
        except RecordError as error:
            last = str(error)
            continue
        for caption in record["captions"]:
            try:
                caption.encode()
            except UnicodeEncodeError:
                last = f"{record['name']}: the caption is not UTF-8"
                continue
            if caption.strip():
                found += 1
                yield caption
    if not found:
        raise UserError(
            f"There is no caption to train a tokenizer on ({last}): repair the data, or name a "
            "tokenizer's folder in tokenizer.path."
        )
