r"""Weights in prompts: of words, `a (red:1.3) pea`, and of whole prompts, `"a cat":1 "rain":-0.5`.

    prompt   = text | part+
    part     = '"' text '":' number          composed by eq. 2 of `guidance/cfg.py`
    text     = (character | '(' text ':' number ')')*

Weights of nested groups multiply. Everything else is text: a parenthesis that does not end in a
number, a quotation without a number after it. A backslash escapes a parenthesis, a quotation mark,
a colon or a backslash. Segments of different weights that touch are words of their own, as in
AUTOMATIC1111: `(red:1.2)(pea:0.8)` is "red pea".
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioner, TextInputs

LARGEST = 10.0  # a larger weight is most likely a typo

_SHOWN = 80  # characters of a prompt in an error message

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_PART = re.compile(rf'\s*"((?:\\.|[^"\\])*)"\s*:\s*({_NUMBER})(?=\s|$)')
_WEIGHT = re.compile(r"\s*([-+.,\d]+)\s*")


class WeightedText(NamedTuple):
    """A segment of a prompt, and the weight of its words."""

    text: str
    weight: float = 1.0


class PromptPart(NamedTuple):
    """One part of a composed prompt, and its weight."""

    texts: tuple[WeightedText, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The text without weights."""
        return "".join(piece.text for piece in self.texts)


def parse_prompt(prompt: str) -> tuple[PromptPart, ...]:
    """Parse a prompt into its parts.

    Raises:
      UserError: a weight is no number, out of range or without words, or there is text outside of
        the weighted prompts.
    """
    if not re.match(r'\s*"(\\.|[^"\\])*"\s*:\s*[-+.\d]', prompt):
        return (PromptPart(_pieces(prompt)),)
    parts, place = [], 0
    while re.compile(r"\s*\S").match(prompt, place):
        match = _PART.match(prompt, place)
        if match is None:
            raise UserError(
                f"{_shown(prompt[place:].strip())} in the prompt {_shown(prompt)} is no weighted "
                'prompt: expected only parts of the form "a cat":1 "rain":-0.5.'
            )
        parts.append(PromptPart(_pieces(match[1]), _weight(match[2], prompt)))
        place = match.end()
    return tuple(parts)


def plain(prompt: str) -> str:
    """Return the text without weights; of composed prompts, parts with a positive weight.

    Raises:
      UserError: as `parse_prompt`.
    """
    parts = parse_prompt(prompt)
    return ", ".join(part.text for part in parts if part.weight > 0 or len(parts) == 1)


def _pieces(text: str) -> tuple[WeightedText, ...]:
    """Split a text into segments of equal weight, in time linear in its length."""
    tokens = re.findall(r'\\[()":\\]|[()]|[^()\\]+|\\', text)
    pieces = [token[1:] if re.match(r"\\.", token) else token for token in tokens]
    factors: dict[int, float] = {}  # by the places of a weighted group's parentheses
    groups: list[tuple[int, int]] = []  # of open ones: place, and pieces with words before it
    with_words = 0
    for place, token in enumerate(tokens):
        if token == "(":
            groups.append((place, with_words))
        if token != ")" or not groups:
            with_words += bool(pieces[place].strip())
            continue
        start, before = groups.pop()
        found = _closing(tokens[place - 1])
        if found is None:
            with_words += 1
            continue
        pieces[start], pieces[place - 1], pieces[place] = "", found[0], ""
        with_words -= 1 + (not found[0].strip())
        if with_words <= before:
            raise UserError(
                f"A weight in the prompt {_shown(text)} has no words: expected the form (word:1.3)."
            )
        weight = _weight(found[1], text)
        factors[start], factors[place] = weight, math.nan
    ends = [place for place, _ in groups[1:]] + [len(tokens)]
    if any(_closing(tokens[end - 1]) for _, end in zip(groups, ends, strict=False)):
        raise UserError(
            f"A group of words with a weight is not closed in the prompt {_shown(text)}: expected "
            "the form (word:1.3)."
        )
    return _join(_multiply(pieces, factors, text))


