import pytest

from jaxdiff.benchmark.timing import median, peak_memory, standard_error, time_in_turns


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_in_turns(contenders, warmup=2, repeats=3)
    assert calls == ["a", "b"] * 5
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_one_slow_call_changes_neither_the_median_nor_its_error():
    steady = [1.0, 1.1, 0.9, 1.0, 1.05]
    assert median([*steady, 100.0]) == pytest.approx(median(steady), abs=0.05)
    assert standard_error([*steady, 100.0]) < 0.1
    assert standard_error([2.0] * 4) == 0


def test_peak_memory_states_what_it_measures():
    peak = peak_memory()
    assert peak.bytes > 10_000_000
    assert peak.of == "the process, in RAM"  # JAX reports none on a CPU
