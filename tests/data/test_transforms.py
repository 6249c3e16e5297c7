import io

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.bad_records import UNREADABLE, RecordError
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.transforms import Transforms, stored_size, stored_sizes
from jaxdiff.errors import UserError


def _encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def _record(image, captions=("a pea",)):
    return {"image": image, "captions": list(captions), "name": "pea.png"}


def _image(transforms, image, seed=0):
    return transforms(_record(image), np.random.default_rng(seed))[0]


def _ramp(height, width):
    """Red is the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return pixels


def test_pixels_of_the_right_size_pass_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(_image(Transforms(size=8), pixels), pixels)
    np.testing.assert_array_equal(_image(Transforms(size=8), _encode(pixels)), pixels)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_centre_crop_is_the_central_square(shape):
    out = _image(Transforms(size=40), _encode(_ramp(*shape)))
    rows, columns = (slice((n - 40) // 2, (n + 40) // 2) for n in shape)
    np.testing.assert_array_equal(out, _ramp(*shape)[rows, columns])


def test_random_crops_reach_both_ends_and_stay_inside():
    transforms = Transforms(size=10, crop="random")
    rng = np.random.default_rng(0)
    lefts = [transforms(_record(_ramp(10, 15)), rng)[0][0, 0, 0] for _ in range(200)]
    assert set(lefts) == set(range(6))


@pytest.mark.parametrize("flip", [False, True])
def test_size_crop_states_what_was_cut_off(flip):
    """Red and green of the ramp show where the crop lies; a mirrored one is given as mirrored."""
    transforms = Transforms(size=10, crop="random", flip=flip)
    rng, lefts = np.random.default_rng(0), set()
    for _ in range(100):
        image, _, size_crop, _ = transforms(_record(_encode(_ramp(10, 15))), rng)
        np.testing.assert_array_equal(size_crop[[0, 1, 2, 4, 5]], [10, 15, 0, 10, 10])
        mirrored = image[0, 0, 0] > image[0, -1, 0]
        assert size_crop[3] == (14 - image[0, 0, 0] if mirrored else image[0, 0, 0])
        lefts.add((bool(mirrored), int(size_crop[3])))
    assert len(lefts) == 6 * (1 + flip)


def test_size_crop_counts_in_pixels_of_the_result():
    tall = Transforms(size=10)(_record(_encode(_ramp(60, 20))), np.random.default_rng(0))
    np.testing.assert_array_equal(tall.size_crop, [60, 20, 10, 0, 10, 10])
    pixels = Transforms(size=10)(_record(_ramp(60, 20)), np.random.default_rng(0))
    np.testing.assert_array_equal(pixels.size_crop, tall.size_crop)


def test_shrinking_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    out = _image(Transforms(size=16), _encode(stripes)).astype(int)
    assert np.abs(out - 127.5).max() < 8


def test_growing_keeps_a_constant_constant():
    out = _image(Transforms(size=30), _encode(np.full((7, 9, 3), 77, np.uint8)))
    assert out.shape == (30, 30, 3)
    assert (out == 77).all()


def test_large_jpegs_look_as_if_decoded_whole():
    smooth = np.asarray(Image.fromarray(_ramp(8, 8) * 30).resize((512, 512)))
    expected = _image(Transforms(size=32), smooth).astype(int)
    out = _image(Transforms(size=32), _encode(smooth, "JPEG", quality=95)).astype(int)
    assert np.abs(out - expected).max() < 12


def test_half_of_the_images_are_flipped_and_none_unless_asked():
    pixels = _ramp(8, 8)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        out = Transforms(size=8, flip=True)(_record(pixels), rng)[0]
        flipped += bool(out[0, 0, 0])
        np.testing.assert_array_equal(out[:, ::-1] if out[0, 0, 0] else out, pixels)
        np.testing.assert_array_equal(Transforms(size=8)(_record(pixels), rng)[0], pixels)
    assert 160 < flipped < 240


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_the_given_fraction(fraction):
    transforms = Transforms(size=4, caption_dropout=fraction)
    rng = np.random.default_rng(1)
    record = _record(np.zeros((4, 4, 3), np.uint8), ["one", "two", " "])
    captions = [transforms(record, rng)[1] for _ in range(4000)]
    assert set(captions) <= {"one", "two", ""}
    dropped = captions.count("") / 4000
    deviation = (fraction * (1 - fraction) / 4000) ** 0.5
    assert abs(dropped - fraction) <= 4 * deviation
    if fraction < 1:
        assert 0.45 < captions.count("one") / (4000 - captions.count("")) < 0.55


def test_the_same_generator_state_gives_the_same_result():
    transforms = Transforms(size=8, crop="random", flip=True)
    record = _record(_ramp(8, 30), ["a", "b", "c"])
    one, other = (transforms(record, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


def test_grey_palette_deep_and_transparent_images_become_rgb():
    grey = np.full((8, 8), 100, np.uint8)
    clear = np.zeros((8, 8, 4), np.uint8)  # black, but wholly transparent
    deep = Image.fromarray(np.full((8, 8), 100 * 256, np.uint16))
    transforms = Transforms(size=8)
    assert (_image(transforms, _encode(grey)) == 100).all()
    assert (_image(transforms, _encode(deep)) == 100).all()
    assert (_image(transforms, _encode(Image.fromarray(grey).convert("P"))) == 100).all()
    assert (_image(transforms, _encode(clear)) == 255).all()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = _image(Transforms(size=8), _encode(_ramp(8, 8), exif=exif.tobytes()))
    np.testing.assert_array_equal(turned, np.rot90(_ramp(8, 8), -1))
    wide = _record(_encode(_ramp(8, 20), exif=exif.tobytes()))
    size_crop = Transforms(size=8)(wide, np.random.default_rng(0)).size_crop
    np.testing.assert_array_equal(size_crop, [20, 8, 6, 0, 8, 8])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty file"),
        (b"not an image", "cannot be decoded"),
        (_encode(_ramp(64, 64))[:-40], "cannot be decoded"),
        (_encode(_ramp(64, 64), "JPEG")[:-300], "cannot be decoded"),
        (_encode(np.zeros((11, 10, 3), np.uint8)), "10 x 11 pixels, more than the 100"),
        (np.zeros((4, 4, 3), np.float32), "not uint8"),
        (np.zeros((8, 8, 3), np.float32), "not uint8"),
        (np.zeros((4, 4), np.uint8), "not uint8"),
    ],
)
def test_unusable_images_are_named_with_the_reason(image, reason):
    limit = 100 if "more than" in reason else 10_000
    with pytest.raises(RecordError, match=rf"^pea\.png: .*{reason}"):
        Transforms(size=8, max_pixels=limit)(_record(image), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("captions", "reason"),
    [([], "no caption"), (["", "  "], "no caption"), (["caf\udce9"], "not UTF-8")],
)
def test_unusable_captions_are_named_with_the_reason(captions, reason):
    record = _record(np.zeros((8, 8, 3), np.uint8), captions)
    with pytest.raises(RecordError, match=rf"^pea\.png: .*{reason}"):
        Transforms(size=8)(record, np.random.default_rng(0))


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match=r"Transforms\.size"):
        Transforms(size=0)
    with pytest.raises(UserError, match=r"Transforms\.caption_dropout"):
        Transforms(size=8, caption_dropout=1.5)


@pytest.mark.parametrize(("stored", "shape"), [((30, 60), (8, 16)), ((60, 30), (16, 8))])
def test_a_shape_of_equal_aspect_ratio_crops_nothing(stored, shape):
    transforms = Transforms(size=16, buckets=Buckets(step=8))
    made = transforms(_record(_encode(_ramp(*stored))), np.random.default_rng(0), [shape])
    assert made.image.shape == (*shape, 3)
    np.testing.assert_array_equal(made.size_crop, [*stored, 0, 0, *shape])
    whole = Image.fromarray(_ramp(*stored)).resize(shape[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(made.image, np.asarray(whole))


def test_a_shape_unlike_the_image_s_takes_its_largest_crop():
    transforms = Transforms(size=16, buckets=Buckets(step=8))
    wide, tall = _encode(_ramp(16, 64)), _encode(_ramp(64, 16))
    made = transforms(_record(wide), np.random.default_rng(0), [(16, 32)])
    np.testing.assert_array_equal(made.size_crop, [16, 64, 0, 16, 16, 32])
    np.testing.assert_array_equal(made.image, _ramp(16, 64)[:, 16:48])
    made = transforms(_record(tall), np.random.default_rng(0), [(16, 16)])
    np.testing.assert_array_equal(made.image, _ramp(64, 16)[24:40])


def test_sizes_are_read_without_decoding():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert stored_size(_encode(_ramp(6, 9))) == (9, 6)
    assert stored_size(_encode(_ramp(6, 9), "JPEG", exif=exif.tobytes())) == (6, 9)
    assert stored_size(_ramp(6, 9)) == (9, 6)
    assert stored_size(_encode(_ramp(60, 90))[:60]) == (90, 60)
    with pytest.raises(RecordError, match="size cannot be read"):
        stored_size(b"damaged")


def test_buckets_that_do_not_fit_the_size_are_refused():
    with pytest.raises(UserError, match=r"divisor of data\.transforms\.size, 20"):
        Transforms(size=20, buckets=Buckets(step=8))


@pytest.mark.parametrize("seed", range(4))
def test_references_are_cropped_and_mirrored_as_their_image(seed):
    pixels = _ramp(20, 60)
    record = {**_record(pixels), "references": [pixels, _encode(_ramp(60, 20))]}
    transforms = Transforms(size=20, crop="random", flip=True, references=2)
    shapes = [(20, 20), (20, 20), (40, 20)]
    made = transforms(record, np.random.default_rng(seed), shapes)
    np.testing.assert_array_equal(made.image, made.references[0])
    assert made.references[1].shape == (40, 20, 3)
    assert (made.image[0, 0, 0] > made.image[0, -1, 0]) == (
        made.references[1][0, 0, 0] > made.references[1][0, -1, 0]
    )
    for view in transforms.views(record, 4, shapes):
        np.testing.assert_array_equal(view.image, view.references[0])


def test_references_that_are_unusable_or_too_many_make_bad_records():
    rng = np.random.default_rng(0)
    record = {**_record(_ramp(8, 8)), "references": [_encode(_ramp(8, 8)), b"damaged"]}
    with pytest.raises(RecordError, match=r"pea.png: it has 2 reference images, more than the 1"):
        Transforms(size=8, references=1)(record, rng)
    two = Transforms(size=8, references=2)
    for read in (lambda: two(record, rng), lambda: stored_sizes(record)):
        with pytest.raises(RecordError, match=r"pea.png: reference image 2: the image") as caught:
            read()
        assert caught.value.reject.kind == UNREADABLE
    with pytest.raises(RecordError, match="changed since"):
        two(record, rng, [(8, 8), (8, 8)])
