"""Scores lie between the chance of shuffled prompts and the ceiling of true drawings."""

import numpy as np

from jaxdiff.data.drawing import render
from jaxdiff.data.produce import Produce
from jaxdiff.data.scene import allowed_in_training
from jaxdiff.evaluation.produce_score import ceiling, evaluation_scenes, report, score


def test_scenes_are_the_same_at_every_call_and_of_their_split():
    for kind in ("single", "two"):
        assert evaluation_scenes(20, "train", kind) == evaluation_scenes(30, "train", kind)[:20]
        assert all(allowed_in_training(s) for s in evaluation_scenes(50, "train", kind))
        assert not any(allowed_in_training(s) for s in evaluation_scenes(50, "held_out", kind))
    training = [Produce(split="held_out").scene(i) for i in range(20)]
    assert evaluation_scenes(20, "held_out") != training


def test_true_drawings_score_like_the_ceiling_and_blank_ones_nothing():
    scenes = evaluation_scenes(40, "held_out")
    images = [render(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    found = report(images, scenes)
    assert found.score["joint"] >= 0.95
    assert found.ceiling == ceiling(scenes)
    assert found.chance["joint"] < 0.2
    assert found.chance["kind"] < 0.5
    blank = score(np.full((40, 64, 64, 3), 240, np.uint8), scenes)
    assert set(blank.values()) == {0.0}


def test_only_attributes_of_the_scenes_are_reported():
    single, two = (evaluation_scenes(4, "train", kind) for kind in ("single", "two"))
    assert "position" in ceiling(single)
    assert "relation" not in ceiling(single)
    assert "relation" in ceiling(two)
    assert "position" not in ceiling(two)


def test_the_table_has_a_line_for_each_attribute():
    scenes = evaluation_scenes(3, "train")
    images = [render(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    lines = report(images, scenes).table().splitlines()
    assert len(lines) == 2 + len(ceiling(scenes))
    assert "3 samples" in lines[-1]
