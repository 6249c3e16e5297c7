"""The detector finds the attributes of rendered scenes, and no kind in other images."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.datasets.produce.attribute_detector import detect, match_attributes
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import KINDS, SIZES, Item, Scene
from jaxdiff.datasets.produce.score import evaluation_scenes


def joint_fraction(scenes, disturb=lambda image, rng: image):
    found = []
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng((9, i))
        found.append(match_attributes(scene, detect(disturb(render(scene, rng), rng)))["joint"])
    return np.mean(found)


def noisy(image, rng):
    noise = rng.integers(-6, 7, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def blurred(image, rng):
    return np.round(ndimage.gaussian_filter(image.astype(float), (0.5, 0.5, 0))).astype(np.uint8)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", ["single", "two"])
def test_rendered_scenes_are_detected(split, kind):
    assert joint_fraction(evaluation_scenes(50, split, kind)) >= 0.97


@pytest.mark.parametrize("disturb", [noisy, blurred])
def test_slight_noise_and_blur_are_tolerated(disturb):
    assert joint_fraction(evaluation_scenes(50, "train"), disturb) >= 0.96


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_detected_at_every_size(kind):
    for size in SIZES:
        item = Item(kind=kind, colour="red", size=size, stem=True)
        scene = Scene(items=(item,), position="centre")
        (detected,) = detect(render(scene, np.random.default_rng(2)))
        assert (detected.kind, detected.size, detected.stem) == (kind, size, True)


def test_other_shapes_have_no_kind():
    y, x = np.mgrid[:64, :64] - 31.5
    background = np.full((64, 64, 3), 235, np.uint8)
    angle = np.arctan2(y, x)
    crosses = (np.minimum(abs(x), abs(y)) < 4) & (np.maximum(abs(x), abs(y)) < 15)
    rays = np.hypot(x, y) < 10 + 7 * np.cos(4 * angle)
    ring = abs(np.hypot(x, y) - 12) < 3
    assert detect(background) == []
    for mask in (crosses, rays, ring):
        image = np.where(mask[..., None], [220, 30, 40], background).astype(np.uint8)
        objects = detect(image)
        assert [detected.kind for detected in objects] == [None]


def test_match_attributes_finds_each_wrong_attribute():
    item = Item(kind="lemon", colour="blue", size="medium", stem=True)
    scene = Scene(items=(item,), position="left")
    objects = detect(render(scene, np.random.default_rng(0)))
    assert all(match_attributes(scene, objects).values())
    changes = {"kind": "pear", "colour": "red", "size": "small", "stem": False}
    for name, value in changes.items():
        other = dataclasses.replace(scene, items=(dataclasses.replace(item, **{name: value}),))
        found = match_attributes(other, objects)
        assert {key for key, correct in found.items() if not correct} == {name, "joint"}
    elsewhere = match_attributes(dataclasses.replace(scene, position="top"), objects)
    assert {key for key, correct in elsewhere.items() if not correct} == {"position", "joint"}
    assert not match_attributes(Scene(items=(item,), count=2), objects)["count"]
    assert not any(match_attributes(scene, []).values())


def test_a_reversed_relation_is_wrong_though_every_item_is_right():
    first = Item(kind="banana", colour="yellow", size="small", stem=False)
    second = Item(kind="tomato", colour="red", size="medium", stem=True)
    scene = Scene(items=(first, second), relation="above")
    objects = detect(render(scene, np.random.default_rng(0)))
    assert all(match_attributes(scene, objects).values())
    found = match_attributes(dataclasses.replace(scene, relation="below"), objects)
    assert {key for key, correct in found.items() if not correct} == {"relation", "joint"}
    swapped = Scene(items=(second, first), relation="below")
    assert all(match_attributes(swapped, objects).values())
