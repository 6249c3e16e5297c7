"""The prepared script for a GPU runs all of its comparisons, at a tiny size on a CPU."""

import json

import pytest

torch = pytest.importorskip("torch")

from benchmarks import one_gpu
from jaxdiff.errors import UserError

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.mark.parametrize("name", one_gpu.COMPARISONS)
def test_a_comparison_writes_its_report(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # it takes a minute
    one_gpu.run_comparison(name, str(tmp_path), tiny=True)
    (file,) = tmp_path.glob(f"*-{name}-tiny.json")
    results = json.loads(file.read_text())["results"]
    assert len(results) == 3
    for result in results.values():
        assert len(result["seconds"]) == 3
        assert result["model_tflops_per_s"] > 0
        if "sample" in name:
            assert result["difference_of_255"] < 4  # in bfloat16


def test_without_a_gpu_the_script_says_so(tmp_path):
    with pytest.raises(UserError, match=r"expected a GPU; .* or give --tiny"):
        one_gpu.run_comparison("sd15-sample-512", str(tmp_path), tiny=False)
