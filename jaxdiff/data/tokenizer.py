"""CLIP's tokenizer: lower-cased byte-level BPE (Radford et al. 2021, section 2.4)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Float32, Int32
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
_SUFFIX = "</w>"  # marks the end of a word, so that "cat" and the start of "category" differ
_SPECIAL = 2
# Contractions, then runs of letters, single digits, and runs of anything else but space.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Texts to token ids of one length: start token, words, end token, padding.

    `length` counts them all. A text that is too long loses its end, never its end token. CLIP
    pads with the end token; variants that pad with another keep it. Made by `load` or `train`.
    `spelt` has the words of several tokens that `with_word` added, each with these tokens.
    """

    bpe: tokenizers.Tokenizer
    length: int
    start_id: int
    end_id: int
    pad_id: int
    spelt: tuple[tuple[str, str], ...] = ()

    def __call__(self, texts: list[str]) -> Int32[np.ndarray, "b n"]:
        """The ids [len(texts), length], each in [0, vocab_size)."""
        encodings = self.bpe.encode_batch_fast([self._spell(text) for text in texts])
        ids = [encoding.ids for encoding in encodings]
        return np.array(ids, np.int32).reshape(len(texts), self.length)

    def weighted(
        self, stretches: Sequence[tuple[str, float]]
    ) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """The ids of the texts as one, and the weight of each: that of the text it begins in.

        Tokens of no text, the start, the end and padding, have the weight 1.
        """
        spelt = [self._spell(text) for text, _ in stretches]
        encoding = self.bpe.encode("".join(spelt))
        ends = np.cumsum([len(text) for text in spelt])
        starts = [start for start, _ in encoding.offsets]
        weights = np.append([weight for _, weight in stretches], 1.0)
        weights = weights[np.searchsorted(ends, starts, side="right")]
        of_text = (np.array(encoding.special_tokens_mask) == 0) & (
            np.array(encoding.attention_mask) == 1
        )
        return np.array(encoding.ids, np.int32), np.where(of_text, weights, 1).astype(np.float32)

    def truncated(self, text: str) -> bool:
        """Whether `text` is longer than the encoder takes, so that its end is not read."""
        return bool(self.bpe.encode(self._spell(text)).overflowing)

    def _spell(self, text: str) -> str:
        for word, tokens in self.spelt:
            text = text.replace(word, tokens)
        return text

    def with_word(self, word: str, count: int) -> "Tokenizer":
        """The same with a new word of `count` tokens, whose ids follow the others.

        They are called WORD, WORD_1, WORD_2 and so on, as diffusers does. Raises `UserError` for a
        word that there is already, or that has spaces in it.
        """
        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        known = self.bpe.get_vocab()
        if not word or word.split() != [word] or any(name in known for name in names):
            raise UserError(
                f"{word!r} cannot be a new word: expected one without spaces that the tokenizer "
                "does not have yet, such as <my-thing>."
            )
        bpe = tokenizers.Tokenizer.from_str(self.bpe.to_str())
        bpe.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
        pad = self.bpe.id_to_token(self.pad_id)
        return _with_length(bpe, self.length, pad or END)

    def with_pad(self, pad_id: int) -> "Tokenizer":
        """Return a copy that pads with another id."""
        bpe = tokenizers.Tokenizer.from_str(self.bpe.to_str())
        return _with_length(bpe, self.length, bpe.id_to_token(pad_id) or END)

    @property
    def vocab_size(self) -> int:
        """The number of different ids."""
        return self.bpe.get_vocab_size()

    def save(self, folder: str) -> None:
        """Writes `tokenizer.json`, all that `load` needs, into `folder`."""
        write_whole(epath.Path(folder) / _FILE, self.bpe.to_str(pretty=True).encode())

    def export(self, folder: str, *, pad_id: int | None = None) -> None:
        """Writes the files of transformers' CLIPTokenizer into `folder`, padding with `pad_id`."""
        root, model = epath.Path(folder), json.loads(self.bpe.to_str())["model"]
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        pad = self.bpe.id_to_token(self.pad_id if pad_id is None else pad_id)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        added = {t.content: i for i, t in self.bpe.get_added_tokens_decoder().items()}
        added = {token: i for token, i in added.items() if token not in model["vocab"]}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, **special}
        for name, text in {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": f"#version: 0.2\n{merges}",
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
            **({"added_tokens.json": json.dumps(added, indent=2)} if added else {}),
        }.items():
            write_whole(root / name, text.encode())

    @classmethod
    def load(cls, folder: str, *, length: int | None = None) -> "Tokenizer":
        """Reads a Hugging Face folder: `tokenizer.json`, or `vocab.json` with `merges.txt`.

        `length` is what the file states, or 77, unless given. Raises `UserError` where the
        folder holds no CLIP tokenizer.
        """
        root = epath.Path(folder)
        try:
            if (root / _FILE).exists():
                bpe = tokenizers.Tokenizer.from_buffer((root / _FILE).read_bytes())
            else:
                vocab = json.loads((root / "vocab.json").read_bytes())
                lines = (root / "merges.txt").read_bytes().decode().split("\n")
                pairs = [line.split(" ") for line in lines if line and line[:8] != "#version"]
                bpe = _clip(vocab, [(left, right) for left, right in pairs])
                added = _json(root / "added_tokens.json")
                for word in sorted(added, key=added.__getitem__):
                    bpe.add_tokens([AddedToken(word, normalized=False, special=False)])
            config = _json(root / "tokenizer_config.json") | _json(root / "special_tokens_map.json")
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no tokenizer: expected {_FILE}, or vocab.json and merges.txt."
            ) from error
        except Exception as error:  # `tokenizers` raises plain Exception for what it cannot parse
            raise UserError(
                f"The tokenizer in {folder} cannot be read ({error}): expected CLIP's, "
                f"as {_FILE}, or as vocab.json and merges.txt."
            ) from error
        stated = (bpe.truncation or {}).get("max_length") or config.get("model_max_length")
        pad = (bpe.padding or {}).get("pad_token") or config.get("pad_token") or END
        pad = pad["content"] if isinstance(pad, dict) else pad
        return _with_length(bpe, length or min(int(stated or MAX_LENGTH), MAX_LENGTH), pad)

    @classmethod
    def train(
        cls, captions: Iterable[str], *, vocab_size: int = 2048, length: int = MAX_LENGTH
    ) -> "Tokenizer":
        """Learns at most `vocab_size` tokens from `captions`; the same captions, the same tokens.

        The ids are laid out like CLIP's: 256 bytes, 256 bytes that end a word, merged tokens,
        start, end. So any text can be written, and the end token is the greatest id.
        """
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([*letters, *(x + _SUFFIX for x in letters)])}
        if vocab_size < len(vocab) + _SPECIAL:
            raise UserError(
                f"A tokenizer of {vocab_size} tokens is too small: "
                f"it needs at least {len(vocab) + _SPECIAL}."
            )
        learner = _clip(vocab, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - _SPECIAL,
            # Naming the bytes fixes their ids, by which ties between merges are broken.
            special_tokens=list(vocab),
            end_of_word_suffix=_SUFFIX,
            show_progress=False,
        )
        learner.train_from_iterator(captions, trainer)
        merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
        for token in (START, END):
            vocab[token] = len(vocab)
        return _with_length(_clip(vocab, merges), length, END)


