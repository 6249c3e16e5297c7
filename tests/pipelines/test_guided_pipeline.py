"""Guidance and weights in prompts, from a pipeline's arguments to images."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.process import to_x0_eps
from jaxdiff.errors import UserError
from jaxdiff.models.layers import any_rngs, merge
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipVisionConfig
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import write_bundle
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import whole

PEA, TOMATO = "a small red pea", "a green tomato with a stem"
SETTINGS = {"seeds": [1, 2, 3], "num_steps": 3, "guidance_scale": 3.0, "output": "float"}
PLAIN = [PEA, TOMATO, "a red tomato"]


@pytest.fixture(scope="module")
def plain(pipeline):
    return pipeline(PLAIN, **SETTINGS)


def test_weight_one_is_the_plain_words_to_the_last_bit(pipeline, plain, compilations):
    compilations.clear()
    images = pipeline([f"({PEA}:1.0)", "a (green tomato:1) with a stem", PLAIN[2]], **SETTINGS)
    np.testing.assert_array_equal(images, plain)
    assert not compilations


@pytest.fixture(scope="module")
def weak(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weak")
    params = jax.tree.map(lambda x: 0.8 * x, tiny_bundle.params)
    write_bundle(folder, tiny_bundle._replace(params=params), "float32")
    return str(folder)


def test_at_neutral_values_every_bit_is_left_beside_others_that_change(
    pipeline, plain, weak, compilations
):
    """Weights of words, composed prompts and a weaker model, all in one program."""

    def draw(second, third=PLAIN[2], scale=1.0):
        prompts = [PEA, second, third]
        return pipeline(prompts, weak=Autoguidance(model=weak, scale=scale), **SETTINGS)

    words = draw('"a (green:2) tomato with a stem":1 "red":0')
    compilations.clear()
    np.testing.assert_array_equal(words[::2], plain[::2])
    composed = draw(f'"{TOMATO}":1 "red":-0.5', "a (red:1.5) tomato")
    doubled = draw(f'"{TOMATO}":2', "a (red:1.5) tomato")
    weaker = draw('"a (green:2) tomato with a stem":1 "red":0', scale=2.0)
    np.testing.assert_array_equal([composed[0], doubled[0]], [plain[0], plain[0]])
    pairs = [(words[1], plain[1]), (composed[1], plain[1]), (composed[2], plain[2])]
    for one, other in [*pairs, *zip(weaker, words, strict=True)]:
        assert np.abs(one - other).max() > 1e-3
    assert not compilations
    # A weight is a part of the guidance scale.
    meant = pipeline(PLAIN, **SETTINGS | {"guidance_scale": [3.0, 6.0, 3.0]})
    np.testing.assert_allclose(doubled[1], meant[1], atol=1e-4)


def test_only_prompts_may_be_composed(pipeline):
    for wrong in ({"negative_prompt": ['"red":1 "pea":1']}, {"toward": ['"red":0.5']}):
        with pytest.raises(UserError, match="for the prompt itself"):
            pipeline(PLAIN, **SETTINGS | wrong)


def test_guidance_is_of_the_recipe_or_of_the_call(pipeline, plain):
    guidance = Guidance(apg=APG(momentum=-0.5), zero_star=CFGZeroStar(zero_steps=2))
    images = pipeline(PLAIN, guidance=guidance, **SETTINGS)
    assert np.abs(images - plain).max() > 1e-3
    neutral = pipeline(PLAIN, guidance=Guidance(), **SETTINGS)
    np.testing.assert_array_equal(neutral, plain)
    with pytest.raises(UserError, match="zero_steps is 2 of 2 steps"):
        pipeline(PLAIN, guidance=guidance, **SETTINGS | {"num_steps": 2})


def test_only_words_count_as_too_long(pipeline):
    fits = "pea " * 14
    assert not pipeline.truncated(f"({fits}:1.5)")
    assert not pipeline.truncated(f'"{fits}":1 "{fits}":-1')
    assert pipeline.truncated(f'"pea":1 "{fits} pea":-1')


def test_the_best_of_several_is_what_its_seed_draws(pipeline):
    prompts = [PEA, TOMATO]
    best = pipeline.best(prompts, of=3, num_steps=2)
    assert best.scores.shape == (2, 3)
    chosen = best.scores.argmax(1)
    np.testing.assert_array_equal(best.seeds, chosen + np.array([0, 3]))
    again = pipeline(prompts, seeds=best.seeds.tolist(), num_steps=2)
    np.testing.assert_array_equal(best.images, again)
    np.testing.assert_allclose(
        clip_scores("shipped:produce_clip", again, prompts), best.scores.max(1), atol=1e-6
    )
    (alone,) = pipeline.best(prompts[:1], of=1, seeds=int(chosen[0]), num_steps=2).images
    np.testing.assert_array_equal(alone, best.images[0])
    with pytest.raises(UserError, match="of is 0"):
        pipeline.best(prompts, of=0)


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
