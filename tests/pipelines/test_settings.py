"""Every field of `GenerationSettings` is a flag, a column, part of records and read from them."""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import pytest
from etils import epath

from jaxdiff.cli.generate.help import help_text
from jaxdiff.cli.generate.options import GROUPS, SampleFlags, flags_class, from_flags
from jaxdiff.cli.generate.prompt_file import COLUMNS, read_prompts
from jaxdiff.cli.parsing import _flags, parse_flags
from jaxdiff.config.fields import Doc, Range, fields_of
from jaxdiff.errors import UserError
from jaxdiff.pipelines.resolve import FILES, resolve_settings
from jaxdiff.pipelines.settings import CONFLICTS, GenerationSettings, Requires, Varies

FIELDS = fields_of(GenerationSettings)
VALUES = {
    "prompt": "a pea",
    "negative_prompt": "",
    "seed": 7,
    "name": "first",
    "num_steps": 5,
    "guidance_scale": 2.5,
    "size": (64, 32),
    "solver": "heun",
    "resample_steps": 2,
    "vae_mode": "slicing",
    "cache_interval": 3,
    "cache_threshold": 0.125,
    "seamless": True,
    "best_of": 3,
    "guidance_interval": (0.1, 0.9),
    "guidance_rescale": 0.5,
    "apg": 0.0,
    "cfg_zero_star": 1,
    "guide_scale": 2.0,
    "clip_scale": 3.0,
    "clip_interval": (0.00001, 1.0),
    "clip_cutouts": 4,
    "true_cfg_scale": 2.0,
    "refiner_start": 0.8,
    "init_image": epath.Path("a.png"),
    "reference": (epath.Path("a.png"), epath.Path("b.png")),
    "strength": 0.25,
    "mask": epath.Path("b.png"),
    "variation": 0.5,
    "mix_prompt": "a tomato",
    "mix_seed": 9,
    "mix": 0.25,
    "upscale": 2,
    "upscale_strength": 0.25,
}
"""A value of each field, as it is held."""


def test_all_fields_are_here():
    assert VALUES.keys() == FIELDS.keys() == COLUMNS.keys()
    assert {f.doc.group for f in FIELDS.values()} <= set(GROUPS)
    rules = {name for others, _ in CONFLICTS.values() for name in others} | CONFLICTS.keys()
    rules |= {rule.name for f in FIELDS.values() if (rule := f.mark(Requires))}
    assert rules <= FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_survives_json_and_cells(name):
    settings = GenerationSettings(**{name: VALUES[name]})
    data = json.loads(json.dumps(settings.to_json()))
    assert GenerationSettings.read(data) == settings
    cell = FIELDS[name].from_cell(str(data[name]))
    assert FIELDS[name].check(cell) == VALUES[name]


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("prompt", "name")])
def test_a_field_is_a_flag(name):
    words = [FIELDS[name].flag]
    if VALUES[name] is not True:
        words.append(str(FIELDS[name].to_json(VALUES[name])))
    options = from_flags(parse_flags(SampleFlags, ["a pea", *words], prog="sample"))
    assert options.settings == GenerationSettings(**{name: VALUES[name]})
    assert options.prompt == ("a pea",)
    assert f"{FIELDS[name].flag} {FIELDS[name].metavar}".rstrip() in help_text(everything=True)


def test_flags_that_are_not_given_set_nothing():
    assert from_flags(parse_flags(SampleFlags, [], prog="sample")).settings == GenerationSettings()


@pytest.mark.parametrize("name", sorted(VALUES.keys() - set(FILES)))
def test_a_field_is_a_column(tmp_path, name):
    file = tmp_path / "a.jsonl"
    row = {"prompt": "x", name: FIELDS[name].to_json(VALUES[name])}
    file.write_text(json.dumps(row))
    (found,), _ = read_prompts(file)
    assert getattr(found.settings, name) == VALUES[name]


def test_images_that_differ_per_image_share_a_program(pipeline):
    one = resolve_settings(GenerationSettings(prompt="x"), pipeline)
    other = GenerationSettings(prompt="y", negative_prompt="z", seed=3, guidance_scale=9.0)
    same = resolve_settings(other, pipeline)
    assert same.group(Varies.BATCH) == one.group(Varies.BATCH)
    steps = one.replace(num_steps=9)
    assert steps.group(Varies.CALL) == one.group(Varies.CALL)
    assert steps.group(Varies.BATCH) != one.group(Varies.BATCH)
    best = one.replace(best_of=2)
    assert best.group(Varies.CALL) != one.group(Varies.CALL)
    assert one.replace(solver="heun").group(Varies.PROGRAM) != one.group(Varies.PROGRAM)


@dataclass(frozen=True, kw_only=True)
class WithSharpness(GenerationSettings):
    sharpness: Annotated[
        float | None, Range(0, 1), Doc("Edge contrast.", "Sampling"), Varies.IMAGE
    ] = None


def test_an_option_costs_one_field(pipeline):
    flags = flags_class(WithSharpness)
    assert set(_flags(flags)) - set(_flags(SampleFlags)) == {"--sharpness"}
    parsed = parse_flags(flags, ["--sharpness", "0.5"], prog="sample")
    asked = from_flags(parsed, WithSharpness).settings
    assert asked == WithSharpness(sharpness=0.5)
    assert WithSharpness.read(asked.to_json()) == asked
    row = WithSharpness.read({"prompt": "x"})
    resolved = resolve_settings(row, pipeline, defaults=asked)
    assert resolved.settings.to_json().items() >= {"prompt": "x", "sharpness": 0.5}.items()
    assert resolved.group(Varies.BATCH) == resolved.replace(sharpness=0.7).group(Varies.BATCH)
    assert resolved.group(Varies.BATCH) != resolved.replace(sharpness=None).group(Varies.BATCH)


@pytest.mark.parametrize("address", ["http://x/a.png", "a/b.://png", "s3://bucket/a.png"])
def test_files_at_addresses_are_refused(address):
    with pytest.raises(UserError, match=r"init_image is .*: expected the path of a file"):
        GenerationSettings.read({"prompt": "a pea", "init_image": address})


def test_long_digits_of_an_interval_are_refused_at_once():
    start = time.process_time()
    with pytest.raises(UserError, match="guidance_interval is"):
        GenerationSettings.read({"prompt": "a pea", "guidance_interval": "1" * 100_000})
    assert time.process_time() - start < 3
