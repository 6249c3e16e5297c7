import pytest

from jaxdiff.benchmark.timing import in_turn, median, p90, peak_memory, standard_error


def test_contenders_take_turns_and_warm_up_uncounted():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = in_turn(contenders, warmup=2, repeats=3)
    assert calls == ["a", "b"] * 5
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_one_slow_call_changes_neither_the_median_nor_its_error():
    steady = [1.0, 1.1, 0.9, 1.0, 1.05]
    assert median([*steady, 100.0]) == pytest.approx(median(steady), abs=0.05)
    assert standard_error([*steady, 100.0]) < 0.1
    assert standard_error([2.0] * 4) == 0


def test_nine_in_ten_do_not_exceed_p90():
    assert p90([float(i) for i in range(11)]) == pytest.approx(9)


def test_peak_memory_says_whose_it_is():
    peak = peak_memory()
    assert peak.bytes > 10_000_000
    assert peak.of == "the process, in RAM"  # of a CPU JAX counts none
