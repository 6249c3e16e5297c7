"""Tokenizers of language models give the ids and masks of transformers, chat template included."""

import numpy as np
import pytest
import transformers

from jaxdiff.data.pretrained_tokenizer import PretrainedTokenizer
from tests.data.language_tokenizers import write_qwen_tokenizer, write_t5_tokenizer

pytestmark = pytest.mark.parity

PROMPTS = [
    "",
    "a small red pea",
    "  two lines\n of it ",
    "Ünïcode \u00e9 e\u0301 12 <|im_end|> <think>",
    "a red pea " * 20,
]


@pytest.mark.parametrize("length", [12, 64])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_template(thinking, side, length, tmp_path):
    write_qwen_tokenizer(tmp_path, padding_side=side)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        theirs.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in PROMPTS
    ]
    padded = {"padding": "max_length", "max_length": length, "truncation": True}
    expected = theirs(texts, **padded)
    ours = PretrainedTokenizer.load(str(tmp_path), length=length, thinking=thinking)
    ids, mask = ours.encode(PROMPTS)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert ours.truncated(prompt) == (len(theirs(text)["input_ids"]) > length)


@pytest.mark.parametrize("length", [8, 64])
def test_t5(length, tmp_path):
    write_t5_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padded = {"padding": "max_length", "max_length": length, "truncation": True}
    expected = theirs(PROMPTS, **padded)
    ours = PretrainedTokenizer.load(str(tmp_path), length=length)
    ids, mask = ours.encode(PROMPTS)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    for prompt in PROMPTS:
        assert ours.truncated(prompt) == (len(theirs(prompt)["input_ids"]) > length)


def test_files_written_by_transformers_are_read(tmp_path):
    """Its version 5 writes the template to a file of its own."""
    write_qwen_tokenizer(tmp_path / "old")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "chat_template.jinja").exists()
    old, new = (
        PretrainedTokenizer.load(str(tmp_path / name), length=32, thinking=False)
        for name in ("old", "new")
    )
    np.testing.assert_array_equal(old(PROMPTS), new(PROMPTS))


def test_exported_files_are_the_original_bytes(tmp_path):
    folder = write_qwen_tokenizer(tmp_path / "original")
    ours = PretrainedTokenizer.load(str(folder), length=32, thinking=False)
    ours.save(str(tmp_path / "saved"))
    again = PretrainedTokenizer.load(str(tmp_path / "saved"), length=32, thinking=False)
    again.export(str(tmp_path / "exported"))
    names = [path.name for path in folder.iterdir()]
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "exported" / name).read_bytes() == (folder / name).read_bytes()
