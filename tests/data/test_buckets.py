import numpy as np
import pytest

from jaxdiff.data.buckets import BucketPlan, Buckets, nearest_shape
from jaxdiff.errors import UserError

SHAPES = Buckets(step=8).shapes(32)


def _plan(sizes, *, batch_size=4, seed=0, shuffle=True):
    sizes = np.array(sizes).reshape(len(sizes), -1, 2)
    return BucketPlan(sizes, SHAPES, batch_size=batch_size, seed=seed, shuffle=shuffle)


def _sizes(*counts):
    """So many squares, so many wide images, so many tall ones."""
    kinds = ((30, 30), (40, 24), (20, 36))
    return [size for size, count in zip(kinds, counts, strict=True) for _ in range(count)]


def test_the_shapes_of_stable_diffusion_xl():
    """Those of Podell et al. 2023, appendix I, up to the maximal aspect ratio."""
    shapes = Buckets().shapes(1024)
    assert shapes[0] == (1024, 1024)
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1344, 768)} <= set(shapes)
    assert len(set(shapes)) == len(shapes) == 9
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024**2
        assert max(height, width) <= 2 * min(height, width)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [({"step": 24}, "divisor of data.transforms.size, 64"), ({"step": 0}, "at least 1")],
)
def test_steps_that_do_not_fit_are_refused(buckets, message):
    with pytest.raises(UserError, match=message):
        Buckets(**buckets).check(64)
    with pytest.raises(UserError, match="expected a number, at least 1"):
        Buckets(step=8, max_ratio=0.5).check(64)


def test_images_go_to_the_nearest_aspect_ratio():
    assert SHAPES == [(32, 32), (24, 40), (40, 24)]
    sizes = np.array([[64, 64], [100, 99], [400, 240], [240, 400], [900, 100], [100, 900]])
    np.testing.assert_array_equal(nearest_shape(sizes, SHAPES), [0, 0, 1, 2, 1, 2])


def test_an_epoch_has_every_record_once_except_for_completed_batches():
    sizes = np.array(_sizes(9, 8, 7))
    plan = _plan(sizes)
    assert plan.batches == 3 + 2 + 2
    for epoch in range(2):
        seen = []
        for number in range(plan.batches):
            batch = plan.batch(epoch * plan.batches + number)
            assert batch.epoch == epoch
            assert len(batch.records) == 4
            assert len(set(batch.records.tolist())) == 4
            ratios = sizes[batch.records, 1] / sizes[batch.records, 0]
            ((height, width),) = batch.shapes
            assert np.all((ratios > 1) == (height > width))
            assert np.all((ratios < 1) == (height < width))
            seen += batch.records.tolist()
        assert set(seen) == set(range(24))
        assert len(seen) == 28


def test_epochs_differ_and_a_seed_fixes_them():
    def order(seed, shuffle=True):
        plan = _plan(_sizes(9, 8, 7), seed=seed, shuffle=shuffle)
        return [plan.batch(k).records.tolist() for k in range(2 * plan.batches)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:7] != order(0)[7:]
    unshuffled = order(0, shuffle=False)
    assert unshuffled[:7] == unshuffled[7:]
    assert unshuffled[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("counts", "shapes"),
    [
        ((9, 8, 3), {(32, 32), (24, 40)}),
        ((3, 3, 8), {(24, 40), (40, 24)}),
        ((1, 2, 3), {(40, 24)}),
    ],
)
def test_shapes_without_a_full_batch_are_dropped(counts, shapes):
    plan = _plan(_sizes(*counts))
    batches = [plan.batch(k) for k in range(plan.batches)]
    assert {batch.shapes for batch in batches} == {(shape,) for shape in shapes}
    assert {int(i) for batch in batches for i in batch.records} == set(range(sum(counts)))


def test_references_have_buckets_of_their_own_number_and_shapes():
    """Of three images, two with a reference alike, one with two; too few wide ones join others."""
    square, wide, tall, none = (30, 30), (40, 24), (20, 36), (0, 0)
    sizes = [[square, wide, none]] * 5 + [[square, tall, none]] * 4 + [[wide, wide, none]] * 3
    sizes += [[square, none, none]] * 4 + [[tall, wide, square]] * 2
    plan = _plan(np.array(sizes).reshape(len(sizes), -1))
    batches = [plan.batch(k) for k in range(plan.batches)]
    assert {batch.shapes for batch in batches} == {
        ((32, 32), (24, 40)),
        ((32, 32), (40, 24)),
        ((32, 32),),
        ((40, 24), (24, 40), (32, 32)),
    }
    assert {int(i) for batch in batches for i in batch.records} == set(range(len(sizes)))
    for batch in batches:
        assert {np.count_nonzero(sizes[i]) // 2 for i in batch.records} == {len(batch.shapes)}
