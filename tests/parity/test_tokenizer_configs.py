"""Each key of a CLIP tokenizer's files changes the ids as in diffusers, or is refused."""

import json
import shutil

import numpy as np
import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

END, START = "<|endoftext|>", "<|startoftext|>"
PROMPTS = [
    "",
    "a red pea",
    "A RED  Pea, two",
    "naïve ÉTÉ",
    "a pea " * 60,
    f"a {END} pea",
    "<new> x",
]

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def token(content, **changes):
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **plain, **changes}


CHANGES = [
    (CONFIG, {}),
    (CONFIG, {"add_prefix_space": True}),
    (CONFIG, {"add_prefix_space": False}),
    (CONFIG, {"do_lower_case": False}),
    (CONFIG, {"do_lower_case": True}),
    (CONFIG, {"model_max_length": 16}),
    (CONFIG, {"model_max_length": 77.0}),
    (CONFIG, {"model_max_length": 1000}),
    (CONFIG, {"model_max_length": 10**30}),
    (CONFIG, {"model_max_length": None}),
    (CONFIG, {"pad_token": "!"}),
    (CONFIG, {"pad_token": token("!")}),
    (CONFIG, {"pad_token": START}),
    (CONFIG, {"pad_token": None}),
    (CONFIG, {"padding_side": "left"}),
    (CONFIG, {"truncation_side": "left"}),
    (CONFIG, {"unk_token": START}),
    (CONFIG, {"bos_token": "a</w>"}),
    (CONFIG, {"eos_token": "a</w>"}),
    (CONFIG, {"errors": "strict"}),
    (CONFIG, {"clean_up_tokenization_spaces": True}),
    (CONFIG, {"split_special_tokens": True}),
    (CONFIG, {"use_fast": False}),
    (CONFIG, {"additional_special_tokens": ["<new>"]}),
    (CONFIG, {"extra_special_tokens": ["<new>"]}),
    (CONFIG, {"add_bos_token": False}),
    (CONFIG, {"add_eos_token": False}),
    (CONFIG, {"tokenizer_class": "CLIPTokenizerFast"}),
    (SPECIAL, {"pad_token": "!"}),
    (SPECIAL, {"pad_token": token("!")}),
    (SPECIAL, {"unk_token": START}),
    (ADDED, {"<new>": None}),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    captions = ["a red pea", "a green banana"] * 9
    Tokenizer.train(captions, vocab_size=540).export(str(folder))
    return folder


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize(("file", "changes"), CHANGES, ids=lambda x: str(x)[:60])
def test_every_key(file, changes, form, plain, tmp_path):
    """`form`: with vocab.json and merges.txt alone, or with tokenizer.json as well."""
    folder = shutil.copytree(plain, tmp_path / "tokenizer")
    if form == "new":
        transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        # transformers 5 writes tokenizer.json alone
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(plain / name, folder / name)
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    if file == ADDED:
        changes = {"<new>": len(json.loads((folder / "vocab.json").read_text()))}
    path.write_text(json.dumps({**before, **changes}))
    try:
        theirs = transformers.CLIPTokenizer.from_pretrained(folder)
        length = min(theirs.model_max_length, 77)
        expected = [
            theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            for prompt in PROMPTS
        ]
    except Exception:  # an odd value may fail anywhere
        return
    if "truncation_side" in changes:
        with pytest.raises(UserError, match="truncation_side is left"):
            Tokenizer.load(str(folder))
        return
    ours = Tokenizer.load(str(folder))
    np.testing.assert_array_equal(ours(PROMPTS), np.array(expected))
