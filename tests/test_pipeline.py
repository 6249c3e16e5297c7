import dataclasses
import itertools

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jaxdiff import pipeline as module
from jaxdiff.batches import Preview
from jaxdiff.bundle import write_bundle, write_config, write_weights
from jaxdiff.diffusion.process import to_x0_eps
from jaxdiff.errors import UserError
from jaxdiff.model import Bundle
from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from jaxdiff.models.clip import ClipConfig, ClipVisionConfig
from jaxdiff.models.layers import abstract_params, any_rngs, blueprint, merge
from jaxdiff.pictures import to_uint8
from jaxdiff.pipeline import Pipeline, load
from jaxdiff.sampling.clip_guidance import ClipGuidance
from jaxdiff.sampling.sampler import noise_from_seeds
from jaxdiff.sampling.settings import SamplingConfig
from jaxdiff.sampling.solvers import DDIM
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.clip import ClipTask
from jaxdiff.training.diffusion import Latents, whole
from jaxdiff.training.loop import abstract_state
from jaxdiff.training.task import from_uint8

pytestmark = pytest.mark.optimized  # what is said of the last bit is said of what users compile
PEA, TOMATO = "a small red pea", "a green tomato with a stem"


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline(tiny_bundle)


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


def test_guidance_scale_1_is_the_conditional_model(pipeline):
    """With one DDIM step from pure noise the image is the network's own estimate of x0."""
    noise = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    image = pipeline([PEA], num_steps=1, guidance_scale=1.0, latents=noise, output="float")

    task = pipeline.task
    model = merge(lambda: task.build(any_rngs()), pipeline.weights["params"])
    schedule = task.objective.schedule
    t = jax.numpy.ones(())
    x = schedule.sigma(t) * noise
    ids = jax.numpy.asarray(pipeline.tokenizer([PEA]))
    output = jax.jit(
        lambda x: model.denoiser(x, t[None], task.features(model, {}, ids, whole(8, 8, len(ids))))
    )(x)
    x0, _ = to_x0_eps(task.objective.prediction, output, x, schedule.alpha(t), schedule.sigma(t))
    np.testing.assert_allclose(image, np.clip(x0 / 2 + 0.5, 0, 1), atol=1e-4)

    other = pipeline(
        [PEA],
        num_steps=1,
        guidance_scale=1.0,
        latents=noise,
        output="float",
        negative_prompt=[TOMATO],
    )
    np.testing.assert_array_equal(other, image)


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


def test_latents_are_decoded(tiny_bundle, tmp_path):
    small = AutoencoderConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    task = tiny_bundle.config.task
    task = dataclasses.replace(
        task,
        denoiser=dataclasses.replace(task.denoiser, channels=4, patch_size=4, depth=1),
        latents=Latents(model=small, pretrained="unused"),
    )
    config = dataclasses.replace(
        tiny_bundle.config, task=task, sampling=SamplingConfig(solver=DDIM(), num_steps=1)
    )
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        abstract_params(lambda: task.build(any_rngs())),
    )
    draw = np.random.default_rng(1)
    build = blueprint(Autoencoder, small)
    autoencoder = jax.tree.map(
        lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(build)
    )
    bundle = Bundle(config, params, {"autoencoder": autoencoder}, tiny_bundle.tokenizer)

    write_bundle(tmp_path / "model", bundle, dtype="float32")
    drawn = load(str(tmp_path / "model"))([PEA])
    assert drawn.shape == (1, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    back = Pipeline(bundle).autoencode(images)

    @jax.jit
    def there_and_back(params, images):
        model = merge(build, params)
        return model.decode(model.encode(from_uint8(images)).mode())

    expected = to_uint8(there_and_back(autoencoder, images))
    assert np.abs(back.astype(int) - expected).max() <= 1  # sums of another batch size
    with pytest.raises(UserError, match="multiples of 8"):
        Pipeline(bundle)([PEA], size=(20, 32))

    write_weights(epath.Path(tmp_path / "model" / "model.safetensors"), params=params)
    with pytest.raises(UserError, match=r"frozen\.autoencoder\."):
        load(str(tmp_path / "model"))


def test_of_pixels_nothing_is_encoded(pipeline):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert pipeline.autoencode(images) is images


def test_how_many_images_are_drawn_at_a_time_depends_on_their_size():
    sizes = [module.images_at_a_time(side, side) for side in (16, 64, 128, 512)]
    assert sizes == [4, 4, 1, 1]


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


@pytest.fixture(scope="module")
def clip(tiny_bundle, tmp_path_factory):
    """A CLIP with random weights, for the tiny model's prompts and images of another size."""
    text = dataclasses.replace(tiny_bundle.config.task.text.model, projection_dim=8)
    vision = ClipVisionConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, projection_dim=8
    )
    config = dataclasses.replace(
        tiny_bundle.config, name="clip", task=ClipTask(model=ClipConfig(text=text, vision=vision))
    )
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(config.task.build(nnx.Rngs(0)))))()
    folder = tmp_path_factory.mktemp("clip")
    write_bundle(folder, Bundle(config, params, {}, tiny_bundle.tokenizer), "float32")
    return str(folder)


def test_clip_steers_toward_the_prompt(pipeline, clip, compilations):
    arguments = {"seeds": [1], "num_steps": 2, "output": "float"}
    plain = pipeline([PEA], **arguments)
    off = pipeline([PEA], clip=ClipGuidance(model=clip, scale=0.0), **arguments)
    np.testing.assert_allclose(off, plain, atol=1e-5)
    compilations.clear()
    steered = pipeline([PEA], clip=ClipGuidance(model=clip, scale=3.0), **arguments)
    other = pipeline([TOMATO], clip=ClipGuidance(model=clip, scale=3.0), **arguments)
    assert np.abs(steered - plain).max() > 0.01
    assert np.abs(other - steered).max() > 0.01
    assert not compilations
    with pytest.raises(UserError, match="is no CLIP but a DiffusionTask"):
        pipeline([PEA], clip=ClipGuidance(model="shipped:produce"))


def test_repeats_change_the_image_and_the_mask_still_keeps(pipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    arguments = {"seeds": [1], "num_steps": 2, "image": image, "mask": half_mask()}
    once, thrice = (pipeline([PEA], repeats=r, **arguments)[0] for r in (1, 3))
    assert (once != thrice).any()
    np.testing.assert_array_equal(thrice[:, :16], image[:, :16])
    with pytest.raises(UserError, match="repeats is 0"):
        pipeline([PEA], repeats=0)