def _multiply(
    pieces: list[str], factors: Mapping[int, float], prompt: str
) -> Iterator[WeightedText]:
    """Yield pieces with the product of the weights of their groups; NaN closes a group."""
    products = [1.0]
    for place, piece in enumerate(pieces):
        factor = factors.get(place)
        if factor is None:
            if piece:
                yield WeightedText(piece, products[-1])
        elif math.isnan(factor):
            products.pop()
        else:
            products.append(products[-1] * factor)
            if abs(products[-1]) > LARGEST:
                raise UserError(
                    f"Weights of nested groups in the prompt {_shown(prompt)} multiply to "
                    f"{products[-1]:g}: expected a number from {-LARGEST:g} to {LARGEST:g}."
                )


def _join(pieces: Iterable[WeightedText]) -> tuple[WeightedText, ...]:
    """Join neighbours of equal weight, and keep words of different weights apart."""
    joined: list[WeightedText] = []
    for weight, run in itertools.groupby(pieces, key=lambda piece: piece.weight):
        text = "".join(piece.text for piece in run)
        if joined and _would_fuse(joined[-1].text[-1], text[0]):
            text = f" {text}"
        joined.append(WeightedText(text, weight))
    return tuple(joined) or (WeightedText(""),)


def _would_fuse(last: str, first: str) -> bool:
    """Whether two characters of different segments would be of one word, or one punctuation."""
    if last.isspace() or first.isspace():
        return False
    return bool(re.match(r"\w", last)) == bool(re.match(r"\w", first))


def _closing(token: str) -> tuple[str, str] | None:
    """Split the last text of a group into words and weight; None if it has no weight."""
    text, colon, number = token.rpartition(":")
    match = _WEIGHT.fullmatch(number)
    return (text, match[1]) if colon and not token.startswith("\\") and match else None


def _weight(number: str, prompt: str) -> float:
    if not re.fullmatch(_NUMBER, number) or abs(float(number)) > LARGEST:
        raise UserError(
            f"{_shown(number, quoted=False)} in the prompt {_shown(prompt)} is no weight: expected "
            f"a number from {-LARGEST:g} to {LARGEST:g}; escape text by a backslash."
        )
    return float(number)


def _shown(text: str, *, quoted: bool = True) -> str:
    """Return the beginning of a long text, for an error message."""
    short = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return repr(short) if quoted else short


class TokenizedPrompts(NamedTuple):
    """Token ids of n prompts.

    Attributes:
      text: of the first part of each.
      composed_text: of further parts, with arrays [n, k, ...]; None where no prompt is composed.
      composed_weights: [n, k + 1], of all parts.
    """

    text: TextInputs
    composed_text: TextInputs | None = None
    composed_weights: Float32[np.ndarray, "n k+1"] | None = None


def tokenize(
    conditioner: Conditioner,
    tokenizers: Mapping[str, TextTokenizer],
    prompts: Sequence[str | None],
    *,
    composed: bool = False,
) -> TokenizedPrompts:
    """Tokenize prompts with their weights.

    Args:
      conditioner: of the model.
      tokenizers: its tokenizers.
      prompts: n texts; None is a prompt that is not given.
      composed: whether composed prompts are allowed.

    Raises:
      UserError: as `parse_prompt`, or a composed prompt is not allowed.
    """
    parsed = [parse_prompt(prompt or "") for prompt in prompts]
    most = max(len(parts) for parts in parsed)
    single = all(len(parts) == 1 and parts[0].weight == 1 for parts in parsed)
    if not (composed or single):
        raise UserError(
            "Negative prompts and the second prompt of a mixture cannot be composed: expected at "
            "most weights of words (words:1.3)."
        )
    count = 1 if single else max(2, 1 << (most - 1).bit_length())  # few counts, few programs
    empty = PromptPart((WeightedText(""),), 0.0)
    padded = [[*parts, *[empty] * (count - len(parts))] for parts in parsed]
    flat = [
        None if prompt is None else part.texts
        for prompt, parts in zip(prompts, padded, strict=True)
        for part in parts
    ]
    inputs = conditioner.tokenize_weighted(tokenizers, flat)
    inputs = jax.tree.map(lambda x: x.reshape(len(prompts), count, *x.shape[1:]), inputs)
    first = jax.tree.map(lambda x: x[:, 0], inputs)
    if single:
        return TokenizedPrompts(first)
    further = jax.tree.map(lambda x: x[:, 1:], inputs)
    weights = np.array([[part.weight for part in parts] for parts in padded], np.float32)
    return TokenizedPrompts(first, further, weights)
