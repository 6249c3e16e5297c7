"""Small image files of all formats and modes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin


def chunk(kind, data):
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, *, bits=8, colour=2, width=16, before=b"", after=b""):
    """A PNG file from the bytes of its rows, with chunks before and after the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    ends = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header), chunk(b"IEND", b"")
    return ends[0] + before + pixels + after + ends[1]


def tiff(rows, *, bits=8, white_is_zero=False, order="<", tags=()):
    """An uncompressed grey TIFF file of one strip, with further tags (number, type, value)."""
    data, size = b"".join(rows), len(rows)
    width = len(rows[0]) * 8 // bits
    found = [(256, 3, width), (257, 3, size), (258, 3, bits), (259, 3, 1), (278, 3, size)]
    found += [(262, 3, 1 - white_is_zero), (273, 4, 400), (277, 3, 1), (279, 4, len(data)), *tags]
    entries = b""
    for number, kind, value in sorted(found):
        field = (
            struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        )
        entries += struct.pack(order + "HHI", number, kind, 1) + field
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(found))
    return (head + entries + bytes(4)).ljust(400, b"\0") + data


def encode(image, kind, **options):
    """An image file by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def image_files():
    """Files by name, 16 x 16 pixels of noise; the name begins with the format."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (16, 16, 4), np.uint8))
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").convert("P")
    modes = {mode: rgba.convert(mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK")}
    modes |= {"P": palette, "YCbCr": rgb.convert("YCbCr"), "LAB": Image.new("LAB", (16, 16))}
    modes |= {mode: rgb.convert("L").convert(mode) for mode in ("I", "F")}
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a pea")
    text.add_itxt("negative", "茄子", "zh", "n")
    text.add_text("long", "z" * 100, zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, '{"prompt": "a"}'
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "x".encode("utf-16-be")
    more = {"save_all": True, "append_images": [rgb.rotate(90)]}
    named = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
        "JPEG": ("L", "RGB", "CMYK"),
        "BMP": ("1", "L", "P", "RGB"),
        "GIF": ("L", "P", "RGBA"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"),
    }
    files = {f"{k} {m}": encode(modes[m], k) for k, ms in named.items() for m in ms}
    files |= {
        f"{kind} frames": encode(rgb, kind, **more) for kind in ("PNG", "GIF", "WEBP", "TIFF")
    }
    files |= {
        f"TIFF {name}": encode(modes[mode], "TIFF", compression=name)
        for mode, name in {
            "RGB": "tiff_lzw",
            "RGBA": "packbits",
            "L": "jpeg",
            "1": "group4",
            "P": "tiff_adobe_deflate",
        }.items()
    }
    files |= {
        "PNG text": encode(rgb, "PNG", pnginfo=text, exif=exif, icc_profile=bytes(200)),
        "PNG clear": encode(palette, "PNG", transparency=bytes(range(200))),
        "PNG 16": png([rng.bytes(32) for _ in range(16)], bits=16, colour=0),
        "PNG LA 16": png([rng.bytes(64) for _ in range(16)], bits=16, colour=4),
        "PNG RGB 16": png(
            [rng.bytes(96) for _ in range(16)], bits=16, before=chunk(b"tRNS", bytes(range(6)))
        ),
        "JPEG progressive": encode(rgb, "JPEG", progressive=True, exif=exif),
        "JPEG MPO": encode(rgb, "MPO", save_all=True, append_images=[rgb]),
        "GIF comment": encode(rgb, "GIF", comment=b"c" * 300),
        "WEBP lossy": encode(rgb, "WEBP", exif=exif),
        "WEBP RGBA": encode(rgba, "WEBP", lossless=True, exif=exif),
        "AVIF RGBA": encode(rgba, "AVIF", exif=exif),
        "TIFF 16": tiff([rng.bytes(32) for _ in range(16)], bits=16),
        "TIFF exif": encode(rgb, "TIFF", exif=exif),
        "TIFF big": encode(rgb, "TIFF", big_tiff=True),
    }
    return files
