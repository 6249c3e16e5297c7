import pytest

from jaxdiff.data.bad_records import MINIMUM, WINDOW, BadRecords
from jaxdiff.errors import UserError


def test_a_share_within_the_allowed_never_stops_the_run():
    judge = BadRecords(0.01)
    for _ in range(1000):
        judge.add(1, ["a.png: broken"], 99)


def test_a_share_above_the_allowed_stops_it_and_names_records():
    judge = BadRecords(0.01)
    for i in range(4):
        judge.add(2, [f"{i}.png: late", "7.png: broken"], 98)
    with pytest.raises(UserError, match=r"2\.0% of the last 500 .*allowed: 1\.0%.*7\.png: broken"):
        judge.add(2, ["4.png: late", "7.png: broken"], 98)


def test_few_records_are_not_judged():
    judge = BadRecords(0.01)
    judge.add(10, ["x: broken"] * 10, MINIMUM - 11)
    with pytest.raises(UserError):
        judge.add(0, [], 1)


def test_none_allowed_means_that_the_first_one_stops():
    judge = BadRecords(0.0)
    judge.add(0, [], 8)
    with pytest.raises(UserError, match="x: broken"):
        judge.add(1, ["x: broken"], 8)


def test_all_allowed_means_that_none_stops():
    judge = BadRecords(1.0)
    for _ in range(100):
        judge.add(1000, ["x: broken"], 0)


def test_a_good_past_does_not_excuse_a_bad_present():
    judge = BadRecords(0.1)
    for _ in range(100):
        judge.add(0, [], WINDOW)
    with pytest.raises(UserError):
        judge.add(WINDOW // 2, ["x: broken"], WINDOW // 2)
