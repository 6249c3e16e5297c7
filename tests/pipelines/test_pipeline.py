import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.time_grids import MOST_STEPS, ConsistencyGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.pipelines.batching import Preview, default_batch_size
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.inputs import (
    Mix,
    SampleRequest,
    UnknownWordWarning,
    check_size,
    float_array,
    negative_list,
    prompt_list,
    seed_array,
    step_counts,
)
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.sampling.sampler import Sampler

pytestmark = pytest.mark.optimized  # compares bits of what users compile
PEA, TOMATO = "a small red pea", "a green tomato with a stem"


@dataclasses.dataclass(frozen=True)
class Halfway:
    """A rule by which the negative prompt has an effect at any scale."""

    def init_state(self, x):
        return ()

    def combine(self, estimates, guidance_scale, state):
        return (estimates.cond + estimates.uncond) / 2, state


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
    """To the last bit: also before rounding to 8 bits."""
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


def test_unguided_images_are_sampled_without_the_negative_prompt(pipeline):
    """A call with a scale of 1 alone evaluates the prompt alone; the result is the same."""

    def guided(**arguments):
        call = pipeline.prepare(SampleRequest.of(prompts=[PEA, PEA], **arguments))
        return call.spec.sampler.guidance.is_classifier_free()

    assert guided(guidance_scale=[1, 2])
    assert not guided(guidance_scale=[1, 1])
    rule = Guidance(rule=Halfway())
    assert guided(guidance_scale=1, guidance=rule)
    both = pipeline([PEA, TOMATO], seeds=[7, 8], guidance_scale=[1, 3], output="float")
    (alone,) = pipeline(PEA, seeds=7, guidance_scale=1, negative_prompt=TOMATO, output="float")
    np.testing.assert_allclose(alone, both[0], atol=1e-4)
    assert np.abs(alone - pipeline(PEA, seeds=7, guidance_scale=1, guidance=rule)).max() > 0.01


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
    snapshots = pipeline.snapshots(num=3, **prompts)
    assert snapshots.shape == (3, 2, 32, 32, 3)
    np.testing.assert_allclose(snapshots[-1], image, atol=1e-4)
    assert np.abs(snapshots[0] - image).max() > 0.05


def test_latents_alone_imply_the_size(pipeline):
    noise = pipeline.noise([3], size=(40, 24))
    images = pipeline(PEA, latents=noise)
    assert images.shape == (1, 24, 40, 3)
    np.testing.assert_array_equal(images, pipeline(PEA, latents=noise, size=(40, 24)))


def test_one_text_is_a_list_of_one(pipeline):
    one = pipeline(PEA, negative_prompt=TOMATO, seeds=7)
    np.testing.assert_array_equal(one, pipeline([PEA], negative_prompt=[TOMATO], seeds=[7]))
    absent = pipeline(PEA, negative_prompt=None, seeds=7)
    np.testing.assert_array_equal(absent, pipeline(PEA, negative_prompt="", seeds=7))


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
    arguments = {"output": "float"}
    steps, strengths = [2, 5, 2, 4], [1.0, 0.5, 0.5, 0.5]

    def init(strength):
        return InitImage(image=image, strength=strength)

    one_by_one = [
        pipeline([PEA], seeds=[i], num_steps=n, init=init(s), **arguments)[0]
        for i, (n, s) in enumerate(zip(steps, strengths, strict=True))
    ]
    compilations.clear()
    together = pipeline([PEA] * 4, num_steps=steps, init=init(strengths), **arguments)
    np.testing.assert_array_equal(together, one_by_one)
    assert not compilations
    others = on_one_device([PEA] * 4, num_steps=steps, init=init(strengths), **arguments)
    np.testing.assert_array_equal(others, one_by_one)


def test_a_preview_shows_images_in_progress_and_changes_no_bit(pipeline, compilations):
    arguments = {"seeds": [1, 2, 3], "num_steps": [4, 6, 6], "output": "float"}
    expected = pipeline([PEA, TOMATO, PEA], **arguments)
    seen = []
    preview = Preview(every=2, show=lambda *shown: seen.append(shown))
    for _ in range(2):
        compilations.clear()
        images = pipeline([PEA, TOMATO, PEA], callback=preview, **arguments)
        np.testing.assert_array_equal(images, expected)
    assert not compilations
    assert len(seen) == 2 * 3
    assert [step for step, *_ in seen[:3]] == [2, 4, 6]
    _, last, indices = seen[-1]
    assert indices == [0, 1, 2]
    np.testing.assert_allclose(last, np.rint(expected * 255), atol=1)
    first = seen[0][1]
    assert np.abs(first.astype(int) - last).max() > 10


