import copy
import json

import pytest

from jaxdiff.benchmark.report import (
    Measured,
    compare,
    read_report,
    report,
    tell,
    write_report,
)
from jaxdiff.errors import UserError


@pytest.fixture(scope="module")
def found(tiny_recipe) -> dict:
    """A report of two contenders, the second half as fast."""
    times = [0.10, 0.11, 0.10, 0.09, 0.10]
    ours = Measured(
        name="jaxdiff", what="step", seconds=times, images=8, figures={"compile_s": 4.0}
    )
    theirs = Measured(name="torch", what="step", seconds=[2 * t for t in times], images=8)
    return report("train", tiny_recipe(), {"warmup": 1}, [ours, theirs])


def test_a_report_says_what_its_figures_depend_on(found):
    assert found["hardware"]["platform"] == "cpu"
    assert {"jax", "flax", "python"} <= set(found["versions"])
    assert found["flags"]["XLA_FLAGS"]
    assert found["config"]["name"] == "tiny"
    assert found["date"].endswith("+00:00")
    ours = found["results"]["jaxdiff"]
    assert ours["images_per_s"] == pytest.approx(80)
    assert ours["images_per_s_per_device"] == pytest.approx(80 / found["hardware"]["devices"])


def test_a_report_comes_back_from_its_file(found, tmp_path):
    write_report(tmp_path / "a.json", found)
    assert read_report(tmp_path / "a.json") == json.loads(json.dumps(found))


def test_the_text_of_a_report_has_the_ratio_to_the_first(found):
    lines = tell(found).splitlines()
    assert any(line.split() == ["ratio", "to", "the", "first", "2.00"] for line in lines)
    assert any(line.startswith("jaxdiff: median 100.00 ms a step") for line in lines)


def later(found: dict, seconds: list[float], **figures: float) -> str:
    after = copy.deepcopy(found)
    entry = after["results"]["jaxdiff"]
    entry |= {"seconds": seconds, "median_s": sorted(seconds)[len(seconds) // 2], **figures}
    (line, *_) = [x for x in compare(found, after).splitlines() if x.startswith("jaxdiff")]
    return line


def test_what_lies_within_the_spread_has_not_moved(found):
    assert later(found, [0.10, 0.12, 0.101, 0.09, 0.10]).endswith("within noise")


def test_what_is_steady_and_differs_has_moved(found):
    assert later(found, [0.199, 0.2, 0.2, 0.2, 0.201]).endswith("rose")
    assert later(found, [0.049, 0.05, 0.05, 0.05, 0.051]).endswith("fell")


def test_less_than_two_in_a_hundred_is_noise_however_steady(found):
    steady = copy.deepcopy(found)
    steady["results"]["jaxdiff"] |= {"seconds": [0.1] * 5, "median_s": 0.1}
    assert later(steady, [0.1015] * 5).endswith("within noise")
    assert later(steady, [0.103] * 5).endswith("rose")


def test_a_figure_measured_once_moves_by_a_tenth(found):
    after = copy.deepcopy(found)
    for value, verdict in ((4.2, "within noise"), (5.0, "rose")):
        after["results"]["jaxdiff"]["compile_s"] = value
        text = compare(found, after)
        line = next(x for x in text.splitlines() if x.startswith("jaxdiff: compile_s"))
        assert line.endswith(verdict)


def test_what_else_differs_is_reported(found):
    after = copy.deepcopy(found)
    after["hardware"]["device"] = "another"
    after["config"]["train"]["batch_size"] = 99
    text = compare(found, after)
    assert "differs: hardware.device is 'cpu' in the first and 'another' in the second" in text
    assert "config.train.batch_size is 8 in the first and 99 in the second" in text
    assert "differs" not in compare(found, found)


def test_reports_that_cannot_be_compared_are_refused(found, tmp_path):
    other = {**copy.deepcopy(found), "benchmark": "data"}
    with pytest.raises(UserError, match="bench train, the second of data"):
        compare(found, other)
    with pytest.raises(UserError, match="no contender in common"):
        compare(found, {**found, "results": {}})
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    for text in ("{", '{"a": 1}', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="give what --json wrote"):
            read_report(tmp_path / "bad.json")
