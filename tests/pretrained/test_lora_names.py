"""Every spelling of layers and roles in LoRA files, and what names of other methods report."""

import pytest

from jaxdiff.errors import UserError
from jaxdiff.pretrained.lora_layers import layers_of
from jaxdiff.pretrained.lora_names import find_targets

WIDTH = 8
QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
TEXT_2 = TEXT.replace("text_encoder", "text_encoder_2")

LAYERS = {
    QUERY: [
        QUERY,
        QUERY.removeprefix("unet."),
        QUERY.replace("unet.", "base_model.model."),
        QUERY.replace("unet.", "unet.base_model.model."),
        QUERY.replace("unet.", "unet._orig_mod."),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q",
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        "diffusion_model.input_blocks.3.1.transformer_blocks.1.attn1.to_q",
    ],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
    ],
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": [
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj"
    ],
    "unet.mid_block.attentions.0.proj_in": [
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_middle_block_1_proj_in",
        "diffusion_model.middle_block.1.proj_in",
    ],
    "unet.mid_block.resnets.1.conv2": ["lora_unet_middle_block_2_out_layers_3"],
    "unet.mid_block.resnets.1.time_emb_proj": ["lora_unet_middle_block_2_emb_layers_1"],
    "unet.mid_block.resnets.0.norm1": ["lora_unet_middle_block_0_in_layers_0"],
    "unet.up_blocks.0.resnets.1.conv_shortcut": ["lora_unet_output_blocks_1_0_skip_connection"],
    "unet.down_blocks.0.downsamplers.0.conv": ["lora_unet_input_blocks_2_0_op"],
    "unet.up_blocks.0.upsamplers.0.conv": ["lora_unet_output_blocks_1_2_conv"],
    "unet.conv_in": ["lora_unet_conv_in", "lora_unet_input_blocks_0_0"],
    "unet.conv_out": ["lora_unet_conv_out", "lora_unet_out_2"],
    "unet.time_embedding.linear_1": [
        "lora_unet_time_embedding_linear_1",
        "lora_unet_time_embed_0",
    ],
    "unet.add_embedding.linear_2": ["lora_unet_label_emb_0_2"],
    TEXT: [
        TEXT,
        TEXT.replace("text_model.", ""),
        TEXT.replace("q_proj", "to_q"),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te_encoder_layers_1_self_attn_q_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj",
    ],
    TEXT_2: [
        TEXT_2.replace("text_model.", ""),
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj",
    ],
    "text_encoder_2.text_projection": ["lora_te2_text_projection"],
    "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": [
        "text_encoder_2.text_model.encoder.layers.0.self_attn.to_out"
    ],
}


@pytest.mark.parametrize(
    ("layer", "spelling"), [(layer, x) for layer, names in LAYERS.items() for x in names]
)
def test_every_spelling_of_a_layer_is_known(layer, spelling, stable_diffusions):
    name = f"{spelling}.lora_down.weight"
    targets = find_targets("style", {name: (4, WIDTH)}, stable_diffusions["XL"])
    assert targets[name].layer.name == layer
    assert targets[name].role == "down"


ROLES = {
    "down": [
        ".lora_A.weight",
        ".lora_A.default.weight",
        ".lora_A.style-2.weight",
        ".lora_down.weight",
        ".lora.down.weight",
        "_lora.down.weight",
        ".processor_lora.down.weight",
        ".lora_linear_layer.down.weight",
    ],
    "up": [".lora_B.weight", ".lora_up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight"],
    "up_bias": [".lora_B.bias", ".lora_B.default.bias"],
    "mid": [".lora_mid.weight"],
    "alpha": [".alpha", "_lora.alpha", ".lora_linear_layer.alpha"],
    "magnitude": [
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default.weight",
    ],
    "dora_scale": [".dora_scale"],
    "diff": [".diff", ".w_norm"],
    "diff_b": [".diff_b", ".b_norm"],
    "hada_w1_a": [".hada_w1_a"],
    "lokr_w1": [".lokr_w1"],
    "lokr_w2_b": [".lokr_w2_b"],
}


@pytest.mark.parametrize(("role", "end"), [(role, x) for role, ends in ROLES.items() for x in ends])
def test_every_spelling_of_a_role_is_known(role, end, stable_diffusions):
    module = QUERY
    if end.startswith(".processor"):  # of an attention's processor
        module, end = QUERY.replace(".to_q", ""), end.replace("_lora", ".to_q_lora")
    targets = find_targets("style", {module + end: (4, WIDTH)}, stable_diffusions["SD"])
    (target,) = targets.values()
    assert (target.role, target.layer.name) == (role, QUERY)
    assert target.module == QUERY.removeprefix("unet.")


@pytest.mark.parametrize("kind", ["SD", "XL", "refiner"])
def test_the_names_of_different_layers_differ(kind, stable_diffusions):
    spec = stable_diffusions[kind]
    for name, layer in layers_of(spec).items():
        folder, _, theirs = name.partition(".")
        kohya = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
        for spelling in (name, kohya[folder] + theirs.replace(".", "_")):
            (target,) = find_targets("style", {f"{spelling}.alpha": ()}, spec).values()
            assert target.layer == layer


OTHERS = {
    "lora_unet_x.oft_blocks": "OFT",
    "unet.x.oft_R.weight": "OFT",
    "lora_unet_x.on_input": r"\(IA\)\^3",
    "lora_unet_x.a1.weight": "GLoRA",
    "lora_unet_x.lambda_layer": "T-LoRA",
    "base_model.model.x.lora_embedding_A": "LoRA of an embedding",
    "base_model.model.x.lora_E": "AdaLoRA",
    "base_model.vera_A.default": "VeRA",
    "lora_unet_x.lokr_t1": "LoKr with lokr_t1",
    "lora_unet_x.bias_indices": "sparse biases",
    "base_model.model.conv_in.base_layer.bias": "bias or modules_to_save",
    "base_model.model.conv_in.modules_to_save.weight": "bias or modules_to_save",
    "bundle_emb.word.string_to_param.*": "a bundled embedding",
    "unet:0:up": "cloneofsimo/lora",
    "lora_controlnet": "Control-LoRA",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_refused_by_name(name, stable_diffusions):
    with pytest.raises(UserError, match=f"style has .*{OTHERS[name]}.*does not read"):
        find_targets("style", {name: (4, WIDTH)}, stable_diffusions["SD"])


def test_the_same_place_by_two_names_is_refused(stable_diffusions):
    names = {f"{QUERY}.lora_A.weight": (4, 8), f"{LAYERS[QUERY][5]}.lora_down.weight": (4, 8)}
    with pytest.raises(UserError, match="two tensors for one place"):
        find_targets("style", names, stable_diffusions["SD"])


def test_names_without_an_encoder_are_of_the_one_that_fits(stable_diffusions):
    name = "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight"
    xl = stable_diffusions["XL"]
    with pytest.raises(UserError, match="fits both text encoders and names neither"):
        find_targets("style", {name: (4, WIDTH)}, xl)
    (target,) = find_targets("style", {name: (4, WIDTH)}, stable_diffusions["refiner"]).values()
    assert target.layer.part == "text_2"
