r"""Weights in prompts: of words, `a (red:1.3) pea`, and of whole prompts, `"a cat":1 "rain":-0.5`.

    prompt   = text | part+
    part     = '"' text '":' number          composed by eq. 2 of `guidance/cfg.py`
    text     = (character | '(' text ':' number ')')*

Weights of nested groups multiply. Everything else is text: a parenthesis that does not end in a
number, a quotation without a number after it. A backslash escapes a parenthesis, a quotation mark,
a colon or a backslash.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioner, TextInputs

LARGEST = 10.0  # a larger weight is most likely a typo

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
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
    while prompt[place:].strip():
        match = _PART.match(prompt, place)
        if match is None:
            raise UserError(
                f"{prompt[place:].strip()!r} in the prompt {prompt!r} is no weighted prompt: "
                'expected only parts of the form "a cat":1 "rain":-0.5.'
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
    """Split a text into segments of equal weight."""
    open_groups: list[list[WeightedText]] = [[]]
    for token in re.findall(r'\\[()":\\]|[()]|[^()\\]+|\\', text):
        if token == "(":
            open_groups.append([])
        elif token == ")" and len(open_groups) > 1:
            group = open_groups.pop()
            weight = _closing(group, text)
            if weight is None:
                group = [WeightedText("("), *group, WeightedText(")")]
            else:
                group = [WeightedText(w.text, w.weight * weight) for w in group if w.text]
            open_groups[-1] += group
        else:
            open_groups[-1].append(WeightedText(token[1:] if re.match(r"\\.", token) else token))
    pieces = open_groups[0]
    for group in open_groups[1:]:  # never closed
        if _closing(list(group), text) is not None:
            raise UserError(
                f"A group of words with a weight is not closed in the prompt {text!r}: expected "
                "the form (word:1.3)."
            )
        pieces += [WeightedText("("), *group]
    joined: list[WeightedText] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            piece = WeightedText(joined.pop().text + piece.text, piece.weight)
        joined.append(piece)
    return tuple(joined) or (WeightedText(""),)


def _closing(group: list[WeightedText], prompt: str) -> float | None:
    """Remove and return the weight at the end of a group; None if there is none."""
    if not group or group[-1].weight != 1 or ":" not in group[-1].text:
        return None
    text, _, number = group[-1].text.rpartition(":")
    match = _WEIGHT.fullmatch(number)
    if match is None:
        return None
    group[-1] = WeightedText(text)
    if not any(piece.text.strip() for piece in group):
        raise UserError(
            f"A weight in the prompt {prompt!r} has no words: expected the form (word:1.3)."
        )
    return _weight(match[1], prompt)


def _weight(number: str, prompt: str) -> float:
    if not re.fullmatch(_NUMBER, number) or abs(float(number)) > LARGEST:
        raise UserError(
            f"{number} in the prompt {prompt!r} is no weight: expected a number from {-LARGEST:g} "
            f"to {LARGEST:g}; escape text by a backslash."
        )
    return float(number)


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
