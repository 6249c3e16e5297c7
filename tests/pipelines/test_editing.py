"""Images to start from: what is checked of them, how far they are taken back, larger canvases."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import Conditions
from jaxdiff.models.layers import TextFeatures
from jaxdiff.pipelines.editing import (
    check_images,
    check_masks,
    coarse,
    extended,
    first_step,
    mixed,
    slerp,
)

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_one_image_or_mask_stands_for_all():
    images = check_images(IMAGE, 3)
    masks = check_masks(np.eye(4, 6), images.shape)
    assert (images.shape, masks.shape) == ((3, 4, 6, 3), (3, 4, 6))
    np.testing.assert_array_equal(images[2], IMAGE)
    np.testing.assert_array_equal(masks[1], np.eye(4, 6))
    np.testing.assert_array_equal(check_images(images, 3), images)
    np.testing.assert_array_equal(check_masks(masks > 0, images.shape), masks)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (IMAGE / 255, "image is float64"),
        (IMAGE[..., 0], r"uint8 \(1, 4, 6\)|uint8 \(4, 6\)"),
        (IMAGE[..., :2], "expected uint8"),
        (np.stack([IMAGE, IMAGE]), "image has 2 for 3 prompts"),
    ],
)
def test_other_images_are_told(image, told):
    with pytest.raises(UserError, match=told):
        check_images(image, 3)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (np.ones((6, 4)), r"mask is of shape \(1, 6, 4\)"),
        (np.full((4, 6), 255), "goes from 255 to 255"),
        (np.full((4, 6), np.nan), "goes from nan"),
        (np.ones((2, 4, 6)), "mask has 2 for 3 prompts"),
    ],
)
def test_other_masks_are_told(mask, told):
    with pytest.raises(UserError, match=told):
        check_masks(mask, (3, 4, 6, 3))


def test_strength_is_the_share_of_steps_that_are_taken():
    assert [first_step(s, 10) for s in (1.0, 0.7, 0.3, 0.05, 0.0)] == [0, 3, 7, 9, 9]
    assert first_step(0.29, 100) == 71
    for strength in (-0.1, 1.1):
        with pytest.raises(UserError, match="expected from 0"):
            first_step(strength, 10)


def test_a_latent_is_drawn_anew_where_any_of_its_pixels_is():
    mask = np.zeros((1, 4, 8), np.float32)
    mask[0, 3, 2] = 1
    found = coarse(jnp.asarray(mask), 2)[0, :, :, 0]
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(coarse(jnp.asarray(mask), 1)[..., 0], mask)


def test_a_larger_canvas_keeps_the_image_and_masks_the_rest():
    canvas, mask = extended(IMAGE, left=2, bottom=3)
    assert (canvas.shape, mask.shape) == ((7, 8, 3), (7, 8))
    np.testing.assert_array_equal(canvas[:4, 2:], IMAGE)
    assert not mask[:4, 2:].any()
    assert mask[4:].all()
    assert mask[:, :2].all()
    np.testing.assert_array_equal(canvas[:4, 0], IMAGE[:, 0])


def test_panning_cuts_off_on_the_other_side():
    canvas, mask = extended(IMAGE, left=-2, right=2)
    assert canvas.shape == IMAGE.shape
    np.testing.assert_array_equal(canvas[:, :4], IMAGE[:, 2:])
    np.testing.assert_array_equal(mask[0], [0, 0, 0, 0, 1, 1])
    with pytest.raises(UserError, match="leave nothing of an image of 6x4"):
        extended(IMAGE, left=-6)


def test_between_two_noises_there_is_noise_of_the_same_size():
    one, other = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(slerp(one, other, 0.0), one, atol=1e-6)
    np.testing.assert_allclose(slerp(one, other, 1.0), other, atol=1e-6)
    assert 0.95 < slerp(one, other, 0.5).std() < 1.05
    assert ((one + other) / 2).std() < 0.8
    np.testing.assert_array_equal(slerp(one, one, 0.3), one)


def test_prompts_are_mixed_by_share_and_heed_the_tokens_of_both():
    def told(value, lengths):
        mask = jnp.arange(3) < jnp.array(lengths)[:, None]
        return TextFeatures(jnp.full((2, 3, 4), value), jnp.full((2, 5), value), mask)

    one, other = told(1.0, (1, 1)), told(3.0, (2, 2))
    found = mixed(one, other, jnp.array([0.25, 0.0]))
    np.testing.assert_allclose(found.pooled[:, 0], [1.5, 1.0])
    # Behind its end nothing of a prompt counts, whatever stands there.
    np.testing.assert_allclose(found.tokens[..., 0], [[1.5, 0.75, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(found.mask, [other.mask[0], one.mask[1]])


def test_without_a_mask_all_tokens_are_mixed():
    one, other = Conditions(jnp.zeros((1, 3, 4))), Conditions(jnp.ones((1, 3, 4)))
    np.testing.assert_allclose(mixed(one, other, jnp.array([0.25])).tokens, 0.25)
