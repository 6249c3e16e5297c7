"""Files of new words: every form, for one text encoder and for two, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.embeddings import FILE, Word, read_embedding, write_embedding


def model(conditioner) -> TextToImage:
    width, pooled = conditioner.text_width, conditioner.pooled_width
    return TextToImage(
        denoiser=DiTConfig(width=32, depth=1, heads=2, text_width=width, pooled_width=pooled),
        conditioner=conditioner,
        prediction="x0",
        schedule=RectifiedFlow(),
        image_size=64,
    )


LARGE, SMALL = (
    ClipTextEncoder(model=ClipTextConfig(width=width, depth=1, heads=2)) for width in (8, 4)
)
SD = model(ClipConditioner(text=LARGE))
XL = model(StableDiffusionXLConditioner(text=LARGE, text_2=SMALL))
REFINER = model(StableDiffusionXLConditioner(text_2=LARGE))
ONE, TWO = np.eye(2, 8, dtype=np.float32), np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "word", "count"),
    [
        ({"<pea>": ONE}, "<pea>", 2),
        ({"<pea>": ONE[0]}, "<pea>", 1),
        ({"emb_params": ONE[:1]}, "my-pea", 1),
        ({"clip_l": ONE}, "my-pea", 2),
    ],
)
def test_files_for_one_text_encoder(tensors, word, count, tmp_path):
    save_file(tensors, tmp_path / "my-pea.safetensors")
    found = read_embedding(tmp_path / "my-pea.safetensors", SD)
    assert (found.word, set(found.rows)) == (word, {"text"})
    np.testing.assert_array_equal(found.rows["text"], ONE[:count])


def test_files_for_two_text_encoders(tmp_path):
    save_file({"clip_l": ONE, "clip_g": TWO}, tmp_path / "pea.safetensors")
    found = read_embedding(tmp_path / "pea.safetensors", XL)
    assert found.word == "pea"
    np.testing.assert_array_equal(found.rows["text"], ONE)
    np.testing.assert_array_equal(found.rows["text_2"], TWO)


@pytest.mark.parametrize("spec", [SD, XL, REFINER], ids=["SD", "XL", "refiner"])
def test_what_is_written_is_read_again(spec, tmp_path):
    rows = dict(zip(spec.conditioner.encoders, (ONE, TWO), strict=False))
    write_embedding(tmp_path, Word("<pea>", rows))
    found = read_embedding(tmp_path, spec)
    assert found.word == "<pea>"
    for name, vectors in rows.items():
        np.testing.assert_array_equal(found.rows[name], vectors)
    assert set(load_file(tmp_path / FILE)) == ({"clip_l", "clip_g"} if spec is XL else {"<pea>"})


@pytest.mark.parametrize(
    ("tensors", "spec", "message"),
    [
        ({"clip_l": ONE, "clip_g": TWO}, SD, "holds clip_g, clip_l|holds clip_l, clip_g"),
        ({"<pea>": ONE}, XL, "expected clip_l and clip_g"),
        ({"clip_l": ONE, "clip_g": TWO[:1]}, XL, "different numbers"),
        ({"<pea>": ONE[None]}, SD, "expected \\[n, d\\]"),
        ({}, SD, "holds nothing"),
        ({"<pea>": ONE * np.nan}, SD, "NaN or infinite"),
    ],
)
def test_other_files_are_refused(tensors, spec, message, tmp_path):
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=message):
        read_embedding(tmp_path, spec)


def test_pickled_files_are_not_opened(tmp_path):
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        read_embedding(tmp_path / "pea.pt", SD)
