import itertools
from collections import Counter

import pytest

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.prior_preservation import PriorPreservation
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError


def epoch_of(own, prior, prior_fraction):
    """The split, `train` (own) or `held_out` (prior), and index of each record of an epoch."""
    source = PriorPreservation(
        own=Produce(length=own, size=32),
        prior=Produce(length=prior, size=32, split="held_out"),
        prior_fraction=prior_fraction,
    )
    return [tuple(source[i]["name"].split("/")[1:]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("own", "prior", "fraction"),
    [(5, 20, 0.5), (20, 5, 0.5), (7, 30, 0.75), (3, 3, 0.25), (1, 1, 0.1)],
)
def test_an_epoch_has_all_images_in_the_given_fractions(own, prior, fraction):
    records = epoch_of(own, prior, fraction)
    counts = Counter(kind for kind, _ in records)
    assert abs(counts["held_out"] - fraction * len(records)) < 1
    times = Counter(records)
    assert len(times) == own + prior
    for kind in counts:
        repeats = [count for record, count in times.items() if record[0] == kind]
        assert max(repeats) - min(repeats) <= 1


def test_an_epoch_has_all_images_for_any_fraction_and_numbers():
    counts = (1, 9, 27, 63)
    for fraction in (*(i / 10 for i in range(1, 10)), 1 / 3):
        for own, prior in itertools.product(counts, counts):
            source = PriorPreservation(
                own=Produce(length=own),
                prior=Produce(length=prior, split="held_out"),
                prior_fraction=fraction,
            )
            places = {source._place(i) for i in range(len(source))}
            assert len(places) == own + prior, (own, prior, fraction)


def test_sources_alternate():
    order = epoch_of(2, 2, 0.5)
    assert order == [("train", "0"), ("held_out", "0"), ("train", "1"), ("held_out", "1")]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_fractions_outside_0_to_1_are_refused(fraction):
    with pytest.raises(UserError, match="from more than 0 to less than 1"):
        PriorPreservation(
            own=Produce(length=2), prior=Produce(length=2), prior_fraction=fraction
        ).check()


def test_both_sources_are_checked():
    with pytest.raises(UserError, match="does not exist"):
        PriorPreservation(own=Produce(length=2), prior=ImageFolder(path="nowhere")).check()
