"""LoRA files that diffusers, PEFT and LyCORIS' formulas write: the merged weights are theirs.

Weights are compared instead of images, so that nothing compiles.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.lora import scaled
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.clip_keys import clip_from_torch
from jaxdiff.pretrained.config_check import Only
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.pretrained.key_mapping import flatten_params
from jaxdiff.pretrained.lora import PEFT_CONFIG, PEFT_FILE, read_lora
from jaxdiff.pretrained.lora_scale import SCHEMA, read_peft_config
from jaxdiff.pretrained.merging import merge_into
from jaxdiff.pretrained.unet_keys import unet_from_torch
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut"]
ALL += ["time_emb_proj", "conv_in", "conv_out", "linear_1", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def bundles(small_unet):
    """Small random models of SD and XL."""
    tokenizer = Tokenizer.train(["a red pea", "a green banana"], vocab_size=540)
    model = ClipTextConfig(vocab_size=tokenizer.vocab_size, width=16, depth=2, heads=2)
    text = ClipTextEncoder(model=model)
    wide = dataclasses.replace(model, width=24, projection_dim=16, activation="gelu")
    sd = TextToImage(
        denoiser=small_unet,
        conditioner=ClipConditioner(text=text, masked=False),
        autoencoder=AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4),
        prediction="eps",
        schedule=ScaledLinear(),
        image_size=16,
        sampler=Sampler(solver=DDIM(), grid=TrainStepGrid(offset=1), init_noise="unit"),
    )
    xl = dataclasses.replace(
        sd,
        denoiser=dataclasses.replace(
            small_unet,
            cross_attention_dim=40,
            use_linear_projection=True,
            added_width=16 + 24,
            time_id_width=4,
        ),
        conditioner=StableDiffusionXLConditioner(
            text=text, text_2=dataclasses.replace(text, model=wide)
        ),
    )
    rng = np.random.default_rng(0)

    def bundle(spec):
        params = jax.tree.map(
            lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), spec.abstract_params()
        )
        return Bundle(spec, params, dict.fromkeys(spec.conditioner.encoders, tokenizer))

    return {"SD": bundle(sd), "XL": bundle(xl)}


@pytest.fixture(scope="module")
def folders(bundles, tmp_path_factory):
    folders = {}
    for kind, bundle in bundles.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        write_diffusers(folders[kind], bundle)
    return folders


def pipeline(folder):
    kind = diffusers.StableDiffusionPipeline
    if (folder / "text_encoder_2").exists():
        kind = diffusers.StableDiffusionXLPipeline
    found = kind.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def adapt(module, targets, **options):
    """Add random adapters to a network of theirs."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": targets, "init_lora_weights": False, **options})
    model = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                value.copy_(0.3 * torch.randn_like(value))
            elif "magnitude" in name:
                value.mul_(1 + torch.rand_like(value))
    return model


def ours_of(module, spec, part):
    """The weights of a network of theirs as ours."""
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    if part == "denoiser":
        return unet_from_torch(state, spec.denoiser)
    names = {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": x
        for name, x in state.items()
    }
    names = {name: x for name, x in names.items() if not name.endswith("position_ids")}
    return clip_from_torch(names, spec.conditioner.encoders[part].model)


def assert_changed_alike(bundle, file, part, expected, scale=1.0, other_than=1e-2):
    """Compare our merged weights with theirs, which differ from the model's."""
    merged = merge_into(bundle.params, scaled(read_lora(file, bundle.spec), scale))
    before, after = bundle.params, merged
    for params in (before, after):
        assert set(params) == {"denoiser", "text_encoders", "autoencoder"}
    select = (lambda x: x["denoiser"]) if part == "denoiser" else lambda x: x["text_encoders"][part]
    old, new, theirs = (flatten_params(x) for x in (select(before), select(after), expected))
    assert new.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_allclose(np.asarray(new[path]), value, atol=2e-5, err_msg=str(path))
    assert max(np.abs(old[path] - value).max() for path, value in theirs.items()) > other_than


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"to_q": 2, r"^mid_block.*attn2\.to_(k|v)": 6, "attn1.to_out.0": 3},
        "alpha_pattern": {"to_k": 32, "attn1.to_q": 5, "conv_in": 1},
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "fan_in_fan_out": {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "target_modules": ["to_q"]},
    "some layers": {"exclude_modules": ["attn1.to_q"], "layers_to_transform": [0]},
    "initial": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft(name, bundles, folders, tmp_path):
    """Every setting of scale, with `adapter_config.json`."""
    model = adapt(pipeline(folders["SD"]).unet, ALL, **CONFIGS[name])
    model.save_pretrained(tmp_path)
    expected = ours_of(model.merge_and_unload(), bundles["SD"].spec, "denoiser")
    assert_changed_alike(bundles["SD"], tmp_path, "denoiser", expected)


