import time

import pytest

from jaxdiff.benchmark.pipeline_rate import measure, measure_data, write_photographs
from jaxdiff.data.array_record import ArrayRecord
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.transforms import Transforms


def test_only_what_comes_after_the_first_batches_is_counted():
    def batches():
        for i in range(5):
            time.sleep(0.2 if i < 2 else 0.01)
            yield i

    figures = measure(batches(), batch_size=10, seconds=10.0)
    assert figures.images == 20  # the second to warm up, and one to start the clock
    assert 10 < figures.images_per_s < 20 / 0.02


@pytest.mark.parametrize("size", [16, 32])
def test_a_pipeline_is_measured_by_clock_and_by_processor(tmp_path, size):
    path = str(tmp_path / "photographs.array_record")
    write_photographs(path, 8, width=64, height=48)
    data = DataConfig(source=ArrayRecord(path=path), transforms=Transforms(size=size))
    figures = measure_data(data, seconds=0.05, batch_size=4)
    assert figures.images >= 4
    assert figures.images % 4 == 0
    assert figures.images_per_s > 0
    assert figures.images_per_s_per_core is not None
