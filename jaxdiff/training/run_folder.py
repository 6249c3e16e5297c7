"""The folder of one run: which recipe it holds, and whether this one may go on in it."""

from collections.abc import Callable, Iterable

import jax
from etils import epath

from jaxdiff.bundle import CHECKPOINTS, CONFIG, read_config, write_config
from jaxdiff.config import Config, differences
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.training.optimizer import ConstantLR

# Keys that say how a run is carried out and looked at, not what it computes.
_FREE = (
    "name",
    "mesh",
    "sampling",
    "eval_samples",
    "data.prefetch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.sample_every",
    "train.max_nonfinite",
    "train.wandb",
)


def open_run(
    config: Config, out: epath.Path, *, fresh: bool, say: Callable[[str], None]
) -> Tokenizer:
    """Makes the run's folder, or goes on in it; writes its recipe and its tokenizer.

    Raises:
      UserError: the folder holds a run of another recipe (the differing keys are named), or files
        that are no run.
    """
    lead = jax.process_index() == 0
    if fresh and lead:
        for name in (CHECKPOINTS, "samples"):
            if (out / name).exists():
                (out / name).rmtree()
        for path in out.glob("*.json*") if out.exists() else ():
            path.unlink()
    if (out / CONFIG).exists():
        _check_same(config, read_config(out), out)
    elif (out / CHECKPOINTS).exists():
        raise UserError(
            f"{out} holds checkpoints but no {CONFIG}, so it cannot be told of which recipe they "
            "are; restore that file, choose another --out, or start anew with --fresh."
        )
    tokenizer = _tokenizer(config, out, say)
    if lead:
        tokenizer.save(str(out))
        write_config(out, config)
    return tokenizer


def _check_same(config: Config, there: Config, out: epath.Path) -> None:
    # With a constant learning rate a longer run goes through the same states as a shorter one.
    free = (*_FREE, "train.steps") if isinstance(config.optimizer.schedule, ConstantLR) else _FREE
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


def _tokenizer(config: Config, out: epath.Path, say: Callable[[str], None]) -> Tokenizer:
    """The run's own tokenizer, or the one that its recipe names, or one trained on its captions."""
    settings = config.tokenizer
    if (out / "tokenizer.json").exists():
        return Tokenizer.load(str(out))
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


def _captions(source, indices: Iterable[int]) -> Iterable[str]:
    for index in indices:
        yield from source[index]["captions"]
