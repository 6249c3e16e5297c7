"""Tokenizers of language models, with their chat template and their original files.

    text of a prompt = prefix + prompt + suffix

Both are what the chat template puts around a message of the user; they are empty without one. The
ids equal those of transformers with `padding="max_length", truncation=True`, which cuts off the end
of the whole text, a template's suffix included. A folder holds the files of
`transformers.AutoTokenizer`, and jaxdiff adds

    jaxdiff_tokenizer.json   prefix, suffix, and the state of the `tokenizers` library

with which neither transformers nor Jinja are needed.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Float32, Int32

from jaxdiff.data.text_tokenizer import TextTokenizer, first_letter
from jaxdiff.data.tokenizer_folders import (
    CONFIG,
    FILE_KINDS,
    check_state,
    damage_as_user_error,
    load_by_transformers,
)
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes, write_whole
from jaxdiff.io.text import LARGEST_TEXT, parse_json

_OWN = "jaxdiff_tokenizer.json"
_SAMPLES = ("a pea", "", " two\nlines ", "Ünïcode {{ x }} <think>?")
"""Prompts with which a template is tested: it must not change them, nor be changed by them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedTokenizer(TextTokenizer):
    """Convert prompts to token ids of one length, within a chat template if there is one.

    Instances are immutable, thread-safe, and can be pickled. Create one with `load`.

    Attributes:
      backend: splits a text into tokens, with padding and truncation to `length`.
      prefix: text before each prompt.
      suffix: text after each prompt.
      files: the original files, by name.
    """

    backend: tokenizers.Tokenizer
    prefix: str = ""
    suffix: str = ""
    files: Mapping[str, bytes]

    def __call__(self, texts: list[str]) -> Int32[np.ndarray, "b n"]:
        """Return the ids [len(texts), length], each in [0, vocab_size)."""
        return self.encode(texts)[0]

    def encode(self, texts: list[str]) -> tuple[Int32[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
        """Return ids and mask [len(texts), length]; the mask is False for padding alone."""
        encodings = self.backend.encode_batch([self._whole(text) for text in texts])
        ids = np.array([encoding.ids for encoding in encodings], np.int32)
        mask = np.array([encoding.attention_mask for encoding in encodings], bool)
        return ids.reshape(-1, self.length), mask.reshape(-1, self.length)

    def weighted(
        self, segments: Sequence[tuple[str, float]]
    ) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the ids [length] of the joined texts, and each id's weight [length].

        A token has the weight of the text in which it begins. Those of the template, the end and
        padding have 1.
        """
        text = self._whole("".join(part for part, _ in segments))
        encoding = self.backend.encode(text)
        ends = np.cumsum([len(self.prefix), *(len(part) for part, _ in segments)])
        of_text = np.array([1.0, *(weight for _, weight in segments), 1.0], np.float32)
        starts = [first_letter(text, *offsets) for offsets in encoding.offsets]
        weights = of_text[np.searchsorted(ends, starts, side="right")]
        added = np.array(encoding.special_tokens_mask, bool)
        return np.array(encoding.ids, np.int32), np.where(added, np.float32(1), weights)

    def truncated(self, text: str) -> bool:
        """Return whether the template with `text` has more tokens than fit."""
        return bool(self.backend.encode(self._whole(text)).overflowing)

    @property
    def length(self) -> int:
        """Ids per text, padding included."""
        truncation: Any = self.backend.truncation
        return truncation["max_length"]

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest, also where not every id has a token."""
        padding: Any = self.backend.padding
        return 1 + max(*self.backend.get_vocab().values(), padding["pad_id"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that determines the ids of a text."""
        return hashlib.sha256(self._state()).hexdigest()

    def save(self, folder: str) -> None:
        """Write the original files and `jaxdiff_tokenizer.json` to `folder`."""
        self.export(folder)
        write_whole(epath.Path(folder) / _OWN, self._state())

    def export(self, folder: str) -> None:
        """Write the original files, which `transformers.AutoTokenizer` reads, to `folder`."""
        for name, data in self.files.items():
            write_whole(epath.Path(folder) / name, data)

    @classmethod
    def load(
        cls, folder: str, *, length: int, thinking: bool | None = None
    ) -> "PretrainedTokenizer":
        """Read a folder that `save` wrote, or any that `transformers.AutoTokenizer` reads.

        Args:
          folder: with `tokenizer_config.json`.
          length: ids per text.
          thinking: transformers' `enable_thinking`, of a chat template; None uses no template.

        Raises:
          UserError: the folder has no tokenizer, or one that is damaged, without padding, or
            without the chat template; or a folder that `save` wrote has another length.
        """
        root = epath.Path(folder)
        if not (root / CONFIG).exists():
            raise UserError(
                f"{folder} holds no tokenizer: expected {CONFIG} beside tokenizer.json; give the "
                "folder of a language model's tokenizer."
            )
        names = [path.name for path in root.iterdir() if path.suffix in FILE_KINDS]
        wanted = "the whole folder of a tokenizer"
        read = {n: read_bytes(root / n, wanted, largest=LARGEST_TEXT) for n in sorted(names)}
        own = read.pop(_OWN, None)
        with damage_as_user_error(folder):
            if own is None:
                return cls._from_transformers(root, read, length, thinking)
            found = cls._from_state(parse_json(own, root / _OWN), read)
            found.encode(["a"])
        if found.length != length:
            raise UserError(
                f"The tokenizer in {folder} gives {found.length} tokens: expected {length}, the "
                "text encoder's max_length; load the model's own tokenizer."
            )
        return found

    @classmethod
    def _from_state(cls, state: Any, files: Mapping[str, bytes]) -> "PretrainedTokenizer":
        """Invert `_state`; exceptions mean damage."""
        check_state(state["backend"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(state["backend"]))
        truncation: Any = backend.truncation
        padding: Any = backend.padding
        if truncation["max_length"] != padding["length"]:
            raise ValueError("texts are cut off and padded to different lengths")
        prefix, suffix = state["prefix"], state["suffix"]
        if not (isinstance(prefix, str) and isinstance(suffix, str)):
            raise TypeError("prefix and suffix are no texts")
        return cls(backend=backend, prefix=prefix, suffix=suffix, files=files)

    @classmethod
    def _from_transformers(
        cls, root: epath.Path, files: Mapping[str, bytes], length: int, thinking: bool | None
    ) -> "PretrainedTokenizer":
        """Read a folder of transformers; exceptions other than `UserError` mean damage."""
        fast = load_by_transformers(root)
        if fast.pad_token_id is None or getattr(fast, "split_special_tokens", False):
            raise UserError(
                f"The tokenizer in {root} has pad_token {fast.pad_token} and split_special_tokens "
                f"{fast.split_special_tokens}: expected a padding token, and that special tokens "
                "are not split; give the folder of another tokenizer."
            )
        prefix, suffix = ("", "") if thinking is None else _around(fast, str(root), thinking)
        backend = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
        backend.enable_truncation(length)
        backend.enable_padding(
            direction=fast.padding_side,
            length=length,
            pad_id=fast.pad_token_id,
            pad_token=fast.pad_token,
        )
        return cls(backend=backend, prefix=prefix, suffix=suffix, files=files)

    def _whole(self, text: str) -> str:
        return f"{self.prefix}{text}{self.suffix}"

    def _state(self) -> bytes:
        backend = json.loads(self.backend.to_str())
        state = {"prefix": self.prefix, "suffix": self.suffix, "backend": backend}
        return json.dumps(state, ensure_ascii=False).encode()


def _around(fast: Any, folder: str, thinking: bool) -> tuple[str, str]:
    """Return what a chat template puts before and after a message of the user.

    Raises:
      UserError: there is no template, it fails or changes the message, or Jinja is missing.
    """
    if fast.chat_template is None:
        raise UserError(
            f"The tokenizer in {folder} has no chat template: expected chat_template in {CONFIG} "
            "or the file chat_template.jinja; copy the whole folder of the model."
        )
    if importlib.util.find_spec("jinja2") is None:
        raise UserError(
            f"The chat template in {folder} cannot be rendered: expected the package jinja2; "
            "install it with pip install jinja2."
        )

    def render(text: str) -> str:
        return fast.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )

    mark = "\ue000"  # of Unicode's private use, in no template
    prefix, found, suffix = render(mark).partition(mark)
    if not found or any(render(text) != f"{prefix}{text}{suffix}" for text in _SAMPLES):
        raise UserError(
            f"The chat template in {folder} changes the user's message: expected one that puts it "
            "between two fixed texts, as Qwen3's does; give the folder of another tokenizer."
        )
    return prefix, suffix
