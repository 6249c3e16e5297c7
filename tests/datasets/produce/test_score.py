"""Scores lie between the chance of rolled prompts and the ceiling of rendered scenes."""

import numpy as np
import pytest

from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import held_out
from jaxdiff.datasets.produce.score import (
    chance,
    evaluation_scenes,
    render_scenes,
    score_scenes,
)
from jaxdiff.datasets.produce.source import Produce


def test_scenes_are_the_same_at_every_call_and_of_their_split():
    for kind in ("single", "two"):
        assert evaluation_scenes(20, "train", kind) == evaluation_scenes(30, "train", kind)[:20]
        for split in ("train", "held_out"):
            firsts = [scene.items[0] for scene in evaluation_scenes(50, split, kind)]
            assert all(held_out(x.kind, x.colour) == (split == "held_out") for x in firsts)
    training = [Produce(split="held_out").scene(i) for i in range(20)]
    assert evaluation_scenes(20, "held_out") != training


def test_rendered_scenes_reach_the_ceiling_and_blank_images_score_0():
    scenes = evaluation_scenes(40, "held_out")
    images = [render(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    assert score_scenes(images, scenes)["joint"] >= 0.95
    assert score_scenes(render_scenes(scenes), scenes)["joint"] >= 0.95
    by_chance = chance(images, scenes)
    assert by_chance["joint"] < 0.2
    assert by_chance["kind"] < 0.5
    blank = score_scenes(np.full((40, 64, 64, 3), 240, np.uint8), scenes)
    assert set(blank.values()) == {0.0}


def test_only_attributes_of_the_scenes_are_reported():
    single, two = (
        score_scenes(render_scenes(scenes), scenes)
        for scenes in (evaluation_scenes(4, "train", kind) for kind in ("single", "two"))
    )
    assert "position" in single
    assert "relation" not in single
    assert "relation" in two
    assert "position" not in two


@pytest.mark.parametrize("count", [2, 3])
def test_chance_never_uses_an_images_own_scene(count):
    scenes = evaluation_scenes(count, "train")
    images = [render(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    assert score_scenes(images, scenes)["joint"] == 1.0
    assert chance(images, scenes)["joint"] == 0.0
