"""Guidance and weights in prompts, from a pipeline's arguments to images."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.process import to_x0_eps
from jaxdiff.errors import UserError
from jaxdiff.models.layers import init_params
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipVisionConfig
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pipelines.inputs import Mix
from jaxdiff.pipelines.rerank import best_of_n
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solver import StepOutput, ddim_update
from jaxdiff.sampling.solvers_ode import DDIM

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
def guide_folder(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    params = jax.tree.map(lambda x: 0.8 * x, tiny_bundle.params)
    write_bundle(folder, tiny_bundle._replace(params=params), "float32")
    return str(folder)


def test_at_neutral_values_every_bit_is_left_beside_others_that_change(
    pipeline, plain, guide_folder, compilations
):
    """Weights of words, composed prompts and autoguidance, all in one program."""

    def images_of(second, third=PLAIN[2], scale=1.0):
        prompts = [PEA, second, third]
        guide = Autoguidance(model=guide_folder, scale=scale)
        return pipeline(prompts, guidance=Guidance(guide=guide), **SETTINGS)

    words = images_of('"a (green:2) tomato with a stem":1 "red":0')
    compilations.clear()
    np.testing.assert_array_equal(words[::2], plain[::2])
    composed = images_of(f'"{TOMATO}":1 "red":-0.5', "a (red:1.5) tomato")
    doubled = images_of(f'"{TOMATO}":2', "a (red:1.5) tomato")
    guided = images_of('"a (green:2) tomato with a stem":1 "red":0', scale=2.0)
    np.testing.assert_array_equal([composed[0], doubled[0]], [plain[0], plain[0]])
    pairs = [(words[1], plain[1]), (composed[1], plain[1]), (composed[2], plain[2])]
    for one, other in [*pairs, *zip(guided, words, strict=True)]:
        assert np.abs(one - other).max() > 1e-3
    assert not compilations
    # A weight is a part of the guidance scale.
    meant = pipeline(PLAIN, **SETTINGS | {"guidance_scale": [3.0, 6.0, 3.0]})
    np.testing.assert_allclose(doubled[1], meant[1], atol=1e-4)


def test_only_prompts_may_be_composed(pipeline):
    composed = '"red":1 "pea":1'
    with pytest.raises(UserError, match="second prompt of a mixture cannot be composed"):
        pipeline(PLAIN, negative_prompt=[composed], **SETTINGS)
    with pytest.raises(UserError, match="second prompt of a mixture cannot be composed"):
        pipeline([Mix(a=PEA, b=composed)] * 3, **SETTINGS)


@pytest.mark.optimized
def test_a_mixture_of_none_of_the_other_prompt_is_the_prompt(pipeline, compilations):
    plain = pipeline(PLAIN, **SETTINGS)
    mixtures = [Mix(a=prompt, b=TOMATO, fraction=0.0) for prompt in PLAIN]
    pipeline(mixtures, **SETTINGS)
    compilations.clear()
    mixtures[0] = Mix(a=PEA, b=TOMATO, fraction=0.4)
    images = pipeline([*mixtures[:2], PLAIN[2]], **SETTINGS)
    np.testing.assert_array_equal(images[1:], plain[1:])
    assert np.abs(images[0] - plain[0]).max() > 1e-3
    assert not compilations


def test_guidance_is_of_the_model_or_of_the_call(pipeline, plain):
    guidance = Guidance(apg=APG(momentum=-0.5), cfg_zero_star=CFGZeroStar(zero_steps=2))
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


def test_the_best_of_several_is_that_of_its_seed(pipeline):
    prompts = [PEA, TOMATO]
    best = best_of_n(pipeline, prompts, 3, num_steps=2)
    assert best.scores.shape == (2, 3)
    chosen = best.scores.argmax(1)
    np.testing.assert_array_equal(best.seeds, chosen + np.array([0, 3]))
    repeated = pipeline(prompts, seeds=best.seeds.tolist(), num_steps=2)
    np.testing.assert_array_equal(best.images, repeated)
    np.testing.assert_allclose(
        clip_scores("shipped:produce_clip", repeated, prompts), best.scores.max(1), atol=1e-6
    )
    (alone,) = best_of_n(pipeline, PEA, 1, seeds=int(chosen[0]), num_steps=2).images
    np.testing.assert_array_equal(alone, best.images[0])
    with pytest.raises(UserError, match="n is 0"):
        best_of_n(pipeline, prompts, 0)


@pytest.fixture(scope="module")
def clip(tiny_bundle, tmp_path_factory):
    """A CLIP with random weights, for the tiny model's prompts and images of another size."""
    text = dataclasses.replace(tiny_bundle.spec.conditioner.text.model, projection_dim=8)
    vision = ClipVisionConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, projection_dim=8
    )
    config = ClipConfig(text=text, vision=vision)
    params = init_params(lambda rngs: Clip(config, rngs=rngs), nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("clip")
    write_bundle(folder, Bundle(config, params, tiny_bundle.tokenizers), "float32")
    return str(folder)


def test_clip_guides_toward_the_prompt(pipeline, clip, compilations):
    def guided_by(scale, model=clip):
        return Guidance(clip=ClipGuidance(model=model, scale=scale))

    arguments = {"seeds": [1], "num_steps": 2, "output": "float"}
    plain = pipeline([PEA], **arguments)
    off = pipeline([PEA], guidance=guided_by(0.0), **arguments)
    np.testing.assert_allclose(off, plain, atol=1e-5)
    compilations.clear()
    guided = pipeline([PEA], guidance=guided_by(3.0), **arguments)
    other = pipeline([TOMATO], guidance=guided_by(3.0), **arguments)
    assert np.abs(guided - plain).max() > 0.01
    assert np.abs(other - guided).max() > 0.01
    assert not compilations
    with pytest.raises(UserError, match="is of type TextToImage: expected a CLIP"):
        pipeline([PEA], guidance=guided_by(1.0, "shipped:produce"))


def test_guidance_scale_1_is_the_conditional_model(pipeline):
    """With one DDIM step from pure noise the image is the network's own estimate of x0."""
    noise = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    image = pipeline([PEA], num_steps=1, guidance_scale=1.0, latents=noise, output="float")

    spec, params = pipeline.spec, pipeline.params
    schedule = spec.schedule
    t = jax.numpy.ones(())
    x = schedule.sigma(t) * noise
    inputs = spec.conditioner.tokenize(pipeline.tokenizers, [PEA])
    inputs = jax.tree.map(jax.numpy.asarray, inputs)
    output = jax.jit(lambda x: spec.predict(params, x, t[None], spec.encode_text(params, inputs)))(
        x
    )
    x0, _ = to_x0_eps(spec.prediction, output, x, schedule.alpha(t), schedule.sigma(t))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSolver:
    """Someone else's: DDIM."""

    def init(self, x):
        return ()

    def step(self, denoise, x, solver_state, state, s, keys):
        x0, state = denoise(x, s.t, state)
        return StepOutput(ddim_update(x, x0, s), x0, solver_state, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnRule:
    """Someone else's: classifier-free guidance, half as strong after the first step."""

    def init_state(self, x):
        return jax.numpy.ones(())

    def combine(self, estimates, guidance_scale, state):
        scale = state * (guidance_scale - 1).reshape(-1, 1, 1, 1)
        x0 = estimates.cond + scale * (estimates.cond - estimates.uncond)
        return x0, jax.numpy.full((), 0.5)


def test_a_solver_and_a_guidance_of_ones_own(pipeline, plain):
    own = pipeline(PLAIN, sampler=Sampler(solver=OwnSolver()), **SETTINGS)
    np.testing.assert_array_equal(own, pipeline(PLAIN, sampler=Sampler(solver=DDIM()), **SETTINGS))
    ruled = pipeline(PLAIN, guidance=Guidance(rule=OwnRule()), **SETTINGS)
    assert np.abs(ruled - plain).max() > 1e-3
    one_step = SETTINGS | {"num_steps": 1}
    np.testing.assert_allclose(
        pipeline(PLAIN, guidance=Guidance(rule=OwnRule()), **one_step),
        pipeline(PLAIN, **one_step),
        atol=1e-5,
    )
    wide, guidance = Sampler(overlap=0.5), Guidance(rule=OwnRule())
    with pytest.raises(UserError, match="Guidance with a state"):
        pipeline(PEA, size=(64, 32), sampler=wide, guidance=guidance)
