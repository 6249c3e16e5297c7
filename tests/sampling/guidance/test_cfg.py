"""Guidance against closed forms on Gaussians, and the promises about its arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.process import add_noise, from_x0_eps
from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.cfg import (
    ComposedPrompts,
    ConditionedModel,
    GuideModel,
    guided_denoiser,
)
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.guidance.thresholds import DynamicThreshold, StaticThreshold
from jaxdiff.sampling.loop import sample
from jaxdiff.sampling.solvers_ode import Euler, Heun

PREDICTIONS = ["eps", "x0", "v", "velocity"]
PLAIN = Guidance()


def _gaussian_network(prediction, schedule):
    """The exact network for data N(mean, std^2); a prompt's features are (mean, std) [b 2]."""

    def network(x, t, cond):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        mean, std = (cond[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
        off = (x - a * mean) / ((a * std) ** 2 + s**2)
        return from_x0_eps(prediction, mean + a * std**2 * off, s * off, alpha, sigma)

    return network


def _model(prediction, schedule, cond, uncond, network=None):
    network = network or _gaussian_network(prediction, schedule)
    return ConditionedModel(
        network=network, prediction=prediction, schedule=schedule, cond=cond, uncond=uncond
    )


def _denoise(model, scale, guidance=PLAIN, **arguments):
    """Return the guided denoiser as a function (x, t) -> x0."""
    denoiser = guided_denoiser(model, guidance, scale, **arguments)
    return lambda x, t: denoiser.denoise(x, t, denoiser.init_state(x))[0]


def _features(b, mean, std):
    return jnp.tile(jnp.array([mean, std]), (b, 1))


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guided_score_is_that_of_the_product_of_gaussians(prediction, schedule):
    """At each t: the score of p(x | cond)^w p(x | uncond)^(1 - w), which is a Gaussian's."""
    x = jnp.linspace(-2, 2, 5).reshape(-1, 1, 1, 1)
    scale = jnp.array([0.0, 1.0, 1.5, 3.0, 7.5])
    (m1, s1), (m0, s0) = (0.8, 0.3), (-0.2, 0.7)
    model = _model(prediction, schedule, _features(5, m1, s1), _features(5, m0, s0))
    denoise = _denoise(model, scale)
    for t in (0.2, 0.5, 0.8):
        t = jnp.asarray(t)
        a, s, w = schedule.alpha(t), schedule.sigma(t), scale.reshape(-1, 1, 1, 1)
        p1, p0 = 1 / ((a * s1) ** 2 + s**2), 1 / ((a * s0) ** 2 + s**2)
        precision = w * p1 + (1 - w) * p0
        mean = a * (w * p1 * m1 + (1 - w) * p0 * m0) / precision
        score = -precision * (x - mean)
        np.testing.assert_allclose(denoise(x, t), (x + s**2 * score) / a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
def test_guided_images_are_those_of_the_guided_gaussian(schedule):
    """With one std for both, guidance moves the mean to m0 + w (m1 - m0) and keeps the std."""
    noise = jnp.linspace(-2, 2, 6).reshape(-1, 1, 1, 1)
    scale = jnp.array([0.0, 1.0, 2.0, 3.0, 5.0, 7.5])
    m1, m0, std = 0.3, 0.1, 0.4
    # On a rectified flow eps says nothing at t = 1, where alpha is 0.
    prediction = "velocity" if isinstance(schedule, RectifiedFlow) else "eps"
    model = _model(prediction, schedule, _features(6, m1, std), _features(6, m0, std))
    denoiser = guided_denoiser(model, PLAIN, scale)
    images = sample(denoiser, Heun(), schedule, TimeGrid(), 400, noise, jnp.arange(6)).images
    one = jnp.ones(())
    a, s, mean = schedule.alpha(one), schedule.sigma(one), m0 + scale * (m1 - m0)
    mean = mean.reshape(-1, 1, 1, 1)
    exact = mean + std * (s * noise - a * mean) / jnp.sqrt((a * std) ** 2 + s**2)
    np.testing.assert_allclose(images, exact, atol=2e-3)


def _denoise_with(scale, cond=(0.8, 0.3), uncond=(-0.2, 0.7), t=0.5, threshold=None, **fields):
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    model = _model("v", Cosine(), _features(3, *cond), _features(3, *uncond))
    guided = _denoise(model, jnp.full(3, scale), Guidance(**fields), threshold=threshold)
    return np.asarray(guided(x, jnp.asarray(t)))


def test_scale_one_is_the_conditional_model_to_the_last_bit():
    np.testing.assert_array_equal(_denoise_with(1.0), _denoise_with(1.0, uncond=(5.0, 2.0)))
    np.testing.assert_allclose(_denoise_with(1.0), _denoise_with(4.0, uncond=(0.8, 0.3)), atol=1e-6)


def test_scale_zero_is_the_negative_prompt():
    plain = _denoise_with(1.0, cond=(-0.2, 0.7))
    np.testing.assert_allclose(_denoise_with(0.0), plain, atol=1e-5)


def test_each_image_has_a_scale_of_its_own_and_one_call_serves_both():
    calls = []

    def network(x, t, cond):
        calls.append((x.shape, t.shape))
        return jnp.broadcast_to(cond["mean"].reshape(-1, 1, 1, 1), x.shape)

    cond, uncond = {"mean": jnp.full(3, 0.5)}, {"mean": jnp.zeros(3)}
    scales = jnp.array([0.0, 1.0, 4.0])
    denoise = _denoise(_model("x0", RectifiedFlow(), cond, uncond, network), scales)
    x0 = denoise(jnp.ones((3, 2, 2, 1)), jnp.asarray(0.5))
    np.testing.assert_allclose(x0[:, 0, 0, 0], [0.0, 0.5, 2.0], atol=1e-6)
    assert calls == [((6, 2, 2, 1), (6,))]


def test_outside_its_interval_guidance_is_off():
    fields = {"interval": (0.2, 0.7)}
    for t, guided in [(0.1, False), (0.5, True), (0.9, False)]:
        same = np.allclose(_denoise_with(5.0, t=t, **fields), _denoise_with(1.0, t=t), atol=1e-6)
        assert same != guided


def test_rescale_brings_back_the_spread_of_the_conditional_estimate():
    spread = [
        x0.std(axis=(1, 2, 3)) for x0 in (_denoise_with(1.0), _denoise_with(5.0, rescale=1.0))
    ]
    np.testing.assert_allclose(*spread, rtol=1e-4)
    np.testing.assert_array_equal(_denoise_with(5.0, rescale=0.0), _denoise_with(5.0))


def test_static_threshold_clips():
    x0 = _denoise_with(20.0)
    assert np.abs(x0).max() > 1
    clipped = _denoise_with(20.0, threshold=StaticThreshold())
    np.testing.assert_array_equal(clipped, np.clip(x0, -1, 1))


def test_dynamic_threshold_scales_what_overflows_and_leaves_the_rest():
    threshold = DynamicThreshold(quantile=0.9)
    calm = jnp.linspace(-0.9, 0.9, 48).reshape(1, 4, 4, 3)
    np.testing.assert_array_equal(threshold(calm), calm)
    both = threshold(jnp.concatenate([calm, 5 * calm]))
    np.testing.assert_array_equal(both[:1], calm)  # image by image
    assert jnp.max(jnp.abs(both)) == 1
    saturated = jnp.mean(jnp.abs(both[1]) == 1)
    assert 0.05 < saturated < 0.15


def test_what_the_network_says_of_noised_data_is_found_again():
    """A network that knows x0 leads to x0 whatever it predicts."""
    schedule, t = Cosine(), jnp.asarray(0.6)
    x0, eps = (jax.random.normal(jax.random.key(i), (2, 3, 3, 1)) for i in (0, 1))
    x_t = add_noise(schedule, x0, eps, t)
    for prediction in PREDICTIONS:

        def network(x, t, cond, prediction=prediction):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            twice = [jnp.concatenate([each, each]) for each in (x0, eps)]
            return from_x0_eps(prediction, *twice, alpha, sigma).astype(jnp.float32)

        model = _model(prediction, schedule, (), (), network)
        denoise = _denoise(model, jnp.full(2, 3.0))
        np.testing.assert_allclose(denoise(x_t, t), x0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StaticThreshold(bound=0.0),
        lambda: DynamicThreshold(quantile=1.5),
        lambda: Guidance(interval=(0.8, 0.2)),
        lambda: Guidance(rescale=2.0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()


def _counting(rows, schedule):
    """A network that records how many images it is evaluated on."""
    network = _gaussian_network("v", schedule)

    def counted(x, t, cond):
        jax.debug.callback(lambda: rows.append(len(x)))
        return network(x, t, cond)

    return counted


def test_outside_its_interval_the_network_sees_the_prompts_alone():
    rows, schedule, grid = [], RectifiedFlow(), TimeGrid()
    model = _model(
        "v", schedule, _features(3, 0.8, 0.3), _features(3, 0, 1), _counting(rows, schedule)
    )
    noise, seeds = jax.random.normal(jax.random.key(0), (3, 2, 2, 1)), jnp.arange(3)

    def images(interval):
        guidance = Guidance(interval=interval)
        denoiser = guided_denoiser(model, guidance, jnp.full(3, 3.0))
        return sample(denoiser, Euler(), schedule, grid, 10, noise, seeds).images

    jax.jit(images, static_argnums=0)((0.25, 0.75))
    jax.effects_barrier()
    times = np.array([grid(jnp.int32(i), jnp.int32(10), 1) for i in range(10)])
    inside = int(np.sum((times >= 0.25) & (times <= 0.75)))
    assert 0 < inside < 10
    assert sorted(rows) == [3] * (10 - inside) + [6] * inside
    programs = {i: str(jax.make_jaxpr(lambda i=i: images(i))()) for i in ((0.0, 1.0), (0.25, 0.75))}
    assert ["cond[" in program for program in programs.values()] == [False, True]


def test_composed_prompts_add_up_what_each_changes():
    """Means are linear in the features here: the x0 of eq. 2 is that of the composed features."""
    schedule, x = RectifiedFlow(), jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    t, std = jnp.asarray(0.4), 0.5
    cond, uncond = _features(3, 0.8, std), _features(3, 0.1, std)
    more = jnp.stack([_features(3, -0.5, std), _features(3, 0.3, std)])
    weights = jnp.array([[1.0, 0.5, -0.5], [0.7, 0.0, 1.0], [1.0, 0.0, 0.0]])
    model = _model("v", schedule, cond, uncond)
    composed = dataclasses.replace(model, composed=ComposedPrompts(more, weights))
    scale = jnp.full(3, 2.0)
    found = _denoise(composed, scale)(x, t)
    each = jnp.stack([cond, *more])[..., 0] - 0.1
    mean = 0.1 + jnp.sum(weights.T * each, axis=0)
    meant = _model("v", schedule, jnp.stack([mean, jnp.full(3, std)], axis=1), uncond)
    expected = _denoise(meant, scale)(x, t)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = _denoise(model, scale)(x, t)
    np.testing.assert_array_equal(found[2], alone[2])  # weight 1 and nothing else: the same bits


@pytest.mark.parametrize("guide_scale", [1.0, 2.5])
def test_autoguidance_adds_the_difference_from_the_guide_model(guide_scale):
    schedule, x, t = RectifiedFlow(), jnp.ones((2, 2, 2, 1)), jnp.asarray(0.4)
    model = _model("v", schedule, _features(2, 0.8, 0.3), _features(2, 0.1, 0.6))
    guide = _model("eps", schedule, _features(2, 0.5, 0.7), _features(2, 0.2, 0.8))
    scale = jnp.array([1.0, 3.0])
    plain = _denoise(model, scale)(x, t)
    guided = _denoise(model, scale, guide=GuideModel(guide, jnp.asarray(guide_scale)))(x, t)
    delta = model.conditional(x, t)[0] - guide.conditional(x, t)[0]
    np.testing.assert_allclose(guided, plain + (guide_scale - 1) * delta, atol=1e-6)
    if guide_scale == 1:
        np.testing.assert_array_equal(guided, plain)


NEUTRAL = [
    Guidance(apg=APG(eta=1.0)),
    Guidance(cfg_zero_star=CFGZeroStar(optimized_scale=False, zero_steps=0)),
    Guidance(rescale=0.0, interval=(0.0, 1.0)),
]


@pytest.mark.parametrize("guidance", NEUTRAL, ids=["apg", "cfg_zero_star", "interval"])
def test_at_its_neutral_value_each_guidance_leaves_every_bit(guidance):
    fields = {
        name: getattr(guidance, name) for name in ("apg", "cfg_zero_star", "rescale", "interval")
    }
    np.testing.assert_array_equal(_denoise_with(3.0, **fields), _denoise_with(3.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMean:
    """A guidance rule of someone else: guides by the mean of the differences so far."""

    def init_state(self, x):
        return jnp.zeros_like(x), jnp.zeros(())

    def combine(self, estimates, guidance_scale, state):
        total, count = state
        total, count = total + estimates.cond - estimates.uncond, count + 1
        scale = (guidance_scale - 1).reshape(-1, 1, 1, 1)
        return estimates.cond + scale * total / count, (total, count)


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_a_rule_of_ones_own_replaces_classifier_free_guidance(solver):
    """Where the differences are the same in all steps, their mean is each of them."""
    guidance = Guidance(rule=RunningMean())
    assert guidance.has_state
    features = _features(2, 0.8, 0.3), _features(2, 0.2, 0.3)

    def means(x, t, cond):
        return jnp.broadcast_to(cond[:, :1, None, None], x.shape)

    model = _model("x0", RectifiedFlow(), *features, means)
    noise, seeds = jax.random.normal(jax.random.key(0), (2, 2, 2, 1)), jnp.arange(2)
    images = [
        sample(
            guided_denoiser(model, guidance, jnp.array([1.0, 3.0])),
            solver,
            model.schedule,
            TimeGrid(),
            5,
            noise,
            seeds,
        ).images
        for guidance in (guidance, PLAIN)
    ]
    np.testing.assert_allclose(*images, atol=1e-6)
