import numpy as np
import pytest

from jaxdiff.explore.axes import (
    ATTRIBUTES,
    distinctive_words,
    linear_probe,
    principal_components,
    rescale,
    text_scores,
)


def blob(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_a_text_axis_orders_images_by_similarity_to_the_two_texts():
    low, high = np.eye(3)[0], np.eye(3)[1]
    images = np.stack([low, (low + high) / 2**0.5, high, np.eye(3)[2]])
    np.testing.assert_allclose(text_scores(images, low, high), [-1, 0, 1, 0], atol=1e-12)


def test_principal_components_are_the_directions_of_largest_variance():
    points = blob(500, 6) * [0.1, 9.0, 0.1, 3.0, 0.1, 0.1]
    along, fractions = principal_components(points + 7, 2)
    assert abs(np.corrcoef(along[:, 0], points[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(along[:, 1], points[:, 3])[0, 1]) > 0.99
    np.testing.assert_allclose(fractions, [0.9, 0.1], atol=0.03)


def test_the_sign_of_a_component_is_independent_of_the_sign_of_the_points():
    points = blob(20, 3)
    along, _ = principal_components(points, 2)
    np.testing.assert_allclose(
        np.abs(principal_components(-points, 2)[0]), np.abs(along), atol=1e-9
    )
    assert (along.max(0) >= -along.min(0)).all()


def test_a_probe_predicts_a_number_that_is_linear_in_the_space():
    points = blob(120, 8)
    target = points @ np.arange(8) + 5
    predicted, r_squared = linear_probe(points, target)
    assert r_squared > 0.99
    np.testing.assert_allclose(predicted, target, atol=1)


def test_a_probe_does_not_fit_noise_in_many_dimensions():
    _, r_squared = linear_probe(blob(60, 500), blob(60, 1, seed=1)[:, 0])
    assert r_squared < 0.1


def test_a_constant_number_has_an_r_squared_of_zero():
    predicted, r_squared = linear_probe(blob(10, 3), np.full(10, 2.0))
    np.testing.assert_allclose(predicted, 2)
    assert r_squared == 0


def test_distinctive_words_are_absent_at_the_other_end():
    captions = ["a green pea"] * 10 + ["a blue pear"] * 10 + ["a red tomato"] * 10
    low, high = distinctive_words(np.arange(30.0), captions)
    assert low == "green, pea"
    assert high == "red, tomato"


def test_equal_captions_have_no_distinctive_words():
    assert distinctive_words(np.arange(10.0), ["a pea"] * 10) == ("", "")


def test_coordinates_fill_the_unit_interval_and_outliers_are_clipped():
    values = rescale(np.concatenate([np.linspace(0, 1, 300), [1000.0]]))
    assert values.min() == 0
    assert values.max() == 1
    assert np.sort(values)[150] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(rescale(np.full(5, 3.0)), 0)


def test_attributes_of_a_scene_are_those_of_its_first_item():
    from jaxdiff.datasets.produce.scene import Item, Scene

    first = Item(kind="pea", colour="green", size="small", stem=True)
    other = Item(kind="pear", colour="red", size="large", stem=False)
    scene = Scene(items=(first, other), relation="left of")
    assert ATTRIBUTES["stem"].of(scene) == 1
    assert ATTRIBUTES["size"].of(scene) < ATTRIBUTES["size"].of(Scene(items=(other,)))
    assert ATTRIBUTES["hue"].of(scene) > ATTRIBUTES["hue"].of(Scene(items=(other,)))
