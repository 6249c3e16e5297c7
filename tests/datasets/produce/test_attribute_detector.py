"""The reader finds in true drawings what was drawn, and in other pictures nothing."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.datasets.produce.attribute_detector import check, read
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import KINDS, SIZES, Item, Scene
from jaxdiff.datasets.produce.score import evaluation_scenes


def joint(scenes, spoil=lambda image, rng: image):
    found = []
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng((9, i))
        found.append(check(scene, read(spoil(render(scene, rng), rng)))["joint"])
    return np.mean(found)


def noisy(image, rng):
    noise = rng.integers(-6, 7, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def soft(image, rng):
    return np.round(ndimage.gaussian_filter(image.astype(float), (0.5, 0.5, 0))).astype(np.uint8)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", ["single", "two"])
def test_true_drawings_are_read(split, kind):
    assert joint(evaluation_scenes(50, split, kind)) >= 0.97


@pytest.mark.parametrize("spoil", [noisy, soft])
def test_slight_noise_and_softness_hardly_matter(spoil):
    assert joint(evaluation_scenes(50, "train"), spoil) >= 0.96


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_at_every_size(kind):
    for size in SIZES:
        item = Item(kind=kind, colour="red", size=size, stem=True)
        scene = Scene(items=(item,), position="centre")
        (reading,) = read(render(scene, np.random.default_rng(2)))
        assert (reading.kind, reading.size, reading.stem) == (kind, size, True)


def test_mush_is_of_no_kind():
    y, x = np.mgrid[:64, :64] - 31.5
    background = np.full((64, 64, 3), 235, np.uint8)
    angle = np.arctan2(y, x)
    crosses = (np.minimum(abs(x), abs(y)) < 4) & (np.maximum(abs(x), abs(y)) < 15)
    rays = np.hypot(x, y) < 10 + 7 * np.cos(4 * angle)
    ring = abs(np.hypot(x, y) - 12) < 3
    assert read(background) == []
    for mask in (crosses, rays, ring):
        picture = np.where(mask[..., None], [220, 30, 40], background).astype(np.uint8)
        readings = read(picture)
        assert [reading.kind for reading in readings] == [None]


def test_check_finds_each_single_mistake():
    item = Item(kind="lemon", colour="blue", size="medium", stem=True)
    scene = Scene(items=(item,), position="left")
    readings = read(render(scene, np.random.default_rng(0)))
    assert all(check(scene, readings).values())
    changes = {"kind": "pear", "colour": "red", "size": "small", "stem": False}
    for name, value in changes.items():
        other = dataclasses.replace(scene, items=(dataclasses.replace(item, **{name: value}),))
        found = check(other, readings)
        assert {key for key, right in found.items() if not right} == {name, "joint"}
    elsewhere = check(dataclasses.replace(scene, position="top"), readings)
    assert {key for key, right in elsewhere.items() if not right} == {"position", "joint"}
    assert not check(Scene(items=(item,), count=2), readings)["count"]
    assert not any(check(scene, []).values())


def test_a_reversed_relation_is_wrong_though_every_item_is_right():
    first = Item(kind="banana", colour="yellow", size="small", stem=False)
    second = Item(kind="tomato", colour="red", size="medium", stem=True)
    scene = Scene(items=(first, second), relation="above")
    readings = read(render(scene, np.random.default_rng(0)))
    assert all(check(scene, readings).values())
    found = check(dataclasses.replace(scene, relation="below"), readings)
    assert {key for key, right in found.items() if not right} == {"relation", "joint"}
    swapped = Scene(items=(second, first), relation="below")
    assert all(check(swapped, readings).values())
