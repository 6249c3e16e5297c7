import collections
import os
from pathlib import Path

import pytest

from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.datasets.icons.names import (
    _SPOKEN,
    _THINGS,
    STYLES,
    held_out_pair,
    held_out_style,
    icon_spelling,
    read_emoji,
)
from jaxdiff.datasets.icons.source import LEAST_STYLES, Iconify
from jaxdiff.pretrained.load import SHIPPED
from jaxdiff.training.recipe import load_recipe

NAMES = [f"{first} {second}" for first in "abcdefghij" for second in "klmnopqrst"]


@pytest.fixture(scope="module")
def emoji(folder):
    return {one.label: one for one in read_emoji(folder / "emojibase-data")}


def test_things_have_names_from_shortcodes_and_nouns_among_the_tags(emoji):
    assert emoji["cat"].names == ("cat", "kitten")
    assert emoji["rocket"].names == ("rocket", "space ship")
    assert emoji["fox"].names == ("fox",)
    assert emoji["dog"].names == ("dog",)


def test_people_and_flags_are_no_things(emoji):
    assert emoji["woman judge dark skin tone"].thing is None
    assert emoji["japan"].flag
    assert emoji["japan"].thing is None
    assert "regional indicator a" not in emoji


def test_labels_are_spelt_as_icon_sets_spell_them():
    assert icon_spelling("T-Rex") == "t-rex"
    assert icon_spelling("woman\N{RIGHT SINGLE QUOTATION MARK}s hat") == "womans-hat"


def test_half_of_the_things_have_one_held_out_style():
    styles = collections.Counter(held_out_style(name) for name in NAMES)
    assert 35 <= styles[None] <= 65
    assert set(styles) == {None, *STYLES}


def test_the_rules_are_stable():
    assert [held_out_style(name) for name in ("cat", "dog", "rocket", "house")] == HELD_OUT
    assert held_out_pair("cat", "dog") == held_out_pair("dog", "cat")
    pairs = [(a, b) for a in NAMES for b in NAMES if a < b]
    assert sum(held_out_pair(*pair) for pair in pairs) / len(pairs) == pytest.approx(
        1 / 8, abs=0.01
    )


HELD_OUT = [None, "fluent-emoji-flat", None, "twemoji"]


def test_the_shipped_model_knows_250_things_in_three_styles():
    """Of the things of this package; whether the sets draw them all is for the next test."""
    sets = load_recipe("icons").data.source.sets
    words = Tokenizer.load(str(SHIPPED / "icons" / "tokenizers" / "text")).words
    assert words
    labels = [part.strip().replace("\\", "") for part in _THINGS.pattern.split("|")]
    things = {_SPOKEN.get(label, label).replace("-", " ") for label in labels}
    assert all(_THINGS.fullmatch(label) for label in labels)
    assert len([thing for thing in things if words.issuperset(words_of(thing))]) >= 250
    assert {STYLES[name] for name in sets} == {"flat", "shaded", "cartoon"}
    assert words >= {"flat", "shaded", "cartoon"}
    assert len(sets) == LEAST_STYLES == 3
    for thing in ("cat", "rocket", "snowman", "crystal ball", "pizza", "house", "car"):
        assert thing in things
        assert words.issuperset(words_of(thing))


@pytest.mark.skipif("JAXDIFF_ICONS" not in os.environ, reason="JAXDIFF_ICONS names no icon sets")
def test_the_sets_draw_250_things_in_three_styles(tmp_path):
    folder = Path(os.environ["JAXDIFF_ICONS"])
    source = Iconify(subset="things", split="all", size=1, folder=str(folder), cache=str(tmp_path))
    styles = collections.defaultdict(set)
    for icon in source.icons:
        styles[icon.emoji.thing].add(icon.set)
    assert len(styles) >= 250
    assert all(len(found) >= 3 for found in styles.values())
    assert {"cat", "rocket", "snowman", "crystal ball", "pizza", "house"} <= set(styles)
    captions = [text for index in range(len(source)) for text in source[index]["captions"]]
    assert {"a kitten", "a car", "a flat drawing of a cat", "an hourglass"} <= set(captions)
    assert not {"an automobile", "an hourglass done", "a canned food"} & set(captions)
