"""Words that relate to things without naming them in captions.

The first of these that has a word decides:

1. `everyday_words`;
2. emojibase's words of a thing, as "pet" is one of a cat;
3. its words of the face of a thing, as "puppy" is one of a dog face;
4. its names of an animal, plant, food, vehicle or instrument that is none of the things, by the
   things among its tags, as a minibus has "bus", or by its neighbours in Unicode's order: skunks
   are between otters and kangaroos.

The words of an emoji are those of its name, tags and shortcodes, in American and British English.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.datasets.icons.everyday import everyday_words
from jaxdiff.datasets.icons.names import normal_code
from jaxdiff.datasets.icons.packages import read_list, read_member, read_object

_MOST_NAMES = 4  # by word; the shorter names, which are the commoner things
_NEIGHBOURS = 2
_SHORTEST = 3  # letters of a word of another emoji
_NO_WORDS = {
    *("and", "are", "but", "for", "from", "has", "her", "his", "its", "not"),
    *("off", "our", "out", "she", "the", "was", "who", "you", "your"),
}
_SHORTCODES = ("emojibase", "emojibase-legacy", "github", "joypixels")
_KINDS = ("animal-", "plant-", "food-", "drink", "transport-", "musical-instrument")


class _Emoji(NamedTuple):
    """An emoji.

    Attributes:
      thing: that it draws; None for none.
      subgroup: of Unicode.
      label: words of its name.
      names: words of its name and of its shortcodes.
      words: these and its tags.
    """

    thing: str | None
    subgroup: str
    label: frozenset[str]
    names: frozenset[str]
    words: frozenset[str]


def related_words(
    place: Path, things: Mapping[str, str], known: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """Return the names of things, or other words of captions, by words that are in no caption.

    Args:
      place: the package `emojibase-data`.
      things: names by code.
      known: words of the captions.
    """
    emoji, names = list(_read(place, things)), frozenset(things.values())
    found = {
        word: tuple(name for name in near if name in names or known.issuperset(words_of(name)))
        for word, near in everyday_words().items()
    }
    for more in (_of_things(emoji), _of_faces(emoji, names), _of_kinds(emoji, names)):
        found = more | {word: near for word, near in found.items() if near}
    return {
        word: found[word]
        for word in sorted(found)
        if found[word] and word not in known and words_of(word) == [word]
    }


def _read(place: Path, things: Mapping[str, str]) -> Iterator[_Emoji]:
    """Yield the emoji of the package, in Unicode's order."""
    subgroups = read_object(place, "meta/groups.json")["subgroups"]
    british = "en-gb/data.json"
    has_british = read_member(place, british) is not None
    others = {entry["hexcode"]: entry for entry in read_list(place, british)} if has_british else {}
    codes = [
        read_object(place, f"en/shortcodes/{name}.json", required=False) for name in _SHORTCODES
    ]
    for entry in read_list(place, "en/data.json"):
        if "group" in entry:
            code = entry["hexcode"]
            both = (entry, others.get(code, entry))
            label = frozenset(word for one in both for word in words_of(one["label"]))
            tags = {tag.lower() for one in both for tag in one.get("tags", ())}
            named = label | {word for table in codes for word in _code_words(table.get(code, ()))}
            thing, subgroup = things.get(normal_code(code)), subgroups[str(entry["subgroup"])]
            yield _Emoji(thing, subgroup, label, named, named | tags)


def _code_words(codes: Any) -> Iterator[str]:
    """Yield the words of one shortcode or several, such as "articulated_lorry", but for "cat2"."""
    for code in [codes] if isinstance(codes, str) else codes:
        yield from (word for word in code.split("_") if word.isalpha())


def _of_things(emoji: list[_Emoji]) -> dict[str, tuple[str, ...]]:
    """Return the things by the words of their own emoji, and by their names in one word."""
    found: dict[str, list[str]] = {}
    for one in emoji:
        if one.thing is not None:
            for word in sorted({one.thing.replace(" ", ""), *one.words} - _NO_WORDS):
                found.setdefault(word, []).append(one.thing)
    return {word: _shortest(names) for word, names in found.items()}


def _shortest(names: list[str]) -> tuple[str, ...]:
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name.count(" "), len(name)))
    return tuple(ordered[:_MOST_NAMES])


def _of_faces(emoji: list[_Emoji], names: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Return the things by the words of emoji of their faces alone."""
    found: dict[str, list[str]] = {}
    for one in emoji:
        if one.thing is None:
            for name in names:
                if one.label == {*name.split(), "face"}:
                    _add(found, one.words, [name])
    return _commonest(found)


def _of_kinds(emoji: list[_Emoji], names: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Return the things by the names of other animals, plants, food, vehicles and instruments.

    These are the things among their tags; without any, the nearest ones of their subgroup.
    """
    places: dict[str, list[int]] = {}
    for place, one in enumerate(emoji):
        if one.thing is not None:
            places.setdefault(one.subgroup, []).append(place)
    found: dict[str, list[str]] = {}
    for place, one in enumerate(emoji):
        if one.thing is None and one.subgroup.startswith(_KINDS):
            there = sorted(places.get(one.subgroup, ()), key=lambda other: abs(other - place))
            near = [str(emoji[other].thing) for other in there[:_NEIGHBOURS]]
            _add(found, one.names, sorted(one.words & names) or near)
    return _commonest(found)


def _add(found: dict[str, list[str]], words: Iterable[str], names: list[str]) -> None:
    for word in words:
        if len(word) >= _SHORTEST and word not in _NO_WORDS:
            found.setdefault(word, []).extend(names)


def _commonest(found: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Return for each word the names that most emoji give it."""
    counts = {word: Counter(names).most_common(_MOST_NAMES) for word, names in found.items()}
    return {word: tuple(name for name, _ in names) for word, names in counts.items()}
