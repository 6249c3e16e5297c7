"""One decoder for training data, initial images, masks and Pillow's images."""

import io
import struct
import subprocess
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import jaxdiff
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.transforms import Transforms, stored_size
from jaxdiff.errors import UserError
from jaxdiff.io.images import mask_of, picture_of, read_mask, read_picture
from tests.io.conftest import chunk, encode, png, tiff

RAMP = np.linspace(0, 65535, 16).astype(np.uint16)
LEVELS = np.rint(RAMP / 257).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
UNREAD = ("TIFF LAB", "TIFF I", "TIFF F")


def as_training_reads(data, shape=(16, 16)):
    record = {"image": data, "captions": ["a pea"], "name": "pea"}
    return Transforms(size=16)(record, np.random.default_rng(0), [shape]).image


def test_training_and_sampling_see_the_same_pixels_of_every_file(image_files):
    assert len(image_files) > 40
    for name, data in image_files.items():
        if name in UNREAD:
            with pytest.raises(UserError, match=r"is not a readable image \(its values are"):
                read_picture("a", data)
            with pytest.raises(RecordError, match=r"cannot be decoded \(its values are"):
                as_training_reads(data)
            continue
        picture = read_picture("a", data)
        assert (picture.shape, picture.dtype) == ((16, 16, 3), np.uint8), name
        np.testing.assert_array_equal(as_training_reads(data), picture, err_msg=name)
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(picture_of(image), picture, err_msg=name)
            own = (
                picture
                if name.endswith(("lossy", "RGBA", "text", "progressive", "exif"))
                else (np.asarray(image.convert("RGBA").convert("RGB")))
            )
        if image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr") and "clear" not in name:
            np.testing.assert_array_equal(picture, own, err_msg=name)


@pytest.mark.parametrize(
    "data",
    [
        png([RAMP.astype(">u2").tobytes()], bits=16, colour=0),
        png([np.repeat(RAMP, 3).astype(">u2").tobytes()], bits=16, colour=2),
        png([np.stack([RAMP, RAMP * 0 + 65535], 1).astype(">u2").tobytes()], bits=16, colour=4),
        tiff([RAMP.astype("<u2").tobytes()], bits=16),
        tiff([RAMP.astype(">u2").tobytes()], bits=16, order=">"),
        tiff([RAMP[::-1].astype("<u2").tobytes()], bits=16, white_is_zero=True),
        tiff([LEVELS[::-1].tobytes()], white_is_zero=True),
        encode(Image.fromarray(RAMP[None]), "TIFF", compression="tiff_lzw"),
    ],
)
def test_deep_grey_is_divided_by_257(data):
    np.testing.assert_array_equal(read_picture("a", data)[0], np.stack([LEVELS] * 3, 1))
    np.testing.assert_array_equal(as_training_reads(data, (1, 16))[0], np.stack([LEVELS] * 3, 1))
    np.testing.assert_array_equal(read_mask("a", data)[0], (LEVELS / 255).astype(np.float32))


