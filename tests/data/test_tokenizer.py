import json
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import jaxdiff
from jaxdiff.data.clip_bpe import END
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError

SHIPPED = Path(jaxdiff.__file__).parent / "weights" / "produce" / "tokenizers" / "text"
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

# The shipped tokenizer's ids of each text, without start, end and padding.
EXPECTED = [
    ("", ""),
    (" ", ""),
    ("\n\t \xa0", ""),
    ("a ripe tomato", "320 614 600"),
    ("A RIPE TOMATO", "320 614 600"),
    ("  a  ripe\ntomato\t ", "320 614 600"),
    ("a small green pea, left of two bananas", "320 551 582 544 267 572 537 628 674"),
    (
        "There's one large banana on the table!",
        "518 68 646 6 338 78 77 324 622 601 548 525 83 64 65 536 256",
    ),
    (
        "it's, I'm, we're, they've, he'll, she'd, don't",
        "72 339 6 338 267 328 6 332 267 86 324 6 646 267 518 68 344 6 655 267 71 324 6 547 "
        "267 82 71 324 6 323 267 67 548 6 339",
    ),
    ("IT'S ROCK'N'ROLL", "72 339 6 338 598 66 330 262 333 262 598 547"),
    ("'s", "6 338"),
    ("\u2019s it\u2019s", "158 222 503 338 72 339 158 222 503 338"),
    ("2 peas, 13 bananas; 1,024 carrots", "273 679 267 272 274 674 282 272 267 271 273 275 686"),
    ("3.14 x 10^-5", "274 269 272 275 343 272 271 61 268 276"),
    (
        "na\xefve caf\xe9, gr\xf6\xdfe",
        "77 64 127 107 655 66 64 69 127 358 267 70 81 127 114 127 253 324",
    ),
    ("nai\u0308ve cafe\u0301", "77 64 127 107 655 66 64 69 127 358"),
    (
        "\xc0\xc9\xce\xd5\xdc \xdf \ufb01 \u01c6",
        "127 254 127 102 127 106 127 113 127 376 127 509 171 105 479 131 484",
    ),
    (
        "\u8c46 \u3068 \u30d0\u30ca\u30ca",
        "164 109 484 159 223 357 159 225 238 159 225 232 159 225 488",
    ),
    (
        "\u0433\u043e\u0440\u043e\u0445 \u0438 \u0431\u0430\u043d\u0430\u043d",
        "140 111 140 122 141 222 140 122 141 483 140 372 140 109 140 108 140 121 140 108 140 377",
    ),
    (
        "\u062d\u0628\u0629 \u0628\u0627\u0632\u0644\u0627\u0621",
        "148 255 148 101 148 358 148 101 148 100 148 110 149 226 148 100 148 350",
    ),
    (
        "\U0001f34c\U0001f345 \u2603 \U0001f469\u200d\U0001f33e",
        "172 253 235 234 172 253 235 483 158 246 481 172 253 239 102 158 222 235 172 253 234 378",
    ),
    ("\u0130stanbul \u03a3\u0391\u03a3", "328 136 485 512 524 65 84 331 139 225 138 109 139 481"),
    ("a<b>c</b>", "320 283 321 285 322 27 270 321 285"),
    ("<|startoftext|>", "687"),
    ("pea <|endoftext|> banana", "544 688 601"),
    ("a</w> pea</w>", "320 27 270 342 285 544 27 270 342 285"),
    (
        "snake_case and kebab-case",
        "82 77 64 74 324 318 66 64 82 324 524 323 74 68 65 64 321 268 66 64 82 324",
    ),
    ("e-mail: a.b@c.de", "324 268 526 72 331 281 320 269 321 287 322 269 616"),
    (
        "https://example.org/?q=pea&n=2",
        "71 83 83 79 338 25 14 270 68 87 64 76 568 269 563 326 14 286 336 284 544 261 333 284 273",
    ),
    ("(((tomato)))", "7 7 263 600 8 8 264"),
    ("[pea:banana:0.5]", "314 544 281 601 281 271 269 276 316"),
    ("!!!???...", "0 0 0 30 30 30 13 13 269"),
    ('"quoted" `code` \\n', "257 80 84 78 83 552 257 319 66 78 616 319 315 333"),
    ("\x00\x07null", "188 451 77 84 547"),
    (
        "\u200bzero\u200bwidth\ufeff",
        "158 222 489 89 68 81 334 158 222 489 86 72 67 83 327 171 119 379",
    ),
    ("\xbd \xb2 \u2460\u2163 \u0663", "126 377 126 366 158 239 510 158 227 367 149 352"),
    ("a\u0301\u0327 combining", "127 350 136 356 66 78 76 65 539 642"),
    (
        "antidisestablishmentarianism",
        "524 83 72 527 82 68 512 64 560 72 82 71 76 68 645 541 72 524 72 82 332",
    ),
    ("tomatotomatotomato", "577 534 577 534 600"),
    ("a pea " * 60, " ".join(["320 544"] * 60)),
    ("x" * 300, " ".join(["87"] * 299 + ["343"])),
    ("\u8c46" * 50, " ".join(["164 109 228"] * 49 + ["164 109 484"])),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=600)


