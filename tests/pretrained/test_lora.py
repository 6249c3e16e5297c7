"""LoRA files: every way of naming the layers, scales, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save, save_file

from jaxdiff.errors import UserError
from jaxdiff.models.lora import Factors
from jaxdiff.pipelines.lora import scaled
from jaxdiff.pretrained.key_mapping import flatten_params
from jaxdiff.pretrained.lora import FILE, PEFT_CONFIG, PEFT_FILE, read_lora, write_lora
from jaxdiff.pretrained.merging import merge_into

WIDTH, RANK = 8, 3
NIGHTLY = pytest.mark.nightly

QUERY = ("down", 1, "transformers", 0, "blocks", "attention", "q")
CONV = ("middle", "first", "conv1")
WORDS = ("blocks", "mlp_in")

# The query of the second block of a stack, the first convolution of the middle, a text layer.
NAMES = {
    "diffusers": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_{}.weight",
        "unet.mid_block.resnets.0.conv1.lora_{}.weight",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight",
        ("A", "B"),
    ),
    "diffusers before PEFT": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_q_lora.{}.weight",
        "unet.mid_block.resnets.0.conv1.lora.{}.weight",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.{}.weight",
        ("down", "up"),
    ),
    "kohya": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.lora_{}.weight",
        "lora_unet_mid_block_resnets_0_conv1.lora_{}.weight",
        "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight",
        ("down", "up"),
    ),
    "kohya, original": (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lora_{}.weight",
        "lora_unet_middle_block_0_in_layers_2.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight",
        ("down", "up"),
    ),
}


@pytest.fixture
def sd(stable_diffusions):
    return stable_diffusions["SD"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensors(naming="diffusers"):
    query, conv, words, (down, up) = NAMES[naming]
    return {
        query.format(down): normal(0, RANK, WIDTH),
        query.format(up): normal(1, WIDTH, RANK),
        conv.format(down): normal(2, RANK, WIDTH, 3, 3),
        conv.format(up): normal(3, WIDTH, RANK, 1, 1),
        words.format(down): normal(4, RANK, WIDTH),
        words.format(up): normal(5, 4 * WIDTH, RANK),
    }


@pytest.mark.parametrize("naming", NAMES)
def test_every_naming_finds_the_same_layers(naming, sd, tmp_path):
    save_file(tensors(naming), tmp_path / FILE)
    found = read_lora(tmp_path, sd)
    assert {part: set(pairs) for part, pairs in found.items()} == {
        "denoiser": {QUERY, CONV},
        "text": {WORDS},
    }
    query, conv = found["denoiser"][QUERY], found["denoiser"][CONV]
    assert query.down.shape == (2, WIDTH, RANK)
    assert not query.down[0].any()  # the other block of the stack
    np.testing.assert_array_equal(query.down[1], normal(0, RANK, WIDTH).T)
    np.testing.assert_array_equal(query.up[1], normal(1, WIDTH, RANK).T)
    assert conv.down.shape == (3, 3, WIDTH, RANK)
    np.testing.assert_array_equal(conv.down[1, 2], normal(2, RANK, WIDTH, 3, 3)[:, :, 1, 2].T)
    np.testing.assert_array_equal(conv.up[0, 0], normal(3, WIDTH, RANK, 1, 1)[:, :, 0, 0].T)
    np.testing.assert_array_equal(found["text"][WORDS].up[1], normal(5, 4 * WIDTH, RANK).T)


def test_alpha_counts_by_tensor_and_by_metadata(sd, tmp_path):
    kohya = tensors("kohya")
    name = NAMES["kohya"][0].replace("lora_{}.weight", "alpha")
    save_file(kohya | {name: np.array(6.0, np.float32)}, tmp_path / "kohya.safetensors")
    stated = '{"unet.lora_alpha": 6, "unet.r": 3}'
    save_file(tensors(), tmp_path / "peft.safetensors", metadata={"lora_adapter_metadata": stated})
    for file, text_scale in (("kohya", 1), ("peft", 1)):
        found = read_lora(tmp_path / f"{file}.safetensors", sd)
        up = found["denoiser"][QUERY].up[1]
        np.testing.assert_array_equal(up, 2 * normal(1, WIDTH, RANK).T)
        np.testing.assert_array_equal(
            found["text"][WORDS].up[1], text_scale * normal(5, 4 * WIDTH, RANK).T
        )


@pytest.mark.parametrize("kind", ["SD", "XL", "refiner"])
def test_it_comes_back(kind, stable_diffusions, tmp_path):
    spec = stable_diffusions[kind]
    pairs = {"denoiser": {QUERY: Factors(normal(0, 2, WIDTH, RANK), normal(1, 2, RANK, WIDTH))}}
    for name in spec.conditioner.encoders:
        pairs[name] = {WORDS: Factors(normal(2, 2, WIDTH, 1), normal(3, 2, 1, 4 * WIDTH))}
    write_lora(tmp_path, pairs, spec)
    assert len(load_file(tmp_path / FILE)) == 4 * len(pairs)
    found = read_lora(tmp_path / FILE, spec)
    for part, layers in pairs.items():
        for path, pair in layers.items():
            np.testing.assert_array_equal(found[part][path].down, pair.down)
            np.testing.assert_array_equal(found[part][path].up, pair.up)


def test_the_second_encoder_of_xl_is_found(stable_diffusions, tmp_path):
    kohya = {
        name.replace("lora_te_", "lora_te2_"): value for name, value in tensors("kohya").items()
    }
    save_file(kohya, tmp_path / FILE)
    assert set(read_lora(tmp_path, stable_diffusions["XL"])) == {"denoiser", "text_2"}


def change(name, value=None):
    """The tensors with one, by a part of its name, in another form, or without it."""
    found = tensors()
    key = next(key for key in found if name in key)
    del found[key]
    return found if value is None else found | {key: value}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (change("to_q.lora_B"), "half a pair for down.1.transformers.0.blocks.attention.q"),
        (change("to_q.lora_A", normal(0, RANK, 9)), "load the model that it was trained on"),
        (tensors() | {"unet.nose.lora_A.weight": normal(0, 1, 1)}, "unet.nose.lora_A.weight"),
        (tensors() | {"lora_unet_x.hada_w1_a": normal(0, 1, 1)}, "no LoRA of this model"),
    ],
    ids=["half", "shape", "layer", "kind"],
)
def test_what_does_not_fit_is_refused(there, message, sd, tmp_path):
    save_file(there, tmp_path / FILE)
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path, sd)


def config_of(folder, **keys):
    (folder / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, **keys}))


def scale_of(found):
    """The scale of the query's factors, which the file has without."""
    return (found["denoiser"][QUERY].up[1] / normal(1, WIDTH, RANK).T).mean()


