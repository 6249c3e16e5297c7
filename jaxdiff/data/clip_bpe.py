"""CLIP's byte-level BPE (Radford et al. 2021, section 2.4), learned from captions."""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

from jaxdiff.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"  # marks the end of a word, so that "cat" and the start of "category" differ
_SPECIAL = 2
# Contractions, then runs of letters, single digits, and runs of anything else but space.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_clip_bpe(captions: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens; the same captions give the same tokens.

    Ids are ordered like CLIP's: 256 bytes, 256 bytes that end a word, merged tokens, start, end.
    Every text can be encoded, and the end token has the greatest id.

    Raises:
      UserError: `vocab_size` is less than 514.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *(x + _SUFFIX for x in letters)])}
    if vocab_size < len(vocab) + _SPECIAL:
        raise UserError(
            f"A tokenizer of {vocab_size} tokens is too small: expected at least "
            f"{len(vocab) + _SPECIAL}; raise tokenizer.vocab_size."
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
    vocab[START], vocab[END] = len(vocab), len(vocab) + 1
    bpe = _clip(vocab, merges)
    bpe.add_special_tokens([START, END])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocab[START]), (END, vocab[END])]
    )
    return bpe


def _clip(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Build CLIP's tokenizer: normalise, split into words, encode as bytes, merge."""
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
    return bpe