def write_clip_files(tokenizer, folder):
    """Write the two files that OpenAI published CLIP's tokenizer in."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The trained tokenizer as `vocab.json` and `merges.txt`."""
    return write_clip_files(tokenizer, tmp_path_factory.mktemp("clip"))


def _words(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).tokens


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
    names = sorted(f.name for f in (tmp_path / "saved").iterdir())
    assert names == ["tokenizer.json", "vocabulary.txt"]
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
    assert set(ids[end + 1 :].tolist()) == {tokenizer.backend.token_to_id("!")}


def test_training_merges_frequent_words_and_is_repeatable(tokenizer):
    for _ in range(8):
        again = Tokenizer.train(iter(CAPTIONS), vocab_size=600)
        assert again.fingerprint == tokenizer.fingerprint
    assert _words(tokenizer, "banana on") == ["banana</w>", "on</w>"]
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    assert Tokenizer.train(CAPTIONS, vocab_size=520).vocab_size == 520


def test_no_text_produces_an_end_token_before_its_end(tokenizer):
    every_byte = bytes(range(1, 128)).decode() + "é ü ß 豆 🍌 \u0085"
    for text in every_byte.split():
        assert "<|endoftext|>" not in _words(tokenizer, text)
        assert _words(tokenizer, text)


def test_truncated_is_exact(tokenizer):
    fits, longer = "pea " * 75, "pea " * 76
    assert _words(tokenizer, "pea") == ["pea</w>"]
    assert not tokenizer.truncated(fits)
    assert tokenizer.truncated(longer)
    assert tokenizer([longer])[0, -1] == tokenizer.end_id
    assert not tokenizer.truncated("")


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.load(str(tmp_path))
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no padding token"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["post_processor"]["special_tokens"].clear(),
        lambda state: state["model"]["vocab"].update(green=2**31),
        lambda state: state["added_tokens"][0].update(id=2**31),
        lambda state: state["post_processor"]["special_tokens"][END].update(ids=[2**31]),
        lambda state: state["padding"].update(pad_id=2**31),
        lambda state: state.update(model={"type": "BPE"}),
    ],
)
def test_parts_of_a_file_that_do_not_fit_together_are_refused(change, tokenizer, tmp_path, capfd):
    """Where `tokenizers` would abort, or take time and memory by the largest id."""
    tokenizer.save(str(tmp_path))
    state = json.loads((tmp_path / "tokenizer.json").read_bytes())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"^The tokenizer in .* cannot be read \("):
        Tokenizer.load(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_ids_with_gaps_count_up_to_the_largest(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path))
    state = json.loads((tmp_path / "tokenizer.json").read_bytes())
    state["model"]["vocab"]["zzz"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.load(str(tmp_path)).vocab_size == 5001


def test_impossible_sizes_are_refused():
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
def test_impossible_new_words_are_refused(tokenizer, word):
    with pytest.raises(UserError, match="cannot be a new word"):
        tokenizer.with_word(word, 1)


@pytest.mark.parametrize("word", ["<mine>", "<MINE>"])
def test_a_new_word_that_differs_in_case_alone_is_refused(word, tokenizer):
    with pytest.raises(UserError, match="does not have yet"):
        tokenizer.with_word("<Mine>", 1).with_word(word, 1)


def test_tokens_have_the_weight_of_the_text_they_begin_in(tokenizer):
    """The ids are those of the whole text, also where a stretch ends within a word."""
    stretches = [("a photo of ", 1.0), ("a 豆 to", 2.0), ("mato", 3.0), (" with", 0.5)]
    ids, weights = tokenizer.weighted(stretches)
    np.testing.assert_array_equal(ids, tokenizer(["".join(text for text, _ in stretches)])[0])
    end = int(np.argmax(ids == tokenizer.end_id))
    tokens = [tokenizer.backend.id_to_token(i) for i in ids]
    by_token = dict(zip(tokens[:end], weights[:end], strict=True))
    assert (by_token["photo</w>"], by_token["tomato</w>"], by_token["with</w>"]) == (1, 2, 0.5)
    assert weights[0] == 1
    assert (weights[end:] == 1).all()


def test_a_word_of_several_tokens_has_the_weight_of_its_stretch(tokenizer):
    longer = tokenizer.with_word("<pea>", 2)
    ids, weights = longer.weighted([("a ", 1.0), ("<pea>", 2.0), (" tomato", 3.0)])
    np.testing.assert_array_equal(ids, longer(["a <pea> tomato"])[0])
    np.testing.assert_array_equal(weights[:6], [1, 1, 2, 2, 3, 1])


def ids_of(tokenizer, text):
    """The ids of a text without start, end and padding."""
    ids, mask = tokenizer.encode([text])
    real = ids[mask].tolist()
    return real[len(tokenizer.prefix) : len(real) - len(tokenizer.suffix)]


@pytest.mark.parametrize("form", ["shipped", "clip_files", "exported"])
def test_ids_stay_as_they_are(form, tmp_path):
    tokenizer = Tokenizer.load(str(SHIPPED))
    length = 32
    if form == "clip_files":
        tokenizer, length = Tokenizer.load(str(write_clip_files(tokenizer, tmp_path))), 77
    if form == "exported":
        tokenizer.export(str(tmp_path))
        tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.length == length
    for text, words in EXPECTED:
        found, expected = ids_of(tokenizer, text), [int(i) for i in words.split()]
        assert found == expected[: length - 2], text
        assert tokenizer.truncated(text) == (len(expected) > length - 2)


def test_mask_is_true_from_start_to_end(tokenizer):
    ids, mask = tokenizer.encode(["a banana", "", "pea " * 90])
    assert mask.dtype == bool
    assert mask.sum(axis=1).tolist() == [4, 2, 77]
    for row, real in zip(ids, mask, strict=True):
        assert row[real][0] == tokenizer.start_id
        assert row[real][-1] == tokenizer.end_id
        assert (row[~real] == tokenizer.pad_id).all()
    np.testing.assert_array_equal(ids, tokenizer(["a banana", "", "pea " * 90]))
    assert tokenizer([]).shape == (0, 77)


def t5(folder):
    """A tokenizer of T5's kind: no start token, an end token, its own padding."""
    from transformers import T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581pea", "\u2581red", "s"]
    vocab = [(word, -float(i)) for i, word in enumerate(words)]
    T5Tokenizer(vocab, extra_ids=0, model_max_length=512).save_pretrained(folder)


def qwen(folder):
    """A tokenizer of Qwen's kind: neither start nor end token, padding on the left."""
    from transformers import Qwen2Tokenizer

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    Qwen2Tokenizer(
        vocab, [], padding_side="left", model_max_length=131072, extra_special_tokens=["<|im_end|>"]
    ).save_pretrained(folder)


@pytest.mark.parametrize("kind", [t5, qwen])
@pytest.mark.parametrize("saved", [False, True])
def test_other_kinds_have_the_ids_and_masks_of_transformers(kind, saved, tmp_path):
    from transformers import AutoTokenizer

    kind(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    tokenizer = Tokenizer.load(str(tmp_path / "theirs"), length=120)
    if saved:
        tokenizer.save(str(tmp_path / "saved"))
        tokenizer = Tokenizer.load(str(tmp_path / "saved"))
    texts = ["a red pea", "", " peas \n\u8c46", "pea<|im_end|>", "</s> a", "red peas " * 80]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=120)
    ids, mask = tokenizer.encode(texts)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert tokenizer.start_id is None
    assert tokenizer.end_id == (1 if kind is t5 else None)
    tokenizer.export(str(tmp_path / "exported"))
    back = Tokenizer.load(str(tmp_path / "exported"))
    assert back.length == 120
    np.testing.assert_array_equal(back(texts), ids)


def test_the_stated_length_of_other_kinds_counts(tmp_path):
    t5(tmp_path)
    assert Tokenizer.load(str(tmp_path)).length == 512
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no length"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match="holds no word"):
        Tokenizer.load(str(tmp_path), length=1)


def test_weights_are_those_of_the_words_with_either_kind(tmp_path):
    """A token that includes the space before its word has the word's weight."""
    t5(tmp_path / "t5")
    ids, weights = Tokenizer.load(str(tmp_path / "t5"), length=6).weighted(
        [("a ", 1.5), ("red", 2.0), (" pea", 3.0)]
    )
    assert ids.tolist() == [4, 6, 5, 1, 0, 0]
    assert weights.tolist() == [1.5, 2, 3, 1, 1, 1]
    qwen(tmp_path / "qwen")
    left = Tokenizer.load(str(tmp_path / "qwen"), length=5)
    assert left.weighted([("ab", 2.0), ("c", 3.0)])[1].tolist() == [1, 1, 2, 2, 3]


def test_a_plain_padding_token_is_an_ordinary_token_in_a_text(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plain = Tokenizer.load(str(folder))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    padded = Tokenizer.load(str(tmp_path))
    assert padded.pad_id == plain.backend.token_to_id("!")
    for text in ("a pea!", "!!! pea ?!", "!"):
        assert ids_of(padded, text) == ids_of(plain, text)


NEW = [  # words with their counts, a text, and the new tokens that it becomes
    ([("<cat>", 2), ("<cat>s", 3)], "a <cat> <cat>s<cat>, <cat>", [0, 1, 2, 3, 4, 0, 1, 0, 1]),
    ([("<cat>s", 3), ("<cat>", 2)], "<cat>s and <cat>", [0, 1, 2, 3, 4]),
    ([("<a>", 2), ("<a_1>", 2)], "<a> <a_1> a<a>b", [0, 1, 2, 3, 0, 1]),
    ([("<a>", 3)], "<a>_1 <a>_2 <a>", [1, 2, 0, 1, 2]),
    ([("EasyNegative", 2), ("EasyNegativeV2", 3)], "a pea, EasyNegative", [0, 1]),
    ([("EasyNegative", 2), ("EasyNegativeV2", 3)], "EasyNegativeV2,EasyNegative", [2, 3, 4, 0, 1]),
    ([("pix", 2)], "a pix pea", [0, 1]),
    ([("pix", 2)], "a <pix> pea", [0, 1]),
    ([("pix", 2)], "a pixel pea, unpix, pix_2, Pixel", []),
    ([("Pix", 2)], "pix, PIX, (Pix), pix's", [0, 1, 0, 1, 0, 1, 0, 1]),
    ([("<Gr\u00f6\u00dfe>", 1)], "<GR\u00d6\u00dfE><gr\u00f6\u00dfe>", [0, 0]),
    ([("bad-hands-5", 2)], "(bad-hands-5), bad-hands-55", [0, 1]),
    ([("1234", 1)], "1234 12345 01234", [0]),
    ([("style", 1), ("style_1", 1)], "a style pea", [0]),
    ([("style", 1), ("style_1", 1)], "a style_1 pea", [1]),
    ([("style_1", 1), ("<style>", 2)], "style_1 <style> <style>_1 style", [0, 1, 2, 2]),
]


@pytest.mark.parametrize(("words", "text", "right"), NEW)
def test_words_that_overlap_stay_apart(words, text, right, tokenizer, tmp_path):
    longer = tokenizer
    for word, count in words:
        longer = longer.with_word(word, count)
    longer.save(str(tmp_path))
    first = tokenizer.vocab_size
    for made in (longer, Tokenizer.load(str(tmp_path)), pickle.loads(pickle.dumps(longer))):
        assert [i - first for i in ids_of(made, text) if i >= first] == right
        assert made.fingerprint == longer.fingerprint
        assert made.added_spellings == longer.added_spellings
        ids, _ = made.weighted([(text, 2.0)])
        np.testing.assert_array_equal(ids, made([text])[0])


def test_exported_words_of_several_tokens_are_read_back(tokenizer, tmp_path):
    longer = tokenizer.with_word("<my-Pea>", 3).with_word("pix", 1)
    longer.export(str(tmp_path))
    back = Tokenizer.load(str(tmp_path))
    texts = ["a <my-Pea>, pix", "pixel <my-Pea>_1", "<my-pea>"]
    np.testing.assert_array_equal(back(texts), longer(texts))
    assert back.fingerprint != tokenizer.fingerprint


def test_fingerprints_differ_by_whatever_changes_ids(tokenizer, tmp_path):
    others = [
        tokenizer.with_word("<a>", 1),
        tokenizer.with_word("<a>", 2),
        tokenizer.with_word("<a>", 1).with_word("<a>_1", 1),
        Tokenizer.train(CAPTIONS, vocab_size=600, length=20),
        Tokenizer.train(CAPTIONS, vocab_size=550),
        tokenizer,
    ]
    assert len({other.fingerprint for other in others}) == len(others)
    tokenizer.save(str(tmp_path))
    assert Tokenizer.load(str(tmp_path)).fingerprint == tokenizer.fingerprint


def test_threads_share_a_tokenizer(tokenizer):
    longer = tokenizer.with_word("<a>", 2)
    texts = [f"{text} <a> {i}" for i, text in enumerate(TEXTS * 20)]
    expected = longer(texts)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: longer(texts), range(16)):
            np.testing.assert_array_equal(found, expected)


def test_transformers_is_imported_for_foreign_folders_alone(folder):
    """The shipped tokenizer works without it; where it is imported, nothing is printed."""
    code = """
import importlib.util
import sys
import jaxdiff
from jaxdiff.data.tokenizer import Tokenizer
Tokenizer.load(sys.argv[1])(["a pea"])
assert "transformers" not in sys.modules
Tokenizer.load(sys.argv[2])(["a pea"])
assert "transformers" in sys.modules or importlib.util.find_spec("torch")
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(SHIPPED), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not logging.getLogger("transformers").filters


def test_the_words_of_its_captions_are_kept(tmp_path):
    trained = Tokenizer.train(["A red, ripe pea", "two peas"], vocab_size=530, length=16)
    assert trained.words == {"a", "red", "ripe", "pea", "two", "peas"}
    trained.save(str(tmp_path))
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.words == trained.words
    assert loaded.fingerprint == trained.with_words(None).fingerprint  # they change no id
    assert loaded.with_word("<dog>", 2).words == {*trained.words, "dog"}
    assert loaded.with_words(["dog"]).words == {*trained.words, "dog"}
    assert loaded.with_words(None).words is None


def test_related_words_are_kept(tmp_path):
    trained = Tokenizer.train(["a red pea", "two peas"], vocab_size=530, length=16)
    assert trained.related is None
    related = {"fruit": ("pea", "red pea"), "crimson": ("red",)}
    trained.with_words(["lime"], related).save(str(tmp_path))
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.related == related
    assert loaded.with_words([]).related == loaded.with_word("<dog>", 2).related == related
    assert loaded.with_words([], {"crimson": ("pea",)}).related == related | {"crimson": ("pea",)}
    assert loaded.fingerprint == trained.fingerprint  # they change no id
    (tmp_path / "related_words.txt").write_text("\n: \npet\n")
    assert Tokenizer.load(str(tmp_path)).related == {}


def test_too_many_words_are_no_vocabulary(monkeypatch):
    monkeypatch.setattr("jaxdiff.data.tokenizer.MOST_WORDS", 3)
    assert Tokenizer.train(["one two three"], vocab_size=530).words == {"one", "two", "three"}
    assert Tokenizer.train(["one two", "three four"], vocab_size=530).words is None
