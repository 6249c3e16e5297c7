import dataclasses

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.config.fields import flag
from jaxdiff.diffusion.time_grids import ConsistencyGrid, TimeGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.io.images import read_picture
from jaxdiff.pipelines.image_metadata import parameters
from jaxdiff.pipelines.inputs import IMAGE_STRENGTH
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import (
    CommandDefaults,
    InputFile,
    ResolvedSettings,
    open_input,
    recorded,
    resolve_settings,
)
from jaxdiff.pipelines.settings import GenerationSettings
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.solvers_ode import DDIM, Heun
from jaxdiff.sampling.solvers_sde import LCM

FILE = epath.Path("a.png")
X = GenerationSettings(prompt="x")


def settings(**values):
    return GenerationSettings(prompt="x", **values)


@pytest.fixture
def pipeline_of(tiny_bundle):
    """`pipeline_of(num_steps=7)`: the tiny model with other settings of its sampler."""

    def make(**sampler):
        spec = tiny_bundle.spec
        sampler = dataclasses.replace(spec.sampler, **sampler)
        return Pipeline(tiny_bundle._replace(spec=dataclasses.replace(spec, sampler=sampler)))

    return make


def test_a_row_comes_before_the_command_line_and_that_before_the_model(pipeline):
    shared = GenerationSettings(seed=5, num_steps=7, solver="heun", negative_prompt="red")
    resolved = resolve_settings(
        settings(num_steps=9, negative_prompt=""), pipeline, defaults=shared
    )
    asked = resolved.settings
    assert (asked.num_steps, asked.seed, asked.negative_prompt) == (9, 5, "")
    assert resolved.sampler.solver == Heun()
    assert asked.guidance_scale == pipeline.spec.sampler.resolve().guidance_scale
    assert asked.size == (pipeline.image_size, pipeline.image_size)
    assert resolve_settings(X, pipeline).settings.negative_prompt is None


def test_lcm_takes_the_steps_of_its_distillation_on_a_discrete_schedule(pipeline_of):
    discrete = pipeline_of(grid=TrainStepGrid(offset=1, num_train_steps=500))
    resolved = resolve_settings(settings(solver="lcm", num_steps=4), discrete)
    assert resolved.sampler.solver == LCM()
    assert resolved.sampler.grid == ConsistencyGrid(num_train_steps=500)
    assert resolve_settings(resolved.settings, discrete) == resolved
    continuous = pipeline_of(grid=TimeGrid(shift=2.0))
    own = (resolve_settings(X, discrete), resolve_settings(settings(solver="lcm"), continuous))
    assert all(resolved.sampler.grid is None for resolved in own)  # the model's


