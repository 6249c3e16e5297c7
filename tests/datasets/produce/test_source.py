"""Produce: random access, correct captions, held-out combinations."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.data.sources.base import Source
from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.datasets.produce.scene import (
    COLOURS,
    KINDS,
    Item,
    Scene,
    held_out,
    sample_group,
    sample_pair,
    sample_single,
)
from jaxdiff.datasets.produce.source import RIPE, SIZE_WORDS, Produce, caption, full_caption
from jaxdiff.errors import UserError
from jaxdiff.pretrained.load import SHIPPED


def test_a_record_depends_on_seed_split_and_index_alone():
    first, again = Produce(length=10), Produce(length=1000)
    np.testing.assert_array_equal(first[7]["image"], again[7]["image"])
    assert first[7]["captions"] == again[7]["captions"]
    for other in (Produce(seed=1)[7], Produce(split="held_out")[7], Produce()[8]):
        assert (other["image"] != first[7]["image"]).any()


def test_records_have_image_captions_and_name():
    source: Source = Produce(length=3)
    record = source[2]
    assert record["image"].shape == (64, 64, 3)
    assert record["image"].dtype == np.uint8
    assert record["name"] == "produce/train/2"
    assert len(source) == 3
    with pytest.raises(IndexError):
        source[3]


def test_one_colour_of_each_kind_is_held_out_and_never_its_ripe_one():
    for kind in KINDS:
        assert sum(held_out(kind, colour) for colour in COLOURS) == 1
    assert not any(held_out(kind, colour) for kind, colour in RIPE.items())
    assert not held_out("pea", "green")
    assert not held_out("pea pod", "green")
    assert held_out("banana", "blue")  # stated in the docstring


def has_held_out(scene):
    return any(held_out(item.kind, item.colour) for item in scene.items)


def test_no_training_scene_has_a_held_out_combination():
    train, rest = Produce(), Produce(split="held_out")
    assert not any(has_held_out(train.scene(i)) for i in range(600))
    assert all(has_held_out(rest.scene(i)) for i in range(100))
    assert all(len(rest.scene(i).items) == rest.scene(i).count == 1 for i in range(100))


def test_the_mix_of_scenes_follows_the_fractions():
    source = Produce(group_fraction=0.2, pair_fraction=0.5)
    scenes = [source.scene(i) for i in range(700)]
    assert np.mean([scene.count > 1 for scene in scenes]) == pytest.approx(0.2, abs=0.07)
    assert np.mean([len(scene.items) == 2 for scene in scenes]) == pytest.approx(0.5, abs=0.07)


def test_captions_name_the_kind_and_never_a_wrong_attribute():
    source = Produce(pair_fraction=0.0, group_fraction=0.0)
    for i in range(60):
        item = source.scene(i).items[0]
        for text in source[i]["captions"]:
            words = set(text.split())
            assert item.kind in text
            assert not (words & set(COLOURS)) - {item.colour}
            for size, names in SIZE_WORDS.items():
                assert size == item.size or not words & set(names)
            if "ripe" in words:
                assert item.colour == RIPE[item.kind]
            if "unripe" in words:
                assert item.colour == "green"
            assert not item.stem or "without" not in words
            assert item.stem or "with" not in words


def test_captions_omit_attributes_at_the_stated_rates():
    source = Produce(pair_fraction=0.0, group_fraction=0.0)
    texts = [caption(source.scene(i), np.random.default_rng((2, i))) for i in range(400)]
    said = np.mean(["stem" in text for text in texts])
    coloured = np.mean([bool(set(t.split()) & {*COLOURS, "ripe", "unripe"}) for t in texts])
    assert said == pytest.approx(0.75, abs=0.07)
    assert coloured == pytest.approx(0.85, abs=0.06)


def test_a_fraction_of_the_captions_is_full():
    source = Produce(pair_fraction=0.0, group_fraction=0.0, length=200, full_fraction=0.5)
    texts = [text for i in range(200) for text in source[i]["captions"]]

    def is_full(text):
        words = set(text.split())
        said = [{*COLOURS, "ripe", "unripe"}, {"with", "without"}, {"on", "at", "in", "near"}]
        sizes = {word for names in SIZE_WORDS.values() for word in names}
        return all(words & options for options in [*said, sizes])

    by_chance = 0.75 * 0.85 * 0.75 * 0.7
    assert np.mean([is_full(t) for t in texts]) == pytest.approx(0.5 + 0.5 * by_chance, abs=0.08)
    every = dataclasses.replace(source, full_fraction=1.0)
    assert all(is_full(text) for i in range(50) for text in every[i]["captions"])


def test_the_vocabulary_is_small_and_captions_are_short():
    source = Produce()
    texts = [caption(source.scene(i), np.random.default_rng((2, i))) for i in range(700)]
    assert len({word for text in texts for word in text.split()}) < 120
    assert max(len(text.split()) for text in texts) <= 24
    assert all(text == text.lower() for text in texts)
    assert not any(" a a" in f" {text}" or " a o" in f" {text}" for text in texts)


def test_full_captions_of_different_scenes_differ():
    for sample in (sample_single, sample_group, sample_pair):
        scenes = {sample(np.random.default_rng(i), "train") for i in range(200)}
        assert len({full_caption(scene) for scene in scenes}) == len(scenes)


def test_full_captions_read_as_english():
    pea = Item(kind="pea", colour="green", size="small", stem=False)
    tomato = Item(kind="tomato", colour="orange", size="medium", stem=True)
    assert (
        full_caption(Scene(items=(pea,), position="left"))
        == "a small green pea without a stem on the left"
    )
    assert full_caption(Scene(items=(tomato,), count=2)) == "two medium orange tomatoes with stems"
    assert (
        full_caption(Scene(items=(pea, tomato), relation="above"))
        == "a small green pea without a stem above a medium orange tomato with a stem"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 8},
        {"length": 0},
        {"seed": -1},
        {"group_fraction": -0.1},
        {"pair_fraction": 1.1},
        {"pair_fraction": float("nan")},
        {"group_fraction": 0.6, "pair_fraction": 0.6},
        {"captions_per_image": 0},
        {"full_fraction": 1.5},
    ],
)
def test_fields_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Produce(**settings).check()


def test_the_fractions_may_exclude_single_objects():
    Produce(group_fraction=0.4, pair_fraction=0.6).check()
    Produce(group_fraction=0.0, pair_fraction=1.0).check()


def test_the_vocabulary_has_the_words_of_all_captions():
    source = Produce(size=32, length=3000)
    vocabulary = source.vocabulary
    words = {
        word for i in range(0, 3000, 10) for c in source[i]["captions"] for word in words_of(c)
    }
    assert words <= vocabulary
    assert {"pea", "medium", "sized", "strawberries"} <= vocabulary
    assert "globe" not in vocabulary
    related = source.related_words
    assert not vocabulary & set(related)
    assert vocabulary >= {w for names in related.values() for n in names for w in words_of(n)}
    shipped = Tokenizer.load(str(SHIPPED / "produce" / "tokenizers" / "text"))
    assert (shipped.words, shipped.related) == (vocabulary, related)