PEFT_TENSORS = {
    name.replace("unet.", "base_model.model."): value
    for name, value in tensors().items()
    if name.startswith("unet.")
}


@pytest.mark.parametrize("name", [PEFT_FILE, "style.safetensors"])
def test_a_folder_of_peft_states_the_scale_beside_the_file(name, sd, tmp_path):
    save_file(PEFT_TENSORS, tmp_path / name)
    assert scale_of(read_lora(tmp_path, sd)) == 1
    config_of(tmp_path, lora_alpha=4 * RANK, alpha_pattern={"to_q": 2 * RANK})
    np.testing.assert_allclose(scale_of(read_lora(tmp_path, sd)), 2, rtol=1e-6)
    conv = read_lora(tmp_path / name, sd)["denoiser"][CONV].up[0, 0]
    np.testing.assert_allclose(conv, 4 * normal(3, WIDTH, RANK, 1, 1)[:, :, 0, 0].T, rtol=1e-6)


def test_the_config_of_another_file_is_not_read(sd, tmp_path):
    config_of(tmp_path, lora_alpha=4 * RANK)
    save_file(tensors(), tmp_path / FILE)
    assert scale_of(read_lora(tmp_path, sd)) == 1


@pytest.mark.parametrize(
    ("stated", "scale"),
    [
        ({"unet.lora_alpha": 6, "unet.r": 3, "unet.alpha_pattern": {"attn1.to_q": 12}}, 4),
        ({"unet.lora_alpha": 6, "unet.r": 4, "unet.rank_pattern": {"to_q|conv1": 3}}, 2),
        ({"unet.lora_alpha": 6, "unet.r": 3, "unet.use_rslora": True}, 6 / 3**0.5),
        ({"text_encoder.lora_alpha": 6, "text_encoder.r": 3}, 1),
    ],
)
def test_metadata_state_the_scale_of_each_component(stated, scale, sd, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps(stated), "ss_network_alpha": "8"}
    save_file(tensors(), tmp_path / FILE, metadata=metadata)
    np.testing.assert_allclose(scale_of(read_lora(tmp_path, sd)), scale, rtol=1e-6)


@pytest.mark.parametrize("stated", ["[1]", '{"unet.r": ', '{"unet.r": 3, "unet.bias": "all"}', "8"])
def test_metadata_that_cannot_be_heeded_are_refused(stated, sd, tmp_path):
    save_file(tensors(), tmp_path / FILE, metadata={"lora_adapter_metadata": stated})
    with pytest.raises(UserError, match="lora_adapter_metadata"):
        read_lora(tmp_path, sd)


MIXED = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": normal(
        0, 2, 8
    ),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": normal(
        1, 8, 2
    ),
    "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lokr_w1": normal(2, 2, 4),
    "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lokr_w2": normal(3, 4, 2),
    "unet.mid_block.resnets.0.conv1.diff": normal(4, 8, 8, 3, 3),
    "unet.mid_block.resnets.0.conv1.diff_b": normal(5, 8),
    "unet.mid_block.resnets.0.norm1.w_norm": normal(6, 8),
    "lora_te_text_model_encoder_layers_1_mlp_fc1.diff": normal(7, 32, 8),
    "lora_te_text_model_final_layer_norm.b_norm": normal(8, 8),
}


