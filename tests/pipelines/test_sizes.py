import pytest

from jaxdiff.errors import UserError
from jaxdiff.pipelines.sizes import size_of_ratio


@pytest.mark.parametrize(
    ("ratio", "area", "multiple", "size"),
    [
        ("1:1", 64**2, 16, (64, 64)),
        ("16:9", 64**2, 16, (80, 48)),
        ("9:16", 64**2, 16, (48, 80)),
        ("1:1", 512**2, 64, (512, 512)),
        ("3:2", 512**2, 64, (640, 448)),
        ("16:9", 1024**2, 64, (1344, 768)),  # as Stable Diffusion XL was trained
        ("2.35:1", 1024**2, 8, (1568, 664)),
    ],
)
def test_a_ratio_keeps_the_area_about_as_it_is(ratio, area, multiple, size):
    assert size_of_ratio(ratio, area, multiple) == size


@pytest.mark.parametrize("ratio", ["16x9", "16", "a:b", "0:1", "1:0", "-1:2", "1:2:3", "inf:1"])
def test_what_is_no_ratio_is_told(ratio):
    with pytest.raises(UserError, match="expected WIDTH:HEIGHT"):
        size_of_ratio(ratio, 64**2, 16)


def test_a_ratio_too_far_from_square_is_told():
    with pytest.raises(UserError, match="a side shorter than 16"):
        size_of_ratio("40:1", 64**2, 16)
