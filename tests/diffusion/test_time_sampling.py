"""Time samplers: range, distribution and strata."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.time_sampling import LogitNormal, Uniform
from jaxdiff.diffusion.time_shifts import TokenShift
from jaxdiff.errors import UserError

TOKENS = 256
SAMPLERS = [
    Uniform(),
    Uniform(stratified=False),
    LogitNormal(),
    LogitNormal(mean=0.8, std=0.8, shift=3.0, stratified=False),
    LogitNormal(mean=-20.0, std=10.0),
    LogitNormal(mean=20.0, std=10.0),
    LogitNormal(shift=2.0, token_shift=TokenShift()),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_times_lie_above_zero_and_up_to_one(sampler):
    t = sampler(jax.random.key(0), 10_000, TOKENS)
    assert t.shape == (10_000,)
    assert t.dtype == jnp.float32
    assert jnp.all((t > 0) & (t <= 1))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_strata_hold_one_time_each(batch):
    for seed in range(20):
        t = np.asarray(Uniform()(jax.random.key(seed), batch, TOKENS))
        assert sorted(np.floor(t * batch).astype(int)) == list(range(batch))


def test_logit_normal_strata_are_equally_likely():
    sampler = LogitNormal(mean=0.5, std=0.7)
    t = sampler(jax.random.key(0), 32, TOKENS)
    logits = (jnp.log(t / (1 - t)) - 0.5) / 0.7
    quantiles = np.asarray(jax.scipy.stats.norm.cdf(logits))
    assert sorted(np.floor(quantiles * 32).astype(int)) == list(range(32))


def test_the_stratum_is_independent_of_the_place_in_the_batch():
    keys = jax.random.split(jax.random.key(0), 4000)
    t = jax.vmap(lambda key: Uniform()(key, 4, TOKENS))(keys)
    np.testing.assert_allclose(t.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(t.std(axis=0), 12**-0.5, atol=0.01)


def test_strata_reduce_the_variance_of_the_mean_time():
    keys = jax.random.split(jax.random.key(0), 500)
    spread = {
        stratified: jax.vmap(
            lambda key, s=stratified: Uniform(stratified=s)(key, 16, TOKENS).mean()
        )(keys).std()
        for stratified in (True, False)
    }
    assert spread[True] < 0.15 * spread[False]


@pytest.mark.parametrize("stratified", [True, False])
def test_logit_normal_has_its_moments(stratified):
    sampler = LogitNormal(mean=-0.4, std=1.2, shift=2.0, stratified=stratified)
    t = sampler(jax.random.key(0), 50_000, TOKENS)
    logits = jnp.log(t / (1 - t))
    assert jnp.mean(logits) == pytest.approx(-0.4 + np.log(2), abs=0.03)
    assert jnp.std(logits) == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15)])
def test_a_token_shift_adds_mu_to_the_mean_of_the_logits(tokens, mu):
    key = jax.random.key(0)
    shifted = LogitNormal(token_shift=TokenShift())(key, 1000, tokens)
    expected = LogitNormal(mean=mu)(key, 1000, tokens)
    np.testing.assert_allclose(shifted, expected, atol=1e-6)


@pytest.mark.parametrize("field", ["std", "shift"])
def test_impossible_settings_are_refused(field):
    with pytest.raises(UserError, match="positive"):
        LogitNormal(**{field: 0.0})
