"""Single files: every spelling of every tensor, what a file is of, and what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pretrained import autoencoder_keys, clip_keys, single_file, unet_keys
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file import VARIANTS, objective_of, read_original, read_original_spec
from jaxdiff.pretrained.single_file_keys import unet_original_name

XL, REFINER, V2, V1 = VARIANTS
SPEC, ARCHITECTURE = "modelspec.prediction_type", "modelspec.architecture"

UNET = UNet2DConditionConfig(
    block_out_channels=(4, 8),
    layers_per_block=1,
    transformer_layers=(1, 0),
    heads=(2, 2),
    cross_attention_dim=8,
    norm_num_groups=2,
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
CLIP = ClipTextConfig(vocab_size=600, length=16, width=8, depth=1, heads=2)
OPENCLIP = dataclasses.replace(CLIP, width=4, depth=2, activation="gelu", projection_dim=4)
P, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
MID = f"{VAE}encoder.mid.attn_1"


def random_params(build):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(build)
    )


def vae_original_name(name):
    """A name of diffusers' AutoencoderKL in the original layout."""
    name = re.sub(r"^encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{1 - int(m[1])}", name)
    name = re.sub(r"((?:down|up)\.\d)\.resnets", r"\1.block", name)
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    for new, old in ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", ""):
        name = re.sub(rf"(attentions\.0\.){new}", rf"\1{old}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    return name.replace("mid_block.attentions.0", "mid.attn_1")


def sd1_tensors(params, network):
    tensors = unet_keys.unet_to_torch(params["denoiser"])
    file = {P + unet_original_name(name, network): x for name, x in tensors.items()}
    for name, x in autoencoder_keys.autoencoder_to_torch(params["autoencoder"]).items():
        kernel = ".attentions.0.to_" in name and x.ndim == 2
        file[VAE + vae_original_name(name)] = x[:, :, None, None] if kernel else x
    for name, x in clip_keys.clip_to_torch(params["text_encoders"]["text"], CLIP).items():
        file[TEXT + name] = x
    return file


def openclip_tensors(params, config):
    """Tensors of transformers' names under OpenCLIP's, with a block that is not used."""
    theirs = clip_keys.clip_to_torch(params, config)
    file = {
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "logit_scale": np.ones((), np.float32),
    }
    if config.projection_dim:
        file["text_projection"] = theirs["text_projection.weight"].T
    for kind in ("weight", "bias"):
        file[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
        for i in range(config.depth):
            ours, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            file[f"{block}.attn.in_proj_{kind}"] = np.concatenate(
                [theirs[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for old, new in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                file[f"{block}.{old}.{kind}"] = theirs[f"{ours}.{new}.{kind}"]
        file[f"transformer.resblocks.{config.depth}.ln_1.{kind}"] = np.ones(config.width)
    return file


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Make the published models tiny; return the parameters of 1.x and its file's tensors."""
    text = ClipTextEncoder(model=CLIP)
    v1 = V1._replace(
        network=UNET,
        autoencoder=AUTOENCODER,
        conditioner=ClipConditioner(text=text, masked=False),
    )
    second = ClipTextEncoder(model=OPENCLIP, hidden_layer=-2, final_norm=False)
    network = dataclasses.replace(
        UNET, cross_attention_dim=12, use_linear_projection=True, added_width=4 + 6 * 256
    )
    xl = XL._replace(
        network=network,
        autoencoder=AUTOENCODER,
        conditioner=StableDiffusionXLConditioner(text=text, text_2=second),
    )
    monkeypatch.setattr(single_file, "VARIANTS", [xl, REFINER, V2, v1])
    Tokenizer.train(["a red pea"], vocab_size=540).save(str(tmp_path / "tokenizer"))
    monkeypatch.setattr(single_file, "download_tokenizer", lambda: tmp_path / "tokenizer")
    params = {
        "denoiser": random_params(bind_build(UNET)),
        "autoencoder": random_params(bind_build(AUTOENCODER)),
        "text_encoders": {"text": random_params(bind_build(text))},
    }
    return params, sd1_tensors(params, UNET)


def read(tensors, folder, metadata=None):
    path = folder / "model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return read_original(path, place=np.asarray)


def renamed(*pairs):
    def change(tensors):
        for old, new in pairs:
            tensors = {re.sub(old, new, name): x for name, x in tensors.items()}
        return tensors

    return change


def linear_vae(tensors):
    return {k: x[:, :, 0, 0] if ".mid.attn_1." in k and x.ndim == 4 else x for k, x in
            tensors.items()}  # fmt: skip


def linear_unet(tensors):
    return {k: x[:, :, 0, 0] if re.search(r"\.proj_(in|out)\.w", k) and x.ndim == 4 else x
            for k, x in tensors.items()}  # fmt: skip


def diffusers_names(tensors):
    """All parts under diffusers' names."""
    network = {
        P + unet_original_name(name, UNET): f"unet.{name}"
        for name in unet_keys.unet_to_torch(random_params(bind_build(UNET)))
    }
    vae = {
        VAE + vae_original_name(name): f"vae.{name}"
        for name in autoencoder_keys.autoencoder_to_torch(random_params(bind_build(AUTOENCODER)))
    }
    names = network | vae
    return {names.get(k, k.replace(TEXT, "text_encoder.")): x for k, x in tensors.items()}


OLD = ("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")
NEW = ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")
WITH_MORE = {
    "model_ema.decay": np.ones(1),
    "model_ema.diffusion_modelinput_blocks00weight": np.ones(1),
    "betas": np.zeros(1000),
    "alphas_cumprod": np.zeros(1000),
    "sqrt_one_minus_alphas_cumprod": np.zeros(1000),
    "global_step": np.ones(1),
    f"{VAE}loss.logvar": np.ones(1),
    f"{VAE}loss.discriminator.main.0.weight": np.ones(1),
    f"{TEXT}text_model.embeddings.position_ids": np.arange(77)[None],
    f"{TEXT}text_projection.weight": np.ones((8, 8)),
    "cond_stage_model.logit_scale": np.ones(1),
}


@pytest.mark.parametrize(
    "spelling",
    [
        renamed(),
        renamed((rf"{TEXT}text_model\.", TEXT)),
        renamed((TEXT, "cond_stage_model.")),
        renamed((TEXT, "conditioner.embedders.0.transformer.")),
        renamed(("^", "state_dict.")),
        renamed((r"^model\.diff", "diff")),
        renamed(*((rf"attn_1\.{old}\.", f"attn_1.{new}.") for old, new in OLD)),
        renamed(*((rf"attn_1\.{old}\.", f"attn_1.{new}.") for old, new in NEW)),
        lambda t: linear_vae(renamed(*((rf"attn_1\.{o}\.", f"attn_1.{n}.") for o, n in NEW))(t)),
        linear_vae,
        linear_unet,
        diffusers_names,
        lambda t: t | WITH_MORE,
    ],
)
def test_every_spelling_is_the_same_model(spelling, tiny, tmp_path):
    params, tensors = tiny
    found = read(spelling(tensors), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert (found.spec.prediction, found.spec.denoiser.in_channels) == ("eps", 4)
    assert read_original_spec(tmp_path / "model.safetensors") == found.spec


@pytest.mark.parametrize("second", ["openclip", "transposed", "transformers"])
def test_xl_has_a_second_text_encoder_in_either_spelling(second, tiny, tmp_path):
    params = tiny[0]
    network, encoder = single_file.VARIANTS[0].network, ClipTextEncoder(model=OPENCLIP)
    params["denoiser"] = random_params(bind_build(network))
    tensors = renamed((TEXT, "conditioner.embedders.0.transformer."))(sd1_tensors(params, network))
    params["text_encoders"]["text_2"] = other = random_params(bind_build(encoder))
    if second == "transformers":
        more = clip_keys.clip_to_torch(other, OPENCLIP)
        tensors |= {f"conditioner.embedders.1.transformer.{k}": x for k, x in more.items()}
    else:
        more = openclip_tensors(other, OPENCLIP)
        if second == "transposed":
            more["text_projection.weight"] = more.pop("text_projection").T
        tensors |= {f"conditioner.embedders.1.model.{k}": x for k, x in more.items()}
    found = read(tensors, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.tokenizers["text_2"].pad_id == 0
    assert found.tokenizers["text"].pad_id == found.tokenizers["text"].end_id


def without(start):
    return lambda t: {k: x for k, x in t.items() if not k.startswith(start)}


def with_stem(channels):
    return lambda t: t | {f"{P}input_blocks.0.0.weight": np.ones((4, channels, 3, 3), np.float32)}


def with_names(*names):
    return lambda t: t | dict.fromkeys(names, np.ones(1, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_stem(8), "8 input channels, as instruct-pix2pix models have"),
        (with_stem(5), "5 input channels, as depth-to-image models have"),
        (with_stem(7), "7 input channels, as upscalers have"),
        (with_stem(6), "6 input channels: expected 4, or 9"),
        (without("first_stage"), r"no autoencoder \(first_stage_model"),
        (without("cond_stage"), r"no text encoder \(cond_stage_model"),
        (without(("first_stage", "cond_stage")), "no autoencoder .*, no text encoder"),
        (lambda t: {k.removeprefix(P): x for k, x in t.items()}, "is no checkpoint of Stable"),
        (lambda t: {"a": np.ones(1)}, "is no checkpoint of Stable Diffusion .* it holds a;"),
        (with_names("edm_mean", "edm_std"), "edm_mean, edm_std, the EDM objective of Playground"),
        (with_names("edm_vpred.sigma_max"), "edm_vpred.sigma_max, the EDM objective of CosXL"),
        (with_names("depth_model.a"), "depth-to-image"),
        (with_names("noise_augmentor.a", "embedder.b"), "unCLIP"),
        (with_names("control_model.input_hint_block.0.weight"), "a ControlNet"),
        (with_names(f"{P}time_embed.cond_proj.weight"), "guidance embedding of an LCM"),
        (with_names(f"{P}label_emb.0.0.weight"), "U-Net: unexpected tensors: add_embedding"),
        (with_names(f"{P}input_blocks.1.3.new.weight"), r"unexpected tensors: input_blocks\.1\.3"),
        (with_names("scale_factor", "other.weight"), "holds other.weight, scale_factor: exp"),
        (with_names("conditioner.embedders.1.model.ln_final.bias"), "expected only tensors of"),
        (without(f"{P}input_blocks.1.1.proj_in"), "U-Net: missing tensors: .*unpruned"),
        (with_names(f"{MID}.to_q.weight"), "are the same tensor"),
        (lambda t: t | {f"{VAE}quant_conv.bias": np.ones(3, np.float32)}, "tensors of another sh"),
        (lambda t: t | {f"{VAE}quant_conv.bias": np.ones(8, np.int8)}, "holds int8: expected flo"),
        (lambda t: t | {f"{VAE}quant_conv.bias": np.full(8, np.nan)}, "quant_conv.bias holds NaN"),
        (lambda t: t | {f"{VAE}quant_conv.bias": np.full(8, -np.inf, np.float16)}, "or infinite"),
        (lambda t: {"lora_unet_a.lora_up.weight": np.ones(1)}, "adapters; give them by --lora"),
        (lambda t: {"emb_params": np.ones((1, 8))}, "give it by --embedding"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(change, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        read(change(tiny[1]), tmp_path)


def test_a_number_in_place_of_a_matrix_is_refused(tmp_path):
    save_file({f"{P}a.attn2.to_k.weight": np.ones((), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is no checkpoint of Stable Diffusion"):
        read_original_spec(tmp_path / "a.safetensors")


def test_inpainting_models_have_nine_channels(tiny, tmp_path):
    found = read(with_stem(9)(tiny[1]), tmp_path)
    assert found.spec.is_inpainting


def marked(folder, names, metadata, more=None):
    path = epath.Path(folder) / "model.safetensors"
    save_file(
        {name: np.empty(0, np.float32) for name in [*names, "other"]} | (more or {}), path, metadata
    )
    return TensorFiles([path])


@pytest.mark.parametrize(
    ("variant", "names", "metadata", "expected"),
    [
        (V1, [], {}, ("eps", False)),
        (V1, [], {SPEC: "v"}, ("v", False)),
        (V2, [], {SPEC: "epsilon"}, ("eps", False)),
        (V2, [], {ARCHITECTURE: "stable-diffusion-v2-512"}, ("eps", False)),
        (V2, [], {ARCHITECTURE: "stable-diffusion-v2-768-v"}, ("v", False)),
        (V2, [], {ARCHITECTURE: "stable-diffusion-v2-768-v", SPEC: "epsilon"}, ("eps", False)),
        (XL, [], {ARCHITECTURE: "stable-diffusion-xl-v1-base"}, ("eps", False)),
        (REFINER, [], {ARCHITECTURE: "stable-diffusion-xl-v1-refiner"}, ("eps", False)),
        (XL, ["v_pred"], {}, ("v", False)),
        (XL, ["ztsnr"], {SPEC: "v"}, ("v", True)),
        (XL, ["v_pred", "ztsnr"], {SPEC: "epsilon"}, ("v", True)),
    ],
)
def test_a_file_states_what_its_network_predicts(variant, names, metadata, expected, tmp_path):
    prediction, schedule = objective_of(variant, marked(tmp_path, names, metadata, STEM))
    assert (prediction, schedule.zero_terminal_snr) == expected


STEM = {f"{P}input_blocks.0.0.weight": np.zeros((1, 4, 3, 3), np.float32)}
BIAS = f"{P}output_blocks.11.1.transformer_blocks.0.norm1.bias"
INPAINTING = {f"{P}input_blocks.0.0.weight": np.zeros((1, 9, 3, 3), np.float32)}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (STEM, "v"),
        (STEM | {BIAS: np.array([-0.05, 0.05], np.float16)}, "eps"),
        (STEM | {BIAS: np.array([-0.2, 0.2], np.float16)}, "v"),
        (INPAINTING | {BIAS: np.array([-0.2, 0.2], np.float16)}, "eps"),
    ],
)
def test_weights_separate_the_two_models_of_2(more, expected, tmp_path):
    assert objective_of(V2, marked(tmp_path, [], {}, more))[0] == expected


@pytest.mark.parametrize(
    ("names", "metadata", "message"),
    [
        ([], {SPEC: "something new"}, "prediction_type is 'something new'"),
        ([], {ARCHITECTURE: "stable-diffusion-v1"}, "expected one that begins with stable-diff"),
        ([], {ARCHITECTURE: "stable-diffusion-xl-v1-refiner"}, "is 'stable-diffusion-xl-v1-ref"),
        ([], {ARCHITECTURE: "stable-diffusion-xl-v1-edit"}, "use another model"),
        (["ztsnr"], {}, "zero terminal SNR .* but predicts eps"),
        (["edm_mean", "edm_std"], {}, "Playground v2.5"),
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min", "v_pred"], {}, "CosXL"),
    ],
)
def test_other_objectives_are_refused_by_their_marks(names, metadata, message, tmp_path):
    with pytest.raises(UserError, match=message):
        objective_of(XL, marked(tmp_path, names, metadata))


BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BARS = np.cumprod(1 - BETAS)
ALPHAS = np.sqrt(ALPHA_BARS)
ZERO_SNR = np.square((ALPHAS - ALPHAS[-1]) * ALPHAS[0] / (ALPHAS[0] - ALPHAS[-1]))


def sigmas(alpha_bars):
    return np.sqrt((1 - alpha_bars) / alpha_bars)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "table", "is_zero"),
    [
        ("betas", BETAS, False),
        ("betas", 1 - ZERO_SNR / np.append(1, ZERO_SNR[:-1]), True),
        ("alphas_cumprod", ALPHA_BARS, False),
        ("alphas_cumprod", ZERO_SNR, True),
        ("state_dict.alphas_cumprod", ALPHA_BARS[:, None], False),
        ("denoiser.sigmas", sigmas(ALPHA_BARS), False),
        ("denoiser.sigmas", sigmas(ALPHA_BARS)[::-1], False),
        ("alphas_cumprod", np.zeros(1000), False),
    ],
)
def test_a_stored_table_of_the_schedule_counts(name, table, is_zero, dtype, tmp_path):
    tensors = marked(tmp_path, ["v_pred"], {}, {name: np.ascontiguousarray(table, dtype)})
    schedule = objective_of(XL, tensors)[1]
    assert schedule.zero_terminal_snr == is_zero
    assert schedule.terminal_alpha_bar == (2.0**-24 if is_zero else 0)


def test_a_marker_of_zero_snr_counts_beside_old_tables(tmp_path):
    tensors = marked(tmp_path, ["v_pred", "ztsnr"], {}, {"betas": BETAS})
    assert objective_of(XL, tensors)[1].zero_terminal_snr


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("betas", np.linspace(1e-4, 0.02, 1000)),
        ("betas", np.linspace(0.00085, 0.012, 1000)),
        ("betas", BETAS[:500]),
        ("alphas_cumprod", np.linspace(1, 0, 1000)),
        ("denoiser.sigmas", np.geomspace(0.002, 80, 1000)),
    ],
)
def test_another_schedule_is_refused_by_its_name(name, table, tmp_path):
    with pytest.raises(UserError, match=f"{name} is a noise schedule of its own"):
        objective_of(XL, marked(tmp_path, [], {}, {name: table}))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin", "model.gguf"])
def test_other_files_are_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    for read_any in (load_bundle, read_spec, read_tokenizers):
        with pytest.raises(UserError, match=r"expected a folder or a \.safetensors file.* can run"):
            read_any(tmp_path / name)


def test_the_suffix_may_be_of_any_case(tiny, tmp_path):
    read(tiny[1], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "MODEL.SAFETENSORS")
    assert read_spec(tmp_path / "MODEL.SAFETENSORS").prediction == "eps"
