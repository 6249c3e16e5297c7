"""What PEFT's configs state of an adapter's scale, and what is refused."""

import math

import pytest

from jaxdiff.errors import UserError
from jaxdiff.pretrained.lora_scale import read_peft_config

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1),
        ({"r": 4, "lora_alpha": 16}, 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8),
        ({"r": 4}, 2),
        ({"rank_pattern": {"to_q": 2}}, 4),
        ({"rank_pattern": {"to_k": 2}}, 1),
        ({"rank_pattern": {"o_q": 2}}, 1),
        ({"alpha_pattern": {"to_q": 16}}, 2),
        ({"alpha_pattern": {"attn1.to_q": 16}}, 2),
        ({"alpha_pattern": {"attn1": 16}}, 1),
        ({"alpha_pattern": {f"^{QUERY}": 16}}, 2),
        ({"alpha_pattern": {"^to_q": 16}}, 1),
        ({"alpha_pattern": {r".*attn\d.to_(q|k)": 16}}, 2),
        ({"alpha_pattern": {"to_q": 16, "attn1.to_q": 32}}, 2),
        ({"alpha_pattern": {"attn1.to_q": 32, "to_q": 16}}, 4),
    ],
)
def test_it_is_that_of_peft(config, scale):
    found = read_peft_config("config", config)
    rank = 2 if config.get("rank_pattern") == {"to_q": 2} else config.get("r", 8)
    assert math.isclose(found.scale(QUERY, rank), scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "is not a config"),
        ({"peft_type": "LOKR"}, "peft_type is 'LOKR'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
        ({"from_the_future": 2}, "the key 'from_the_future'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16': expected a number"),
        ({"r": True}, "r is True: expected a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"alpha_pattern": {"to_q": None}}, "'to_q' is None"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complicated"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
    ],
)
def test_what_has_no_meaning_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        read_peft_config("config", config)


@pytest.mark.parametrize(
    ("config", "selected"),
    [
        ({}, True),
        ({"target_modules": ["to_q"]}, True),
        ({"target_modules": ["to_k"]}, False),
        ({"target_modules": ["o_q"]}, False),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r".*attn\d+\.to_(q|k)"}, True),
        ({"target_modules": "to_q"}, False),
        ({"exclude_modules": ["attn1.to_q"]}, False),
        ({"exclude_modules": r".*attn2.*"}, True),
        ({"target_modules": ["to_q"], "layers_to_transform": [0]}, True),
        ({"target_modules": ["to_q"], "layers_to_transform": 1}, False),
        ({"target_modules": [QUERY], "layers_to_transform": [5]}, True),
        ({"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}, True),
        ({"layers_to_transform": [0], "layers_pattern": ["layers"]}, False),
    ],
)
def test_adapters_of_layers_that_peft_leaves_out_are_refused(config, selected):
    found = read_peft_config("config", config, selects=True)
    assert found.selects(QUERY) == selected
    assert read_peft_config("metadata", config).scale(QUERY, 8) == 1  # diffusers selects by tensors
    if not selected:
        with pytest.raises(UserError, match=r"target_modules, .* leave out mid_block"):
            found.scale(QUERY, 8)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", [1, [1], {"a": 1}, "(", "(a+)+"])
def test_layers_are_selected_by_names(key, value):
    with pytest.raises(UserError, match=f"config: .*{key}"):
        read_peft_config("config", {key: value}, selects=True)


@pytest.mark.parametrize("key", ["layers_to_transform", "layers_pattern"])
@pytest.mark.parametrize("value", [1.5, {"a": 1}, [None], ["(", 1]])
def test_layers_are_selected_by_numbers(key, value):
    with pytest.raises(UserError, match=f"config: {key} is"):
        read_peft_config("config", {key: value}, selects=True)


def test_the_rank_of_another_file_is_refused():
    with pytest.raises(UserError, match=r"the rank of .*to_q is 8, but that of its tensors 4"):
        read_peft_config("config", {}).scale(QUERY, 4)