def _clip(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's steps around one vocabulary: normalise, split into words, spell in bytes, merge."""
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix=_SUFFIX, unk_token=END, fuse_unk=False)
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if START in vocab and END in vocab:
        bpe.add_special_tokens([START, END])
    return bpe


def _with_length(bpe: tokenizers.Tokenizer, length: int, pad_token: str) -> Tokenizer:
    if not 2 < length <= MAX_LENGTH:
        raise UserError(
            f"A text of {length} tokens does not fit CLIP: expected from 3 to {MAX_LENGTH}."
        )
    start_id, end_id = bpe.token_to_id(START), bpe.token_to_id(END)
    pad_id = bpe.token_to_id(pad_token)
    if start_id is None or end_id is None or pad_id is None:
        raise UserError(
            f"The tokenizer is not CLIP's: its vocabulary lacks {START}, {END} or {pad_token}; "
            "give the tokenizer folder of a CLIP text encoder."
        )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start_id), (END, end_id)]
    )
    bpe.enable_truncation(length)
    bpe.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
    return Tokenizer(
        bpe=bpe,
        length=length,
        start_id=start_id,
        end_id=end_id,
        pad_id=pad_id,
        spelt=tuple(_words_of_several_tokens(bpe)),
    )


def _words_of_several_tokens(bpe: tokenizers.Tokenizer) -> Iterator[tuple[str, str]]:
    added = [token.content for token in bpe.get_added_tokens_decoder().values()]
    for word in added:
        names = [word]
        while f"{word}_{len(names)}" in added:
            names.append(f"{word}_{len(names)}")
        if len(names) > 1:
            yield word, " ".join(names)


def _json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
