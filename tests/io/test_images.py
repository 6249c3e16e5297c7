import io

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.errors import UserError
from jaxdiff.io.image_files import read_image_text
from jaxdiff.io.images import (
    GAP,
    GAP_COLOUR,
    animation_bytes,
    grid,
    save_png,
    strip,
    to_uint8,
)


def plain(*levels, side=4):
    """One image of each grey level."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def tile(picture, row, column, side):
    """The pixels of a tile in a grid without captions."""
    top, left = (GAP + i * (side + GAP) for i in (row, column))
    return picture[top : top + side, left : left + side]


def test_to_uint8_inverts_the_scaling_of_every_level_and_clips():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / np.float32(127.5) - 1), levels)
    outside = jnp.array([-7.0, 3.0, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    np.testing.assert_array_equal(to_uint8(outside), [0, 255, 255, 0, 0])


def test_grid_puts_images_in_reading_order_between_light_gaps():
    picture = grid(plain(10, 20, 30, 40, 50), columns=3)
    assert picture.shape == (2 * (4 + GAP) + GAP, 3 * (4 + GAP) + GAP, 3)
    for i, level in enumerate((10, 20, 30, 40, 50)):
        assert (tile(picture, i // 3, i % 3, 4) == level).all()
    assert (tile(picture, 1, 2, 4) == GAP_COLOUR).all()
    assert (picture[:, 4 + GAP : 4 + 2 * GAP] == GAP_COLOUR).all()


def test_grid_is_about_square_and_no_wider_than_its_images():
    assert grid(plain(*range(16))).shape[0] == grid(plain(*range(16))).shape[1]
    assert grid(plain(1, 2), columns=5).shape[1] == 2 * (4 + GAP) + GAP


def test_scale_repeats_pixels():
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 3), np.uint8)
    picture = grid(image, scale=3)[GAP:-GAP, GAP:-GAP]
    np.testing.assert_array_equal(picture[1::3, 1::3], image[0])
    np.testing.assert_array_equal(picture[::3, ::3], picture[2::3, 2::3])


def test_captions_lie_under_their_image_and_inside_its_width():
    side = 80
    images = plain(0, 0, 0, 0, side=side)
    long = "a ripe tomato left of an extraordinarilylongwordthatdoesnotfit pea pod"
    picture = grid(images, columns=2, captions=["", long, "", ""])
    below = picture[GAP + side : -(2 * GAP + side)]
    inked = (below < GAP_COLOUR).any(axis=(0, 2))
    assert inked[side + 2 * GAP :].any()
    assert not inked[: side + GAP].any()
    assert not inked[-GAP:].any()
    # The images themselves are not written on, and rows without captions take no extra space.
    assert (picture[GAP : GAP + side, GAP : GAP + side] == 0).all()
    assert (picture[-GAP - side : -GAP, GAP : GAP + side] == 0).all()


def test_a_longer_caption_takes_more_lines():
    images = plain(0, side=64)
    heights = [grid(images, captions=["pea " * n]).shape[0] for n in (1, 20, 40)]
    assert heights[0] < heights[1] < heights[2]


def test_captions_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        grid(plain(1, 2), captions=["one"])


def test_strip_has_time_from_left_to_right_and_a_row_for_each_image():
    snapshots = np.stack([plain(10 * k, 10 * k + 1) for k in range(3)])
    picture = strip(snapshots)
    for k in range(3):
        for n in range(2):
            assert (tile(picture, n, k, 4) == 10 * k + n).all()
    np.testing.assert_array_equal(strip(snapshots[:, 0]), strip(snapshots[:, :1]))


def test_png_returns_pixels_and_text_of_any_script(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    text = {
        "prompt": "ein grüner Apfel",
        "negative prompt": "青い林檎 🍏\nsecond line",
        "seed": "7",
        "empty": "",
    }
    path = tmp_path / "new" / "picture.png"
    save_png(path, image, text)
    assert read_image_text(path) == text
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    data = path.read_bytes()
    assert data.count(b"tEXt") == 3
    assert data.count(b"iTXt") == 1
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(path, plain(1)[0], {"seed": "1"})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", fail)
    with pytest.raises(UserError, match="no space"):
        save_png(path, plain(2)[0], {"seed": "2"})
    monkeypatch.undo()
    assert read_image_text(path) == {"seed": "1"}


def test_read_image_text_names_the_file_that_is_missing_or_not_an_image(tmp_path):
    with pytest.raises(UserError, match=r"missing.*cannot be read"):
        read_image_text(tmp_path / "missing.png")
    (tmp_path / "noise.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"noise.*is not a readable PNG"):
        read_image_text(tmp_path / "noise.png")
    save_png(tmp_path / "cut.png", np.zeros((64, 64, 3), np.uint8), {"seed": "1"})
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut.*is not a readable PNG"):
        read_image_text(tmp_path / "cut.png")


@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize("ping_pong", [False, True])
def test_an_animation_has_its_frames_and_durations_and_loops(kind, ping_pong):
    levels = [0, 80, 160, 240]
    data = animation_bytes(plain(*levels), kind, seconds=0.25, ping_pong=ping_pong, scale=2)
    shown = [*levels, 160, 80] if ping_pong else levels
    with Image.open(io.BytesIO(data)) as animation:
        assert animation.format == kind.upper()
        assert animation.size == (8, 8)
        assert animation.info["loop"] == 0  # forever
        assert animation.n_frames == len(shown)
        for i, level in enumerate(shown):
            animation.seek(i)
            animation.load()
            assert animation.info["duration"] == 250
            assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - level).max() <= 3


def test_empty_or_too_fast_animations_are_refused():
    with pytest.raises(UserError, match="animation of 0 frames"):
        animation_bytes(plain(0)[:0])
    with pytest.raises(UserError, match=r"0\.001 seconds"):
        animation_bytes(plain(0), seconds=0.001)
    assert animation_bytes(plain(0))[:4] == b"GIF8"
