"""Goodput counts each step once, over all starts."""

import json

import pytest
from etils import epath

from jaxdiff.training.goodput import STARTS, Goodput


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def line(step: int, seconds_per_step: float) -> dict:
    return {"step": step, "images_per_s": 8 / seconds_per_step}


def test_a_run_without_a_break_loses_what_is_no_step(tmp_path):
    clock = Clock()
    goodput = Goodput(epath.Path(tmp_path), first=0, batch_size=8, clock=clock)
    goodput.add(line(10, 2.0))
    goodput.add({"step": 10, "score": 0.5})  # of an evaluator
    goodput.add(line(20, 3.0))
    clock.now += 100
    assert goodput.totals() == {"goodput": pytest.approx(0.5), "restarts": 0, "wall_s": 100}


def test_a_step_that_is_taken_twice_counts_once(tmp_path):
    folder, clock = epath.Path(tmp_path), Clock()
    killed = Goodput(folder, first=0, batch_size=8, clock=clock)
    killed.add(line(10, 2.0))
    killed.add(line(20, 2.0))  # after the checkpoint of step 15
    clock.now += 160
    resumed = Goodput(folder, first=15, batch_size=8, records=[line(10, 2.0)], clock=clock)
    resumed.add(line(20, 2.0))
    clock.now += 40
    # Steps 11 to 15 have no line of their own left.
    assert resumed.totals() == {
        "goodput": pytest.approx((10 + 5) * 2.0 / 200),
        "restarts": 1,
        "wall_s": 200,
    }
    assert json.loads((tmp_path / STARTS).read_text()) == {"starts": [1000.0, 1160.0]}


def test_a_start_before_the_first_checkpoint_counts(tmp_path):
    folder, clock = epath.Path(tmp_path), Clock()
    Goodput(folder, first=0, batch_size=8, clock=clock)
    clock.now += 50
    again = Goodput(folder, first=0, batch_size=8, clock=clock)
    assert again.totals() == {"goodput": 0.0, "restarts": 1, "wall_s": 50}


@pytest.mark.parametrize("text", ["{", '{"starts": 7}', '{"starts": ["a"]}', "{}"])
def test_starts_that_cannot_be_read_are_none(text, tmp_path):
    (tmp_path / STARTS).write_text(text)
    assert Goodput(epath.Path(tmp_path), first=3, batch_size=8).totals()["restarts"] == 0


def test_a_clock_that_is_set_back_gives_no_impossible_figure(tmp_path):
    clock = Clock()
    goodput = Goodput(epath.Path(tmp_path), first=0, batch_size=8, clock=clock)
    goodput.add(line(10, 1.0))
    clock.now -= 3600
    assert goodput.totals()["goodput"] == 1.0
