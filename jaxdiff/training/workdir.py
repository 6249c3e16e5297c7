"""The folder of a run: its recipe, its tokenizers, and whether a recipe can resume there."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxdiff.config.serialization import to_json, types_in
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.multihost import broadcast_text, run_on_host0, sum_over_hosts
from jaxdiff.errors import UserError
from jaxdiff.io.files import make_folder
from jaxdiff.io.text import read_json
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.pretrained.bundle import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    RECIPE,
    TOKENIZERS,
    write_json,
    write_tokenizers,
)
from jaxdiff.pretrained.load import model_folder, read_tokenizers
from jaxdiff.pretrained.run_folder import FROZEN, is_recipe, read_run_spec
from jaxdiff.training.best import BEST
from jaxdiff.training.goodput import STARTS
from jaxdiff.training.metrics import RECORDS, TENSORBOARD, WANDB_ID
from jaxdiff.training.post_hoc_ema import SNAPSHOTS
from jaxdiff.training.profiler import TRACE
from jaxdiff.training.recipe import Config, config_from_json, differences
from jaxdiff.training.tasks.diffusion import DiffusionTask

CACHE = "latents"
SUMMARY = "summary.json"

# Keys that do not change what a run computes.
_FREE = (
    "name",
    "mesh",
    "evaluators",
    "best",
    "slices",
    "task.model.name",
    "task.model.sampler",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_bad_fraction",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_nonfinite",
    "train.wandb",
    "train.evaluate",
    "train.profile_at",
    "train.profile_steps",
)
# Files of a run. Checkpoints come first: an interrupted removal leaves a run without checkpoints,
# which starts again with the same recipe. Cached latents stay: they took hours, and a recipe that
# needs others is refused.
_RUN_FILES = (
    CHECKPOINTS,
    SNAPSHOTS,
    BEST,
    FROZEN,
    "samples",
    TENSORBOARD,
    TRACE,
    WANDB_ID,
    RECORDS,
    STARTS,
    SUMMARY,
    "evaluation.json",
    "history.txt",
    "ema_search.json",
    TOKENIZERS,
    CONFIG,
)


def open_run(
    config: Config, out: epath.Path, *, fresh: bool, log: Callable[[str], None]
) -> dict[str, TextTokenizer]:
    """Create the run's folder or resume in it, and write its recipe and tokenizers.

    Returns:
      The tokenizers, by the names of the text encoders.

    Raises:
      UserError: the folder cannot be created, or differs between hosts; it holds a run of another
        recipe (the message names the keys), an exported model, or checkpoints without a recipe.
    """
    run_on_host0(lambda: _prepare(config, out, fresh, log))
    _check_shared(out)
    return _load_tokenizers(config, out)


def read_config(folder: epath.PathLike, types: tuple[type, ...] = ()) -> Config:
    """Read the recipe of a run, an exported model or `shipped:NAME`.

    `types` are further dataclasses to accept.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    return config_from_json(_recipe_json(folder, types), types)


def _recipe_json(folder: epath.PathLike, types: tuple[type, ...] = ()) -> dict[str, Any]:
    """Read a recipe, as `read_config`, but leave it JSON."""
    root = model_folder(folder)
    path = root / RECIPE if (root / RECIPE).exists() else root / CONFIG
    data = read_json(path) if path.exists() else None
    if data is None or not is_recipe(data):
        raise UserError(
            f"{folder} holds no recipe: expected the folder of a run, or of a model that was "
            f"exported with its {RECIPE}; check the path."
        )
    read_run_spec(root, data, types)  # refuses what another version wrote
    return data


def find_recipe_of(folder: epath.PathLike, types: tuple[type, ...] = ()) -> Config | None:
    """Return the recipe of a trained model; None if its folder has none."""
    root = model_folder(folder)
    names = (RECIPE, CONFIG) if root.is_dir() else ()
    has_one = any((root / name).exists() and is_recipe(read_json(root / name)) for name in names)
    return read_config(folder, types) if has_one else None


def write_config(folder: epath.PathLike, config: Config) -> None:
    """Write the recipe into a run's folder."""
    write_json(epath.Path(folder) / CONFIG, to_json(config))


def _prepare(config: Config, out: epath.Path, fresh: bool, log: Callable[[str], None]) -> None:
    """Create or check the folder on one host, and write recipe and tokenizers."""
    make_folder(out)
    if (out / MODEL).exists():
        raise UserError(f"{out} holds an exported model rather than a run: choose another --out.")
    _check_ownership(out, fresh)
    # A recipe that computes something else may replace a run without a checkpoint.
    begun = (out / CHECKPOINTS).exists() and any((out / CHECKPOINTS).iterdir())
    there = _read_own(out, config) if (out / CONFIG).exists() and not fresh else None
    if fresh or (there is not None and not begun and _changes(config, there, 0)):
        _remove_run(out)
    elif there is not None:
        _check_same(config, there, out)
    elif (out / CHECKPOINTS).exists():
        raise UserError(
            f"{out} holds checkpoints but no {CONFIG}, so their recipe is unknown: restore that "
            "file, choose another --out, or start again with --fresh."
        )
    tokenizers = _tokenizers(config, out, log)
    config.task.check_tokenizers(tokenizers)
    write_tokenizers(out, tokenizers)
    write_config(out, config)


