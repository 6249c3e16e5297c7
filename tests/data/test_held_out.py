"""The held-out share: by the record, not by its place, and apart from what is trained on."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.held_out import split_records
from jaxdiff.data.loader import DataConfig, make_dataset, make_evaluation_dataset
from jaxdiff.data.shard_writer import RecordReader
from jaxdiff.data.sources.array_record import write_encoded
from jaxdiff.data.sources.cached_latents import CachedLatents, encode_latents
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.prior_preservation import PriorPreservation
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.io.images import save_png

SHARE = 0.25


@dataclass(frozen=True)
class Colours:
    """An image of one colour for each number; -1 cannot be read."""

    numbers: tuple[int, ...]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        if number < 0:
            raise RecordError("no image", name=str(index))
        size = (32, 64) if number % 2 else (48, 32)
        image = np.full((*size, 3), [number, 1, 2], np.uint8)
        return {"image": image, "captions": [f"colour {number}"], "name": str(index)}

    def check(self):
        pass


def held_out(numbers, share=SHARE):
    source = Colours(tuple(numbers))
    return [source.numbers[i] for i in split_records(source, share)[1]]


def test_the_share_is_held_out_in_any_order_and_size():
    first = held_out(range(200))
    assert 30 < len(first) < 70
    shuffled = held_out(np.random.default_rng(0).permutation(200).tolist())
    assert shuffled == first  # in the order of their hashes
    assert set(held_out(range(100))) == {n for n in first if n < 100}
    assert [n for n in held_out(range(255)) if n < 200] == first


def test_a_larger_share_contains_a_smaller_one_and_both_sides_are_all():
    assert set(held_out(range(100), 0.1)) < set(held_out(range(100), 0.3))
    train, out = split_records(Colours(tuple(range(100))), SHARE)
    assert sorted([*train, *out]) == list(range(100))
    assert len(split_records(Colours((1, 2)), 0.0)[1]) == 0


def test_equal_records_are_on_one_side_and_unreadable_ones_are_left_to_training():
    out = held_out([*range(50), *range(50), -1, -1])
    assert all(out.count(n) == 2 for n in out)
    assert -1 not in out


def test_the_identity_of_files_is_their_path_in_the_folder(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for i in range(40):
            save_png(folder / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
        source = ImageFolder(path=str(folder), prompt="a colour")
        found.append([source.identity(int(i)) for i in split_records(source, SHARE)[1]])
    assert found[0] == found[1] != []
    both = PriorPreservation(own=Colours((1, 2)), prior=source)
    assert {both.identity(i) for i in range(len(both))} >= {b"0.png".hex()}
    assert Produce(length=3).identity(1) != Produce(length=3, seed=1).identity(1)


def cached_latents(folder, digests) -> CachedLatents:
    """Latents of zeros, with these digests of their images."""
    record = {
        "moments": np.zeros((1, 1, 1, 2), np.float16),
        "text": None,
        "size_crop": np.zeros((1, 6), np.int32),
        "captions": ["a colour"],
        "name": "n",
    }
    records = (encode_latents({**record, "digest": digest}) for digest in digests)
    write_encoded(str(folder / "a.array_record"), records)
    return CachedLatents(path=str(folder))


@pytest.mark.parametrize(
    "source", [Colours(tuple(range(60))), Produce(length=60, size=32)], ids=["pixels", "identity"]
)
def test_latents_are_held_out_with_their_images(source, tmp_path):
    reader = RecordReader(source=source, transforms=Transforms(size=32))
    crops = [reader.views(i, 1) for i in range(60)]
    latents = cached_latents(tmp_path, [one.digest for one in crops])
    found, expected = split_records(latents, SHARE), split_records(source, SHARE)
    assert len(expected[1]) > 5
    for side in (0, 1):
        np.testing.assert_array_equal(found[side], expected[side])


def test_latents_of_an_earlier_version_cannot_be_held_out(tmp_path):
    with pytest.raises(UserError, match=r"without the digests .* set data\.held_out to 0"):
        split_records(cached_latents(tmp_path, [None, None]), SHARE)


@pytest.mark.parametrize("buckets", [None, Buckets(step=16)])
def test_training_never_sees_held_out_records(buckets):
    transforms = Transforms(size=32, buckets=buckets, flip=False)
    data = DataConfig(source=Colours(tuple(range(60))), transforms=transforms, held_out=SHARE)
    out = set(held_out(range(60)))
    batches = iter(make_dataset(data, None, batch_size=4, seed=0))
    seen = {int(image[0, 0, 0]) for _ in range(40) for image in next(batches)["image"]}
    assert seen == set(range(60)) - out


def test_no_held_out_share_changes_nothing():
    data = DataConfig(source=Colours(tuple(range(20))), transforms=Transforms(size=32))
    tiny = dataclasses.replace(data, held_out=1e-9)  # which holds out none
    first, second = (next(iter(make_dataset(d, None, batch_size=8, seed=3))) for d in (data, tiny))
    np.testing.assert_array_equal(first["image"], second["image"])


def test_an_evaluation_reads_records_once_in_order_without_randomness():
    data = DataConfig(
        source=Colours(tuple(range(20))),
        transforms=Transforms(size=32, crop="random", flip=True, caption_dropout=1.0),
    )
    tokenize = lambda captions: np.array([len(c) for c in captions])  # noqa: E731
    batches = list(make_evaluation_dataset(data, tokenize, [7, 3, 12, 1, 9], batch_size=2))
    assert [batch["image"][:, 0, 0, 0].tolist() for batch in batches] == [[7, 3], [12, 1]]
    assert batches[1]["text"].tolist() == [len("colour 12"), len("colour 1")]