@pytest.mark.parametrize(("kind", "part"), [("SD", "text"), ("XL", "text"), ("XL", "text_2")])
def test_a_text_encoder_of_peft(kind, part, bundles, folders, tmp_path):
    name = {"text": "text_encoder", "text_2": "text_encoder_2"}[part]
    model = adapt(getattr(pipeline(folders[kind]), name), TEXT, r=4, lora_alpha=12)
    model.save_pretrained(tmp_path)
    expected = ours_of(model.merge_and_unload(), bundles[kind].spec, part)
    assert_changed_alike(bundles[kind], tmp_path, part, expected)
    # transformers before 5.6 names layers text_model.encoder, and from then on encoder.
    tensors = load_file(tmp_path / PEFT_FILE)
    names = {
        key: key.replace("model.text_model.", "model.")
        if "text_model" in key
        else key.replace("base_model.model.", "base_model.model.text_model.")
        for key in tensors
    }
    other = {names[key]: value for key, value in tensors.items()}
    assert set(other) != set(tensors)
    save_file(other, tmp_path / PEFT_FILE)
    assert_changed_alike(bundles[kind], tmp_path, part, expected)


@pytest.mark.parametrize("kind", ["SD", "XL"])
@pytest.mark.parametrize("name", ["alpha", "patterns", "dora"])
def test_a_file_of_diffusers_with_its_metadata(kind, name, bundles, folders, tmp_path):
    """All components at once, saved and loaded by diffusers, which loses text encoders' DoRA."""
    trained, layers = pipeline(folders[kind]), {}
    bundle = bundles[kind]
    parts = {"denoiser": "unet"} | {
        part: {"text": "text_encoder", "text_2": "text_encoder_2"}[part]
        for part in bundle.spec.conditioner.encoders
        if name != "dora"
    }
    for part, component in parts.items():
        targets = ATTENTION if part == "denoiser" else TEXT
        module = getattr(trained, component)
        model = adapt(module, targets, **CONFIGS[name])
        config = model.peft_config["default"].to_dict()
        config = {key: list(x) if isinstance(x, set) else x for key, x in config.items()}
        layers[f"{component}_lora_layers"] = {
            key.removeprefix("base_model.model."): value
            for key, value in peft.get_peft_model_state_dict(model).items()
        }
        layers[f"{component}_lora_adapter_metadata"] = config
    type(trained).save_lora_weights(tmp_path, **layers)
    fresh = pipeline(folders[kind])
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora(components=list(parts.values()))
    fresh.unload_lora_weights()
    for part, component in parts.items():
        expected = ours_of(getattr(fresh, component), bundle.spec, part)
        assert_changed_alike(bundle, tmp_path, part, expected)


OLD = {  # names before PEFT; a text encoder's attention and MLP have different ones
    "processors": (
        lambda x: re.sub(r"(attn\d)\.(to_\w+?)(\.0)?$", r"\1.processor.\2_lora", x),
        "{}.down.weight",
        "{}.up.weight",
    ),
    "lora.down": (lambda x: x, "{}.lora.down.weight", "{}.lora.up.weight"),
    "kohya": (lambda x: "lora_" + x.replace(".", "_"), "{}.lora_down.weight", "{}.lora_up.weight"),
}


@pytest.mark.parametrize("naming", OLD)
@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_files_of_other_eras(naming, kind, bundles, folders, tmp_path):
    rename, down, up = OLD[naming]
    fresh, tensors = pipeline(folders[kind]), {}
    rng = np.random.default_rng(0)
    for name, module in fresh.unet.named_modules():
        if name.endswith(tuple(ATTENTION)):
            key = rename(f"unet.{name}")
            outputs, inputs = module.weight.shape
            tensors[down.format(key)] = rng.normal(size=(3, inputs)).astype(np.float32)
            tensors[up.format(key)] = rng.normal(size=(outputs, 3)).astype(np.float32)
            if naming == "kohya":
                tensors[f"{key}.alpha"] = np.array(2, np.float32)  # diffusers confuses several
    save_file(tensors, tmp_path / "style.safetensors")
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    fresh.fuse_lora(components=["unet"], lora_scale=0.5)
    fresh.unload_lora_weights()
    expected = ours_of(fresh.unet, bundles[kind].spec, "denoiser")
    assert_changed_alike(bundles[kind], tmp_path, "denoiser", expected, scale=0.5)


