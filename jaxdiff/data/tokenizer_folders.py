"""Folders of tokenizers: jaxdiff's own and those of transformers.

    tokenizer.json         jaxdiff's own tokenizer
    vocabulary.txt         words of the training captions, one per line, if known
    related_words.txt      names in captions by words that are in none: "pet: cat, dog"
    tokenizer_config.json  and more files: any tokenizer that `transformers.AutoTokenizer` reads
    vocab.json merges.txt  alone: a CLIP tokenizer

transformers, whose import takes about a second, is imported only for other folders than jaxdiff's.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from jaxdiff.data.clip_bpe import END, START
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes, write_whole
from jaxdiff.io.imports import without_torch
from jaxdiff.io.text import LARGEST_TEXT, parse_json, read_json, read_text

SAVED = "tokenizer.json"
VOCABULARY = "vocabulary.txt"
RELATED = "related_words.txt"
CLIP_LENGTH = 77
MOST_IDS = 2**20  # of a tokenizer; the largest published vocabularies have a quarter of that
CONFIG = "tokenizer_config.json"
_VOCAB = "vocab.json"
FILE_KINDS = {".json", ".txt", ".model", ".jinja"}  # of a transformers tokenizer folder
_UNSTATED = 10**9  # transformers gives a greater length where the folder states none


class StoredTokenizer(NamedTuple):
    """The contents of a folder; the fields are those of `Tokenizer`."""

    backend: tokenizers.Tokenizer
    length: int
    pad_id: int
    pad_left: bool
    added_spellings: Mapping[int, tuple[int, ...]]


def read_folder(folder: str, length: int | None) -> StoredTokenizer:
    """Read a tokenizer; see `Tokenizer.load`."""
    root = epath.Path(folder)
    own = is_own_folder(root)
    if not own and not any((root / name).exists() for name in (CONFIG, _VOCAB)):
        raise UserError(
            f"{folder} holds no tokenizer: expected {SAVED}, {CONFIG}, or vocab.json and "
            "merges.txt; give the folder of a text encoder's tokenizer."
        )
    with damage_as_user_error(folder):
        backend, stated, pad_id, pad_left = _read_saved(root) if own else _read_foreign(root)
        backend.encode("a")
    if pad_id is None:
        raise UserError(
            f"The tokenizer in {folder} has no padding token: expected pad_token in {CONFIG}; "
            "give the tokenizer folder of a text encoder."
        )
    if _is_clip(backend):
        stated = min(stated or CLIP_LENGTH, CLIP_LENGTH)
    length = length or stated
    if length is None:
        raise UserError(
            f"The tokenizer in {folder} has no length: expected model_max_length in {CONFIG}; "
            "set the length."
        )
    return StoredTokenizer(backend, length, pad_id, pad_left, _spellings(backend, by_name=not own))


def is_own_folder(root: epath.Path) -> bool:
    """Return whether `Tokenizer.save` wrote a folder's tokenizer, without transformers' config."""
    return (root / SAVED).exists() and not (root / CONFIG).exists()


@contextmanager
def damage_as_user_error(folder: str) -> Iterator[None]:
    """Raise `UserError` for what `tokenizers` cannot parse or use.

    It raises plain Exception, or PanicException, a BaseException that it does not export.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"The tokenizer in {folder} cannot be read ({error}): expected {SAVED}, or the "
            "files of a transformers tokenizer; copy the whole folder again."
        ) from error


def read_words(folder: str) -> frozenset[str] | None:
    """Read the words of a folder; None if it has no list."""
    path = epath.Path(folder) / VOCABULARY
    return frozenset(read_text(path).split()) if path.exists() else None


def read_related(folder: str) -> dict[str, tuple[str, ...]]:
    """Read the related words of a folder; {} if it has none. Other lines are ignored."""
    path = epath.Path(folder) / RELATED
    lines = read_text(path).splitlines() if path.exists() else []
    parts = (line.partition(": ") for line in lines)
    return {word: tuple(names.split(", ")) for word, _, names in parts if names}


def write_related(folder: str, related: Mapping[str, tuple[str, ...]]) -> None:
    """Write the related words to a folder."""
    lines = (f"{word}: {', '.join(names)}\n" for word, names in sorted(related.items()))
    write_whole(epath.Path(folder) / RELATED, "".join(lines).encode())


