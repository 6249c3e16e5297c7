"""Edits of images, and images that start from others, on a tiny model with random weights."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.pipelines import edit
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.sampling.sampler import Sampler
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
        sampler=Sampler(solver=DDIM()),
        output="latents",
    )
    noise = edit.invert(pipeline, images, [PEA, TOMATO], num_steps=1)
    assert noise.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(noise, 2 * x0 - estimate, atol=1e-4)
    alone = edit.invert(pipeline, images[1], [TOMATO], num_steps=1)
    np.testing.assert_array_equal(alone[0], noise[1])
    assert np.abs(edit.invert(pipeline, images, num_steps=1) - noise).max() > 1e-3


def test_variations_begin_at_the_image_and_end_at_the_seeds(pipeline, images):
    arguments = {"prompts": PEA, "num_steps": 3}
    sampled = edit.variations(pipeline, images[0], [0.0, 0.5, 1.0], seeds=[5, 5, 5], **arguments)
    own = edit.invert(pipeline, images[0], [PEA], num_steps=3)
    ends = pipeline(
        [PEA] * 2,
        latents=np.concatenate([own, pipeline.noise([5])]),
        sampler=Sampler(solver=DDIM()),
        **PLAIN,
    )
    assert np.abs(sampled[[0, 2]].astype(int) - ends).max() <= 1
    assert (sampled[1] != sampled[0]).any()
    assert (sampled[1] != sampled[2]).any()


def test_noise_may_be_rotated_toward_that_of_variation_seeds(pipeline):
    own, other = np.asarray(noise_from_seeds(jnp.uint32([3, 4]), (32, 32, 3)))
    np.testing.assert_array_equal(pipeline.noise([3, 4]), [own, other])
    found = pipeline.noise([3, 3, 3], variation_seeds=4, variation_strength=[0.0, 0.3, 1.0])
    np.testing.assert_allclose(found[[0, 2]], [own, other], atol=1e-5)
    assert 0.95 < found[1].std() < 1.05
    with pytest.raises(UserError, match="variation_strength has 2 values for 1"):
        pipeline.noise([3], variation_seeds=4, variation_strength=[0.1, 0.2])


@pytest.mark.nightly
def test_interpolation_between_two_images_begins_and_ends_at_both(pipeline, images):
    frames = edit.interpolate(pipeline, (PEA, TOMATO), 3, images=images, num_steps=3)
    noise = edit.invert(pipeline, images, [PEA, TOMATO], num_steps=3)
    ends = pipeline([PEA, TOMATO], latents=noise, sampler=Sampler(solver=DDIM()), **PLAIN)
    assert np.abs(frames[[0, 2]].astype(int) - ends).max() <= 1
    assert (frames[1] != frames[0]).any()


def test_the_output_of_edits_is_that_of_their_images(pipeline, images):
    floats = edit.variations(pipeline, images[0], seeds=4, num_steps=1, output="float")
    assert (floats.shape, floats.dtype) == ((1, 32, 32, 3), np.float32)
    settings = {"num_steps": 1, "output": "float", "guidance_scale": 3.0}
    frames = edit.interpolate(pipeline, (PEA, TOMATO), 2, images=images, **settings)
    noise = edit.invert(pipeline, images, [PEA, TOMATO], num_steps=1)
    ends = pipeline([PEA, TOMATO], latents=noise, sampler=Sampler(solver=DDIM()), **settings)
    np.testing.assert_allclose(frames, ends, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "seeds", "message"),
    [
        (1, (0, 0), "frames is 1: expected a whole number, at least 2"),
        (2.5, (0, 0), "frames is 2.5: expected a whole number"),
        (2, 3, "seeds is 3: expected"),
        (2, (0, 1, 2), "seeds is .*: expected"),
    ],
)
def test_frames_and_seeds_of_an_interpolation_are_checked(pipeline, frames, seeds, message):
    with pytest.raises(UserError, match=message):
        edit.interpolate.__wrapped__(pipeline, (PEA, TOMATO), frames, seeds=seeds)


def test_upscaled_images_are_larger(pipeline, images):
    large = edit.upscale(pipeline, images, [PEA, TOMATO], strength=0.1, num_steps=8)
    assert large.shape == (2, 64, 64, 3)
    same = edit.upscale(pipeline, images, [PEA, TOMATO], factor=1, strength=0.5, num_steps=4)
    plain = pipeline([PEA, TOMATO], init=InitImage(image=images, strength=0.5), num_steps=4)
    np.testing.assert_array_equal(same, plain)
    with pytest.raises(UserError, match="factor is 0"):
        edit.upscale(pipeline, images, [PEA, TOMATO], factor=0)
    for factor in (1.5, "2"):
        with pytest.raises(UserError, match=r"factor is .*: expected a whole number"):
            edit.upscale.__wrapped__(pipeline, images, [PEA, TOMATO], factor=factor)
    with pytest.raises(UserError, match=r"overlap is 1.0"):
        edit.upscale(pipeline, images, [PEA, TOMATO], overlap=1.0)


def test_images_that_wrap_differ_and_depend_on_their_seed_alone(pipeline, images):
    seamless = Sampler(wrap=(True, True))
    tiles = pipeline([PEA, TOMATO], seeds=[1, 2], sampler=seamless, **PLAIN)
    assert (tiles != images).any()
    alone = pipeline([TOMATO], seeds=[2], sampler=seamless, **PLAIN)[0]
    np.testing.assert_array_equal(alone, tiles[1])
    off = Sampler(wrap=(False, False))
    np.testing.assert_array_equal(
        pipeline([PEA, TOMATO], seeds=[1, 2], sampler=off, **PLAIN), images
    )
    with pytest.raises(UserError, match="tiles do not wrap"):
        pipeline([PEA], sampler=Sampler(wrap=(True, False), vae_mode="tiling"))


def test_a_ratio_is_a_size_that_the_model_samples(pipeline):
    assert pipeline.size_of("1:1") == (32, 32)
    width, height = pipeline.size_of("16:9")
    assert (width, height) == (40, 24)


def half_mask():
    mask = np.zeros((32, 32), np.float32)
    mask[:, 16:] = 1
    return mask


def test_pixels_that_the_mask_keeps_are_kept_exactly(pipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    sampled = pipeline([PEA, TOMATO], seeds=[1, 2], init=InitImage(image=image, mask=half_mask()))
    for one in sampled:
        np.testing.assert_array_equal(one[:, :16], image[:, :16])
        assert (one[:, 16:] != image[:, 16:]).mean() > 0.5
    assert (sampled[0] != sampled[1]).any()


def test_strength_is_how_much_changes_and_compiles_nothing(pipeline, compilations):
    image, other = pipeline([TOMATO, PEA], seeds=[5, 6])
    arguments = {"seeds": [1], "num_steps": 6}
    plain = pipeline([PEA], **arguments)

    def start_from(image, strength=None):
        return {"init": InitImage(image=image, strength=strength)} | arguments

    little, much = (pipeline([PEA], **start_from(image, s)) for s in (0.3, 0.8))
    compilations.clear()
    assert (little != much).any()
    assert (pipeline([PEA], **start_from(other, 0.3)) != little).any()
    # Nothing of it is left at t = 1 of a rectified flow.
    whole_way = pipeline([PEA], output="float", **start_from(image, 1.0))
    np.testing.assert_allclose(whole_way, plain / 255, atol=0.003)
    pipeline([TOMATO], **start_from(image) | {"seeds": [3], "num_steps": 4})
    assert not compilations


def test_an_image_has_its_own_size(pipeline):
    image = np.zeros((32, 40, 3), np.uint8)
    init = InitImage(image=image)
    assert pipeline([PEA], init=init, num_steps=1).shape == (1, 32, 40, 3)
    with pytest.raises(UserError, match="size is 32x32 but image is 40x32"):
        pipeline([PEA], init=init, size=(32, 32))
    with pytest.raises(UserError, match="expected multiples of 8"):
        pipeline([PEA], init=InitImage(image=image[:, :37]))


def test_a_float_image_is_that_of_its_levels(pipeline, images):
    arguments = {"seeds": [1, 2], "num_steps": 3}
    levels, floats = (
        pipeline([PEA, TOMATO], init=InitImage(image=image), **arguments)
        for image in (images, images.astype(np.float32) / 255)
    )
    np.testing.assert_array_equal(floats, levels)


@pytest.mark.parametrize("momentum", [-0.5, 0.0])
def test_images_are_inverted_and_varied_under_guidance_with_a_state(pipeline, images, momentum):
    guidance = Guidance(apg=APG(momentum=momentum))
    arguments = {"num_steps": 3, "guidance": guidance}
    noise = edit.invert(pipeline, images, [PEA, TOMATO], guidance_scale=2.0, **arguments)
    assert np.isfinite(noise).all()
    varied = edit.variations(pipeline, images[0], prompts=PEA, seeds=[1, 2], **arguments)
    assert varied.shape == (2, 32, 32, 3)
    unguided = edit.invert(pipeline, images, [PEA, TOMATO], **arguments)
    without = edit.invert(pipeline, images, [PEA, TOMATO], num_steps=3)  # another program
    np.testing.assert_allclose(unguided, without, rtol=1e-5, atol=1e-4)


def test_between_two_prompts_and_seeds_both_ends_are_their_own_images(pipeline, compilations):
    frames = edit.interpolate(pipeline, (PEA, TOMATO), 4, seeds=(3, 8), num_steps=3)
    ends = pipeline([PEA, TOMATO], seeds=[3, 8], num_steps=3)
    for frame, end in ((frames[0], ends[0]), (frames[-1], ends[1])):
        np.testing.assert_allclose(frame.astype(int), end, atol=1)
    steps = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0.1 * max(steps)  # it moves all the way
    compilations.clear()
    edit.interpolate(pipeline, (TOMATO, PEA), 7, num_steps=2)
    assert not compilations
    with pytest.raises(UserError, match="expected a whole number, at least 2"):
        edit.interpolate(pipeline, (PEA, TOMATO), 1)


def test_resampling_changes_the_image_and_the_mask_still_keeps(pipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    init = InitImage(image=image, mask=half_mask())
    arguments = {"seeds": [1], "num_steps": 2, "init": init}
    once, thrice = (
        pipeline([PEA], sampler=Sampler(resample_steps=r), **arguments)[0] for r in (1, 3)
    )
    assert (once != thrice).any()
    np.testing.assert_array_equal(thrice[:, :16], image[:, :16])
