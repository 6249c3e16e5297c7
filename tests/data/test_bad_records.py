import pytest

from jaxdiff.data.bad_records import MINIMUM, WINDOW, BadRecords
from jaxdiff.errors import UserError


def test_an_allowed_fraction_never_stops_the_run():
    limit = BadRecords(0.01)
    for _ in range(1000):
        limit.add(1, ["a.png: broken"], 99)


def test_a_larger_fraction_stops_it_and_names_records():
    limit = BadRecords(0.01)
    for i in range(4):
        limit.add(2, [f"{i}.png: late", "7.png: broken"], 98)
    with pytest.raises(UserError, match=r"2\.0% of the last 500 .*allowed: 1\.0%.*7\.png: broken"):
        limit.add(2, ["4.png: late", "7.png: broken"], 98)


def test_few_records_are_not_checked():
    limit = BadRecords(0.01)
    limit.add(10, ["x: broken"] * 10, MINIMUM - 11)
    with pytest.raises(UserError):
        limit.add(0, [], 1)


def test_a_limit_of_0_stops_at_the_first():
    limit = BadRecords(0.0)
    limit.add(0, [], 8)
    with pytest.raises(UserError, match="x: broken"):
        limit.add(1, ["x: broken"], 8)


def test_a_limit_of_1_never_stops():
    limit = BadRecords(1.0)
    for _ in range(100):
        limit.add(1000, ["x: broken"], 0)


def test_old_good_records_do_not_hide_new_bad_ones():
    limit = BadRecords(0.1)
    for _ in range(100):
        limit.add(0, [], WINDOW)
    with pytest.raises(UserError):
        limit.add(WINDOW // 2, ["x: broken"], WINDOW // 2)
