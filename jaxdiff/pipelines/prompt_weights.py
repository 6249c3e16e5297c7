r"""Weights in prompts: of words, `a (red:1.3) pea`, and of whole prompts, `"a cat":1 "rain":-0.5`.

    prompt   = text | part+
    part     = '"' text '":' number          composed by eq. 2 of `sampling/guidance.py`
    text     = (character | '(' text ':' number ')')*

Weights of words multiply where groups are nested. Everything else is text: a parenthesis without a
number before its end, a quotation that no number follows. A backslash makes text of a parenthesis,
a quotation mark, a colon or a backslash after it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError

LARGEST = 10.0  # what is beyond it lacks a point

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_PART = re.compile(rf'\s*"((?:\\.|[^"\\])*)"\s*:\s*({_NUMBER})(?=\s|$)')
_WEIGHT = re.compile(r"\s*([-+.,\d]+)\s*")


class Words(NamedTuple):
    """A stretch of a prompt whose words have one weight."""

    text: str
    weight: float = 1.0


class Part(NamedTuple):
    """One of the prompts that a prompt is composed of."""

    words: tuple[Words, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The plain words."""
        return "".join(words.text for words in self.words)


def parse(prompt: str) -> tuple[Part, ...]:
    """What a prompt is composed of; most are of one part, of one stretch of words.

    Raises:
      UserError: a weight that is no number or out of range, that is about no words, or text
        outside of the weighted prompts.
    """
    if not re.match(r'\s*"(\\.|[^"\\])*"\s*:\s*[-+.\d]', prompt):
        return (Part(_words(prompt)),)
    parts, place = [], 0
    while prompt[place:].strip():
        match = _PART.match(prompt, place)
        if match is None:
            raise UserError(
                f"{prompt[place:].strip()!r} in the prompt {prompt!r} is no weighted prompt: "
                'expected all of it to be of the form "a cat":1 "rain":-0.5.'
            )
        parts.append(Part(_words(match[1]), _weight(match[2], prompt)))
        place = match.end()
    return tuple(parts)


def plain(prompt: str) -> str:
    """The words alone, of weighted prompts those that are to be seen.

    Raises:
      UserError: as `parse`.
    """
    parts = parse(prompt)
    return ", ".join(part.text for part in parts if part.weight > 0 or len(parts) == 1)


def _words(text: str) -> tuple[Words, ...]:
    """The stretches of a text, neighbours of one weight joined."""
    open_groups: list[list[Words]] = [[]]
    for token in re.findall(r'\\[()":\\]|[()]|[^()\\]+|\\', text):
        if token == "(":
            open_groups.append([])
        elif token == ")" and len(open_groups) > 1:
            group = open_groups.pop()
            weight = _closing(group, text)
            if weight is None:
                group = [Words("("), *group, Words(")")]
            else:
                group = [Words(w.text, w.weight * weight) for w in group if w.text]
            open_groups[-1] += group
        else:
            open_groups[-1].append(Words(token[1:] if re.match(r"\\.", token) else token))
    words = open_groups[0]
    for group in open_groups[1:]:  # never closed
        if _closing(list(group), text) is not None:
            raise UserError(
                f"A group of words with a weight is not closed in the prompt {text!r}: expected "
                "the form (word:1.3)."
            )
        words += [Words("("), *group]
    joined: list[Words] = []
    for stretch in words:
        if joined and joined[-1].weight == stretch.weight:
            stretch = Words(joined.pop().text + stretch.text, stretch.weight)
        joined.append(stretch)
    return tuple(joined) or (Words(""),)


def _closing(group: list[Words], prompt: str) -> float | None:
    """The weight at the end of a group, which is taken from there; None if there is none."""
    if not group or group[-1].weight != 1 or ":" not in group[-1].text:
        return None
    text, _, number = group[-1].text.rpartition(":")
    match = _WEIGHT.fullmatch(number)
    if match is None:
        return None
    group[-1] = Words(text)
    if not any(words.text.strip() for words in group):
        raise UserError(
            f"A weight in the prompt {prompt!r} is about no words: expected the form (word:1.3)."
        )
    return _weight(match[1], prompt)


def _weight(number: str, prompt: str) -> float:
    if not re.fullmatch(_NUMBER, number) or abs(float(number)) > LARGEST:
        raise UserError(
            f"{number} in the prompt {prompt!r} is no weight: expected a number from {-LARGEST:g} "
            f"to {LARGEST:g}, or a backslash before what is meant as it stands."
        )
    return float(number)


def rows_of(
    tokenizer: Tokenizer, prompts: Sequence[str], name: str = "", *, composed: bool = False
) -> dict[str, np.ndarray]:
    """What the compiled loop reads of n prompts, beside the rows of other arguments.

    Args:
      tokenizer: of the text encoder.
      prompts: n texts.
      name: what the rows' names begin with.
      composed: whether they may be composed of several.

    Returns:
      `ids` [n, length]; if a word of any has a weight, `weights` and `empty`, the ids of no words,
      of the same shape; and if any is composed, `more_ids` and `more_weights` [n, k, length] and
      `parts` [n, k + 1], the weights of all.

    Raises:
      UserError: as `parse`, or a composed prompt where none may be.
    """
    parsed = [parse(prompt) for prompt in prompts]
    most = max(len(parts) for parts in parsed)
    alone = all(len(parts) == 1 and parts[0].weight == 1 for parts in parsed)
    if not (composed or alone):
        raise UserError(
            "Weighted prompts are for the prompt itself: the others may weight (words:1.3) alone."
        )
    count = 1 if alone else max(2, 1 << (most - 1).bit_length())  # few counts, few programs
    nothing = Part((Words(""),), 0.0)
    filled = [[*parts, *[nothing] * (count - len(parts))] for parts in parsed]
    told = [[tokenizer.weighted(part.words) for part in parts] for parts in filled]
    ids = np.stack([[one for one, _ in row] for row in told])
    weights = np.stack([[one for _, one in row] for row in told])
    rows = {"ids": ids[:, 0]}
    if (weights != 1).any():
        rows["weights"] = weights[:, 0]
        rows["empty"] = tokenizer([""] * len(ids))
    if not alone:
        rows["more_ids"] = ids[:, 1:]
        rows["parts"] = np.array([[part.weight for part in parts] for parts in filled], np.float32)
        if "weights" in rows:
            rows["more_weights"] = weights[:, 1:]
    return {name + key: value for key, value in rows.items()}
