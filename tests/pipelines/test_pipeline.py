import jax
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.pipelines import pipeline as module
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.pipeline import Pipeline, load
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import write_bundle, write_config
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.checkpoint import Checkpoints

pytestmark = pytest.mark.optimized  # what is said of the last bit is said of what users compile
PEA, TOMATO = "a small red pea", "a green tomato with a stem"


def test_images_are_uint8_or_float_from_0_to_1(pipeline):
    images = pipeline([PEA, TOMATO], seeds=[1, 2])
    floats = pipeline([PEA, TOMATO], seeds=[1, 2], output="float")
    assert images.shape == floats.shape == (2, 32, 32, 3)
    assert (images.dtype, floats.dtype) == (np.uint8, np.float32)
    assert floats.min() >= 0
    assert floats.max() <= 1
    np.testing.assert_array_equal(images, np.rint(floats * 255))


def test_the_image_depends_on_prompt_seed_steps_scale_and_negative_prompt(pipeline):
    arguments = {"seeds": [1], "num_steps": 3, "guidance_scale": 2.0}
    image = pipeline([PEA], **arguments)
    changes = (
        {"seeds": [2]},
        {"num_steps": 2},
        {"guidance_scale": 4.0},
        {"negative_prompt": [TOMATO]},
    )
    for change in changes:
        assert (pipeline([PEA], **(arguments | change)) != image).any(), change
    assert (pipeline([TOMATO], **arguments) != image).any()
    np.testing.assert_array_equal(pipeline([PEA], **arguments), image)


def test_an_image_is_the_same_alone_at_any_place_and_among_any_number(pipeline):
    """To the last bit: also of what is not yet rounded to 8 bits."""
    alone = pipeline([PEA], seeds=[7], output="float")[0]
    for n in (3, 7):
        for place in (0, n - 1):
            prompts, seeds = [TOMATO] * n, list(range(100, 100 + n))
            prompts[place], seeds[place] = PEA, 7
            images = pipeline(prompts, seeds=seeds, output="float")
            np.testing.assert_array_equal(images[place], alone)


def test_settings_of_the_others_do_not_matter(pipeline):
    alone = pipeline([PEA], seeds=[7], guidance_scale=2.0, negative_prompt=["red"])[0]
    images = pipeline(
        [TOMATO, PEA],
        seeds=[1, 7],
        guidance_scale=[5.0, 2.0],
        negative_prompt=["", "red"],
    )
    np.testing.assert_array_equal(images[1], alone)


def test_another_batch_size_changes_no_more_than_rounding(pipeline):
    prompts, seeds = [PEA, TOMATO] * 3, list(range(6))
    images = pipeline(prompts, seeds=seeds, output="float")
    other = pipeline(prompts, seeds=seeds, output="float", batch_size=2)
    np.testing.assert_allclose(other, images, atol=1e-4)
    alone = pipeline([TOMATO], seeds=[5], output="float", batch_size=2)
    np.testing.assert_array_equal(alone[0], other[5])


def test_no_argument_of_the_loop_compiles_it_again(pipeline, compilations):
    pipeline([PEA], seeds=[1], num_steps=3, guidance_scale=2.0)
    compilations.clear()
    pipeline([TOMATO], seeds=[2**32 - 1], num_steps=3, guidance_scale=2.0)
    pipeline([TOMATO], seeds=[2], num_steps=5)
    pipeline([PEA], guidance_scale=7)
    pipeline(["something else", PEA], guidance_scale=[1.0, 2.0], negative_prompt=["a pea"])
    pipeline([PEA] * 5, seeds=range(5), output="float")
    pipeline([PEA, TOMATO], seeds=7, guidance_scale=np.float32(2))
    assert not compilations


def test_given_noise_stands_in_for_the_seeds_own(pipeline):
    noise = np.asarray(noise_from_seeds(jax.numpy.uint32([3, 4]), (32, 32, 3)))
    seeded = pipeline([PEA, TOMATO], seeds=[3, 4], output="float")
    given = pipeline([PEA, TOMATO], seeds=[8, 9], latents=noise, output="float")
    np.testing.assert_allclose(given, seeded, atol=1e-4)


def test_the_last_snapshot_is_close_to_the_image(pipeline):
    prompts = {"prompts": [PEA, TOMATO], "seeds": [1, 2], "output": "float"}
    image = pipeline(**prompts)
    snapshots = pipeline(**prompts, num_snapshots=3)
    assert snapshots.shape == (3, 2, 32, 32, 3)
    np.testing.assert_allclose(snapshots[-1], image, atol=1e-4)
    assert np.abs(snapshots[0] - image).max() > 0.05


def test_another_size_that_the_patches_tile(pipeline, compilations):
    assert pipeline([PEA], size=(40, 24)).shape == (1, 24, 40, 3)
    assert compilations  # which shows that they are counted


@pytest.fixture(scope="module")
def on_one_device(tiny_bundle):
    return Pipeline(tiny_bundle, devices=jax.devices()[:1])


