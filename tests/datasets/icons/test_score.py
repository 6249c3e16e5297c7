import dataclasses

import numpy as np
import pytest

from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.datasets.icons.names import held_out_pair, held_out_style
from jaxdiff.datasets.icons.score import IconJudge, icon_prompts, icon_scenes

COUNT = 24
WRONG_SIDE = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


@pytest.fixture(scope="module")
def source(places):
    return EmojiScenes(size=64, **places)


@pytest.fixture(scope="module")
def judge(source):
    return IconJudge(source)


def compose(source, scenes):
    return np.stack([source.compose(scene) for scene in scenes])


@pytest.mark.parametrize("share", ["train", "held_out"])
@pytest.mark.parametrize("kind", ["single", "two"])
def test_true_scenes_are_right_and_other_prompts_are_not(share, kind, source, judge):
    scenes = icon_scenes(source, COUNT, share, kind)
    result = judge.score(compose(source, scenes), scenes)
    assert result.score["joint"] >= 0.9
    assert result.ceiling["joint"] >= 0.75
    assert result.chance["joint"] <= 0.1
    assert result.score.keys() == result.ceiling.keys() == result.chance.keys()
    assert result.score == judge.fractions(compose(source, scenes), scenes)


def test_scenes_are_of_the_share_and_always_the_same(source):
    singles = icon_scenes(source, COUNT, "held_out", "single")
    assert all(held_out_style(s.items[0].thing) == s.items[0].style for s in singles)
    pairs = icon_scenes(source, COUNT, "held_out", "two")
    assert all(held_out_pair(*(item.thing for item in s.items)) for s in pairs)
    assert pairs == icon_scenes(dataclasses.replace(source, seed=5), COUNT, "held_out", "two")
    assert len(set(icon_prompts(pairs))) > 5


def test_another_style_only_fails_the_style(source, judge):
    scene = icon_scenes(source, 1, "train", "single")[0]
    item = scene.items[0]
    others = [style for style in source.catalogue.styles[item.thing] if style != item.style]
    other = dataclasses.replace(scene, items=(item._replace(style=others[0]),))
    result = judge.fractions(compose(source, [other]), [scene])
    assert result == {"thing": 1.0, "style": 0.0, "joint": 0.0}


def test_things_in_another_relation_only_fail_the_relation(source, judge):
    scene = icon_scenes(source, 1, "train", "two")[0]
    image = compose(source, [scene])
    assert judge.fractions(image, [scene]) == {"things": 1.0, "joint": 1.0}
    reverse = dataclasses.replace(scene, items=scene.items[::-1])
    turned = dataclasses.replace(scene, relation=WRONG_SIDE[scene.relation])
    for wrong in (reverse, turned):
        assert judge.fractions(image, [wrong]) == {"things": 1.0, "joint": 0.0}


def test_empty_images_are_no_error(source, judge):
    scenes = icon_scenes(source, 2, "train", "two")
    result = judge.fractions(np.full((2, 64, 64, 3), 200, np.uint8), scenes)
    assert result["joint"] == 0


def test_a_wrong_number_of_images_is_refused(source, judge):
    scenes = icon_scenes(source, 2, "train", "single")
    with pytest.raises(ValueError, match="1 images for 2 scenes"):
        judge.score(compose(source, scenes[:1]), scenes)
