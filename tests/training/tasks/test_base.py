"""Means of metrics over steps and over counts."""

import numpy as np

from jaxdiff.training.tasks.base import means


def test_sums_are_divided_by_their_counts_and_others_by_the_steps():
    totals = {
        "loss": np.float64(6.0),
        "part_sum": np.array([6.0, 0.0]),
        "part_count": np.array([4.0, 0.0]),
    }
    found = means(totals, 3)
    assert found.keys() == {"loss", "part"}
    assert found["loss"] == 2.0
    np.testing.assert_array_equal(found["part"], [1.5, np.nan])
