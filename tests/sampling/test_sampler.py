"""A recipe's way of sampling, as JSON and back."""

import json

from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.training.recipe import from_json, to_json


def test_guidance_is_kept_with_the_recipe():
    apg, zero_star = APG(eta=0.5, momentum=-0.5, norm_threshold=8.0), CFGZeroStar(zero_steps=2)
    guidance = Guidance(interval=(0.1, 0.8), rescale=0.5, apg=apg, zero_star=zero_star)
    config = SamplingConfig(interval=(0.1, 0.8), rescale=0.5, apg=apg, zero_star=zero_star)
    assert config.guidance == guidance
    for value in (config, guidance):
        assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def test_a_recipe_of_before_is_without_it():
    stored = to_json(SamplingConfig())
    del stored["apg"], stored["zero_star"]
    assert from_json(SamplingConfig, stored).guidance == Guidance()
