import json
import pickle

import numpy as np
import pytest
import tokenizers

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError

CAPTIONS = [
    "a photo of a ripe tomato with a stem",
    "a small green pea, left of two bananas",
    "There's one large banana on the table!",
] * 5
TEXTS = [
    "",
    "a photo of a ripe tomato",
    "  A  PHOTO\n of\ta Tomato ",
    "It's 2 peas, 13 bananas; isn't it?!",
    "naïve café, größe ÀÉ 豆 ☃ 🍌",
    "a pea " * 60,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=600)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The trained tokenizer in the two files that OpenAI published CLIP's in."""
    model = json.loads(tokenizer.bpe.to_str())["model"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _words(tokenizer, text):
    encoding = tokenizer.bpe.encode(text, add_special_tokens=False)
    return encoding.tokens[: sum(encoding.attention_mask)]


def test_ids_are_start_words_end_and_padding_with_the_end(tokenizer):
    ids = tokenizer(["a pea", ""])
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == tokenizer.start_id).all()
    assert ids[1].tolist() == [tokenizer.start_id] + [tokenizer.end_id] * 76
    words = (ids[0] != tokenizer.end_id).sum()
    assert 3 <= words < 10
    assert (ids[0, words:] == tokenizer.end_id).all()


def test_ids_equal_those_of_transformers(tokenizer, folder):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(Tokenizer.load(str(folder))(TEXTS), expected)


def test_every_form_on_disk_gives_the_same_ids(tokenizer, folder, tmp_path):
    tokenizer.save(str(tmp_path / "saved"))
    assert [f.name for f in (tmp_path / "saved").iterdir()] == ["tokenizer.json"]
    saved = Tokenizer.load(str(tmp_path / "saved"))
    for other in (saved, Tokenizer.load(str(folder)), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other(TEXTS), tokenizer(TEXTS))
        assert other.vocab_size == tokenizer.vocab_size


def test_length_and_padding_survive_saving(tmp_path):
    Tokenizer.train(CAPTIONS, vocab_size=600, length=12).save(str(tmp_path))
    assert Tokenizer.load(str(tmp_path))(TEXTS).shape == (len(TEXTS), 12)
    assert Tokenizer.load(str(tmp_path), length=20).length == 20


def test_a_folder_may_name_another_padding(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    tokenizer = Tokenizer.load(str(tmp_path))
    ids = tokenizer(["a pea"])[0]
    end = ids.tolist().index(tokenizer.end_id)
    assert set(ids[end + 1 :].tolist()) == {tokenizer.bpe.token_to_id("!")}


def test_training_merges_frequent_words_and_is_repeatable(tokenizer):
    for _ in range(8):
        again = Tokenizer.train(iter(CAPTIONS), vocab_size=600)
        assert again.bpe.to_str() == tokenizer.bpe.to_str()
    assert _words(tokenizer, "banana on") == ["banana</w>", "on</w>"]
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    assert Tokenizer.train(CAPTIONS, vocab_size=520).vocab_size == 520


def test_no_text_produces_an_end_token_before_its_end(tokenizer):
    every_byte = bytes(range(1, 128)).decode() + "é ü ß 豆 🍌 \u0085"
    for text in every_byte.split():
        assert "<|endoftext|>" not in _words(tokenizer, text)
        assert _words(tokenizer, text)


def test_truncation_is_told_exactly(tokenizer):
    fits, longer = "pea " * 75, "pea " * 76
    assert _words(tokenizer, "pea") == ["pea</w>"]
    assert not tokenizer.truncated(fits)
    assert tokenizer.truncated(longer)
    assert tokenizer([longer])[0, -1] == tokenizer.end_id
    assert not tokenizer.truncated("")


def test_folders_without_a_clip_tokenizer_are_told(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(str(tmp_path))
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="is not CLIP's"):
        Tokenizer.load(str(tmp_path))


def test_impossible_sizes_are_told():
    with pytest.raises(UserError, match="too small"):
        Tokenizer.train(CAPTIONS, vocab_size=100)
    with pytest.raises(UserError, match="does not fit CLIP"):
        Tokenizer.train(CAPTIONS, vocab_size=600, length=100)


def test_a_new_word_has_tokens_of_its_own_after_the_others(tokenizer, tmp_path):
    longer = tokenizer.with_word("<my-Pea>", 2)
    first = tokenizer.vocab_size
    assert longer.vocab_size == first + 2
    ids = longer(["a <my-Pea> on", "a pea"])
    before = tokenizer(["a", "on"])
    assert ids[0, :5].tolist() == [*before[0, :2], first, first + 1, before[1, 1]]
    np.testing.assert_array_equal(ids[1], tokenizer(["a pea"])[0])
    assert longer.truncated("<my-Pea> " * 38)
    assert not longer.truncated("<my-Pea> " * 37)
    longer.save(str(tmp_path))
    np.testing.assert_array_equal(Tokenizer.load(str(tmp_path))(["a <my-Pea> on"])[0], ids[0])
    assert tokenizer(["<my-Pea>"]).max() < first  # the one it was made from is as it was


def test_transformers_reads_a_new_word_as_we_do(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    longer = tokenizer.with_word("<mine>", 1)
    longer.export(str(tmp_path))
    texts = ["a <mine> pea", "<mine>", "two bananas"]
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(longer(texts), expected)
    np.testing.assert_array_equal(Tokenizer.load(str(tmp_path))(texts), expected)


@pytest.mark.parametrize("word", ["", "two words", "<|endoftext|>", "a</w>"])
def test_what_cannot_be_a_new_word_is_told(tokenizer, word):
    with pytest.raises(UserError, match="cannot be a new word"):
        tokenizer.with_word(word, 1)


def test_tokens_have_the_weight_of_the_text_they_begin_in(tokenizer):
    """The ids are those of the whole text, also where a stretch ends within a word."""
    stretches = [("a photo of ", 1.0), ("a 豆 to", 2.0), ("mato", 3.0), (" with", 0.5)]
    ids, weights = tokenizer.weighted(stretches)
    np.testing.assert_array_equal(ids, tokenizer(["".join(text for text, _ in stretches)])[0])
    end = int(np.argmax(ids == tokenizer.end_id))
    tokens = [tokenizer.bpe.id_to_token(i) for i in ids]
    by_token = dict(zip(tokens[:end], weights[:end], strict=True))
    assert (by_token["photo</w>"], by_token["tomato</w>"], by_token["with</w>"]) == (1, 2, 0.5)
    assert weights[0] == 1
    assert (weights[end:] == 1).all()


def test_a_word_of_several_tokens_has_the_weight_of_its_stretch(tokenizer):
    longer = tokenizer.with_word("<pea>", 2)
    ids, weights = longer.weighted([("a ", 1.0), ("<pea>", 2.0), (" tomato", 3.0)])
    np.testing.assert_array_equal(ids, longer(["a <pea> tomato"])[0])
    np.testing.assert_array_equal(weights[:6], [1, 1, 2, 2, 3, 1])
