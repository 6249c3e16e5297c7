import numpy as np
import pytest

from jaxdiff.explore.axes import TRUTHS, end_words, principal, read_out, spread, text_scores


def blob(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_a_text_axis_orders_images_by_which_text_they_are_nearer_to():
    low, high = np.eye(3)[0], np.eye(3)[1]
    images = np.stack([low, (low + high) / 2**0.5, high, np.eye(3)[2]])
    np.testing.assert_allclose(text_scores(images, low, high), [-1, 0, 1, 0], atol=1e-12)


def test_principal_components_are_the_directions_in_which_points_were_spread():
    points = blob(500, 6) * [0.1, 9.0, 0.1, 3.0, 0.1, 0.1]
    along, shares = principal(points + 7, 2)
    assert abs(np.corrcoef(along[:, 0], points[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(along[:, 1], points[:, 3])[0, 1]) > 0.99
    np.testing.assert_allclose(shares, [0.9, 0.1], atol=0.03)


def test_the_sign_of_a_component_does_not_depend_on_that_of_the_points():
    points = blob(20, 3)
    along, _ = principal(points, 2)
    np.testing.assert_allclose(np.abs(principal(-points, 2)[0]), np.abs(along), atol=1e-9)
    assert (along.max(0) >= -along.min(0)).all()


def test_a_figure_that_lies_along_a_direction_is_read_out_of_a_space():
    points = blob(120, 8)
    target = points @ np.arange(8) + 5
    read, told = read_out(points, target)
    assert told > 0.99
    np.testing.assert_allclose(read, target, atol=1)


def test_what_a_space_does_not_know_is_not_read_out_of_it_however_many_its_dimensions():
    _, told = read_out(blob(60, 500), blob(60, 1, seed=1)[:, 0])
    assert told < 0.1


def test_a_figure_that_is_the_same_for_all_tells_nothing():
    read, told = read_out(blob(10, 3), np.full(10, 2.0))
    np.testing.assert_allclose(read, 2)
    assert told == 0


def test_the_words_of_an_end_are_those_that_the_other_end_lacks():
    captions = ["a green pea"] * 10 + ["a blue pear"] * 10 + ["a red tomato"] * 10
    low, high = end_words(np.arange(30.0), captions)
    assert low == "green, pea"
    assert high == "red, tomato"


def test_ends_that_are_told_alike_have_no_words():
    assert end_words(np.arange(10.0), ["a pea"] * 10) == ("", "")


def test_coordinates_fill_the_map_and_outliers_stay_at_its_rim():
    values = spread(np.concatenate([np.linspace(0, 1, 300), [1000.0]]))
    assert values.min() == 0
    assert values.max() == 1
    assert np.sort(values)[150] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(spread(np.full(5, 3.0)), 0)


def test_truths_of_a_drawn_scene_are_those_of_its_first_item():
    from jaxdiff.datasets.produce.scene import Item, Scene

    first = Item(kind="pea", colour="green", size="small", stem=True)
    other = Item(kind="pear", colour="red", size="large", stem=False)
    scene = Scene(items=(first, other), relation="left of")
    assert TRUTHS["stem"].of(scene) == 1
    assert TRUTHS["size"].of(scene) < TRUTHS["size"].of(Scene(items=(other,)))
    assert TRUTHS["hue"].of(scene) > TRUTHS["hue"].of(Scene(items=(other,)))
