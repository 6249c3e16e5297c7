"""Checked arguments: images, masks, strengths, sizes; and larger canvases."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import UserError
from jaxdiff.pipelines.edit import extend, invert, upscale, variations
from jaxdiff.pipelines.input_images import check_images, check_masks
from jaxdiff.pipelines.inputs import first_step, size_of_ratio, slerp
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.program import latent_mask

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_one_image_or_mask_stands_for_all():
    images = check_images(IMAGE, 3)
    masks = check_masks(np.eye(4, 6), images.shape)
    assert (images.shape, masks.shape) == ((3, 4, 6, 3), (3, 4, 6))
    np.testing.assert_array_equal(images[2], IMAGE)
    np.testing.assert_array_equal(masks[1], np.eye(4, 6))
    np.testing.assert_array_equal(check_images(images, 3), images)
    np.testing.assert_array_equal(check_images(images / 255, 3), images)
    np.testing.assert_array_equal(check_masks(masks > 0, images.shape), masks)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE / 1.0, "values from 0 to 71"),
        (np.full((4, 6, 3), np.nan), "values from nan"),
        (IMAGE.astype(np.int64), "image is int64"),
        (IMAGE[..., 0], r"uint8 \(1, 4, 6\)|uint8 \(4, 6\)"),
        (IMAGE[..., :2], "expected uint8"),
        (np.stack([IMAGE, IMAGE]), "image has 2 for 3 prompts"),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises(UserError, match=message):
        check_images(image, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([Image.new("RGB", (4, 6)), Image.new("RGB", (6, 4))], "image is no array"),
        (Image.new("F", (6, 4)), r"image cannot be read \(its values are floating point"),
        (IMAGE.astype(np.uint16), "image is uint16"),
        (IMAGE > 3, "image is bool"),
        (IMAGE * 1j, "image is complex128"),
        (np.zeros((0, 6, 3), np.uint8), "image is uint8"),
        (IMAGE / 127.5 - 1, "values from -1 to"),
        (np.concatenate([IMAGE, IMAGE[..., :1]], -1), r"uint8 \(1, 4, 6, 4\)"),
    ],
)
def test_what_is_no_image_is_refused_wherever_images_are_given(image, message):
    pipe = Pipeline.__new__(Pipeline)  # never called
    for use in (
        check_images,
        lambda image: check_images(image, 1),
        lambda image: extend(image, left=2),
        lambda image: invert(pipe, image),
        lambda image: variations(pipe, image),
        lambda image: upscale(pipe, image, "a pea"),
    ):
        with pytest.raises(UserError, match=message) as error:
            use(image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.png", "image is a str: expected an array"),
        (b"GIF89a", "image is a bytes"),
        (Path("photo.png"), r"image is a \w*Path"),
        (None, "image is a NoneType"),
        ([[1], [2, 3]], "image is no array"),
    ],
)
def test_what_is_no_array_is_refused(image, message):
    with pytest.raises(UserError, match=message):
        check_images(image)


def test_images_of_pillow_are_read_as_files_are():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(IMAGE).copy())
    turned.info["exif"] = exif.tobytes()
    for image in (Image.fromarray(IMAGE), Image.fromarray(IMAGE).convert("RGBA"), turned):
        np.testing.assert_array_equal(check_images(image)[0], IMAGE)
    ycbcr = check_images(Image.fromarray(IMAGE).convert("YCbCr"))[0]
    assert np.abs(ycbcr.astype(int) - IMAGE).max() <= 2
    assert check_images([Image.fromarray(IMAGE)] * 3, 3).shape == (3, 4, 6, 3)
    strokes = Image.fromarray(np.uint8(255 * np.eye(4, 6)[..., None].repeat(4, -1)))
    for mask in (strokes, strokes.getchannel("A"), strokes.convert("1"), [strokes]):
        np.testing.assert_array_equal(check_masks(mask, (1, 4, 6, 3))[0], np.eye(4, 6))
    np.testing.assert_array_equal(extend(Image.fromarray(IMAGE), left=-2).image, IMAGE[:, 2:])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((6, 4)), r"mask is of shape \(1, 6, 4\)"),
        (np.full((4, 6), 255), "goes from 255 to 255"),
        (np.full((4, 6), np.nan), "goes from nan"),
        (np.ones((2, 4, 6)), "mask has 2 for 3 prompts"),
        (np.uint8(255 * np.eye(4, 6)), "goes from 0 to 255"),
        (np.ones((4, 6, 1)), r"mask is of shape \(4, 6, 1\)"),
        ("mask.png", "mask is a str"),
        ([[0], [0, 1]], "mask is no array"),
        (np.ones((4, 6)) * 1j, "mask is complex"),
        (Image.new("RGBA", (6, 4)), "equally transparent everywhere"),
        (Image.new("L", (5, 4)), r"mask is of shape \(1, 4, 5\)"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(UserError, match=message):
        check_masks(mask, (3, 4, 6, 3))


def test_strength_is_the_fraction_of_steps_that_are_taken():
    assert [first_step(s, 10) for s in (1.0, 0.7, 0.3, 0.05, 0.0)] == [0, 3, 7, 9, 9]
    assert first_step(0.29, 100) == 71
    for strength in (-0.1, 1.1):
        with pytest.raises(UserError, match="expected a number from 0"):
            first_step(strength, 10)


def test_a_latent_is_replaced_where_any_of_its_pixels_is():
    mask = np.zeros((1, 4, 8), np.float32)
    mask[0, 3, 2] = 1
    found = latent_mask(jnp.asarray(mask), 2)[0, :, :, 0]
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(latent_mask(jnp.asarray(mask), 1)[..., 0], mask)


def test_a_larger_canvas_keeps_the_image_and_masks_the_rest():
    init = extend(IMAGE, left=2, bottom=3)
    canvas, mask = init.image, init.mask
    assert (canvas.shape, mask.shape) == ((7, 8, 3), (7, 8))
    np.testing.assert_array_equal(canvas[:4, 2:], IMAGE)
    assert not mask[:4, 2:].any()
    assert mask[4:].all()
    assert mask[:, :2].all()
    np.testing.assert_array_equal(canvas[:4, 0], IMAGE[:, 0])


def test_panning_crops_the_other_side():
    init = extend(IMAGE, left=-2, right=2)
    canvas, mask = init.image, init.mask
    assert canvas.shape == IMAGE.shape
    np.testing.assert_array_equal(canvas[:, :4], IMAGE[:, 2:])
    np.testing.assert_array_equal(mask[0], [0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("side", ["left", "top", "right", "bottom"])
def test_an_image_is_not_cropped_to_nothing(side):
    for more in (-6, -7, -10):  # of 4 rows and 6 columns
        with pytest.raises(UserError, match="crop all of an image of 6x4"):
            extend(IMAGE, **{side: more})
    with pytest.raises(UserError, match=f"{side} is 1.5: expected a whole number"):
        extend.__wrapped__(IMAGE, **{side: 1.5})


def test_between_two_noises_there_is_noise_of_the_same_size():
    one, other = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(slerp(one, other, 0.0), one, atol=1e-6)
    np.testing.assert_allclose(slerp(one, other, 1.0), other, atol=1e-6)
    assert 0.95 < slerp(one, other, 0.5).std() < 1.05
    assert ((one + other) / 2).std() < 0.8
    np.testing.assert_array_equal(slerp(one, one, 0.3), one)


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
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(UserError, match="expected WIDTH:HEIGHT"):
        size_of_ratio(ratio, 64**2, 16)


def test_a_ratio_too_far_from_square_is_refused():
    with pytest.raises(UserError, match="a side below 16"):
        size_of_ratio("40:1", 64**2, 16)
