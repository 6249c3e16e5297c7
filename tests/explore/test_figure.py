import numpy as np
import pytest

from jaxdiff.explore.axes import Axis
from jaxdiff.explore.figure import BACKGROUND, Panel, assign_cells, render_figure


def test_no_two_points_share_a_cell():
    cells = assign_cells(np.full(20, 0.5), np.full(20, 0.5), 6)
    assert len({tuple(cell) for cell in cells.tolist()}) == 20
    assert cells.min() >= 0
    assert cells.max() < 6


def test_points_far_apart_get_the_cell_they_lie_in():
    x, y = np.array([0.1, 0.9, 0.5]), np.array([0.9, 0.1, 0.5])
    np.testing.assert_array_equal(assign_cells(x, y, 5), [[0, 0], [4, 4], [2, 2]])


def axis(values, low="low", high="high") -> Axis:
    return Axis(
        key="k", name="name", low=low, high=high, values=np.asarray(values), group="learned"
    )


@pytest.fixture(scope="module")
def red_to_blue() -> np.ndarray:
    """Nine plain images, each redder and less blue than the one before."""
    images = np.zeros((9, 8, 8, 3), np.uint8)
    images[..., 0] = np.linspace(0, 255, 9)[:, None, None]
    images[..., 2] = 255 - images[..., 0]
    return images


def test_images_are_ordered_along_the_horizontal_axis(red_to_blue):
    panel = Panel("chosen axes", axis(np.arange(9.0)), axis(np.arange(9) % 3.0))
    picture = render_figure(red_to_blue, "title", [panel], side=160).astype(int)
    coloured = (picture.sum(-1) < 300) & (picture[..., 1] < 60) & (picture.max(-1) > 120)
    _, columns = np.nonzero(coloured)
    left = picture[:, : int(np.median(columns))][coloured[:, : int(np.median(columns))]]
    right = picture[:, int(np.median(columns)) :][coloured[:, int(np.median(columns)) :]]
    assert left[:, 2].mean() > left[:, 0].mean() + 60
    assert right[:, 0].mean() > right[:, 2].mean() + 60


def test_panels_are_side_by_side(red_to_blue):
    panel = Panel("chosen axes", axis(np.arange(9.0)), axis(np.arange(9.0)))
    one, two = (render_figure(red_to_blue, "title", [panel] * n, side=160) for n in (1, 2))
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] == 2 * one.shape[1]
    np.testing.assert_array_equal(two[0, 0], BACKGROUND)


def test_the_end_labels_are_in_the_figure(red_to_blue):
    def rendered(low: str) -> np.ndarray:
        x = axis(np.arange(9.0), low=low)
        return render_figure(red_to_blue, "title", [Panel("p", x, axis(np.arange(9.0)))], side=160)

    assert (rendered("green") != rendered("small")).any()
