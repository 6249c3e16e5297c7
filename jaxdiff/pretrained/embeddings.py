"""Files of textual inversion: the vectors of a new word.

    {WORD: [n, d]}, {WORD: [d]}              diffusers, for one text encoder
    {"clip_l": [n, d], "clip_g": [n, e]}     for Stable Diffusion XL's two
    {"emb_params": [n, d]}                   of the web UIs

Where the file does not say the word it is the name of the file.
"""

from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors.numpy import save

from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.pipelines.textual_inversion import Word
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.training.tasks.diffusion import DiffusionTask

FILE = "learned_embeds.safetensors"

_XL = {"text": "clip_l", "text_2": "clip_g"}
_PLAIN = "emb_params"
_WORD = "word"  # in the metadata


def read_embedding(file: epath.PathLike, task: DiffusionTask) -> Word:
    """The word of a file, for the text encoders of a model.

    Args:
      file: safetensors, or a folder with `learned_embeds.safetensors`.
      task: of the model that it is for.

    Raises:
      UserError: the file is damaged, pickled, or of something else.
    """
    path = epath.Path(file)
    path = path / FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: embeddings are read from .safetensors files alone; convert it.")
    tensors = TensorFiles([path])
    names, towers = list(tensors), list(task.towers)
    keys = (
        {n: _XL[n] for n in towers} if len(towers) > 1 else dict(zip(towers, names, strict=False))
    )
    if len(names) != len(towers) or set(keys.values()) != set(names):
        raise UserError(
            f"{path} holds {', '.join(names[:3]) or 'nothing'}: expected "
            f"{' and '.join(_XL.values())} for the two text encoders of XL, and one tensor for any "
            "other model."
        )
    rows = {name: _rows(tensors[key], path) for name, key in keys.items()}
    if len({len(vectors) for vectors in rows.values()}) > 1:
        raise UserError(f"{path} holds unlike numbers of vectors: expected the same for both.")
    named = len(names) == 1 and names[0] != _PLAIN
    return Word(names[0] if named else tensors.metadata.get(_WORD, path.stem), rows)


def _rows(value: Any, path: epath.Path) -> Float[np.ndarray, "n d"]:
    vectors = np.atleast_2d(np.asarray(value, np.float32))
    if vectors.ndim != 2 or len(vectors) == 0:
        raise UserError(f"{path} holds {vectors.shape}: expected one or several vectors of a word.")
    return vectors


def write_embedding(file: epath.PathLike, word: Word) -> None:
    """Writes a file that `read_embedding` and, of one text encoder, diffusers' loader reads.

    Args:
      file: safetensors, or a folder to write `learned_embeds.safetensors` into.
      word: with its vectors.
    """
    path = epath.Path(file)
    path = path / FILE if path.suffix != ".safetensors" else path
    rows = {name: np.ascontiguousarray(vectors) for name, vectors in word.rows.items()}
    tensors = {_XL[n]: v for n, v in rows.items()} if len(rows) > 1 else {word.word: rows["text"]}
    write_whole(path, save(tensors, metadata={"format": "pt", _WORD: word.word}))
