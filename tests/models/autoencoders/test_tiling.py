import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.autoencoders.tiling import (
    apply_vae_mode,
    one_by_one,
    tile_by_tile,
    tile_sides,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 22, 3)), jnp.float32)


def enlarge(x):
    """Nearest neighbours to twice the size: no position sees another."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x):
    return x[:, ::2, ::2]


@pytest.mark.parametrize(
    ("tile", "size"),
    [
        (8, (11, 22)),
        (8, (8, 8)),
        (16, (11, 22)),
        (4, (9, 5)),
        (6, (11, 22)),
        (7, (9, 15)),
        (1, (3, 5)),
    ],
)
def test_tiles_of_what_sees_one_position_alone_fit_seamlessly(tile, size):
    x = X[:, : size[0], : size[1]]
    found = jax.jit(lambda x: tile_by_tile(enlarge, x, tile, 2 * tile))(x)
    np.testing.assert_allclose(found, enlarge(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile_out", [4, 3, 1])
def test_the_output_may_be_smaller(tile_out):
    found = tile_by_tile(halve, X[:, :10, :20], 2 * tile_out, tile_out)
    np.testing.assert_allclose(found, halve(X[:, :10, :20]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sample_size", "sides"), [(512, (64, 512)), (240, (30, 240)), (250, (31, 248)), (5, (1, 8))]
)
def test_a_tile_has_whole_latents(sample_size, sides):
    assert tile_sides(sample_size, 8) == sides


def test_two_tiles_meet_in_a_ramp():
    """The first is 1, the second 2, and their overlap goes linearly from one to the other."""
    seen = []

    def number(x):
        seen.append(x.shape)
        return jnp.where(x[:, :1, :1] == 0, 1.0, 2.0) * jnp.ones_like(x)

    columns = jnp.arange(14.0).reshape(1, 1, 14, 1) * jnp.ones((1, 8, 1, 1))
    found = tile_by_tile(number, columns, 8, 8)[0, 0, :, 0]
    np.testing.assert_allclose(found, [1, 1, 1, 1, 1, 1, 1, 1.5, *[2] * 4, 2, 2])
    assert set(seen) == {(1, 8, 8, 1), (1, 2, 8, 1), (1, 8, 2, 1), (1, 2, 2, 1)}


def test_one_image_at_a_time_is_the_whole_batch():
    def network(x):
        assert x.shape[0] == 1
        return jnp.cumsum(x, axis=1)

    np.testing.assert_allclose(one_by_one(network, X), jnp.cumsum(X, axis=1), rtol=1e-6, atol=1e-6)


def test_what_fits_one_tile_is_not_cut():
    def network(x):
        return x - x.mean(axis=(1, 2), keepdims=True)

    for by in ("full", "slicing", "tiling"):
        np.testing.assert_allclose(
            apply_vae_mode(network, X, by, 22, 22), network(X), rtol=1e-6, atol=1e-6
        )
    assert np.abs(apply_vae_mode(network, X, "tiling", 16, 16) - network(X)).max() > 0.01
