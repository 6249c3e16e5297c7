"""Edits of images, and images that start from others, on a tiny model whose weights are drawn."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.sampling.solvers_ode import DDIM

PEA, TOMATO = "a small red pea", "a green tomato with a stem"
PLAIN = {"num_steps": 3, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def images(pipeline):
    return pipeline([PEA, TOMATO], seeds=[1, 2], **PLAIN)


def test_images_are_inverted_by_the_model_and_its_prompt(pipeline, images):
    """One round of one step from data to noise alone: x0 + (x0 - D(x0, 1)), in closed form."""
    x0 = images.astype(np.float32) / 127.5 - 1
    estimate = pipeline(
        [PEA, TOMATO],
        latents=x0,
        num_steps=1,
        guidance_scale=1.0,
        solver=DDIM(),
        output="latents",
    )
    noise = pipeline.invert(images, [PEA, TOMATO], num_steps=1)
    assert noise.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(noise, 2 * x0 - estimate, atol=1e-4)
    alone = pipeline.invert(images[1], [TOMATO], num_steps=1)
    np.testing.assert_array_equal(alone[0], noise[1])
    assert np.abs(pipeline.invert(images, num_steps=1) - noise).max() > 1e-3


def test_variations_begin_at_the_image_and_end_at_the_seeds(pipeline, images):
    arguments = {"prompt": PEA, "num_steps": 3}
    drawn = pipeline.variations(images[0], [0.0, 0.5, 1.0], seeds=[5, 5, 5], **arguments)
    own = pipeline.invert(images[0], [PEA], num_steps=3)
    ends = pipeline(
        [PEA] * 2,
        latents=np.concatenate([own, pipeline.noise([5])]),
        solver=DDIM(),
        **PLAIN,
    )
    assert np.abs(drawn[[0, 2]].astype(int) - ends).max() <= 1
    assert (drawn[1] != drawn[0]).any()
    assert (drawn[1] != drawn[2]).any()


def test_noise_of_seeds_may_be_turned_toward_that_of_others(pipeline):
    own, other = np.asarray(noise_from_seeds(jnp.uint32([3, 4]), (32, 32, 3)))
    np.testing.assert_array_equal(pipeline.noise([3, 4]), [own, other])
    found = pipeline.noise([3, 3, 3], toward=4, amount=[0.0, 0.3, 1.0])
    np.testing.assert_allclose(found[[0, 2]], [own, other], atol=1e-5)
    assert 0.95 < found[1].std() < 1.05
    with pytest.raises(UserError, match="amount has 2 values for 1"):
        pipeline.noise([3], toward=4, amount=[0.1, 0.2])


@pytest.mark.nightly
def test_between_two_images_both_are_drawn_from_their_noise(pipeline, images):
    frames = pipeline.between((PEA, TOMATO), 3, images=images, num_steps=3)
    noise = pipeline.invert(images, [PEA, TOMATO], num_steps=3)
    ends = pipeline([PEA, TOMATO], latents=noise, solver=DDIM(), **PLAIN)
    assert np.abs(frames[[0, 2]].astype(int) - ends).max() <= 1
    assert (frames[1] != frames[0]).any()


def test_upscaled_images_are_larger_and_keep_what_little_strength_leaves(pipeline, images):
    large = pipeline.upscaled(images, [PEA, TOMATO], strength=0.1, num_steps=8)
    assert large.shape == (2, 64, 64, 3)
    same = pipeline.upscaled(images, [PEA, TOMATO], factor=1, strength=0.5, num_steps=4)
    plain = pipeline([PEA, TOMATO], image=images, strength=0.5, num_steps=4)
    np.testing.assert_array_equal(same, plain)
    with pytest.raises(UserError, match="factor is 0"):
        pipeline.upscaled(images, [PEA, TOMATO], factor=0)
    with pytest.raises(UserError, match=r"overlap is 1.0"):
        pipeline([PEA], overlap=1, size=(40, 32))


def test_a_seamless_pipeline_has_the_same_weights_and_draws_otherwise(pipeline, images):
    seamless = pipeline.seamless()
    assert seamless.fingerprint == pipeline.fingerprint
    tiles = seamless([PEA, TOMATO], seeds=[1, 2], **PLAIN)
    assert (tiles != images).any()
    np.testing.assert_array_equal(seamless([TOMATO], seeds=[2], **PLAIN)[0], tiles[1])
    off = pipeline.seamless(down=False, across=False)
    np.testing.assert_array_equal(off([PEA, TOMATO], seeds=[1, 2], **PLAIN), images)
    with pytest.raises(UserError, match="no tiles with edges"):
        seamless([PEA], decode_by="tiles")


def test_a_ratio_is_a_size_that_the_model_draws(pipeline):
    assert pipeline.size_of("1:1") == (32, 32)
    width, height = pipeline.size_of("16:9")
    assert (width, height) == (40, 24)


def half_mask():
    mask = np.zeros((32, 32), np.float32)
    mask[:, 16:] = 1
    return mask


def test_pixels_that_the_mask_keeps_are_kept_exactly(pipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    drawn = pipeline([PEA, TOMATO], seeds=[1, 2], image=image, mask=half_mask())
    for one in drawn:
        np.testing.assert_array_equal(one[:, :16], image[:, :16])
        assert (one[:, 16:] != image[:, 16:]).mean() > 0.5
    assert (drawn[0] != drawn[1]).any()


def test_strength_says_how_much_is_left_of_the_image_and_compiles_nothing(pipeline, compilations):
    image, other = pipeline([TOMATO, PEA], seeds=[5, 6])
    arguments = {"seeds": [1], "num_steps": 6}
    plain = pipeline([PEA], **arguments)
    weak, strong = (pipeline([PEA], image=image, strength=s, **arguments) for s in (0.3, 0.8))
    compilations.clear()
    assert (weak != strong).any()
    assert (pipeline([PEA], image=other, strength=0.3, **arguments) != weak).any()
    # Nothing of it is left at t = 1 of a rectified flow.
    whole_way = pipeline([PEA], image=image, strength=1.0, output="float", **arguments)
    np.testing.assert_allclose(whole_way, plain / 255, atol=0.003)
    pipeline([TOMATO], seeds=[3], num_steps=4, image=image)
    assert not compilations


def test_an_image_has_its_own_size(pipeline):
    image = np.zeros((32, 40, 3), np.uint8)
    assert pipeline([PEA], image=image, num_steps=1).shape == (1, 32, 40, 3)
    with pytest.raises(UserError, match="size is 32x32 but image is 40x32"):
        pipeline([PEA], image=image, size=(32, 32))
    with pytest.raises(UserError, match="cannot be drawn by this model"):
        pipeline([PEA], image=image[:, :37])


def test_mask_and_strength_without_an_image_are_told(pipeline):
    for wrong in ({"mask": half_mask()}, {"strength": 0.5}):
        with pytest.raises(UserError, match="give image as well"):
            pipeline([PEA], **wrong)


def test_between_two_prompts_and_seeds_both_ends_are_their_own_images(pipeline, compilations):
    frames = pipeline.between((PEA, TOMATO), 4, seeds=(3, 8), num_steps=3)
    ends = pipeline([PEA, TOMATO], seeds=[3, 8], num_steps=3)
    for frame, end in ((frames[0], ends[0]), (frames[-1], ends[1])):
        np.testing.assert_allclose(frame.astype(int), end, atol=1)
    steps = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0.1 * max(steps)  # it moves all the way
    compilations.clear()
    pipeline.between((TOMATO, PEA), 7, num_steps=2)
    assert not compilations
    with pytest.raises(UserError, match="expected at least 2"):
        pipeline.between((PEA, TOMATO), 1)


def test_repeats_change_the_image_and_the_mask_still_keeps(pipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    arguments = {"seeds": [1], "num_steps": 2, "image": image, "mask": half_mask()}
    once, thrice = (pipeline([PEA], repeats=r, **arguments)[0] for r in (1, 3))
    assert (once != thrice).any()
    np.testing.assert_array_equal(thrice[:, :16], image[:, :16])
    with pytest.raises(UserError, match="repeats is 0"):
        pipeline([PEA], repeats=0)
