import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.errors import UserError
from jaxdiff.training.ema import Ema


def test_late_updates_average_with_the_decay():
    ema, step = Ema(decay=0.9), 1000
    average, value = {"w": jnp.zeros(3)}, 0.0
    for n in range(20):
        average = ema.update(average, {"w": jnp.full(3, n + 1.0)}, step)
        value = 0.9 * value + 0.1 * (n + 1)
    np.testing.assert_allclose(average["w"], value, rtol=1e-5)


def test_early_updates_reduce_the_influence_of_the_initial_weights():
    first = Ema(decay=0.9999).update({"w": jnp.float32(1)}, {"w": jnp.float32(0)}, 0)
    np.testing.assert_allclose(first["w"], 0.1, rtol=1e-6)
    tenth = Ema(decay=0.9999).update({"w": jnp.float32(1)}, {"w": jnp.float32(0)}, jnp.int32(8))
    np.testing.assert_allclose(tenth["w"], 0.5, rtol=1e-6)


def test_the_half_life_is_the_documented_one():
    ema, decay = Ema(decay=0.99), 0.99
    average = jnp.float32(0)
    for _ in range(round(0.69 / (1 - decay))):
        average = ema.update(average, jnp.float32(1), 10**6)
    assert float(average) == pytest.approx(0.5, abs=0.01)


def test_the_average_is_float32_and_equal_weights_stay_equal():
    params = {"w": jnp.linspace(-1, 1, 7, dtype=jnp.bfloat16)}
    ema = Ema()
    average = ema.init(params)
    for step in range(5):
        average = ema.update(average, params, step)
    assert average["w"].dtype == jnp.float32
    np.testing.assert_array_equal(average["w"], params["w"].astype(jnp.float32))


def test_the_first_average_survives_the_donation_of_the_parameters():
    params = {"w": jnp.arange(4.0)}
    average = Ema().init(params)
    params["w"].delete()
    np.testing.assert_array_equal(average["w"], np.arange(4))


def test_update_keeps_the_sharding():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("fsdp"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    average = jax.jit(Ema().update)(jax.device_put(jnp.zeros(16), sharding), params, 0)
    assert average.sharding.is_equivalent_to(sharding, 1)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=r"Ema\.decay is"):
        Ema(decay=decay)