def saved_form(stored: StoredTokenizer) -> bytes:
    """Return the content of `tokenizer.json`; see `_spellings` for words of several tokens."""
    state = json.loads(stored.backend.to_str())
    later = {i for ids in stored.added_spellings.values() for i in ids[1:]}
    for token in state["added_tokens"]:
        token["special"] |= token["id"] in later
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.enable_truncation(stored.length)
    backend.enable_padding(
        direction="left" if stored.pad_left else "right",
        length=stored.length,
        pad_id=stored.pad_id,
        pad_token=backend.id_to_token(stored.pad_id),
    )
    return backend.to_str(pretty=True).encode()


def transformers_files(
    stored: StoredTokenizer, *, start_id: int | None, end_id: int | None
) -> dict[str, str]:
    """Return file name -> content of a folder that `transformers.AutoTokenizer` reads.

    CLIP's becomes `vocab.json` and `merges.txt`, which diffusers expects; any other kind becomes
    `tokenizer.json`.
    """
    backend = stored.backend
    state = json.loads(backend.to_str())
    model = state["model"]
    ids = {"bos_token": start_id, "eos_token": end_id, "pad_token": stored.pad_id}
    special = {name: backend.id_to_token(i) for name, i in ids.items() if i is not None}
    if model.get("unk_token"):
        special["unk_token"] = model["unk_token"]
    config: dict[str, Any] = {"model_max_length": stored.length, **special}
    config["padding_side"] = "left" if stored.pad_left else "right"
    if model["type"] == "BPE" and _is_clip(backend):
        added = [token for token in state["added_tokens"] if token["content"] not in model["vocab"]]
        config["tokenizer_class"] = "CLIPTokenizer"
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        files = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": f"#version: 0.2\n{merges}",
        }
        if added:
            decoder = {str(token["id"]): token for token in state["added_tokens"]}
            config["added_tokens_decoder"] = {
                i: {key: value for key, value in token.items() if key != "id"}
                for i, token in decoder.items()
            }
            by_name = {token["content"]: token["id"] for token in added}
            files["added_tokens.json"] = json.dumps(by_name, indent=2)
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {SAVED: backend.to_str(pretty=True)}
    return files | {
        "special_tokens_map.json": json.dumps(special, indent=2),
        CONFIG: json.dumps(config, indent=2),
    }


def _is_clip(backend: tokenizers.Tokenizer) -> bool:
    return all(backend.token_to_id(token) is not None for token in (START, END))


def _read_saved(root: epath.Path) -> tuple[tokenizers.Tokenizer, int | None, int | None, bool]:
    """Return backend, stated length, padding id, and whether padding is on the left."""
    backend = tokenizers.Tokenizer.from_buffer(_checked(root / SAVED))
    padding = backend.padding or {"pad_id": backend.token_to_id(END), "direction": "right"}
    stated = (backend.truncation or {}).get("max_length")
    return backend, stated, padding["pad_id"], padding["direction"] == "left"


def _checked(file: epath.Path) -> bytes:
    """Return the content of a `tokenizer.json` whose parts fit together."""
    data = read_bytes(file, "the whole folder of a tokenizer", largest=LARGEST_TEXT)
    check_state(parse_json(data, file))
    return data


def check_state(state: Any) -> None:
    """Check that the parts of a `tokenizer.json`, as parsed, fit together.

    `tokenizers` does not check ids: it aborts on a template with an unknown token, and takes time
    and memory in proportion to the largest id.

    Raises:
      ValueError: they do not. Other damage raises other exceptions.
    """
    vocabulary = state["model"]["vocab"]  # a list of Unigram, whose ids are its places
    ids = [*vocabulary.values()] if isinstance(vocabulary, Mapping) else []
    ids += [token["id"] for token in state.get("added_tokens") or ()]
    ids.append((state.get("padding") or {}).get("pad_id", 0))
    processor = state.get("post_processor") or {}
    for part in (processor, *processor.get("processors", ())):
        if part.get("type") == "TemplateProcessing":
            pieces, known = [*part["single"], *part["pair"]], part["special_tokens"]
            used = {p["SpecialToken"]["id"] for p in pieces if "SpecialToken" in p}
            if unknown := used - known.keys():
                raise ValueError(f"its template has the unknown token {min(unknown)!r}")
            ids += [i for token in known.values() for i in token["ids"]]
    _check_ids(ids)


