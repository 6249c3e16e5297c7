"""Tokenizers of language models; tests/parity compares chat templates with transformers."""

import json
import pickle

import numpy as np
import pytest

from jaxdiff.data import pretrained_tokenizer
from jaxdiff.data.pretrained_tokenizer import PretrainedTokenizer
from jaxdiff.errors import UserError
from tests.data.language_tokenizers import write_qwen_tokenizer, write_t5_tokenizer

PROMPTS = ["a small red pea", "", "a red pea " * 20]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = write_t5_tokenizer(tmp_path_factory.mktemp("t5"))
    return PretrainedTokenizer.load(str(folder), length=16)


def test_a_text_ends_with_the_end_also_where_it_is_cut_off(t5):
    ids, mask = t5.encode(PROMPTS)
    assert ids.dtype == np.int32
    assert ids.shape == mask.shape == (3, t5.length)
    assert [int(row[real][-1]) for row, real in zip(ids, mask, strict=True)] == [1, 1, 1]
    assert [list(row[~real]) for row, real in zip(ids, mask, strict=True)][1] == [0] * 15
    assert [t5.truncated(prompt) for prompt in PROMPTS] == [False, False, True]
    assert ids.max() < t5.vocab_size


def test_weights_are_those_of_the_words_in_which_tokens_begin(t5):
    ids, weights = t5.weighted([("a small ", 1.0), ("red", 1.5), (" pea", 0.5)])
    np.testing.assert_array_equal(ids, t5(["a small red pea"])[0])
    names = [t5.backend.id_to_token(i) for i in ids]
    for weight, word in ((1.5, "red"), (0.5, "pea")):
        pieces = [name for name, w in zip(names, weights, strict=True) if w == weight]
        assert "".join(pieces).replace("▁", "") == word
    assert set(weights[names.index("</s>") :]) == {1.0}


def test_weights_leave_the_template_out(tmp_path):
    folder = write_qwen_tokenizer(tmp_path)
    plain = PretrainedTokenizer.load(str(folder), length=32)
    ours = PretrainedTokenizer(
        backend=plain.backend, prefix="<|im_start|>user\n", suffix="<|im_end|>\n", files={}
    )
    ids, weights = ours.weighted([("a red pea", 2.0)])
    np.testing.assert_array_equal(ids, ours(["a red pea"])[0])
    words = plain.encode(["a red pea"])[1].sum()
    assert (weights == 2).sum() == words
    assert set(weights) == {1.0, 2.0}


def test_a_saved_tokenizer_gives_the_same_ids_and_files(t5, tmp_path):
    t5.save(str(tmp_path))
    for again in (
        PretrainedTokenizer.load(str(tmp_path), length=16),
        pickle.loads(pickle.dumps(t5)),
    ):
        np.testing.assert_array_equal(again(PROMPTS), t5(PROMPTS))
        assert again.fingerprint == t5.fingerprint
        assert again.files == t5.files


def test_the_fingerprint_depends_on_length_and_template(t5, tmp_path):
    t5.export(str(tmp_path))
    longer = PretrainedTokenizer.load(str(tmp_path), length=17)
    framed = PretrainedTokenizer(backend=t5.backend, prefix="x", files={})
    assert len({t5.fingerprint, longer.fingerprint, framed.fingerprint}) == 3


def test_wrong_folders_are_refused(t5, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer: expected tokenizer_config"):
        PretrainedTokenizer.load(str(tmp_path), length=16)
    t5.save(str(tmp_path))
    with pytest.raises(UserError, match=r"gives 16 tokens: expected 17"):
        PretrainedTokenizer.load(str(tmp_path), length=17)


def unknown_token(state):
    state["backend"]["post_processor"]["special_tokens"] = {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("backend"),
        lambda state: state.update(prefix=None),
        lambda state: state["backend"].update(padding=None),
        lambda state: state["backend"]["truncation"].update(max_length=15),
        lambda state: state["backend"]["added_tokens"][0].update(id=2**21),
        unknown_token,
    ],
)
def test_damage_is_refused(damage, t5, tmp_path):
    t5.save(str(tmp_path))
    path = tmp_path / "jaxdiff_tokenizer.json"
    state = json.loads(path.read_text())
    damage(state)
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="cannot be read"):
        PretrainedTokenizer.load(str(tmp_path), length=16)


def test_without_a_chat_template_or_padding_it_is_refused(tmp_path):
    folder = write_qwen_tokenizer(tmp_path / "plain", template=None)
    with pytest.raises(UserError, match="has no chat template"):
        PretrainedTokenizer.load(str(folder), length=16, thinking=False)
    folder = write_qwen_tokenizer(tmp_path / "split", split_special_tokens=True)
    with pytest.raises(UserError, match="special tokens are not split"):
        PretrainedTokenizer.load(str(folder), length=16)


def test_without_jinja_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    folder = write_qwen_tokenizer(tmp_path)
    monkeypatch.setattr(pretrained_tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install jinja2"):
        PretrainedTokenizer.load(str(folder), length=16, thinking=False)


def test_a_template_that_changes_the_message_is_refused(tmp_path):
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"
    folder = write_qwen_tokenizer(tmp_path, template=template)
    with pytest.raises(UserError, match="changes the user's message"):
        PretrainedTokenizer.load(str(folder), length=16, thinking=False)
