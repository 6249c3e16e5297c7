from collections import Counter

import pytest

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.prior_preservation import WithPrior
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError


def seen(own, prior, share):
    """The kind, `train` or `held_out`, and number of each record of an epoch."""
    source = WithPrior(
        own=Produce(length=own, size=32),
        prior=Produce(length=prior, size=32, split="held_out"),
        share=share,
    )
    return [tuple(source[i]["name"].split("/")[1:]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("own", "prior", "share"),
    [(5, 20, 0.5), (20, 5, 0.5), (7, 30, 0.75), (3, 3, 0.25), (1, 1, 0.1)],
)
def test_all_are_seen_in_their_shares(own, prior, share):
    records = seen(own, prior, share)
    counts = Counter(kind for kind, _ in records)
    assert abs(counts["held_out"] - share * len(records)) < 1
    times = Counter(records)
    assert len(times) == own + prior
    for kind in counts:
        again = [count for record, count in times.items() if record[0] == kind]
        assert max(again) - min(again) <= 1


def test_they_take_turns():
    turns = seen(2, 2, 0.5)
    assert turns == [("train", "0"), ("held_out", "0"), ("train", "1"), ("held_out", "1")]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_one_out_is_told(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        WithPrior(own=Produce(length=2), prior=Produce(length=2), share=share).check()


def test_what_is_wrong_with_either_is_told():
    with pytest.raises(UserError, match="does not exist"):
        WithPrior(own=Produce(length=2), prior=ImageFolder(path="nowhere")).check()
