import itertools

import pytest

from jaxdiff.benchmark import data
from jaxdiff.errors import UserError


def test_batches_are_timed_as_fast_as_they_come(tiny_recipe):
    found = data.measure(tiny_recipe(), warmup=1, repeats=4)
    assert len(found.seconds) == 4
    assert found.images == 8
    assert found.figures["workers"] == 0
    assert found.figures["images_per_s_per_core"] > 0
    assert found.figures["first_batch_s"] > 0


def test_warm_up_is_taken_but_not_timed():
    taken = []
    batches = map(taken.append, itertools.count())
    seconds, busy = data.timed(batches, 2, 3)
    assert len(seconds) == 3
    assert taken == [0, 1, 2, 3, 4]
    assert busy >= 0


def test_too_large_a_batch_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="lower train"):
        data.measure(tiny_recipe(batch_size=1000), warmup=0, repeats=3)
