"""Add words of textual inversion to a model."""

from typing import Any

import jax.numpy as jnp
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.embeddings import Word, read_embedding


def apply_embedding(pipe: Pipeline, file: epath.PathLike, *, word: str | None = None) -> Pipeline:
    """Return a pipeline with the word of a textual inversion file.

    Args:
      pipe: of the model that the file is for; unchanged.
      file: safetensors, or a folder with `learned_embeds.safetensors`.
      word: its name in prompts; by default that of the file.

    Raises:
      UserError: the file is damaged or for another model, or the word exists.
    """
    learned = read_embedding(file, pipe.spec)
    bundle = add_word(pipe.bundle, learned._replace(word=word or learned.word))
    return pipe.with_bundle(bundle)


def add_word(bundle: Bundle, word: Word) -> Bundle:
    """Add a word to a model's tokenizers, and its embeddings to `params["added_tokens"]`.

    Raises:
      UserError: the word exists already, or is for another model.
    """
    spec, params = bundle.spec, bundle.params
    spec.conditioner.check_new_tokens()
    widths = {name: encoder.width for name, encoder in spec.conditioner.encoders.items()}
    given = {name: rows.shape[-1] for name, rows in word.rows.items()}
    if given != widths:
        raise UserError(
            f"The vectors of {word.word} are of widths {list(given.values())}: expected "
            f"{list(widths.values())}, those of {spec.name}; load the model that it is for."
        )
    (count,) = {len(rows) for rows in word.rows.values()}
    added, tokenizers = {}, {}
    for name in widths:
        tokenizer: Any = bundle.tokenizers[name]
        table = params["text_encoders"][name]["token_embedding"]
        rows = jnp.asarray(word.rows[name], table.dtype)
        if (before := params.get("added_tokens", {}).get(name)) is not None:
            rows = jnp.concatenate([jnp.asarray(before, table.dtype), rows])
        size = len(table) + len(rows) - count
        if size != tokenizer.vocab_size:
            raise UserError(
                f"The tokenizer of {spec.name} has {tokenizer.vocab_size} tokens and its text "
                f"encoder {size}: expected equal numbers; use another model for new words."
            )
        added[name], tokenizers[name] = rows, tokenizer.with_word(word.word, count)
    return bundle._replace(params={**params, "added_tokens": added}, tokenizers=tokenizers)