def test_a_callback_is_called_after_every_step(pipeline):
    seen = []
    images = pipeline(PEA, num_steps=3, callback=lambda *shown: seen.append(shown))
    assert [step for step, _ in seen] == [1, 2, 3]
    np.testing.assert_allclose(seen[-1][1].astype(int), images, atol=1)
    np.testing.assert_array_equal(images, pipeline(PEA, num_steps=3))


def test_a_preview_of_no_steps_is_refused():
    with pytest.raises(UserError, match="every is 0"):
        Preview(every=0, show=lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"prompts": []}, "prompt"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: expected a number"),
        ({"guidance_scale": [1.0, float("inf"), 2.0]}, "guidance_scale is inf"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"negative_prompt": []}, "negative_prompt"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [-1]}, "-1"),
        ({"seeds": [2**32]}, str(2**32)),
        ({"seeds": -1}, "seed is -1: expected a whole number from 0"),
        ({"prompts": ["\ud800"]}, "is not UTF-8"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": [1, 2]}, "num_steps"),
        ({"size": (33, 32)}, "33x32"),
        ({"size": (0, 32)}, "0x32"),
        ({"batch_size": 0}, "batch_size"),
        ({"latents": np.zeros((2, 32, 32, 3), np.float32)}, "latents"),
        ({"latents": np.full((3, 32, 32, 3), np.nan, np.float32)}, "latents .* not finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipeline, arguments, names):
    with pytest.raises(UserError, match=names):
        pipeline(**({"prompts": [PEA, TOMATO, PEA]} | arguments))


def test_values_of_another_type_are_refused_in_one_sentence():
    for prompts in ([None], [b"a pea"], b"a pea", [1], None, 3):
        with pytest.raises(UserError, match="expected a text"):
            prompt_list(prompts)
    for negatives in ([1], b"red", 3):
        with pytest.raises(UserError, match="expected a text"):
            negative_list(negatives, 1)
    assert negative_list([None, "red"], 2) == [None, "red"]
    assert prompt_list(PEA) == [PEA]
    mixed = Mix(a=PEA, b=TOMATO)
    assert prompt_list(mixed) == [mixed]
    for seed in (1.5, True, np.float32(2)):
        with pytest.raises(UserError, match="expected a whole number from 0 to 4294967295"):
            seed_array.__wrapped__([seed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": np.zeros((32, 32, 3))}, r"init is array\(.*: expected InitImage"),
        ({"sampler": "ddim"}, "sampler is 'ddim': expected Sampler"),
        ({"guidance": 3.0}, r"guidance is 3\.0: expected Guidance"),
        ({"batch_size": 1.5}, r"batch_size is 1\.5: expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0: expected a whole number, at least 1"),
        ({"batch_size": True}, "batch_size is True: expected a whole number"),
        ({"callback": 3}, "callback is 3: expected Preview or a function"),
        ({"output": "png"}, "output is 'png': expected one of uint8, float, latents"),
        ({"output": None}, "output is None: expected one of"),
        ({"size": 32}, "size is 32: expected a tuple of 2 whole numbers"),
        ({"size": (32,)}, r"size is \(32,\): expected a tuple of 2 whole numbers"),
        ({"size": (32, 32, 3)}, r"size is \(32, 32, 3\): expected a tuple of 2 whole numbers"),
        ({"size": (64.0, 64)}, r"size\[0\] is 64\.0: expected a whole number"),
        ({"size": "64x64"}, "size is '64x64': expected a tuple of 2 whole numbers"),
        ({"size": (64, True)}, r"size\[1\] is True: expected a whole number"),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        SampleRequest.of(prompts=PEA, **arguments)
    assert "\n" not in str(error.value)


def test_numbers_of_another_type_are_refused_in_one_sentence():
    for scale in ("7", None, True, 1e300, 10**400, 1j, np.float32("nan"), np.arange(2)):
        with pytest.raises(UserError, match=r"^guidance_scale is .*: expected a number\.$"):
            float_array.__wrapped__("guidance_scale", [scale], 1)
    for steps in ("3", 2.0, True, 0, -1, 10**9, 10**400):
        with pytest.raises(UserError, match=r"^num_steps is .*: expected a whole number from 1 to"):
            step_counts.__wrapped__([steps], 1)


def test_arguments_whose_meaning_is_plain_are_accepted(pipeline):
    image = np.random.default_rng(0).random((32, 32, 3))
    levels = np.rint(image * 255).astype(np.uint8)
    np.testing.assert_array_equal(
        pipeline(PEA, init=InitImage(image=image)), pipeline(PEA, init=InitImage(image=levels))
    )
    prompts = [PEA, TOMATO, PEA]
    images = pipeline(prompts, negative_prompt="red", seeds=np.arange(3))
    for negatives in (["red"], ["red"] * 3):
        np.testing.assert_array_equal(images, pipeline(prompts, negative_prompt=negatives))
    assert seed_array.__wrapped__(jnp.arange(3, dtype=jnp.uint32)).tolist() == [0, 1, 2]
    assert pipeline("").shape == (1, 32, 32, 3)


def test_numbers_of_numpy_and_jax_and_lists_are_accepted(pipeline):
    """Those whose every digit is kept."""
    same = {"seeds": 3, "num_steps": 2, "guidance_scale": 2.0, "size": (32, 32)}
    image = pipeline([PEA], **same)
    for other in (
        {"seeds": np.int64(3), "num_steps": np.int8(2), "guidance_scale": 2},
        {"seeds": [np.uint32(3)], "num_steps": [2], "guidance_scale": np.float64(2)},
        {"guidance_scale": (np.float16(2),)},
    ):
        np.testing.assert_array_equal(pipeline([PEA], **(same | other)), image)
    assert SampleRequest.of(prompts=PEA, size=[64, 64]).size == (64, 64)
    assert seed_array.__wrapped__([jnp.asarray(3)]).tolist() == [3]
    assert float_array.__wrapped__("guidance_scale", jnp.asarray([2.0]), 1).tolist() == [2]


@pytest.mark.parametrize("steps", [0, -1, 10**9, MOST_STEPS + 1])
def test_steps_out_of_range_are_refused(pipeline, steps):
    for arguments in ({"num_steps": steps}, {"num_steps": [2, steps]}):
        with pytest.raises(UserError, match=f"num_steps is {steps}: expected a whole number from"):
            pipeline([PEA, TOMATO], **arguments)
    with pytest.raises(UserError, match=f"Sampler.num_steps is {steps}: expected"):
        Sampler(num_steps=steps)


@pytest.mark.parametrize(
    ("grid", "steps", "most"),
    [
        (TrainStepGrid(spacing="leading", offset=1), 1000, 999),
        (TrainStepGrid(spacing="leading"), 1001, 1000),
        (TrainStepGrid(spacing="leading", skip_last=True), 1000, 999),
        (TrainStepGrid(spacing="trailing"), 1001, 1000),
        (TrainStepGrid(spacing="linspace", num_train_steps=100), 101, 100),
        (ConsistencyGrid(), 51, 50),
        (ConsistencyGrid(distilled_steps=4), 5, 4),
    ],
)
def test_more_steps_than_the_grid_has_are_refused(pipeline, grid, steps, most):
    message = f"num_steps is {steps}: expected at most {most}, the steps that the model's"
    with pytest.raises(UserError, match=message):
        pipeline([PEA, TOMATO], num_steps=[2, steps], sampler=Sampler(grid=grid))
    times = np.asarray(grid(jnp.arange(most + 1), most, 64))
    assert (np.diff(times) < 0).all()
    assert pipeline([PEA], num_steps=2, sampler=Sampler(grid=grid)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_a_strength_that_leaves_no_step_of_the_interval_is_refused(pipeline, strength):
    init = InitImage(image=np.zeros((32, 32, 3), np.uint8), strength=strength)
    first = Sampler(denoising_interval=(0, 0.3))
    with pytest.raises(UserError, match="strength starts after the end of denoising_interval"):
        pipeline(PEA, init=init, num_steps=10, sampler=first, output="latents")
    more = dataclasses.replace(init, strength=0.8)
    latents = pipeline(PEA, init=more, num_steps=10, sampler=first, output="latents")
    assert np.abs(latents).max() > 0.1


def test_the_windows_of_an_image_are_no_larger_than_it(pipeline):
    """The size condition and the time shift are those of what the network reads."""

    def shape(width, height):
        request = SampleRequest.of(prompts=PEA, size=(width, height), sampler=Sampler(overlap=0.5))
        return pipeline.prepare(request).spec.network_shape

    assert shape(64, 16) == (16, 32)
    assert shape(64, 64) == (32, 32)
    assert shape(32, 16) == (16, 32)


def test_a_strength_below_one_step_takes_one(pipeline):
    image = np.full((32, 32, 3), 128, np.uint8)
    for strength in (0, 0.1, 0.3):
        init = InitImage(image=image, strength=strength)
        assert pipeline(PEA, num_steps=3, init=init).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("scale", [0, -1, 0.5])
def test_a_scale_below_1_of_other_families_warns_and_follows_the_negative_prompt(pipeline, scale):
    with pytest.warns(UserWarning, match=f"guidance_scale is {scale}: below 1 it steers"):
        image = pipeline([PEA, PEA], guidance_scale=[1, scale], negative_prompt=TOMATO)
    (unguided,) = pipeline([PEA], guidance_scale=1, seeds=1, negative_prompt=TOMATO)
    assert (image[1] != unguided).any()


def test_a_scale_of_1_or_more_does_not_warn(pipeline, recwarn):
    pipeline([PEA, PEA], guidance_scale=[1, 2])
    assert not recwarn.list


def test_other_sizes_are_refused(tiny_spec):
    for size in (32, (32,), (32.5, 32), (32, 32, 3)):
        with pytest.raises(UserError, match=r"expected a (tuple of 2 )?whole number"):
            check_size.__wrapped__(size, tiny_spec)


def test_a_prompt_that_is_too_long_is_cut_off(pipeline):
    start = "pea " * 20
    assert pipeline.truncated(start)
    assert not pipeline.truncated(PEA)
    np.testing.assert_array_equal(
        pipeline([start + "red"], seeds=[1]), pipeline([start + "green"], seeds=[1])
    )


def test_only_text_to_image_models_are_loaded():
    with pytest.raises(UserError, match="ClipConfig: expected a text-to-image model"):
        load("shipped:produce_clip")


def test_pixels_are_not_encoded(pipeline):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert pipeline.autoencode(images) is images


def test_the_default_batch_size_depends_on_the_images():
    sizes = [default_batch_size(side, side) for side in (16, 64, 128, 512)]
    assert sizes == [4, 4, 1, 1]


def test_words_that_it_never_saw_are_said_once(pipeline):
    unknown = pipeline.unknown_words('"a (snow:1.2) pea":1 "red dog":-0.5')
    assert unknown == {"snow": (), "dog": ()}
    with pytest.warns(UnknownWordWarning, match="No caption in training had 'snow', 'dog': use"):
        pipeline(["a snow pea", "a red dog"], num_steps=1)


def test_the_words_nearest_to_an_unknown_one_are_named(pipeline):
    bundle = pipeline.bundle
    tokenizers = {
        name: one.with_words([], {"fruit": ("a red pea", "tomato")})
        for name, one in bundle.tokenizers.items()
    }
    related = pipeline.with_bundle(bundle._replace(tokenizers=tokenizers))
    mix = Mix(a="a fruit", b="a tomatto", fraction=0.5)
    nearest = {"fruit": ("a red pea", "tomato"), "tomatto": ("tomato",)}
    assert related.unknown_words(mix) == nearest
    said = r"'fruit' \(nearest: a red pea, tomato\), 'tomatto' \(nearest: tomato\): use"
    with pytest.warns(UnknownWordWarning, match=said):
        related(mix, num_steps=1)


def test_models_without_a_vocabulary_say_nothing(pipeline, recwarn):
    bundle = pipeline.bundle
    tokenizers = {name: one.with_words(None) for name, one in bundle.tokenizers.items()}
    silent = pipeline.with_bundle(bundle._replace(tokenizers=tokenizers))
    assert silent.vocabulary is None
    assert silent.unknown_words("a snow globe") == {}
    silent("a snow globe", num_steps=1)
    assert not [w for w in recwarn if w.category is UnknownWordWarning]


def test_images_that_are_not_finite_are_warned_of(pipeline):
    with pytest.warns(UserWarning, match="1 of 2 images have values that are not finite"):
        images = pipeline(["a red pea", "a green pea"], guidance_scale=[3.4e38, 2.0], num_steps=2)
    assert images.shape[0] == 2
