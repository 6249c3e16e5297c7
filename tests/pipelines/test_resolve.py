import dataclasses

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.cli.generate.image_metadata import as_set, parameters
from jaxdiff.cli.generate.prompt_file import Row
from jaxdiff.cli.generate.settings import Fixed, ImageSettings, InputFile, open_input, settle
from jaxdiff.errors import UserError
from jaxdiff.io.images import read_picture
from jaxdiff.pipelines.inputs import IMAGE_STRENGTH
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.solvers_ode import DDIM, Heun

FILE = epath.Path("a.png")


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


def test_guidance_is_the_recipes_where_nothing_is_said(tiny_bundle):
    recipe = {"interval": (0.1, 1.0), "apg": APG(eta=0.5, momentum=-0.5)}
    sampling = dataclasses.replace(tiny_bundle.config.sampling, **recipe)
    config = dataclasses.replace(tiny_bundle.config, sampling=sampling)
    pipeline = Pipeline(tiny_bundle._replace(config=config))
    given = Row(prompt="", guidance_rescale=0.3, apg=1.0)
    settings = settle(Row(prompt="x"), given, pipeline)
    apg = APG(eta=1.0, momentum=-0.5)
    assert settings.guidance == Guidance(interval=(0.1, 1.0), rescale=0.3, apg=apg)
    assert as_set(settings, pipeline).items() >= {"guidance_rescale": 0.3, "apg": 1.0}.items()
    whole = Row(prompt="x", guidance_interval=(0.0, 1.0), guidance_rescale=0.0, apg=0.5)
    settings = settle(whole, given, pipeline)
    assert settings.guidance == Guidance(apg=recipe["apg"])
    told = as_set(settings, pipeline)
    assert told["guidance_interval"] == "0-1"
    assert not told.keys() & {"guidance_rescale", "apg"}


def test_what_does_nothing_is_as_if_it_were_not_there(pipeline):
    given = Row(prompt="", clip_scale=2.0, repeats=3, guide_scale=2.0, upscale=2, best_of=4)
    off = Row(prompt="x", clip_scale=0.0, repeats=1, guide_scale=1.0, upscale=1, best_of=1)
    fixed = Fixed(weak_model="any")
    nothing = settle(Row(prompt="x"), Row(prompt=""), pipeline)
    assert settle(off, given, pipeline, fixed) == nothing
    assert settle(Row(prompt="x"), given, pipeline, fixed).weak == Autoguidance(
        model="any", scale=2.0
    )
    assert settle(Row(prompt="x"), Row(prompt=""), pipeline, fixed).weak.scale == 1.5


def test_a_ratio_is_the_size_that_the_model_draws_best(pipeline):
    assert settle(Row(prompt="x", size="16:9"), Row(prompt=""), pipeline).size == (40, 24)
    for wrong, told in (("16:9:1", "is none"), ("1e-320:1", "too|nearer to 1:1"), ("x:y", "none")):
        with pytest.raises(UserError, match=told):
            settle(Row(prompt="x", size=wrong), Row(prompt=""), pipeline)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"variation": 0.5}, "variation is about an image: give init_image as well"),
        ({"upscale_strength": 0.5}, "upscale_strength is about enlarging: give upscale as well"),
        ({"guide_scale": 2.0}, "guide_scale is about a weaker model: give --guide-model"),
        ({"cfg_zero_star": 3}, "zero_steps is 3 of 3 steps"),
        ({"size": (4096, 4096), "upscale": 4}, "would be 16384x16384: expected at most 8192"),
        ({"init_image": FILE, "mask": FILE, "upscale": 2}, "upscale and mask exclude"),
        ({"init_image": FILE, "variation": 0.5, "strength": 0.5}, "variation and strength excl"),
        ({"init_image": FILE, "variation": 0.5, "solver": "heun"}, "variation and solver excl"),
        ({"init_image": FILE, "variation": 0.5, "mix_prompt": "y"}, "variation and toward exclude"),
    ],
)
def test_what_makes_no_sense_is_told_by_the_names_of_the_file(pipeline, row, told):
    with pytest.raises(UserError, match=told):
        settle(Row(prompt="x", line=1, **row), Row(prompt=""), pipeline)
    with pytest.raises(UserError, match="--variation is about an image: give --init-image"):
        settle(Row(prompt="x", variation=0.5), Row(prompt=""), pipeline)


def test_copies_draw_no_seed_twice(pipeline):
    settings = settle(Row(prompt="x", seed=5, best_of=3), Row(prompt=""), pipeline)
    assert [copy.seed for copy in settings.copies(3)] == [5, 8, 11]
    last = dataclasses.replace(settings, seed=2**32 - 6)
    assert last.copies(2)[-1].seed == 2**32 - 3
    with pytest.raises(UserError, match=f"seed is {2**32 - 6}: expected a number from 0 to"):
        last.copies(3)


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
