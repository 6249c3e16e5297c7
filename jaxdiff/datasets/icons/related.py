"""Words that relate to things without naming them in captions: emojibase's tags, "pet" of a cat."""

from collections.abc import Mapping
from pathlib import Path

from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.datasets.icons.names import normal_code
from jaxdiff.datasets.icons.packages import read_list

_MOST_NAMES = 4  # by word; the shorter names, which are the commoner things


def related_words(
    place: Path, things: Mapping[str, str], known: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """Return the names of things by words that are in no caption.

    Args:
      place: the package `emojibase-data`.
      things: names by code.
      known: words of the captions.
    """
    found: dict[str, list[str]] = {}
    for entry in read_list(place, "en/data.json"):
        thing = things.get(normal_code(entry["hexcode"]))
        if thing is not None:
            for word in (thing.replace(" ", ""), *map(str.lower, entry.get("tags", ()))):
                if words_of(word) == [word] and word not in known:
                    found.setdefault(word, []).append(thing)
    return {word: _shortest(names) for word, names in sorted(found.items())}


def _shortest(names: list[str]) -> tuple[str, ...]:
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name.count(" "), len(name)))
    return tuple(ordered[:_MOST_NAMES])
