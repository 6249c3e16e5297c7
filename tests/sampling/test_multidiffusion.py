"""Windows: one is the denoiser itself, several are averaged, and around an axis all are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.sampling import multidiffusion
from jaxdiff.sampling.multidiffusion import Windows
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solver import stateless

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)
T = jnp.float32(0.37)


def windowed(denoise, windows, height, width):
    """Return the windowed denoiser as a function (x, t) -> x0."""
    denoiser = multidiffusion.windowed(stateless(denoise), windows, height, width)
    return lambda x, t: denoiser.denoise(x, t, ())[0]


def pointwise(x, t):
    return jnp.sin(x) + t


def mean(x, t):
    """One that sees all of a window."""
    return jnp.broadcast_to(jnp.mean(x, axis=(1, 2), keepdims=True), x.shape)


def test_one_window_is_the_denoiser_itself():
    denoiser = stateless(mean)
    for height, width in ((8, 12), (16, 12)):
        one = Windows(height=height, width=width)
        assert multidiffusion.windowed(denoiser, one, 8, 12) is denoiser


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("wrap", [(False, False), (True, False), (True, True)])
def test_windows_do_not_change_a_pointwise_denoiser(overlap, wrap):
    windows = Windows(height=4, width=5, overlap=overlap, wrap=wrap, at_a_time=3)
    found = jax.jit(windowed(pointwise, windows, 8, 12))(X, T)
    np.testing.assert_allclose(found, pointwise(X, T), atol=1e-6)


def test_how_many_are_taken_at_a_time_does_not_matter():
    found = [windowed(mean, Windows(height=4, width=4, at_a_time=k), 8, 12)(X, T) for k in (1, 4)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_two_windows_blend_smoothly():
    seen = []

    def number(x, t):
        seen.append(x.shape)
        return jnp.where(x[:, :1, :1] == 0, 1.0, 2.0) * jnp.ones_like(x)

    columns = jnp.arange(12.0).reshape(1, 1, 12, 1) * jnp.ones((1, 8, 1, 1))
    found = windowed(number, Windows(height=8, width=8), 8, 12)(columns, T)[0, 0, :, 0]
    np.testing.assert_allclose(found[:4], 1)
    np.testing.assert_allclose(found[8:], 2)
    assert (np.diff(found[3:9]) > 0).all()
    assert set(seen) == {(1, 8, 8, 1)}


def test_windows_of_an_axis_that_wraps_have_another_offset_at_each_time():
    def number(x, t):
        return jnp.broadcast_to(jnp.arange(12.0)[:, None], x.shape)

    around = windowed(number, Windows(height=8, width=12, wrap=(False, True)), 8, 12)
    rows = [np.asarray(around(X, jnp.float32(t)))[0, 0, :, 0] for t in (0.1, 0.3, 0.4)]
    assert not all(np.allclose(row, rows[0]) for row in rows)
    np.testing.assert_array_equal(around(X, T), around(X, T))
    # One window keeps its place until the layout has formed; one of several does not.
    for t, stays in ((0.9, True), (0.6, True), (0.3, False)):
        row = around(X, jnp.float32(t))[0, 0, :, 0]
        assert np.array_equal(row, range(12)) == stays
    halves = windowed(mean, Windows(height=8, width=6, overlap=0.0, wrap=(False, True)), 8, 12)
    one, other = (np.asarray(halves(X, jnp.float32(t))) for t in (0.6, 0.9))
    assert not np.allclose(one, other)
    level = windowed(number, Windows(height=8, width=12, wrap=(True, False)), 8, 12)
    one, other = (np.asarray(level(X, jnp.float32(t))) for t in (0.1, 0.8))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_overlap_of_1_is_refused():
    with pytest.raises(UserError, match=r"overlap is 1.0: expected"):
        Sampler(overlap=1.0)