def test_an_image_is_the_same_on_one_device_and_on_eight(pipeline, on_one_device):
    assert (len(pipeline.devices), len(on_one_device.devices)) == (8, 1)
    prompts, seeds = [PEA, TOMATO] * 5, list(range(10))
    images = pipeline(prompts, seeds=seeds, output="float")
    for n in (1, 7, 10):
        fewer = on_one_device(prompts[:n], seeds=seeds[:n], output="float")
        np.testing.assert_array_equal(fewer, images[:n])
        np.testing.assert_array_equal(
            pipeline(prompts[:n], seeds=seeds[:n], output="float"), images[:n]
        )


def test_each_image_may_have_its_own_steps_and_strength(pipeline, on_one_device, compilations):
    image = pipeline([PEA])
    arguments = {"image": image, "output": "float"}
    steps, strengths = [2, 5, 2, 4], [1.0, 0.5, 0.5, 0.5]
    one_by_one = [
        pipeline([PEA], seeds=[i], num_steps=n, strength=s, **arguments)[0]
        for i, (n, s) in enumerate(zip(steps, strengths, strict=True))
    ]
    compilations.clear()
    together = pipeline([PEA] * 4, num_steps=steps, strength=strengths, **arguments)
    np.testing.assert_array_equal(together, one_by_one)
    assert not compilations
    others = on_one_device([PEA] * 4, num_steps=steps, strength=strengths, **arguments)
    np.testing.assert_array_equal(others, one_by_one)


def test_a_preview_sees_images_on_their_way_and_changes_no_bit(pipeline, compilations):
    arguments = {"seeds": [1, 2, 3], "num_steps": [4, 6, 6], "output": "float"}
    expected = pipeline([PEA, TOMATO, PEA], **arguments)
    seen = []
    preview = Preview(every=2, show=lambda *shown: seen.append(shown))
    for _ in range(2):
        compilations.clear()
        images = pipeline([PEA, TOMATO, PEA], preview=preview, **arguments)
        np.testing.assert_array_equal(images, expected)
    assert not compilations
    assert len(seen) == 2 * 3
    which, last = seen[-1]
    assert sorted(which) == [0, 1, 2]
    np.testing.assert_allclose(last, np.rint(expected[list(which)] * 255), atol=1)
    first = seen[0][1]
    assert np.abs(first.astype(int) - last).max() > 10


def test_a_preview_of_no_steps_is_told():
    with pytest.raises(UserError, match="every is 0"):
        Preview(every=0, show=lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": PEA}, "list"),
        ({"negative_prompt": "red"}, "list"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"negative_prompt": []}, "negative_prompt"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [-1]}, "-1"),
        ({"seeds": [2**32]}, str(2**32)),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": [1, 2]}, "num_steps"),
        ({"size": (33, 32)}, "33x32"),
        ({"size": (0, 32)}, "0x32"),
        ({"batch_size": 0}, "batch_size"),
        ({"latents": np.zeros((2, 32, 32, 3), np.float32)}, "latents"),
    ],
)
def test_arguments_that_do_not_fit_are_told(pipeline, arguments, names):
    with pytest.raises(UserError, match=names):
        pipeline(**({"prompts": [PEA, TOMATO, PEA]} | arguments))


def test_a_prompt_that_is_too_long_is_cut_off_and_told(pipeline):
    start = "pea " * 20
    assert pipeline.truncated(start)
    assert not pipeline.truncated(PEA)
    np.testing.assert_array_equal(
        pipeline([start + "red"], seeds=[1]), pipeline([start + "green"], seeds=[1])
    )


def test_a_run_and_its_exported_bundle_draw_the_same(tiny_bundle, pipeline, tmp_path):
    config, params, _, tokenizer = tiny_bundle
    run, exported = tmp_path / "run", tmp_path / "exported"
    zeros = jax.tree.map(
        lambda leaf: (
            jax.numpy.zeros(leaf.shape, leaf.dtype)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jax.random.key(0, impl="threefry2x32")
        ),
        abstract_state(config),
    )
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(zeros.replace(ema=jax.device_put(params)))
        checkpoints.wait()
    write_config(run, config)
    tokenizer.save(str(run))
    write_bundle(exported, Bundle(config, params, {}, tokenizer), dtype="float32")

    expected = pipeline([PEA], seeds=[1])
    for folder in (run, exported):
        loaded = load(str(folder))
        np.testing.assert_array_equal(loaded([PEA], seeds=[1]), expected)
        assert loaded.fingerprint == pipeline.fingerprint


def test_only_text_to_image_models_are_loaded(tiny_bundle):
    with pytest.raises(UserError, match="DiffusionTask"):
        Pipeline(tiny_bundle._replace(tokenizer=None))


def test_of_pixels_nothing_is_encoded(pipeline):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert pipeline.autoencode(images) is images


def test_how_many_images_are_drawn_at_a_time_depends_on_their_size():
    sizes = [module.images_at_a_time(side, side) for side in (16, 64, 128, 512)]
    assert sizes == [4, 4, 1, 1]
