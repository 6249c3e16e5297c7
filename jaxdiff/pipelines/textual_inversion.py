"""New words of a whole model: what textual inversion learnt, beside its vocabulary or part of it.

Vectors go by part (`text`, `text_2`), one row for each token of the word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from jaxdiff.errors import UserError
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.tasks.diffusion import DiffusionTask


class Word(NamedTuple):
    """A word, and its vectors for each text encoder."""

    word: str
    rows: Mapping[str, Float[Any, "n d"]]


def word_of(bundle: Bundle) -> Word | None:
    """The word that a run of textual inversion learnt."""
    task = bundle.config.task
    if not isinstance(task, DiffusionTask) or task.inversion is None:
        return None
    return Word(task.inversion.word, bundle.params["words"])


def settled(bundle: Bundle) -> Bundle:
    """The model with the word that it learnt as one of its vocabulary."""
    task, word = bundle.config.task, word_of(bundle)
    if word is None:
        return bundle
    assert isinstance(task, DiffusionTask)
    params, frozen = dict(bundle.params), dict(bundle.frozen)
    del params["words"]
    if task.lora is None:
        params["denoiser"] = frozen.pop("denoiser")
    task = dataclasses.replace(task, inversion=None)
    config = dataclasses.replace(bundle.config, task=task)
    return _with_rows(bundle._replace(config=config, params=params, frozen=frozen), word)


def with_word(bundle: Bundle, word: Word) -> Bundle:
    """The model with one more word in its vocabulary.

    Raises:
      UserError: the word is there already, or is for another model.
    """
    bundle = settled(bundle)
    task, tokenizer = bundle.config.task, bundle.tokenizer
    if not isinstance(task, DiffusionTask) or tokenizer is None:
        raise UserError(f"{bundle.config.name} reads no text: new words are for a model that does.")
    widths = {name: tower.model.width for name, tower in task.towers.items()}
    given = {name: rows.shape[-1] for name, rows in word.rows.items()}
    if given != widths:
        raise UserError(
            f"The vectors of {word.word} are of widths {list(given.values())}, those of the words "
            f"of {bundle.config.name} {list(widths.values())}: they are for another model."
        )
    for name in task.towers:
        table = _home(bundle, name)[name]["token_embedding"]
        if len(table) != tokenizer.vocab_size:
            raise UserError(
                f"The tokenizer of {bundle.config.name} has {tokenizer.vocab_size} tokens and its "
                f"text encoder {len(table)}: new words need as many of one as of the other."
            )
    (count,) = {len(rows) for rows in word.rows.values()}
    tokenizer = tokenizer.with_word(word.word, count)
    return _with_rows(bundle, word)._replace(tokenizer=tokenizer)


def _home(bundle: Bundle, name: str) -> Mapping[str, Any]:
    task = bundle.config.task
    assert isinstance(task, DiffusionTask)
    tower = task.towers[name]
    return bundle.params if tower.trained and tower.lora is None else bundle.frozen


def _with_rows(bundle: Bundle, word: Word) -> Bundle:
    task = bundle.config.task
    assert isinstance(task, DiffusionTask)
    towers, weights = {}, {"params": dict(bundle.params), "frozen": dict(bundle.frozen)}
    for name, tower in task.towers.items():
        home = weights["params" if _home(bundle, name) is bundle.params else "frozen"]
        towers[name], home[name] = tower.with_rows(home[name], jnp.asarray(word.rows[name]))
    config = dataclasses.replace(bundle.config, task=dataclasses.replace(task, **towers))
    return bundle._replace(config=config, **weights)
