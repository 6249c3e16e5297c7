"""Damaged images of all formats: pixels, or one sentence."""

import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.transforms import Transforms, stored_size
from jaxdiff.errors import UserError
from jaxdiff.io.image_files import read_image_text
from jaxdiff.io.images import read_mask, read_picture

# Lengths, counts and sizes at the edges, a JPEG's start of scan, and sides of 8192.
NUMBERS = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\x20\0",
)
NUMBERS += (b"\0\x20\0\0", b"\xff\xda", b"\0", b"\xff", b"\x80")


def mutate(data, rng):
    """Change, remove, repeat or insert bytes, more often near the start."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(min(len(found), rng.choice((64, len(found)))) or 1)
        number = rng.choice(NUMBERS)
        match rng.randrange(6):
            case 0:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                found[at : at + len(number)] = number
            case 2:
                found[at:at] = number
            case 3:
                del found[at : at + rng.choice((1, 4, 100, 10**6))]
            case 4:
                found[at:at] = found[at : at + rng.randrange(1, 64)] * rng.choice((1, 50))
            case _:
                found[at : at + 1] = bytes([found[at] ^ 1 << rng.randrange(8)] if found else [])
    return bytes(found)


def with_checksums(data):
    """Repair the checksums of a PNG, so that its chunks are parsed."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(100_000, marks=pytest.mark.nightly, id="nightly")]
)
def test_a_damaged_image_is_decoded_or_refused_in_one_sentence(image_files, count, tmp_path):
    rng, path, files = random.Random(count), tmp_path / "a.png", sorted(image_files.items())
    transforms = Transforms(size=8)

    def train(data):
        record = {"image": data, "captions": ["a"], "name": "a"}
        assert transforms(record, np.random.default_rng(0)).image.shape == (8, 8, 3)

    def picture(data):
        pixels = read_picture("a", data)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert pixels.size

    def mask(data):
        found = read_mask("a", data)
        assert 0 <= found.min() <= found.max() <= 1

    def text(data):
        path.write_bytes(data)
        read_image_text(path)

    outcomes, longest, lines = {"read": 0, "refused": 0}, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(count):
            name, data = rng.choice(files)
            data = mutate(data, rng)
            if name.startswith("PNG") and rng.random() < 0.7:
                data = with_checksums(data)
            use = rng.choice((picture, mask, train, stored_size, text))
            start = time.monotonic()
            try:
                use(data)
                outcomes["read"] += 1
            except (UserError, RecordError) as error:
                outcomes["refused"] += 1
                longest = max(longest, len(str(error)))
                lines = max(lines, len(str(error).splitlines()))
            assert time.monotonic() - start < 10, name
    assert min(outcomes.values()) > count // 10
    assert (lines, longest < 400) == (1, True)
