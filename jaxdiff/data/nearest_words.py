"""The known words nearest to a word that no caption in training has.

The embeddings of such a word are untrained, so its neighbours in a text encoder's space are
arbitrary. These are not: its inflections, names that the data source relates to it, and known words
of similar spelling.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping

from jaxdiff.data.text_tokenizer import words_of

_FORM = re.compile(r"\b(heavy|black|white) ")  # of a character; black cats are two characters
_SIMILAR = 0.8  # difflib's ratio of a typing error; "desk" and "dusk" have 0.75
_SHORTEST = 4  # letters of a word whose spelling is corrected
_LONG = 7  # letters of a word with several typing errors
_STEM = 3  # letters before an ending
_ENDINGS = ("s", "es", "ies", "y", "ie", "ish", "ing", "ed")


def nearest_words(
    word: str, known: frozenset[str], related: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Return the known words or names nearest to an unknown word; () where nothing is near.

    Args:
      word: as `words_of` returns it; an emoji is named by Unicode.
      known: words of the training captions.
      related: names in the captions by words that are in none, such as cat and dog by pet.
    """
    if len(word) == 1 and unicodedata.category(word) == "So":
        name = unicodedata.name(word, "").lower().partition(" with ")[0]
        name = _FORM.sub("", name)
        return (name,) if name and known.issuperset(words_of(name)) else ()
    if word in related:
        return related[word]
    for form in _inflections(word):
        if form in known:
            return (form,)
        if form in related and word.endswith("s"):
            return related[form]
    return _respelt(word, known)


def with_nearest(unknown: Mapping[str, tuple[str, ...]]) -> str:
    """Return unknown words and the nearest of each: `'appel' (nearest: apple), 'snow'`."""
    return ", ".join(
        f"{word!r} (nearest: {', '.join(nearest)})" if nearest else repr(word)
        for word, nearest in unknown.items()
    )


def _respelt(word: str, known: frozenset[str]) -> tuple[str, ...]:
    """Return the known word that a typing error turns into `word`, if any."""
    if len(word) < _SHORTEST:
        return ()
    others = sorted(o for o in known if o[0] == word[0] and len(o) >= _SHORTEST)
    near = difflib.get_close_matches(word, others, n=3, cutoff=_SIMILAR)
    return tuple(other for other in near if len(word) >= _LONG or _one_edit(word, other))[:1]


def _one_edit(word: str, other: str) -> bool:
    """Whether one letter is missing, added or another, or two neighbours are exchanged."""
    pairs = enumerate(zip(word, other, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(word), len(other)))
    a, b = word[start:], other[start:]
    exchanged = a[:2] == b[1::-1] and a[2:] == b[2:]
    return exchanged or a[1:] == b or a == b[1:] or a[1:] == b[1:]


def _inflections(word: str) -> Iterator[str]:
    """Yield the plurals, singulars and stems that a word may have: doggy, dog; sock, socks."""
    yield from (f"{word}s", f"{word}e", f"{word}es")
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < _STEM:
            continue
        yield from (stem, f"{stem}e", f"{stem}y")
        if len(stem) > _STEM and stem[-1] == stem[-2]:
            yield stem[:-1]