def _check_ids(ids: Iterable[int]) -> None:
    """Raise `ValueError` for ids beyond `MOST_IDS`."""
    if (largest := max(ids, default=0)) >= MOST_IDS:
        raise ValueError(f"it has the id {largest}: expected less than {MOST_IDS}")


def _read_foreign(root: epath.Path) -> tuple[tokenizers.Tokenizer, int | None, int | None, bool]:
    """Read a folder as `_read_saved` does, by transformers."""
    fast = load_by_transformers(root)
    stated = fast.model_max_length if fast.model_max_length < _UNSTATED else None
    pad_id = fast.eos_token_id if fast.pad_token_id is None else fast.pad_token_id
    backend = _with_plain_padding(fast.backend_tokenizer, pad_id)
    return backend, stated, pad_id, fast.padding_side == "left"


def load_by_transformers(root: epath.Path) -> Any:
    """Return the tokenizer of `transformers.AutoTokenizer`; CLIP is the default kind.

    Raises:
      UserError: texts are truncated on the left. Damaged files raise other exceptions.
    """
    named = _names_kind(root / CONFIG, "tokenizer_class") or _names_kind(
        root / "config.json", "model_type"
    )
    kind = {} if named else {"tokenizer_type": "clip"}
    if (root / SAVED).exists():
        _checked(root / SAVED)
    elif (root / _VOCAB).exists():
        _check_ids(read_json(root / _VOCAB).values())
    with _local_copy(root) as folder, without_torch("transformers"), _quiet_transformers():
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **kind
        )
    if fast.truncation_side != "right":
        raise UserError(
            f"The tokenizer in {root}: truncation_side is {fast.truncation_side}: expected right; "
            "give the folder of another tokenizer."
        )
    return fast


def _with_plain_padding(backend: tokenizers.Tokenizer, pad_id: int | None) -> tokenizers.Tokenizer:
    """Encode a CLIP padding token that is an ordinary one, such as "!", in texts as OpenCLIP does.

    transformers matches the padding token ahead of the vocabulary: "pea!" becomes "pea</w>" and
    the "!" that starts a word, where OpenCLIP, which trained these encoders, gives "!</w>".
    """
    if pad_id is None or not _is_clip(backend) or backend.id_to_token(pad_id) in (START, END):
        return backend
    state = json.loads(backend.to_str())
    known = state["model"]["vocab"]
    state["added_tokens"] = [
        token
        for token in state["added_tokens"]
        if token["id"] != pad_id or token["content"] not in known
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _names_kind(file: epath.Path, key: str) -> bool:
    return file.exists() and key in read_json(file)


@contextmanager
def _local_copy(root: epath.Path) -> Iterator[str]:
    """Yield the folder, or a temporary copy of its small files if it is in a bucket."""
    if "://" not in str(root):
        yield str(root)
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in root.iterdir():
            if file.suffix in FILE_KINDS:
                (Path(folder) / file.name).write_bytes(file.read_bytes())
        yield folder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the warning of transformers' import without PyTorch."""
    logger = logging.getLogger("transformers")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def _spellings(backend: tokenizers.Tokenizer, *, by_name: bool) -> dict[int, tuple[int, ...]]:
    """Find the added words of several tokens: WORD, WORD_1, WORD_2 and so on.

    jaxdiff's own folders mark the tokens after the first as special, so that two words WORD and
    WORD_1 stay two. Others have no such mark: `by_name` reads them as diffusers does, by name.
    """
    added = backend.get_added_tokens_decoder()
    ids, found = {token.content: i for i, token in added.items()}, {}
    for first, token in added.items():
        word = [first]
        while (i := ids.get(f"{token.content}_{len(word)}")) is not None:
            if not (by_name or added[i].special):
                break
            word.append(i)
        if len(word) > 1:
            found[first] = tuple(word)
    return found
