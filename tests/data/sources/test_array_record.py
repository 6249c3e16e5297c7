import io
import resource

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.array_record import (
    IMAGES,
    ArrayRecord,
    decode_record,
    encode_record,
    pack,
    write_array_record,
)
from jaxdiff.errors import UserError


def _records(start, stop):
    return [
        {"image": b"image %d" % i, "captions": [f"caption {i}", "größe"], "name": f"n{i}"}
        for i in range(start, stop)
    ]


def _write_raw(path, data):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(data)
    writer.close()


def test_records_round_trip_across_files(tmp_path):
    assert write_array_record(str(tmp_path / "a.array_record-0"), _records(0, 3)) == 3
    write_array_record(str(tmp_path / "a.array_record-1"), _records(3, 7))
    source = ArrayRecord(path=str(tmp_path))
    source.check()
    assert [source[i] for i in range(len(source))] == _records(0, 7)


def test_pixels_survive_the_encoding():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    record = decode_record(encode_record({"image": pixels, "captions": ["x"], "name": "n"}))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record["image"]))), pixels)


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    def broken():
        yield from _records(0, 2)
        raise OSError("source not found")

    with pytest.raises(OSError, match="source not found"):
        write_array_record(str(tmp_path / "a.array_record"), broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1000, 10_000_000])  # fails on closing, and while writing
def test_a_full_disk_is_reported_and_keeps_the_old_file(tmp_path, size):
    path = tmp_path / "a.array_record"
    write_array_record(str(path), _records(0, 2))
    noise = np.random.default_rng(0).bytes(size)
    records = ({"image": noise, "captions": ["x"], "name": "n"} for _ in range(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.array_record cannot be written .*free some space"):
            write_array_record(str(path), records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert len(ArrayRecord(path=str(path))) == 2


def test_records_of_another_encoding_are_refused(tmp_path):
    _write_raw(tmp_path / "x.array_record", b"a record of something else")
    source = ArrayRecord(path=str(tmp_path))
    with pytest.raises(UserError, match="contain no captioned images"):
        source.check()
    with pytest.raises(RecordError, match="record 0"):
        _ = source[0]


@pytest.mark.parametrize("damage", [slice(4, 8), slice(8, 20)])
def test_damaged_records_are_bad(tmp_path, damage):
    data = bytearray(encode_record(_records(0, 1)[0]))
    data[damage] = b"\xff" * (damage.stop - damage.start)
    _write_raw(tmp_path / "x.array_record", bytes(data))
    with pytest.raises(RecordError, match="record 0"):
        _ = ArrayRecord(path=str(tmp_path))[0]


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.array_record").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read as ArrayRecord"):
        ArrayRecord(path=str(tmp_path)).check()


def test_missing_and_empty_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ArrayRecord(path=str(tmp_path / "none")).check()
    write_array_record(str(tmp_path / "x.array_record"), [])
    with pytest.raises(UserError, match="are empty"):
        ArrayRecord(path=str(tmp_path)).check()


def test_references_follow_their_image(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    record = {"image": b"image", "captions": ["x"], "name": "n", "references": [b"one", pixels]}
    found = decode_record(encode_record(record))
    assert found["image"] == b"image"
    assert found["references"][0] == b"one"
    np.testing.assert_array_equal(Image.open(io.BytesIO(found["references"][1])), pixels)
    for sizes in ([-1], [9, -9], [10]):
        header = {"name": "n", "captions": ["x"], "references": sizes}
        with pytest.raises(ValueError, match="not those of its images"):
            decode_record(pack(IMAGES, header, b"123456789"))