def test_a_lora_bias_of_peft(bundles, folders, tmp_path):
    model = adapt(pipeline(folders["SD"]).unet, ["conv1", "to_out.0"], r=4, lora_bias=True)
    model.save_pretrained(tmp_path)
    expected = ours_of(model.merge_and_unload(), bundles["SD"].spec, "denoiser")
    assert_changed_alike(bundles["SD"], tmp_path, "denoiser", expected)


def test_the_scale_of_dora(bundles, folders, tmp_path):
    """diffusers scales only the direction."""
    model = adapt(pipeline(folders["SD"]).unet, ["to_q", "conv1"], r=4, use_dora=True)
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    expected = ours_of(model.merge_and_unload(), bundles["SD"].spec, "denoiser")
    assert_changed_alike(bundles["SD"], tmp_path, "denoiser", expected, scale=0.5)


@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
@pytest.mark.parametrize("tucker", [False, True])
def test_lycoris(method, tucker, bundles, folders, tmp_path):
    """The tensors of PEFT's LoHa and LoKr, which are those of LyCORIS, named as its scripts do."""
    torch.manual_seed(0)
    options = {"target_modules": ["to_q", "conv1", "proj_in"], "r": 1, "alpha": 1.5}
    options |= {"use_effective_conv2d": tucker, "init_weights": False}
    model = peft.get_peft_model(
        pipeline(folders["SD"]).unet, getattr(peft, f"{method}Config")(**options)
    )
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(model).items():
        module, _, role = key.removeprefix("base_model.model.").rpartition(".")
        layer = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{layer}.{role}": value.detach().numpy().copy()}
        tensors[f"{layer}.alpha"] = np.array(1.5, np.float32)
    assert any("_t2" in name for name in tensors) == tucker
    save_file(tensors, tmp_path / "style.safetensors")
    expected = ours_of(model.merge_and_unload(), bundles["SD"].spec, "denoiser")
    assert_changed_alike(bundles["SD"], tmp_path, "denoiser", expected)


def test_every_key_of_peft_is_known():
    """Keys that are neither read, nor without effect, nor refused: none."""
    keys = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert keys - set(SCHEMA) == set()
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert read_peft_config("config", defaults).scale("conv_in", 8) == 1


WITHOUT_EFFECT = {
    "auto_mapping": {"base_model_class": "UNet", "parent_library": "unet"},
    "base_model_name_or_path": "somewhere",
    "inference_mode": False,
    "peft_version": "0.1",
    "revision": "main",
    "exclude_modules": ["conv_in"],
    "layers_to_transform": [0, 1],
    "target_modules": r".*\.to_q",
    "corda_config": {"verbose": True},
    "eva_config": {"rho": 3.0},
    "lora_ga_config": {"stable_gamma": 8},
    "loftq_config": {},
    "init_lora_weights": "gaussian",
    "lora_dropout": 0.5,
    "velora_config": {"num_groups": 4},
    "fan_in_fan_out": True,
    "megatron_core": "core",
    "qalora_group_size": 4,
    "ensure_weight_tying": True,
}


def test_keys_without_effect_have_none(bundles, folders, tmp_path):
    """PEFT merges the same weights whatever these keys are."""
    model = adapt(pipeline(folders["SD"]).unet, ["to_q"], r=4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    expected = ours_of(model.merge_and_unload(), bundles["SD"].spec, "denoiser")
    for key, value in WITHOUT_EFFECT.items():
        (tmp_path / PEFT_CONFIG).write_text(json.dumps({**config, key: value}))
        loaded = peft.PeftModel.from_pretrained(pipeline(folders["SD"]).unet, tmp_path)
        found = ours_of(loaded.merge_and_unload(), bundles["SD"].spec, "denoiser")
        for (path, a), b in zip(
            flatten_params(expected).items(), flatten_params(found).values(), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{key}: {path}")
        assert_changed_alike(bundles["SD"], tmp_path, "denoiser", expected)


CHANGED = {
    "bias": "all",
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "modules_to_save": ["conv_in"],
    "monteclora_config": {"a": 1},
    "peft_type": "LOKR",
    "target_parameters": ["weight"],
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.mark.parametrize(
    "key", sorted(key for key, rule in SCHEMA.items() if isinstance(rule, Only))
)
def test_keys_that_change_the_model_are_refused_by_name(key, tmp_path, bundles, folders):
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", key: CHANGED[key]}))
    save_file(
        {"base_model.model.conv_in.lora_A.weight": np.ones((8, 4, 3, 3), np.float32)},
        tmp_path / PEFT_FILE,
    )
    with pytest.raises(UserError, match=key):
        read_lora(tmp_path, bundles["SD"].spec)
