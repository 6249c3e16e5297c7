import numpy as np
import pytest
from PIL import Image

from jaxdiff.asked import IMAGE_STRENGTH
from jaxdiff.errors import UserError
from jaxdiff.pictures import read_picture
from jaxdiff.pipeline import Pipeline
from jaxdiff.sampling.solvers import DDIM, Heun
from jaxdiff.scripts.file_text import parameters
from jaxdiff.scripts.image_settings import ImageSettings, InputFile, open_input, settle
from jaxdiff.scripts.prompt_file import Row


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline(tiny_bundle)


def test_a_row_comes_before_the_command_line_and_that_before_the_recipe(pipeline):
    given = Row(prompt="", seed=5, num_steps=7, solver="heun")
    settings = settle(Row(prompt="x", num_steps=9), given, pipeline)
    assert (settings.num_steps, settings.seed, settings.solver) == (9, 5, Heun())
    assert settings.guidance_scale == pipeline.config.sampling.guidance_scale
    assert settings.size == (pipeline.image_size, pipeline.image_size)


def test_an_image_sets_the_size_and_brings_the_defaults_that_are_for_images(pipeline, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    path = open_input(tmp_path / "a.png").path
    given = Row(prompt="", mask=path, strength=0.3)
    assert settle(Row(prompt="x"), given, pipeline).mask is None
    assert settle(Row(prompt="x"), given, pipeline).strength is None
    settings = settle(Row(prompt="x", init_image=path), given, pipeline)
    assert settings.size == (40, 24)
    assert settings.strength == 0.3
    for mask, strength in ((None, IMAGE_STRENGTH), (path, 1.0)):
        row = Row(prompt="x", init_image=path, mask=mask)
        assert settle(row, Row(prompt=""), pipeline).strength == strength


def test_the_parameters_of_web_uis_put_quotes_where_they_must():
    settings = ImageSettings(
        prompt="a, b",
        negative_prompt="",
        seed=3,
        num_steps=20,
        guidance_scale=3.0,
        solver=DDIM(),
        size=(64, 32),
    )
    assert parameters(settings, "mine: a, b", "0123456789abcdef") == (
        "a, b\nNegative prompt: \nSteps: 20, Sampler: DDIM, CFG scale: 3, Seed: 3, Size: 64x32, "
        'Model: "mine: a, b", Model hash: 0123456789'
    )


def test_a_picture_is_upright_and_white_where_it_is_transparent(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (8, 4, 3)
    assert open_input(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "clear.png"), 255)
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png"), 7)


def test_an_input_is_known_by_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no readable image"):
        open_input(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_input(tmp_path / "missing.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    first = open_input(tmp_path / "a.png")
    assert first == InputFile(first.path, first.sha256, (4, 2))
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    assert open_input(tmp_path / "a.png").sha256 != first.sha256
