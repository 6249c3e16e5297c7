"""Guidance and weights in prompts, from a pipeline's arguments to images."""

import jax
import numpy as np
import pytest

from jaxdiff.bundle import write_bundle
from jaxdiff.errors import UserError
from jaxdiff.pipeline import Pipeline
from jaxdiff.sampling.apg import APG
from jaxdiff.sampling.autoguidance import Autoguidance
from jaxdiff.sampling.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance import Guidance
from jaxdiff.second_models import clip_scores

PEA, TOMATO = "a small red pea", "a green tomato with a stem"
SETTINGS = {"seeds": [1, 2, 3], "num_steps": 3, "guidance_scale": 3.0, "output": "float"}
PLAIN = [PEA, TOMATO, "a red tomato"]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline(tiny_bundle)


@pytest.fixture(scope="module")
def plain(pipeline):
    return pipeline(PLAIN, **SETTINGS)


@pytest.fixture
def compilations():
    """Names of the functions that are compiled during the test."""
    names = []

    def listen(event, *_, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


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