def test_every_value_of_16_bits_is_rounded():
    values = np.arange(65536).astype(np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    for dtype in ("<u2", ">u2"):
        picture = picture_of(Image.fromarray(values.astype(dtype)))
        np.testing.assert_array_equal(picture[..., 0], expected)


def test_12_bits_are_scaled_by_their_own_range():
    values = np.linspace(0, 4095, 16).astype(int)
    pairs = zip(values[::2], values[1::2], strict=True)
    packed = b"".join(bytes([p >> 4, (p & 15) << 4 | q >> 8, q & 255]) for p, q in pairs)
    picture = read_picture("a", tiff([packed], bits=12))
    np.testing.assert_array_equal(picture[0, :, 0], np.rint(values / 4095 * 255))


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_values_are_refused(bits):
    with pytest.raises(UserError, match="whose range is unknown"):
        read_picture("a", tiff([bytes(32)], bits=bits, tags=[(339, 3, 2)]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"])
def test_pillow_s_modes_of_8_bits_agree_with_their_conversion(mode):
    rgba = Image.fromarray(NOISE).convert("RGBA")
    image = {
        "La": lambda: rgba.convert("LA").convert("La"),
        "P": lambda: rgba.convert("RGB").convert("P"),
        "PA": lambda: rgba.convert("RGB").convert("P").convert("PA"),
    }.get(mode, lambda: rgba.convert(mode))()
    alike = image.convert("LA") if mode == "La" else image
    expected = Image.new("RGBA", image.size, "white")
    expected.alpha_composite(alike.convert("RGBA" if mode != "RGBX" else "RGB").convert("RGBA"))
    np.testing.assert_array_equal(picture_of(image), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_become_rgb(mode):
    rgb = Image.new("RGB", (4, 4), (200, 30, 60))
    assert np.abs(picture_of(rgb.convert(mode)).astype(int) - (200, 30, 60)).max() <= 2


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_of_unknown_range_are_refused(mode):
    with pytest.raises(Exception, match="its values are") as error:
        picture_of(Image.new(mode, (4, 4)))
    assert type(error.value).__name__ == "ImageError"


@pytest.mark.parametrize(
    ("bits", "colour", "row", "clear"),
    [
        (1, 0, b"\x40", b"\0\1"),
        (2, 0, b"\x30", b"\0\3"),
        (4, 0, b"\x0f", b"\0\x0f"),
        (8, 0, b"\0\x0f", b"\0\x0f"),
        (16, 0, b"\0\0\x12\x34", b"\x12\x34"),
        (8, 2, b"\0\0\0\1\2\3", b"\0\1\0\2\0\3"),
        (16, 2, b"\0\0\0\0\0\0\x12\x34\x56\x78\x9a\xbc", b"\x12\x34\x56\x78\x9a\xbc"),
    ],
)
def test_the_transparent_colour_of_a_png_is_white(bits, colour, row, clear):
    """PNG specification, section 11.3.2.1."""
    data = png([row], bits=bits, colour=colour, width=2, before=chunk(b"tRNS", clear))
    np.testing.assert_array_equal(read_picture("a", data), [[[0] * 3, [255] * 3]])


def test_inverted_cmyk_of_adobe_is_read_as_pillow_reads_it():
    rgb = Image.new("RGB", (16, 16), (200, 30, 60))
    data = encode(rgb.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(read_picture("a", data).astype(int) - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_exif_in_every_format(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters = np.zeros((16, 32, 3), np.uint8)
    quarters[:8, :16], quarters[8:, :16], quarters[:8, 16:] = 250, 170, 90
    options = {"save_all": True, "append_images": [Image.new("RGB", (32, 16))]}
    options = options if kind == "MPO" else {}
    data = encode(Image.fromarray(quarters), kind, exif=exif, **options)
    turned = {
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.swapaxes(0, 1),
        6: np.rot90(quarters, -1),
        7: np.rot90(quarters, 2).swapaxes(0, 1),
        8: np.rot90(quarters),
    }[orientation]
    picture = read_picture("a", data)
    assert picture.shape == turned.shape
    assert np.abs(picture.astype(int) - turned).max() < 12
    assert stored_size(data) == picture.shape[1::-1]
    record = {"image": data, "captions": ["a"], "name": "a"}
    example = Transforms(size=16)(record, np.random.default_rng(0), [picture.shape[:2]])
    assert tuple(example.size_crop[:2]) == picture.shape[:2]
    np.testing.assert_array_equal(example.image, picture)
    assert read_mask("a", data).shape == picture.shape[:2]


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40, b"\0"],
)
def test_damaged_exif_is_ignored_without_a_warning(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "JPEG", "WEBP"):
            data = encode(Image.new("RGB", (16, 8), "red"), kind, exif=exif)
            assert read_picture("a", data).shape == (8, 16, 3)
            assert stored_size(data) == (16, 8)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(Image.new("RGB", (16, 8)), "JPEG", exif=exif)
    assert read_picture("a", data).shape == (8, 16, 3)


def test_colour_profiles_and_gamma_are_ignored():
    image = Image.fromarray(NOISE[..., :3])
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for profile in (b"damaged", lab):
        data = encode(image, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(read_picture("a", data), NOISE[..., :3])
    rows = [row.tobytes() for row in NOISE[..., :3]]
    data = png(rows, before=chunk(b"gAMA", struct.pack(">I", 100_000)))
    np.testing.assert_array_equal(read_picture("a", data), NOISE[..., :3])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_image_of_several_is_read(kind):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = encode(red, kind, save_all=True, append_images=[blue])
    assert np.abs(read_picture("a", data).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PDF", "JPEG2000", "TGA", "PCX", "SGI"])
def test_other_formats_are_not_opened(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # ghostscript
    data = encode(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(UserError, match="its format is none of PNG, JPEG"):
        read_picture("a", data)
    with pytest.raises(RecordError, match="its format is none of PNG, JPEG"):
        as_training_reads(data)


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused_or_lack_no_pixels(image_files, fraction):
    refused = 0
    for name, data in image_files.items():
        try:
            picture = read_picture("a", data[: int(len(data) * fraction)])
        except UserError:
            refused += 1
        else:  # cut in the second image, or after the pixels
            np.testing.assert_array_equal(picture, read_picture("a", data), err_msg=name)
    assert refused > 0.8 * len(image_files)


BOMBS = {
    "pixels": png([bytes(48)] * 16).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)),
    ),
    "zTXt": png(
        [bytes(48)] * 16, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))
    ),
    "iTXt": png(
        [bytes(48)] * 16, before=chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2_000_000)))
    ),
    "iCCP": png(
        [bytes(48)] * 16, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2_000_000)))
    ),
    "chunks before": png([bytes(48)] * 16, before=chunk(b"teXt", b"") * 100_000),
    "chunks after": png([bytes(48)] * 16, after=chunk(b"teXt", b"") * 100_000),
    "padding of JPEG": b"\xff\xd8\xff" + b"\xff" * 1_000_000,
    "comments of GIF": b"GIF89a" + bytes([4, 0, 4, 0, 0, 0, 0, 0x21, 0xFE])
    + (b"\xff" + b"c" * 255) * 20_000,
    "run-length BMP": b"BM" + struct.pack("<IHHI", 1178, 0, 0, 1078)
    + struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(10_000),
    "tiles of TIFF": tiff([bytes(16)] * 16, tags=[(322, 4, 2**16), (323, 4, 2**16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_exhaust_a_decoder_is_refused(name):
    with pytest.raises(UserError, match="not a readable image") as error:
        read_picture("a", BOMBS[name])
    assert "\n" not in str(error.value)
    with pytest.raises(RecordError):
        as_training_reads(BOMBS[name])


def test_a_progressive_jpeg_has_a_limited_number_of_scans():
    data = encode(Image.new("L", (16, 16)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert read_picture("a", data).shape == (16, 16, 3)
    with pytest.raises(UserError, match="more than 64 scans"):
        read_picture("a", data[:-2] + data[last:-2] * 100 + data[-2:])


def test_what_looks_like_scans_in_other_data_is_no_scan(image_files):
    """A phone's film after a progressive JPEG, and pixels of a TIFF."""
    film = b"\xff\xda" * 1_000
    assert read_picture("a", image_files["JPEG progressive"] + film).shape == (16, 16, 3)
    for compression in ("tiff_lzw", "jpeg", None):
        options = {} if compression is None else {"compression": compression}
        tall = Image.fromarray(np.tile(np.uint8([[255, 218]]), (2000, 100)))
        data = encode(tall, "TIFF", tiffinfo={278: 8}, **options)
        assert read_picture("a", data).shape == (2000, 200, 3)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UserError, match="more than 268435456 bytes"):
        read_picture(tmp_path / "a.png")


def test_no_warning_and_no_message_of_a_decoder_is_shown(image_files, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in image_files.values():
            broken = bytearray(data)
            broken[len(data) // 3 :: 7] = bytes(len(broken[len(data) // 3 :: 7]))
            for found in (data, bytes(broken)):
                try:
                    read_picture("a", found)
                except UserError:
                    continue
        large = png([bytes(48)] * 16).replace(
            chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)),
            chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)),
        )
        with pytest.raises(UserError, match="it has 10000 x 10000 pixels"):
            read_picture("a", large)
    assert capfd.readouterr() == ("", "")


def test_threads_leave_the_filters_of_warnings_as_they_were(image_files):
    before = list(warnings.filters)
    files = [data for name, data in image_files.items() if name not in UNREAD]
    threads = [
        threading.Thread(target=lambda: [read_picture("a", data) for data in files * 3])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_no_other_module_opens_images():
    package = Path(jaxdiff.__file__).parent
    opening = {p.name for p in package.rglob("*.py") if "Image.open(" in p.read_text("utf-8")}
    assert opening == {"image_decoding.py", "input_images.py"}  # a message of the latter names it


def strokes(colour, clear, background=(0, 0, 0)):
    """A stroke on the right half, `clear` opaque on the left."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4, :3], pixels[:, :4, 3] = background, clear
    pixels[:, 4:, :3], pixels[:, 4:, 3] = colour, 255
    return Image.fromarray(pixels)


RIGHT = np.repeat([0.0, 1.0], 4)[None].repeat(8, 0)


@pytest.mark.parametrize(
    "image",
    [
        strokes(255, 0),
        strokes(255, 0, background=(255, 255, 255)),
        strokes((255, 0, 0), 0),
        strokes(0, 0),
        strokes(255, 255),  # opaque: brightness
        strokes(255, 0).convert("LA"),
        Image.fromarray(np.uint8(255 * RIGHT)),
        Image.fromarray(np.uint8(255 * RIGHT)).convert("1"),
        Image.fromarray(np.uint8(255 * RIGHT)).convert("P"),
        Image.fromarray(np.uint16(65535 * RIGHT)),
    ],
)
def test_opacity_is_the_mask_where_it_varies_and_otherwise_brightness(image):
    np.testing.assert_array_equal(mask_of(image), RIGHT)


def test_a_mask_keeps_soft_edges():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    white = Image.merge("LA", [Image.new("L", (16, 16), 255), Image.fromarray(ramp)])
    equal = Image.merge("LA", [Image.fromarray(ramp)] * 2)
    for image in (white, equal, Image.fromarray(ramp)):
        np.testing.assert_array_equal(mask_of(image), (ramp / 255).astype(np.float32))


@pytest.mark.parametrize("level", [0, 255])
def test_an_opaque_mask_may_be_uniform(level):
    assert (mask_of(Image.new("RGB", (4, 4), (level,) * 3)) == level // 255).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGBA", (8, 8), (255, 255, 255, 0)), "equally transparent everywhere"),
        (Image.new("RGBA", (8, 8), (255, 255, 255, 99)), "equally transparent everywhere"),
        (Image.fromarray(np.where([0, 0, 0, 1], RIGHT[..., None] * 255, NOISE[:8, :8]).astype("u1")
         ), "contradicts its brightness"),
    ],
)  # fmt: skip
def test_ambiguous_masks_are_refused(image, message, tmp_path):
    image.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=rf"mask\.png is not a readable image .*{message}"):
        read_mask(tmp_path / "mask.png")
