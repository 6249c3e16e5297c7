"""Rendered images show their scene, with separate objects inside the image, deterministically."""

import numpy as np
import pytest
from scipy import ndimage

from jaxdiff.datasets.produce.rendering import EXTENT, HALF, TEXELS, coverage, render, template
from jaxdiff.datasets.produce.scene import (
    COLOURS,
    KINDS,
    POSITIONS,
    SIZES,
    Item,
    Scene,
    sample_group,
    sample_pair,
)


def single(kind="pear", colour="red", size="medium", stem=False, position="centre"):
    item = Item(kind=kind, colour=colour, size=size, stem=stem)
    return Scene(items=(item,), position=position)


def body_of(image):
    pixels = image.astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


def dark_of(image):
    return image.max(-1) < 90


def longest_extent(mask):
    rows, columns = np.nonzero(mask)
    angle = np.linspace(0, np.pi, 90)
    along = columns[:, None] * np.cos(angle) + rows[:, None] * np.sin(angle)
    return np.ptp(along, axis=0).max() + 1


def test_rendering_is_a_function_of_the_seed():
    first, again, other = (render(single(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("kind", KINDS)
def test_longest_extent_follows_the_size_for_every_kind(kind):
    for size in SIZES:
        scene = single(kind=kind, size=size)
        extents = [
            longest_extent(body_of(render(scene, np.random.default_rng(seed)))) for seed in range(5)
        ]
        assert np.mean(extents) == pytest.approx(EXTENT[size], rel=0.08)


@pytest.mark.parametrize("colour", COLOURS)
def test_only_stems_are_dark(colour):
    for kind in KINDS:
        for size in SIZES:
            bare = render(single(kind, colour, size), np.random.default_rng(3))
            stemmed = render(single(kind, colour, size, stem=True), np.random.default_rng(3))
            assert not dark_of(bare).any()
            assert dark_of(stemmed).sum() >= 15


def test_a_single_object_is_at_its_position():
    expected = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    for position in POSITIONS:
        image = render(single(position=position), np.random.default_rng(5))
        y, x = ndimage.center_of_mass(body_of(image))
        offset = np.array([x, y]) - 31.5
        np.testing.assert_allclose(
            offset, 12 * np.array(expected.get(position, (0, 0))), rtol=0, atol=3.5
        )


def test_objects_are_separate_and_inside_the_image():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scene = (sample_pair, sample_group)[seed % 2](rng, "train")
        mask = body_of(render(scene, rng))
        parts, count = ndimage.label(mask)
        large = sum((parts == i).sum() >= 15 for i in range(1, count + 1))
        assert large == len(scene.items) * scene.count
        frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert frame.sum() <= 2


def test_images_scale_with_their_size():
    small = render(single(), np.random.default_rng(4), 64)
    large = render(single(), np.random.default_rng(4), 128)
    assert large.shape == (128, 128, 3)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_a_distance_near_its_edge(kind):
    body = template(kind).planes[..., 0]
    spacing = 2 * HALF / (TEXELS - 1)
    steepness = np.hypot(*np.gradient(body, spacing))
    assert np.median(steepness[np.abs(body) < 0.03]) == pytest.approx(1, abs=0.15)


def test_coverage_falls_from_one_to_zero_over_a_pixel():
    np.testing.assert_allclose(coverage(np.array([-0.5, 0.0, 0.5])), [1, 0.5, 0])
