import itertools
import multiprocessing
import os
import signal

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.loader import WORKER_DIED, DataConfig, device_batches, host_rows, make_dataset
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError

RECORDS = 13


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a pea", "two bananas"] * 5, vocab_size=530, length=8)


def _folder(path, broken=()):
    """Images whose pixels are their index; those in `broken` cannot be decoded."""
    for i in range(RECORDS):
        file = path / f"{i:02}.png"
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(file)
        if i in broken:
            file.write_bytes(b"damaged")
        file.with_suffix(".txt").write_text(f"a pea {i}\ntwo bananas {i}")
    return ImageFolder(path=str(path))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return _folder(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return _folder(tmp_path_factory.mktemp("damaged"), broken=(3, 4, 9))


def _dataset(source, tokenizer, *, batch_size=4, seed=0, rows=None, first=0, dropout=0.5, **data):
    config = DataConfig(
        source=source, transforms=Transforms(size=8, caption_dropout=dropout), **data
    )
    return make_dataset(config, tokenizer, batch_size=batch_size, seed=seed, rows=rows, first=first)


def _take(iterable, batches):
    return list(itertools.islice(iterable, batches))


def _stream(dataset, records):
    """The first records as (index, tokens)."""
    stream = []
    for batch in dataset:
        rows = zip(batch["image"][:, 0, 0, 0].tolist(), batch["text"].tolist(), strict=True)
        stream += [(index, tuple(tokens)) for index, tokens in rows]
        if len(stream) >= records:
            return stream[:records]
    raise AssertionError("the data set ended")


def _indices(dataset, records):
    return [index for index, _ in _stream(dataset, records)]


def _assert_equal(batches, expected):
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys() == {"image", "text", "size_crop", "skipped", "bad"}
        for key in ("image", "text", "size_crop"):
            np.testing.assert_array_equal(batch[key], other[key])
        assert (batch["skipped"], batch["bad"]) == (other["skipped"], other["bad"])


def test_a_batch_has_the_documented_arrays(source, tokenizer):
    (batch,) = _take(_dataset(source, tokenizer), 1)
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 8, 8, 3), np.uint8)
    assert (batch["text"].shape, batch["text"].dtype) == ((4, 8), np.int32)
    np.testing.assert_array_equal(batch["size_crop"], np.tile([8, 8, 0, 0, 8, 8], (4, 1)))
    assert (batch["skipped"], batch["bad"]) == (0, [])


def test_every_epoch_is_a_new_permutation(source, tokenizer):
    order = _indices(_dataset(source, tokenizer), 3 * RECORDS)
    epochs = [tuple(order[i : i + RECORDS]) for i in range(0, 3 * RECORDS, RECORDS)]
    assert len(set(epochs)) == 3
    assert all(sorted(epoch) == list(range(RECORDS)) for epoch in epochs)


def test_the_seed_fixes_the_order_and_changes_it(source, tokenizer):
    one, again, other = (_stream(_dataset(source, tokenizer, seed=s), 20) for s in (0, 0, 1))
    assert one == again
    assert one != other


def test_without_shuffling_records_come_in_order(source, tokenizer):
    order = _indices(_dataset(source, tokenizer, shuffle=False), RECORDS + 2)
    assert order == [*range(RECORDS), 0, 1]


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_hosts_divide_every_batch_without_overlap_or_loss(damaged, tokenizer, num_hosts):
    """Thirteen records, three of them unusable, divide into no number of hosts."""
    whole = _take(_dataset(damaged, tokenizer, batch_size=6), 9)
    shares = [
        _take(_dataset(damaged, tokenizer, batch_size=6, rows=range(6)[host::num_hosts]), 9)
        for host in range(num_hosts)
    ]
    assert sum(batch["skipped"] for batch in whole) >= 3 * 4  # four epochs
    for batch, *parts in zip(whole, *shares, strict=True):
        for host, part in enumerate(parts):
            for key in ("image", "text", "size_crop"):
                np.testing.assert_array_equal(part[key], batch[key][host::num_hosts])
        assert sorted(name for part in parts for name in part["bad"]) == sorted(batch["bad"])