def _check_ownership(out: epath.Path, fresh: bool) -> None:
    """Raise `UserError` if files have the names of a run's but are none, as `--fresh` removes."""
    checkpoints = checkpoint_folder.absolute(out / CHECKPOINTS)
    if checkpoint_folder.steps(checkpoints):
        return
    if (out / CONFIG).exists() and (not fresh or is_recipe(read_json(out / CONFIG))):
        return  # without `fresh`, reading the recipe refuses another file
    # Tokenizers are what a run without a recipe has if its start was interrupted.
    others = [name for name in _RUN_FILES if name != TOKENIZERS and (out / name).exists()]
    if others and (fresh or CHECKPOINTS not in others):
        raise UserError(
            f"{out} is not the folder of a run but holds {', '.join(others)}, which a run "
            "replaces: choose another --out, or move them away."
        )


def _read_own(out: epath.Path, config: Config) -> Config:
    """Read the recipe of the run in `out`, with the evaluators of `config`, which may differ."""
    data = {**_recipe_json(out, types_in(config)), "evaluators": to_json(config.evaluators)}
    return config_from_json(data, types_in(config))


def _check_shared(out: epath.Path) -> None:
    """Raise `UserError` unless all hosts see the same folder, as saving requires."""
    if jax.process_count() == 1:
        return
    sign = out / f".shared-{broadcast_text(uuid.uuid4().hex)}"
    run_on_host0(sign.touch)
    blind = sum_over_hosts(not sign.exists())
    run_on_host0(sign.unlink)
    if blind:
        raise UserError(
            f"{out} is not the same folder on all hosts, {blind} of {jax.process_count()} do not "
            "see it: expected shared storage; give an --out there, such as gs://."
        )


def _remove_run(out: epath.Path) -> None:
    for name in _RUN_FILES:
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
            f"{config.train.steps}: give {taken} or more, choose another --out, or start again "
            "with --fresh, which removes that run."
        )
    if changes := _changes(config, there, taken):
        raise UserError(
            f"{out} holds a run of another recipe: {'; '.join(changes[:5])}"
            f"{' ...' if len(changes) > 5 else ''}. Choose another --out, or start again with "
            "--fresh, which removes that run."
        )


def _changes(config: Config, there: Config, taken: int) -> list[str]:
    """Return the differences that change what a run computes after it has taken some steps."""
    # A run of another length has the same states as long as its learning rates are equal.
    free = (*_FREE, "train.steps") if _same_learning_rates(config, there, taken) else _FREE
    return [
        line
        for line in differences(config, there)
        if not any(line.split(" ")[0] == key or line.startswith(key + ".") for key in free)
    ]


def _same_learning_rates(config: Config, there: Config, taken: int) -> bool:
    """Whether both lengths of the run give the first `taken` updates the same learning rates."""

    def factors(steps: int):
        factor = config.optimizer.schedule.factor
        return jax.vmap(lambda step: factor(step, steps))(jnp.arange(taken))

    ours, theirs = config.train.steps, there.train.steps
    return ours == theirs or bool(jnp.array_equal(factors(ours), factors(theirs)))


def _load_tokenizers(config: Config, out: epath.Path) -> dict[str, TextTokenizer]:
    """Load the tokenizers of the run's folder."""
    conditioner = config.task.conditioner
    return {} if conditioner is None else dict(conditioner.load_tokenizers(str(out / TOKENIZERS)))


def _tokenizers(
    config: Config, out: epath.Path, log: Callable[[str], None]
) -> Mapping[str, TextTokenizer]:
    """Return the tokenizers of the run, the text encoders or the recipe, or train new ones."""
    settings, task = config.tokenizer, config.task
    if task.conditioner is None:
        return {}
    names = task.conditioner.encoders
    if all((out / TOKENIZERS / name).exists() for name in names):
        return _load_tokenizers(config, out)
    if isinstance(task, DiffusionTask) and task.pretrained.text_encoders is not None:
        tokenizers: Mapping[str, Any] = read_tokenizers(
            task.pretrained.text_encoders, types_in(config)
        )
        stated = getattr(config.data.source, "vocabulary", None)
        related = getattr(config.data.source, "related_words", None)
        tokenizers = {
            name: tok.with_words(stated, related) if isinstance(tok, Tokenizer) else tok
            for name, tok in tokenizers.items()
        }
        new = task.trainable.inversion
        if new is None:
            return tokenizers
        return {n: tok.with_word(new.word, new.vectors) for n, tok in tokenizers.items()}
    if settings.path is not None:
        return dict.fromkeys(names, Tokenizer.load(settings.path, length=settings.length))
    source = config.data.source
    source.check()
    count = min(settings.records, len(source))
    # Evenly spaced, since data may be sorted.
    indices = [i * len(source) // count for i in range(count)]
    log(f"Training a tokenizer on the captions of {count} records.")
    return task.conditioner.train_tokenizers(
        _captions(source, indices), vocab_size=settings.vocab_size, length=settings.length
    )


def _captions(source: Any, indices: Iterable[int]) -> Iterator[str]:
    """Yield the captions of records of images or latents, without unusable ones.

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
