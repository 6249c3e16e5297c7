"""A trained model in memory, wherever it came from."""

from typing import NamedTuple

from jaxtyping import PyTree

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.training.recipe import Config


class Bundle(NamedTuple):
    """A trained model: its recipe, its weights (of a run, their moving average), its tokenizer."""

    config: Config
    params: PyTree
    frozen: PyTree
    tokenizer: Tokenizer | None