def test_the_order_goes_on_under_any_number_of_hosts_and_workers(source, tokenizer):
    """A run of 8 hosts, then of 4, 1 and 2, each from the step at which the one before ended."""
    size, stops = 8, [0, 3, 5, 9, 13]
    seen = []
    for num_hosts, first, last in zip((8, 4, 1, 2), stops[:-1], stops[1:], strict=True):
        workers = 1 if num_hosts == 1 else 0
        parts = [
            _dataset(
                source,
                tokenizer,
                batch_size=size,
                rows=range(size)[host * size // num_hosts : (host + 1) * size // num_hosts],
                first=first,
                workers=workers,
            )
            for host in range(num_hosts)
        ]
        for batches in zip(*(_take(part, last - first) for part in parts), strict=True):
            seen += [i for batch in batches for i in batch["image"][:, 0, 0, 0].tolist()]
    assert seen == _indices(_dataset(source, tokenizer, batch_size=size), 13 * size)
    epochs = [sorted(seen[i : i + RECORDS]) for i in range(0, len(seen), RECORDS)]
    assert epochs == [list(range(RECORDS))] * 8


@pytest.mark.slow
def test_workers_take_the_batches_in_turn_and_change_nothing(damaged, tokenizer):
    batches = _take(_dataset(damaged, tokenizer, workers=2), 7)
    _assert_equal(batches, _take(_dataset(damaged, tokenizer), 7))


def test_captions_vary_between_epochs_and_are_dropped_at_their_fraction(source, tokenizer):
    stream = _stream(_dataset(source, tokenizer, dropout=0.25), 20 * RECORDS)
    empty = tuple(tokenizer([""])[0])
    fraction = sum(tokens == empty for _, tokens in stream) / len(stream)
    assert abs(fraction - 0.25) < 4 * (0.25 * 0.75 / len(stream)) ** 0.5
    assert len({tokens for index, tokens in stream if index == 5}) == 3


def test_the_next_record_of_the_batch_replaces_a_bad_one_which_is_named(damaged, tokenizer):
    batches = _take(_dataset(damaged, tokenizer, shuffle=False), 4)
    order = [batch["image"][:, 0, 0, 0].tolist() for batch in batches]
    # Numbers 3, 4 and 9 are bad; the first is followed by the batch's own beginning.
    assert order == [[0, 1, 2, 0], [5, 5, 6, 7], [8, 10, 10, 11], [12, 0, 1, 2]]
    assert [batch["skipped"] for batch in batches] == [1, 1, 1, 0]
    assert "03.png" in batches[0]["bad"][0]
    assert "cannot be decoded" in batches[1]["bad"][0]


def test_workers_leave_signals_to_the_main_process(source, tokenizer):
    iterator = iter(_dataset(source, tokenizer, workers=1))
    before = _take(iterator, 1)
    workers = multiprocessing.active_children()
    assert workers
    for child in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
    batches = before + _take(iterator, 7)  # more than were made ahead
    iterator.close()
    _assert_equal(batches, _take(_dataset(source, tokenizer), 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_continues_at_a_given_batch(damaged, tokenizer, workers):
    iterator = iter(_dataset(damaged, tokenizer, workers=workers, first=3))
    _assert_equal(_take(iterator, 4), _take(_dataset(damaged, tokenizer), 7)[3:])
    iterator.close()


def test_a_killed_worker_is_reported(source, tokenizer):
    iterator = iter(_dataset(source, tokenizer, workers=1))
    _take(iterator, 1)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=WORKER_DIED):
        _take(iterator, 100)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_bad_records_end_in_an_error_that_names_some(tmp_path, tokenizer, workers):
    broken = _folder(tmp_path, broken=range(RECORDS))
    dataset = _dataset(broken, tokenizer, workers=workers)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(
        UserError, match=r"All 4 records of a batch .*\d\d\.png: .*max_bad_fraction"
    ):
        next(iter(device_batches(dataset, sharding, batch_size=4)))


def test_batches_are_laid_out_over_the_devices(source, tokenizer):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    host = _take(_dataset(source, tokenizer), 3)
    device = _take(device_batches(_dataset(source, tokenizer), sharding, batch_size=4), 3)
    for batch in device:
        assert batch["image"].sharding == batch["text"].sharding == sharding
        assert batch["image"].addressable_shards[0].data.shape == (1, 8, 8, 3)
    _assert_equal(device, host)


@pytest.mark.parametrize(("data", "tensor"), [(4, 2), (2, 4), (1, 8)])
def test_a_hosts_rows_are_those_of_its_devices(data, tensor):
    mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert host_rows(NamedSharding(mesh, PartitionSpec("data")), 8) == list(range(8))


def test_more_records_in_a_batch_than_there_are_are_refused(source, tokenizer):
    with pytest.raises(UserError, match=r"batch of 14 records is more than the 13"):
        _dataset(source, tokenizer, batch_size=14)
    _dataset(source, tokenizer, batch_size=13)


def test_missing_data_are_refused_before_anything_starts(tmp_path, tokenizer):
    with pytest.raises(UserError, match="does not exist"):
        _dataset(ImageFolder(path=str(tmp_path / "none")), tokenizer)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Images of three shapes whose pixels are their index; numbers 3 and 4 cannot be decoded."""
    path = tmp_path_factory.mktemp("shapes")
    for i in range(24):
        size = ((8, 8), (10, 6), (6, 12))[i % 3]
        file = path / f"{i:02}.png"
        Image.fromarray(np.full((*size, 3), i, np.uint8)).save(file)
        if i in (3, 4):
            file.write_bytes(file.read_bytes()[:50])
        file.with_suffix(".txt").write_text(f"a pea {i}")
    return ImageFolder(path=str(path))


def _buckets(source, tokenizer, *, rows=None, first=0, **data):
    transforms = Transforms(size=8, buckets=Buckets(step=2), caption_dropout=0.5)
    config = DataConfig(source=source, transforms=transforms, **data)
    return make_dataset(config, tokenizer, batch_size=4, seed=0, rows=rows, first=first)


def test_buckets_make_batches_of_one_shape_each(shapes, tokenizer):
    batches = _take(_buckets(shapes, tokenizer), 7)
    assert {batch["image"].shape for batch in batches} == {
        (4, 8, 8, 3),
        (4, 10, 6, 3),
        (4, 6, 10, 3),
    }
    epoch = [i for batch in batches[:6] for i in batch["image"][:, 0, 0, 0].tolist()]
    assert set(epoch) == set(range(24)) - {3, 4}
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        np.testing.assert_array_equal(batch["size_crop"][:, 4:], [[height, width]] * 4)
    reported = [name for batch in batches[:6] for name in batch["bad"]]
    assert len(reported) == sum(batch["skipped"] for batch in batches[:6]) == 2
    assert all("cannot be decoded" in name for name in reported)


def test_hosts_get_their_rows_of_the_same_shapes(shapes, tokenizer):
    alone = _take(_buckets(shapes, tokenizer), 8)
    shares = [_take(_buckets(shapes, tokenizer, rows=range(4)[host::2]), 8) for host in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        for host, part in enumerate(parts):
            np.testing.assert_array_equal(part["image"], whole["image"][host::2])
            np.testing.assert_array_equal(part["text"], whole["text"][host::2])


@pytest.mark.parametrize("workers", [0, 1])
def test_buckets_continue_at_a_given_batch(shapes, tokenizer, workers):
    iterator = iter(_buckets(shapes, tokenizer, workers=workers, first=3))
    _assert_equal(_take(iterator, 5), _take(_buckets(shapes, tokenizer), 8)[3:])
    iterator.close()


def test_a_batch_of_bad_records_alone_is_an_error(tmp_path, tokenizer):
    broken = _folder(tmp_path, broken=range(RECORDS))
    with pytest.raises(
        UserError, match=r"All 4 records of a batch .*\d\d\.png: .*max_bad_fraction"
    ):
        next(iter(_buckets(broken, tokenizer)))


@pytest.mark.parametrize(
    "setting", [{"workers": -1}, {"threads": 0}, {"prefetch": 0}, {"max_bad_fraction": 2.0}]
)
def test_impossible_settings_are_refused(source, setting):
    with pytest.raises(UserError, match=rf"DataConfig\.{next(iter(setting))} is"):
        DataConfig(source=source, transforms=Transforms(size=8), **setting)
