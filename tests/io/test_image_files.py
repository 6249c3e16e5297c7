"""Texts in PNG and WebP files, of jaxdiff and of other programs."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import UserError
from jaxdiff.io.image_files import image_bytes, read_image_text
from tests.io.conftest import chunk, encode, png

ROWS = [bytes(48)] * 16
TEXT = {"prompt": "a pea", "negative": "茄子", "parameters": "Steps: 2"}


def read(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    return read_image_text(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_texts_are_read_as_they_were_written(kind, tmp_path):
    assert read(tmp_path, image_bytes(np.zeros((4, 4, 3), np.uint8), TEXT, kind)) == TEXT


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"seed\0007"),
        chunk(b"zTXt", b"seed\0\0" + zlib.compress(b"7")),
        chunk(b"iTXt", b"seed\0\0\0en\0seed\0007"),
        chunk(b"iTXt", b"seed\0\1\0\0\0" + zlib.compress(b"7")),
    ],
)
def test_every_kind_of_text_is_read_before_and_after_the_pixels(text, tmp_path):
    assert read(tmp_path, png(ROWS, before=text)) == {"seed": "7"}
    assert read(tmp_path, png(ROWS, after=text)) == {"seed": "7"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (chunk(b"tEXt", b"seed\0007") * 2, "has several texts 'seed'"),
        (chunk(b"tEXt", b"seed\0007") + chunk(b"iTXt", b"seed\0\0\0\0\0008"), "several texts"),
        (chunk(b"tEXt", b"seed\0007")[:-1] + b"?", "not a readable PNG"),
        (chunk(b"tEXt", b"prompt\0a\0b"), "text 'prompt' of .* holds a NUL"),
        (chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(2**21))), "not a readable PNG"),
        (
            b"".join(
                chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(b"a" * 1_000_000)) for i in range(80)
            ),
            "not a readable PNG",
        ),
    ],
)
def test_texts_that_are_damaged_or_ambiguous_are_refused(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, png(ROWS, before=text))


@pytest.mark.parametrize(
    "description",
    [None, "a photo", "[]", "3", "[" * 100_000 + "]" * 100_000, "9" * 5_000, b"\xff\xfe", 7],
)
@pytest.mark.parametrize("comment", [None, b"UNICODE\0\0x\0", "text", 7])
def test_exif_of_other_programs_has_no_texts(description, comment, tmp_path):
    exif = Image.Exif()
    if description is not None:
        exif[0x010E] = description
    if comment is not None:
        exif.get_ifd(0x8769)[0x9286] = comment
    data = encode(Image.new("RGB", (4, 4)), "WEBP", lossless=True, exif=exif)
    assert read(tmp_path, data) == {}


def test_damaged_exif_has_no_texts(tmp_path):
    data = encode(Image.new("RGB", (4, 4)), "WEBP", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read(tmp_path, data) == {}


def test_a_workflow_of_another_program_is_read_as_it_is(tmp_path):
    workflow = json.dumps({"nodes": list(range(100))})
    assert read(tmp_path, png(ROWS, before=chunk(b"tEXt", b"workflow\0" + workflow.encode()))) == {
        "workflow": workflow
    }


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF"])
def test_files_that_are_not_lossless_or_without_texts_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match=f"is a {kind} file, whose compression changes pixels"):
        read(tmp_path, encode(Image.new("RGB", (4, 4)), kind))
