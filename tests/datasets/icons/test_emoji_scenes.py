import dataclasses
import pickle
from itertools import combinations

import numpy as np
import pytest

from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes, plural, prompt_of
from jaxdiff.datasets.icons.names import held_out_pair, held_out_style
from jaxdiff.datasets.icons.packages import package_of
from jaxdiff.datasets.icons.scene import GRID, IconScene, SceneItem
from jaxdiff.datasets.scenes import DIRECTIONS
from jaxdiff.errors import UserError
from tests.datasets.icons.tiny import THINGS, write_names, write_package

COUNT = 300
CAT = SceneItem("cat", "fluent-emoji-flat")


@pytest.fixture(scope="module")
def source(places):
    source = EmojiScenes(size=64, length=COUNT, **places)
    source.check()
    return source


@pytest.fixture(scope="module")
def held_out(source):
    return dataclasses.replace(source, split="held_out")


@pytest.fixture(scope="module")
def scenes(source):
    return [source.scene(index) for index in range(COUNT)]


def test_a_record_is_a_function_of_seed_and_index(source):
    again = pickle.loads(pickle.dumps(source))
    other = dataclasses.replace(source, seed=1)
    for index in (0, 7, COUNT - 1):
        record, same = source[index], again[index]
        np.testing.assert_array_equal(record["image"], same["image"])
        assert record["captions"] == same["captions"]
        assert record["image"].shape == (64, 64, 3)
    assert any(source[i]["captions"] != other[i]["captions"] for i in range(5))
    with pytest.raises(IndexError, match="outside"):
        source[COUNT]


def test_training_has_no_held_out_style_or_pair(scenes):
    for scene in scenes:
        assert all(held_out_style(item.thing) != item.style for item in scene.items)
        things = [item.thing for item in scene.items]
        assert not any(held_out_pair(*pair) for pair in combinations(things, 2))
    kinds = {(len(scene.items), scene.count) for scene in scenes}
    assert kinds == {(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)}
    assert {item.thing for scene in scenes for item in scene.items} == set(THINGS)


def test_the_held_out_split_has_only_held_out_combinations(held_out):
    scenes = [held_out.scene(index) for index in range(60)]
    assert {len(scene.items) for scene in scenes} == {1, 2}
    for scene in scenes:
        if len(scene.items) == 1:
            assert held_out_style(scene.items[0].thing) == scene.items[0].style
        else:
            assert held_out_pair(*(item.thing for item in scene.items))
            assert all(held_out_style(item.thing) != item.style for item in scene.items)


def test_boxes_are_in_the_image_and_pairs_where_the_relation_says(scenes):
    for scene in scenes:
        assert len(scene.boxes) == max(scene.count, len(scene.items))
        for x, y, side in scene.boxes:
            assert side / 2 - 0.01 <= x <= 1.01 - side / 2
            assert side / 2 - 0.01 <= y <= 1.01 - side / 2
            assert x % GRID == 0
            assert y % GRID == 0
        if scene.relation is not None:
            apart = np.subtract(scene.boxes[0][:2], scene.boxes[1][:2])
            assert apart @ DIRECTIONS[scene.relation] > 0.25


def test_drawings_are_where_their_boxes_are(source):
    scene = IconScene(
        items=(CAT,), boxes=((0.75, 0.5, 0.4),), background="white", colour=(255, 255, 255)
    )
    found = np.argwhere((source.compose(scene) < 250).any(-1))
    assert found.mean(0) == pytest.approx([31.5, 47.5], abs=1.5)
    assert np.ptp(found, axis=0).max() == pytest.approx(0.4 * 64, abs=2)


def test_captions_name_what_is_there(source, scenes):
    rng = np.random.default_rng(0)
    for scene in scenes[:100]:
        text = source.caption(scene, rng, full=True)
        assert text == text.lower()
        assert f"on {scene.background}" in text or f"{scene.background} background" in text
        if scene.count > 1:
            assert {2: "two", 3: "three"}[scene.count] in text
            assert " drawings of " in text
        if scene.size in ("small", "large"):
            assert any(word in text for word in ("small", "little", "tiny", "large", "big"))


def test_prompts_have_fixed_wording(source):
    scene = next(s for s in map(source.scene, range(COUNT)) if s.relation and len(s.items) == 2)
    changes = {"items": (CAT, SceneItem("rocket", CAT.style)), "relation": "left of"}
    text = prompt_of(dataclasses.replace(scene, **changes))
    assert text == "a flat drawing of a cat to the left of a rocket"
    changes["items"] = (CAT, SceneItem("rocket", "noto"))
    assert prompt_of(dataclasses.replace(scene, **changes)) == (
        "a flat drawing of a cat to the left of a cartoon drawing of a rocket"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("cat", "cats"), ("fox", "foxes"), ("strawberry", "strawberries"), ("donkey", "donkeys")),
        *(
            ("tropical fish", "tropical fish"),
            ("mouse", "mice"),
            ("computer mouse", "computer mice"),
        ),
        *(("sushi", None), ("grapes", None), ("glasses", None), ("church", "churches")),
    ],
)
def test_plurals(name, expected):
    assert plural(name) == expected


def test_the_vocabulary_has_the_words_of_captions(source):
    assert {"cat", "kitten", "flat", "two", "left", "blue"} <= source.vocabulary
    related = source.related_words
    assert not source.vocabulary & related.keys()
    assert related["pet"] == ("cat", "dog")
    assert related["puppy"] == ("dog",)
    assert related["beneath"] == ("below", "under")
    assert "lorry" not in related  # there is no vehicle but a rocket


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (THINGS, {"split": "held_out"}),
        (THINGS, {"split": "held_out", "pair_fraction": 0.0}),
        (["arrow"], {}),
        (["arrow"], {"pair_fraction": 0.0, "trio_fraction": 0.0}),
    ],
)
def test_sets_without_drawings_for_a_split_are_refused_at_the_start(names, fields, tmp_path):
    """Only the default sets have held-out styles."""
    icons = {name: {"body": '<circle cx="8" cy="8" r="7"/>'} for name in names}
    write_package(tmp_path, package_of("lines"), {"icons.json": {"icons": icons}})
    write_names(tmp_path)
    places = {"folder": str(tmp_path), "cache": str(tmp_path / "cache")}
    scenes = EmojiScenes(sets=("lines",), size=32, **places)
    if names is THINGS:
        scenes.check()
    with pytest.raises(UserError, match=r"data\.source\.sets have no drawings .* noto"):
        dataclasses.replace(scenes, **fields).check()


def test_fractions_above_one_are_refused(source):
    with pytest.raises(UserError, match="sum to at most 1"):
        dataclasses.replace(source, group_fraction=0.7).check()