def test_what_is_resolved_resolves_to_itself(pipeline, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    path = epath.Path(tmp_path / "a.png")
    kinds = [
        {},
        {"init_image": path, "mask": path},
        {"init_image": path, "variation": 0.5},
        {"clip_scale": 2.0, "best_of": 3, "size": "16:9", "seamless": True},
        {"mix_prompt": "y", "seed": 4, "upscale": 2, "apg": 0.5, "guidance_rescale": 0.5},
    ]
    for values in kinds:
        resolved = resolve_settings(settings(**values), pipeline)
        assert resolve_settings(resolved.settings, pipeline) == resolved
        assert all(getattr(resolved.settings, name) is not None for name in values)


def test_an_image_sets_the_size_and_takes_the_defaults_that_are_for_images(pipeline, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    path = open_input(tmp_path / "a.png").path
    shared = GenerationSettings(mask=path, strength=0.3)
    assert resolve_settings(X, pipeline, defaults=shared) == resolve_settings(X, pipeline)
    resolved = resolve_settings(settings(init_image=path), pipeline, defaults=shared)
    assert resolved.size == (40, 24)
    assert resolved.settings.strength == 0.3
    for mask, strength in ((None, IMAGE_STRENGTH), (path, 1.0)):
        resolved = resolve_settings(settings(init_image=path, mask=mask), pipeline)
        assert resolved.settings.strength == strength


def test_guidance_is_the_models_unless_set(pipeline_of):
    apg = APG(eta=0.5, momentum=-0.5)
    pipe = pipeline_of(guidance=Guidance(interval=(0.1, 1.0), apg=apg))

    def guidance(resolved):
        return resolved.sampler.inherit(pipe.spec.sampler).resolve().guidance

    shared = GenerationSettings(guidance_rescale=0.3, apg=1.0)
    resolved = resolve_settings(X, pipe, defaults=shared)
    full = APG(eta=1.0, momentum=-0.5)
    assert guidance(resolved) == Guidance(interval=(0.1, 1.0), rescale=0.3, apg=full)
    assert recorded(resolved).items() >= {"guidance_rescale": 0.3, "apg": 1.0}.items()
    own = settings(guidance_interval=(0.0, 1.0), guidance_rescale=0.0, apg=0.5)
    resolved = resolve_settings(own, pipe, defaults=shared)
    assert guidance(resolved).interval == (0.0, 1.0)
    assert guidance(resolved).apg == apg
    assert recorded(resolved)["guidance_interval"] == "0-1"
    assert "apg" not in recorded(resolved)


def test_values_without_effect_are_as_if_they_were_not_set(pipeline, pipeline_of):
    shared = GenerationSettings(
        clip_scale=2.0, resample_steps=3, guide_scale=2.0, upscale=2, best_of=4, seamless=True
    )
    off = settings(
        clip_scale=0.0, resample_steps=1, guide_scale=1.0, upscale=1, best_of=1, seamless=False
    )
    command = CommandDefaults(guide_model="any")
    assert resolve_settings(off, pipeline, command, defaults=shared) == resolve_settings(
        X, pipeline
    )
    for defaults, scale in ((shared, 2.0), (GenerationSettings(), 1.5)):
        guidance = resolve_settings(X, pipeline, command, defaults=defaults).sampler.guidance
        assert guidance.guide == Autoguidance(model="any", scale=scale)
    # But where the model has its own, they switch it off.
    pipe = pipeline_of(resample_steps=3, guidance=Guidance(guide=Autoguidance(model="own")))
    sampler = resolve_settings(settings(resample_steps=1, guide_scale=1.0), pipe).sampler
    assert sampler.resample_steps == 1
    assert sampler.guidance.guide == Autoguidance(model="own", scale=1.0)
    pipe = pipeline_of(guidance=Guidance(clip=ClipGuidance(model="own", scale=3.0)))
    assert resolve_settings(X, pipe).sampler.guidance.clip is None  # inherits
    for command, model in ((CommandDefaults(), "own"), (CommandDefaults(clip_model="any"), "any")):
        clip = resolve_settings(settings(clip_scale=0.0), pipe, command).sampler.guidance.clip
        assert clip == ClipGuidance(model=model, scale=0.0)


def test_a_variation_is_unguided_and_of_ddim(pipeline_of, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    asked = settings(init_image=epath.Path(tmp_path / "a.png"), variation=0.5)
    resolved = resolve_settings(asked, pipeline_of(solver=Heun()))
    assert resolved.sampler.solver == DDIM()
    assert resolved.settings.guidance_scale == 1.0
    assert (resolved.settings.solver, resolved.settings.strength) == (None, None)


def test_a_ratio_is_a_size_of_about_the_training_area(pipeline):
    assert resolve_settings(settings(size="16:9"), pipeline).size == (40, 24)
    for wrong, message in (
        ("16:9:1", "expected WIDTH:HEIGHT"),
        ("1e-320:1", "WIDTH:HEIGHT|nearer to 1:1"),
        ("x:y", "expected WIDTH:HEIGHT"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_settings(settings(size=wrong), pipeline)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"variation": 0.5}, "variation has no effect without init_image: give init_image as well"),
        ({"upscale_strength": 0.5}, "upscale_strength has no effect without upscale"),
        ({"guide_scale": 2.0}, "guide_scale has no effect without a guide model: give --guide-mod"),
        ({"cfg_zero_star": 3}, "zero_steps is 3 of 3 steps"),
        ({"size": (4096, 4096), "upscale": 4}, "would be 16384x16384: expected at most 8192"),
        ({"size": (33, 32)}, "size is 33x32: expected multiples of 8"),
        ({"init_image": FILE, "mask": FILE, "upscale": 2}, "upscale and mask exclude"),
        ({"init_image": FILE, "variation": 0.5, "strength": 0.5}, "variation and strength excl"),
        ({"init_image": FILE, "variation": 0.5, "solver": "heun"}, "variation and solver excl"),
        ({"init_image": FILE, "variation": 0.5, "mix_prompt": "y"}, "variation and mix_prompt"),
        ({"seamless": True, "vae_mode": "tiling"}, "seamless and vae_mode tiling exclude"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_by_the_names_of_the_file(
    pipeline, row, message
):
    with pytest.raises(UserError, match=message):
        resolve_settings(settings(**row), pipeline)
    with pytest.raises(UserError, match="--variation has no effect without --init-image"):
        resolve_settings(settings(variation=0.5), pipeline, called=flag)


def test_a_size_that_does_not_fit_is_named_as_it_was_given(pipeline, tmp_path):
    Image.new("RGB", (1, 3)).save(tmp_path / "odd.png")
    asked = settings(init_image=epath.Path(tmp_path / "odd.png"))
    with pytest.raises(UserError, match=r"--init-image odd\.png is 1x3: expected multiples of 8"):
        resolve_settings(asked, pipeline, called=flag)
    with pytest.raises(UserError, match=r"--size is 33x32: expected multiples of 8"):
        resolve_settings(settings(size=(33, 32)), pipeline, called=flag)


def test_copies_use_no_seed_twice(pipeline):
    resolved = resolve_settings(settings(seed=5, best_of=3), pipeline)
    assert [copy.seed for copy in resolved.copies(3)] == [5, 8, 11]
    last = resolved.replace(seed=2**32 - 6)
    assert last.copies(2)[-1].seed == 2**32 - 3
    with pytest.raises(UserError, match=f"seed is {2**32 - 6}: expected a number from 0 to"):
        last.copies(3)


def test_the_parameters_of_web_uis_quote_separators():
    asked = GenerationSettings(
        prompt="a, b", seed=3, num_steps=20, guidance_scale=3.0, size=(64, 32)
    )
    resolved = ResolvedSettings(settings=asked)
    assert parameters(resolved, "DDIM", "mine: a, b", "0123456789abcdef") == (
        "a, b\nNegative prompt: \nSteps: 20, Sampler: DDIM, CFG scale: 3, Seed: 3, Size: 64x32, "
        'Model: "mine: a, b", Model hash: 0123456789'
    )


def test_a_picture_is_upright_and_white_where_it_is_transparent(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "rotated.jpg", exif=exif)
    assert read_picture(tmp_path / "rotated.jpg").shape == (8, 4, 3)
    assert open_input(tmp_path / "rotated.jpg").size == (4, 8)
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "clear.png"), 255)
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png"), 7)


def test_an_input_is_identified_by_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        open_input(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_input(tmp_path / "missing.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    first = open_input(tmp_path / "a.png")
    assert first == InputFile(first.path, first.sha256, (4, 2))
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    assert open_input(tmp_path / "a.png").sha256 != first.sha256
    with pytest.raises(UserError, match="has changed since the start"):
        first.read()
