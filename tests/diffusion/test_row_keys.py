"""What is sampled for a row does not depend on the micro-batch that the row is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.objectives import Denoising, LossInputs
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import Cosine
from jaxdiff.diffusion.time_sampling import LogitNormal, Uniform

WHOLE = RowKeys.whole(jax.random.key(0), 8)
ROWS = np.array([1, 4, 6])
PART = RowKeys(WHOLE.key, jnp.asarray(ROWS), 8)


def test_rows_have_the_same_keys_in_any_part_of_the_batch():
    for whole, part in zip((WHOLE, *WHOLE.split()), (PART, *PART.split()), strict=True):
        np.testing.assert_array_equal(part.normal(2, 3), whole.normal(2, 3)[ROWS])
        assert len(np.unique(jax.random.key_data(whole.by_row()), axis=0)) == 8
    first, second = WHOLE.split()
    assert not np.any(np.isclose(first.normal(4), second.normal(4)))


@pytest.mark.parametrize("times", [Uniform(), LogitNormal(stratified=False)])
def test_a_part_of_a_batch_has_its_times_and_noise(times):
    x0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))

    def outputs(keys, x0):
        model = lambda x_t, t, cond, next_t=None: x_t  # noqa: E731
        inputs = LossInputs(
            model=model, prediction="eps", schedule=Cosine(), x0=x0, cond=None, keys=keys
        )
        return Denoising(times=times, noise_offset=0.1).loss(inputs)

    whole, part = outputs(WHOLE, x0), outputs(PART, x0[ROWS])
    np.testing.assert_array_equal(part.t, whole.t[ROWS])
    np.testing.assert_allclose(part.loss, whole.loss[ROWS], rtol=1e-5)