def test_other_kinds_are_merged_into_the_weights(sd, random_params, tmp_path):
    params = random_params(sd)
    save_file(MIXED, tmp_path / FILE)
    merged = merge_into(params, scaled(read_lora(tmp_path, sd), 0.5))
    a, b, w1, w2, conv, bias, norm, text, final = MIXED.values()
    unet, words = params["denoiser"], params["text_encoders"]["text"]
    expected = {
        ("denoiser", *QUERY, "kernel"): np.stack([(b @ a).T, np.kron(w1, w2).T]),
        ("denoiser", *CONV, "kernel"): conv.transpose(2, 3, 1, 0),
        ("denoiser", *CONV, "bias"): bias,
        ("denoiser", "middle", "first", "norm1", "scale"): norm,
        ("text_encoders", "text", *WORDS, "kernel"): np.stack([0 * text.T, text.T]),
        ("text_encoders", "text", "final_norm", "bias"): final,
    }
    assert unet.keys() == merged["denoiser"].keys()
    assert words.keys() == merged["text_encoders"]["text"].keys()
    old, new = flatten_params(params), flatten_params(merged)
    for path, value in old.items():
        change = np.asarray(new[path]) - value
        np.testing.assert_allclose(change, 0.5 * expected.get(path, 0 * value), atol=1e-5)


def test_a_folder_has_one_file_of_any_name(sd, tmp_path):
    with pytest.raises(UserError, match=r"has 0 \.safetensors files"):
        read_lora(tmp_path, sd)
    save_file(tensors(), tmp_path / "a*[style]?.safetensors")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert set(read_lora(link, sd)) == {"denoiser", "text"}
    save_file(tensors(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"has 2 \.safetensors files: .* give the path of the file"):
        read_lora(tmp_path, sd)


def test_numbers_of_one_byte_are_read(sd, tmp_path):
    small = {name: value.astype(jnp.float8_e4m3fn) for name, value in tensors().items()}
    save_file(small, tmp_path / FILE)
    up = read_lora(tmp_path, sd)["denoiser"][QUERY].up[1]
    np.testing.assert_array_equal(up, normal(1, WIDTH, RANK).T.astype(jnp.float8_e4m3fn))


def mutate(found, rng):
    """Rename, reshape, spoil or drop a tensor."""
    name = list(found)[rng.integers(len(found))]
    value = found.pop(name)
    at = rng.integers(len(name))
    changes = [
        {name[:at] + str(rng.choice(list("._aZ0:"))) + name[at + rng.integers(2) :]: value},
        {f"{name.rsplit('.', 2)[0]}.{rng.choice(ENDS)}": value},
        {name: np.zeros(rng.integers(0, 9, rng.integers(5)), rng.choice(["f4", "f2", "i1", "?"]))},
        {name: value * rng.choice(np.array([np.nan, np.inf, 0], np.float32))},
        {name: np.ascontiguousarray(value.T)},
        {},
    ]
    return found | changes[rng.integers(len(changes))]


ENDS = ["lora_A.weight", "lora_up.weight", "alpha", "hada_t1", "lokr_w1", "lokr_t2", "diff_b"]
ENDS += ["dora_scale", "lora_magnitude_vector", "lora_mid.weight", "w_norm", "lora_B.bias"]


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 20_000), marks=NIGHTLY)])
@pytest.mark.filterwarnings("error")
def test_mutated_files_are_read_or_refused(seeds, sd, tmp_path):
    found_parts, messages = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            found = mutate([tensors(), tensors("kohya"), dict(MIXED)][seed % 3], rng)
        data = bytearray(save(found, {"lora_adapter_metadata": '{"text_encoder.r": 3}'}))
        if seed % 4 == 0:
            data[rng.integers(min(len(data), 2000))] = rng.integers(256)
        (tmp_path / FILE).write_bytes(data)
        try:
            found_parts.append(read_lora(tmp_path, sd))
        except UserError as error:
            messages.append(str(error))
    assert found_parts
    assert messages
    assert not [x for x in messages if "\n" in x]


def test_an_empty_file_is_refused(sd, tmp_path):
    save_file({}, tmp_path / FILE)
    with pytest.raises(UserError, match="has no tensors: expected those of a LoRA"):
        read_lora(tmp_path, sd)


@pytest.mark.parametrize("name", ["style.bin", "style.pt", "style.ckpt", "style.pth"])
def test_pickled_files_are_never_opened(name, sd, tmp_path):
    (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        read_lora(tmp_path / name, sd)
    with pytest.raises(UserError, match="holds only pickled files, which can run code"):
        read_lora(tmp_path, sd)


def test_a_locked_folder_is_reported(sd, tmp_path, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "iterdir", locked)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        read_lora(tmp_path, sd)


def test_a_missing_file_is_reported(sd, tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        read_lora(tmp_path / "nothing.safetensors", sd)


def test_other_denoisers_have_no_such_files(tmp_path, small_bundle):
    save_file(tensors(), tmp_path / FILE)
    with pytest.raises(UserError, match="denoiser of small is of type DiTConfig: expected Stable"):
        read_lora(tmp_path, small_bundle.spec)
