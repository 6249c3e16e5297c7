import itertools

import pytest

from jaxdiff.benchmark.data import interval_seconds, time_batches
from jaxdiff.errors import UserError


def test_batches_are_timed_and_traced(tiny_recipe, tmp_path):
    found = time_batches(tiny_recipe(), warmup=1, repeats=4, trace=str(tmp_path))
    assert list(tmp_path.glob("plugins/profile/*/*.trace.json.gz"))
    assert len(found.seconds) == 4
    assert found.images == 8
    assert found.metrics["workers"] == 0
    assert found.metrics["images_per_s_per_core"] > 0
    assert found.metrics["first_batch_s"] > 0


def test_the_warm_up_is_consumed_but_not_timed():
    taken = []
    batches = map(taken.append, itertools.count())
    seconds, busy = interval_seconds(batches, 2, 3)
    assert len(seconds) == 3
    assert taken == [0, 1, 2, 3, 4]
    assert busy >= 0


def test_a_batch_larger_than_the_data_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="lower train"):
        time_batches(tiny_recipe(batch_size=1000), warmup=0, repeats=3)
