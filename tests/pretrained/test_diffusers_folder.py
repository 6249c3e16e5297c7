"""Folders of diffusers' pipelines: which family reads and writes them."""

import json

import pytest

from jaxdiff.errors import UserError
from jaxdiff.pretrained.diffusers_folder import FAMILIES, write_diffusers
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.pretrained.pipeline_folder import INDEX


def test_no_two_families_have_a_pipeline_in_common():
    names = [name for family in FAMILIES.values() for name in family.pipelines]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("read", [load_bundle, read_spec, read_tokenizers])
@pytest.mark.parametrize(
    ("index", "name"),
    [
        ({"_class_name": "PixArtSigmaPipeline"}, "PixArtSigmaPipeline"),
        ({"_class_name": ["StableDiffusionPipeline"]}, "StableDiffusionPipeline"),
        ({}, "None"),
    ],
)
def test_an_unknown_pipeline_is_refused_with_the_known_ones(index, name, read, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"names .*{name}.*not support: expected StableDiff") as e:
        read(tmp_path)
    for family in FAMILIES.values():
        assert all(pipeline in str(e.value) for pipeline in family.pipelines)


def test_a_model_of_no_family_is_not_written(small_bundle, tmp_path):
    with pytest.raises(UserError, match=r"small is no model of diffusers: .* Stable Diffusion"):
        write_diffusers(tmp_path, small_bundle)
