import copy
import json

import pytest

from jaxdiff.benchmark.report import (
    Measurement,
    compare,
    format_report,
    make_report,
    read_report,
    write_report,
)
from jaxdiff.errors import UserError


@pytest.fixture(scope="module")
def found(tiny_recipe) -> dict:
    """A report of two contenders; the second is half as fast."""
    times = [0.10, 0.11, 0.10, 0.09, 0.10]
    ours = Measurement(
        name="jaxdiff", unit="step", seconds=times, images=8, metrics={"compile_s": 4.0}
    )
    theirs = Measurement(name="torch", unit="step", seconds=[2 * t for t in times], images=8)
    return make_report("train", tiny_recipe(), {"warmup": 1}, [ours, theirs])


def test_a_report_records_machine_versions_flags_and_recipe(found):
    assert found["hardware"]["platform"] == "cpu"
    assert {"jax", "flax", "python"} <= set(found["versions"])
    assert found["flags"]["XLA_FLAGS"]
    assert found["config"]["name"] == "tiny"
    assert found["date"].endswith("+00:00")
    ours = found["results"]["jaxdiff"]
    assert ours["images_per_s"] == pytest.approx(80)
    assert ours["images_per_s_per_device"] == pytest.approx(80 / found["hardware"]["devices"])


def test_a_report_round_trips_through_its_file(found, tmp_path):
    write_report(tmp_path / "a.json", found)
    assert read_report(tmp_path / "a.json") == json.loads(json.dumps(found))


def test_the_text_of_a_report_has_the_ratio_to_the_first(found):
    lines = format_report(found).splitlines()
    assert any(line.split() == ["ratio", "to", "the", "first", "2.00"] for line in lines)
    assert any(line.startswith("jaxdiff: median 100.00 ms per step") for line in lines)


def later(found: dict, seconds: list[float], **figures: float) -> str:
    after = copy.deepcopy(found)
    entry = after["results"]["jaxdiff"]
    entry |= {"seconds": seconds, "median_s": sorted(seconds)[len(seconds) // 2], **figures}
    (line, *_) = [x for x in compare(found, after).splitlines() if x.startswith("jaxdiff")]
    return line


def test_a_change_within_the_standard_error_is_noise(found):
    assert later(found, [0.10, 0.12, 0.101, 0.09, 0.10]).endswith("within noise")


def test_a_change_beyond_the_standard_error_is_reported(found):
    assert later(found, [0.199, 0.2, 0.2, 0.2, 0.201]).endswith("rose")
    assert later(found, [0.049, 0.05, 0.05, 0.05, 0.051]).endswith("fell")


def test_a_change_below_two_percent_is_noise(found):
    steady = copy.deepcopy(found)
    steady["results"]["jaxdiff"] |= {"seconds": [0.1] * 5, "median_s": 0.1}
    assert later(steady, [0.1015] * 5).endswith("within noise")
    assert later(steady, [0.103] * 5).endswith("rose")


def test_a_metric_measured_once_changes_by_more_than_a_tenth(found):
    after = copy.deepcopy(found)
    for value, verdict in ((4.2, "within noise"), (5.0, "rose")):
        after["results"]["jaxdiff"]["compile_s"] = value
        text = compare(found, after)
        line = next(x for x in text.splitlines() if x.startswith("jaxdiff: compile_s"))
        assert line.endswith(verdict)


def test_differences_of_setup_are_listed(found):
    after = copy.deepcopy(found)
    after["hardware"]["device"] = "another"
    after["config"]["train"]["batch_size"] = 99
    text = compare(found, after)
    assert "differs: hardware.device is 'cpu' in the first and 'another' in the second" in text
    assert "config.train.batch_size is 8 in the first and 99 in the second" in text
    assert "differs" not in compare(found, found)


def test_incomparable_reports_are_refused(found, tmp_path):
    other = {**copy.deepcopy(found), "benchmark": "data"}
    with pytest.raises(UserError, match="bench train, the second of bench data"):
        compare(found, other)
    with pytest.raises(UserError, match="no contender in common"):
        compare(found, {**found, "results": {}})
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_report(tmp_path / "bad.json")
    for text in ('{"a": 1}', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="that --json wrote"):
            read_report(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"results": 3},
        {"results": {"a": {}}},
        {"results": {"a": {"median_s": 1.0, "seconds": []}}},
        {"results": {"a": {"median_s": "x", "seconds": [1.0]}}},
        {"results": {"a": {"median_s": 10**399, "seconds": [1.0, 2.0]}}},
    ],
)
def test_reports_that_were_edited_are_refused(found, damage):
    other = {**copy.deepcopy(found), **damage}
    with pytest.raises(UserError, match="incomplete or edited"):
        compare(other, other)
