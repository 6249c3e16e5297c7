"""Tokenizers of text encoders: texts to token ids and masks of one length.

A `Tokenizer` wraps an object of the `tokenizers` library, as the fast tokenizers of transformers
do, and gives the same ids.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Float32, Int32
from tokenizers import AddedToken

from jaxdiff.data.clip_bpe import learn_clip_bpe
from jaxdiff.data.text_tokenizer import TextTokenizer, first_letter, words_of
from jaxdiff.data.tokenizer_folders import (
    CLIP_LENGTH,
    SAVED,
    VOCABULARY,
    StoredTokenizer,
    read_folder,
    read_related,
    read_words,
    saved_form,
    transformers_files,
    write_related,
)
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole

# A longer list of words is not stored.
MOST_WORDS = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer(TextTokenizer):
    """Convert texts to token ids of one length: prefix, words, suffix, padding.

    A text that is too long loses its end, never its prefix or suffix. Instances are immutable,
    thread-safe, and can be pickled. Create one with `load` or `train`.

    Attributes:
      backend: splits a text into tokens, without padding or truncation.
      length: ids per text, prefix, suffix and padding included.
      pad_id: the padding's id. CLIP pads with its end token.
      pad_left: whether padding precedes a text instead of following it.
      prefix: ids before each text: CLIP's start token; none for T5 and Qwen.
      suffix: ids after each text: the end token of CLIP and T5; none for Qwen.
      added_spellings: ids of an added word of several tokens, by the first of them.
      words: words of the training captions, in lower case; None if unknown or more than 10,000.
        They do not affect ids.
      related: names in captions by words that are in none, such as cat and dog by pet.
    """

    backend: tokenizers.Tokenizer
    length: int
    pad_id: int
    pad_left: bool = False
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    added_spellings: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    words: frozenset[str] | None = None
    related: Mapping[str, tuple[str, ...]] | None = None

    def __call__(self, texts: list[str]) -> Int32[np.ndarray, "b n"]:
        """Return the ids [len(texts), length], each in [0, vocab_size)."""
        return self.encode(texts)[0]

    def encode(self, texts: list[str]) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Return ids and mask [len(texts), length]; the mask is False for padding alone."""
        ids = np.full((len(texts), self.length), self.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        for row, real, encoding in zip(ids, mask, encodings, strict=True):
            words = self._expand(encoding.ids)[: self._max_words]
            at = self._place(len(words))
            row[at], real[at] = [*self.prefix, *words, *self.suffix], True
        return ids, mask

    def weighted(
        self, segments: Sequence[tuple[str, float]]
    ) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the ids [length] of the joined texts, and each id's weight [length].

        A token has the weight of the text in which it begins. Prefix, suffix and padding have 1.
        """
        text = "".join(part for part, _ in segments)
        encoding = self.backend.encode(text, add_special_tokens=False)
        ends = np.cumsum([len(part) for part, _ in segments])
        starts = [first_letter(text, *offsets) for offsets in encoding.offsets]
        of_text = np.append([weight for _, weight in segments], 1.0)
        of_text = of_text[np.searchsorted(ends, starts, side="right")]
        counts = [len(self.added_spellings.get(i, (i,))) for i in encoding.ids]
        of_text = np.repeat(of_text, counts)[: self._max_words]
        weights = np.ones(self.length, np.float32)
        first = self._place(len(of_text)).start + len(self.prefix)
        weights[first : first + len(of_text)] = of_text
        return self([text])[0], weights

    def truncated(self, text: str) -> bool:
        """Return whether `text` has more tokens than fit."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return len(self._expand(encoding.ids)) > self._max_words

    def with_word(self, word: str, count: int) -> "Tokenizer":
        """Return a copy with a new word of `count` tokens, whose ids follow the others.

        The tokens are called WORD, WORD_1, WORD_2 and so on, as in diffusers; WORD in a text
        becomes all of them, in upper or lower case where the tokenizer ignores case. Where words
        overlap, the longest match wins. A word that begins and ends with a letter, digit or
        underscore is not found inside longer words.

        Raises:
          UserError: the word is in the vocabulary already, is empty or contains spaces.
        """
        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        normalize = getattr(self.backend.normalizer, "normalize_str", str)
        added = {
            normalize(token.content) for token in self.backend.get_added_tokens_decoder().values()
        }
        known = {*self.backend.get_vocab(), *added}
        if (
            not word
            or word.split() != [word]
            or any(name in known or normalize(name) in added for name in names)
        ):
            raise UserError(
                f"{word!r} cannot be a new word: expected one without spaces that the tokenizer "
                "does not have yet, such as <my-thing>."
            )
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_tokens([_added(name) for name in names])
        ids = tuple(backend.token_to_id(name) for name in names)
        spellings = {**self.added_spellings, **({ids[0]: ids} if count > 1 else {})}
        stored = StoredTokenizer(backend, self.length, self.pad_id, self.pad_left, spellings)
        words = self.words and self.words | set(words_of(word))
        return replace(_assemble(stored), words=words, related=self.related)

    def with_words(
        self, more: Iterable[str] | None, related: Mapping[str, tuple[str, ...]] | None = None
    ) -> "Tokenizer":
        """Return a copy with more known and related words; None makes the words unknown."""
        known = None if self.words is None or more is None else self.words | frozenset(more)
        return replace(self, words=known, related={**(self.related or {}), **(related or {})})

    def with_pad(self, pad_id: int) -> "Tokenizer":
        """Return a copy that pads with another id."""
        return replace(self, pad_id=pad_id)

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest, also where not every id has a token."""
        ids = (*self.backend.get_vocab().values(), self.pad_id, *self.prefix, *self.suffix)
        return 1 + max(ids)

    @property
    def start_id(self) -> int | None:
        """The id before each text; None where the tokenizer adds none."""
        return self.prefix[0] if self.prefix else None

    @property
    def end_id(self) -> int | None:
        """The id after each text; None where the tokenizer adds none."""
        return self.suffix[-1] if self.suffix else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that determines the ids of a text."""
        return hashlib.sha256(saved_form(self._stored())).hexdigest()

    def save(self, folder: str) -> None:
        """Write `tokenizer.json` to `folder`, and the known and related words if there are any."""
        write_whole(epath.Path(folder) / SAVED, saved_form(self._stored()))
        if self.words is not None:
            lines = "".join(f"{word}\n" for word in sorted(self.words))
            write_whole(epath.Path(folder) / VOCABULARY, lines.encode())
        if self.related:
            write_related(folder, self.related)

    def export(self, folder: str, *, pad_id: int | None = None) -> None:
        """Write the files that `transformers.AutoTokenizer` reads to `folder`.

        Padding is with `pad_id`, or with the tokenizer's own. diffusers reads CLIP's.
        """
        stored = self._stored()
        if pad_id is not None:
            stored = stored._replace(pad_id=pad_id)
        files = transformers_files(stored, start_id=self.start_id, end_id=self.end_id)
        for name, text in files.items():
            write_whole(epath.Path(folder) / name, text.encode())

    @classmethod
    def load(cls, folder: str, *, length: int | None = None) -> "Tokenizer":
        """Read a folder that `save` wrote, or any that `transformers.AutoTokenizer` reads.

        `vocab.json` and `merges.txt` suffice for CLIP's. The default length is that of the folder,
        for CLIP at most 77.

        Raises:
          UserError: the folder has no tokenizer, a damaged one, or one without padding; or the
            length is missing or too small.
        """
        stored = _assemble(read_folder(folder, length))
        return replace(stored, words=read_words(folder), related=read_related(folder))

    @classmethod
    def train(
        cls, captions: Iterable[str], *, vocab_size: int = 2048, length: int = CLIP_LENGTH
    ) -> "Tokenizer":
        """Learn a CLIP tokenizer from `captions`: lower-cased byte-level BPE.

        Args:
          captions: the same ones give the same tokenizer.
          vocab_size: the largest number of ids, at least 514.
          length: ids per text, from 3 to 77.

        Raises:
          UserError: the vocabulary is too small, or the length out of range.
        """
        if not 2 < length <= CLIP_LENGTH:
            raise UserError(
                f"A text of {length} tokens does not fit CLIP: expected from 3 to {CLIP_LENGTH}; "
                "change tokenizer.length."
            )
        words: set[str] = set()
        backend = learn_clip_bpe(_collect_words(words, captions), vocab_size)
        stored = StoredTokenizer(backend, length, backend.get_vocab_size() - 1, False, {})
        return replace(
            _assemble(stored), words=frozenset(words) if len(words) <= MOST_WORDS else None
        )

    @property
    def _max_words(self) -> int:
        return self.length - len(self.prefix) - len(self.suffix)

    def _place(self, words: int) -> slice:
        """Return the slice of ids for a text of `words` tokens with prefix and suffix."""
        size = len(self.prefix) + words + len(self.suffix)
        return slice(self.length - size, self.length) if self.pad_left else slice(0, size)

    def _expand(self, ids: list[int]) -> list[int]:
        if not self.added_spellings:
            return ids
        return [part for i in ids for part in self.added_spellings.get(i, (i,))]

    def _stored(self) -> StoredTokenizer:
        return StoredTokenizer(
            self.backend, self.length, self.pad_id, self.pad_left, self.added_spellings
        )


def _assemble(stored: StoredTokenizer) -> Tokenizer:
    """Disable the backend's padding and truncation, and find its prefix and suffix."""
    backend = stored.backend
    backend.no_padding()
    backend.no_truncation()
    encoding = backend.encode("a")
    words = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    first, last = (words[0], words[-1]) if words else (len(encoding.ids), len(encoding.ids))
    prefix, suffix = tuple(encoding.ids[:first]), tuple(encoding.ids[last + 1 :])
    if stored.length <= len(prefix) + len(suffix):
        raise UserError(
            f"A text of {stored.length} tokens holds no word: expected at least "
            f"{len(prefix) + len(suffix) + 1}; raise tokenizer.length."
        )
    return Tokenizer(**stored._asdict(), prefix=prefix, suffix=suffix)


def _collect_words(words: set[str], captions: Iterable[str]) -> Iterator[str]:
    """Yield the captions, and add their words to `words`."""
    for caption in captions:
        if len(words) <= MOST_WORDS:
            words.update(words_of(caption))
        yield caption


def _added(name: str) -> AddedToken:
    whole = re.fullmatch(r"\w(.*\w)?", name) is not None
    return AddedToken(name, normalized=True, special=False, single_word=whole)
