"""Textual inversion files: the embeddings of a new word.

    {WORD: [n, d]}, {WORD: [d]}              diffusers, for one text encoder
    {"clip_l": [n, d], "clip_g": [n, e]}     for Stable Diffusion XL's two
    {"emb_params": [n, d]}                   of the web UIs

The word of a file that does not state it is the file's name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.safetensors_io import TensorFiles, write_tensors

FILE = "learned_embeds.safetensors"

_XL = {"text": "clip_l", "text_2": "clip_g"}
_PLAIN = "emb_params"
_WORD = "word"  # in the metadata


class Word(NamedTuple):
    """A word, and its embeddings by text encoder: one row for each token of the word."""

    word: str
    rows: Mapping[str, Float[Any, "n d"]]


def read_embedding(file: epath.PathLike, spec: TextToImage) -> Word:
    """Read the word and embeddings of a file.

    Args:
      file: safetensors, or a folder with `learned_embeds.safetensors`.
      spec: of the model.

    Raises:
      UserError: the file is damaged, pickled, or no embedding for this model.
    """
    path = epath.Path(file)
    path = path / FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no embedding: expected a .safetensors file; convert it.")
    tensors = TensorFiles([path])
    names, encoders = list(tensors), list(spec.conditioner.encoders)
    pairs = zip(encoders, names, strict=False)
    keys = {n: _XL.get(n, n) for n in encoders} if len(encoders) > 1 else dict(pairs)
    if len(names) != len(encoders) or set(keys.values()) != set(names):
        raise UserError(
            f"{path} holds {', '.join(names[:3]) or 'nothing'}: expected "
            f"{' and '.join(_XL.values())} for Stable Diffusion XL, or one tensor for other "
            "models; load the model that it was trained on."
        )
    rows = {name: _rows(tensors[key], path) for name, key in keys.items()}
    if len({len(vectors) for vectors in rows.values()}) > 1:
        raise UserError(
            f"{path} holds different numbers of vectors: expected the same for both encoders; "
            "check that it is an embedding."
        )
    has_name = len(names) == 1 and names[0] not in (_PLAIN, *_XL.values())
    return Word(names[0] if has_name else tensors.metadata.get(_WORD, path.stem), rows)


def _rows(value: Any, path: epath.Path) -> Float[np.ndarray, "n d"]:
    vectors = np.atleast_2d(np.asarray(value, np.float32))
    if vectors.ndim != 2 or len(vectors) == 0:
        raise UserError(
            f"{path} holds an array of shape {vectors.shape}: expected [n, d]; check that it is an "
            "embedding."
        )
    if not np.isfinite(vectors).all():
        raise UserError(
            f"{path} holds NaN or infinite numbers: expected finite vectors; train the embedding "
            "again, or use another one."
        )
    return vectors


def write_embedding(file: epath.PathLike, word: Word) -> None:
    """Write a file that `read_embedding` and, for one text encoder, diffusers' loader read.

    Args:
      file: safetensors, or a folder to write `learned_embeds.safetensors` into.
      word: with its embeddings.
    """
    path = epath.Path(file)
    path = path / FILE if path.suffix != ".safetensors" else path
    if len(word.rows) > 1:
        tensors = {_XL.get(name, name): vectors for name, vectors in word.rows.items()}
    else:
        (vectors,) = word.rows.values()
        tensors = {word.word: vectors}
    write_tensors(path, tensors, **{_WORD: word.word})
