"""Tensors in the original layout become those that diffusers' own conversion makes of them."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionModel
from jaxdiff.models.layers import abstract_params, any_rngs
from jaxdiff.models.text_encoders.clip import ClipText, ClipTextConfig
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained import autoencoder_keys, clip_keys, unet_keys
from jaxdiff.pretrained import single_file as original
from jaxdiff.pretrained import single_file_keys as keys
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.pretrained.safetensors_io import Renamed

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

pytestmark = pytest.mark.parity

SMALL = {"norm_num_groups": 4, "cross_attention_dim": 8}
UNETS = {
    "SD 1": dataclasses.replace(original.SD1, block_out_channels=(8, 16, 16, 16), **SMALL),
    "XL": dataclasses.replace(
        original.XL,
        block_out_channels=(20, 40, 80),
        added_width=12,
        transformer_layers=(0, 1, 2),
        middle_transformer_layers=2,
        **SMALL,
    ),
}
AUTOENCODER = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4)
OPENCLIP = ClipTextConfig(
    vocab_size=9, length=5, width=8, depth=2, heads=2, activation="gelu", projection_dim=8
)


def random_params(build):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(build)
    )


def unet_originals(tensors, config):
    """The U-Net's tensors under their original names."""
    prefix = "model.diffusion_model."
    return {prefix + keys.unet_original_name(name, config): x for name, x in tensors.items()}


def read_as(component, rename):
    """Return what `Renamed` renames the names of a file's component by."""

    def of_file(name):
        found, inner = keys.component_of(name)
        return rename(inner) if found == component else None

    return of_file


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    config = UNETS[name]
    params = random_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()))
    tensors = unet_keys.unet_to_torch(params)
    ldm = unet_originals(tensors, config)
    assert len(ldm) == len(tensors)  # each has an original name, and no two the same

    theirs = single_file.convert_ldm_unet_checkpoint(
        {k: torch.from_numpy(v.copy()) for k, v in ldm.items()},
        unet_keys.write_unet_config(config) | {"class_embed_type": None},
    )
    assert set(theirs) == set(tensors)
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), tensors[key], err_msg=key)
    rename = read_as(keys.UNET, keys.unet_rename(config))
    again = unet_keys.unet_from_torch(Renamed(ldm, rename), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def autoencoder_original(params):
    """The autoencoder's tensors under their original names."""
    tensors = autoencoder_keys.autoencoder_to_torch(params)
    attention = ("norm", "q", "k", "v", "proj_out")
    inner = ["norm1", "norm2", "conv1", "conv2", "nin_shortcut"]
    modules = ["quant_conv", "post_quant_conv"]
    for half, level in (("encoder", "down"), ("decoder", "up")):
        modules += [f"{half}.{x}" for x in ("conv_in", "conv_out", "norm_out")]
        modules += [f"{half}.mid.attn_1.{x}" for x in attention]
        modules += [f"{half}.mid.block_{i}.{x}" for i in (1, 2) for x in inner]
        modules += [f"{half}.{level}.{i}.{level}sample.conv" for i in (0, 1)]
        modules += [
            f"{half}.{level}.{i}.block.{j}.{x}" for i in (0, 1) for j in range(3) for x in inner
        ]
    rename = keys.vae_rename(AUTOENCODER)
    ldm = {}
    for old in (f"{m}.{kind}" for m in modules for kind in ("weight", "bias")):
        (new,) = Renamed({rename(old): np.ones((1, 1))}, autoencoder_keys._current_name)
        if new in tensors:
            value = tensors[new]
            kernel = "mid.attn_1" in old and value.ndim == 2
            ldm[f"first_stage_model.{old}"] = value[:, :, None, None] if kernel else value
    assert len(ldm) == len(tensors)
    return ldm


def test_autoencoder():
    params = random_params(lambda: Autoencoder(AUTOENCODER, rngs=any_rngs()))
    tensors, ldm = autoencoder_keys.autoencoder_to_torch(params), autoencoder_original(params)
    theirs = single_file.convert_ldm_vae_checkpoint(
        {k: torch.from_numpy(v.copy()) for k, v in ldm.items()},
        autoencoder_keys.write_autoencoder_config(AUTOENCODER),
    )
    assert set(theirs) == set(tensors)
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), tensors[key], err_msg=key)
    rename = read_as(keys.AUTOENCODER, keys.vae_rename(AUTOENCODER))
    again = autoencoder_keys.autoencoder_from_torch(Renamed(ldm, rename), AUTOENCODER)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_openclip():
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    width, prefix = OPENCLIP.width, "conditioner.embedders.1.model."
    ldm = {
        "positional_embedding": random(OPENCLIP.length, width),
        "token_embedding.weight": random(OPENCLIP.vocab_size, width),
        "text_projection": random(width, width),
        "ln_final.weight": random(width),
        "ln_final.bias": random(width),
        "logit_scale": random(),
    }
    shapes = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    for layer in range(OPENCLIP.depth):
        for name, shape in shapes.items():
            ldm[f"transformer.resblocks.{layer}.{name}"] = random(*shape)
    ldm = {f"{prefix}{name}": value for name, value in ldm.items()}
    theirs = single_file.convert_open_clip_checkpoint(
        None, {k: torch.from_numpy(v) for k, v in ldm.items()}, prefix
    )
    rename = read_as(f"{keys.TEXT} 1", keys.text_rename(OPENCLIP))
    found = clip_keys.clip_from_torch(Renamed(ldm, rename), OPENCLIP)
    expected = {k: v.numpy() for k, v in theirs.items() if "logit_scale" not in k}
    jax.tree.map(
        np.testing.assert_array_equal, found, clip_keys.clip_from_torch(expected, OPENCLIP)
    )
    abstract = abstract_params(lambda: ClipText(OPENCLIP, rngs=any_rngs()))
    assert jax.tree.structure(found) == jax.tree.structure(abstract)


def test_a_whole_file_is_loaded(tmp_path, monkeypatch):
    """The names in it identify the model; the rest is as it was published."""
    text = ClipTextConfig(vocab_size=600, width=8, depth=1, heads=2)
    variant = original.VARIANTS[-1]._replace(
        network=UNETS["SD 1"],
        autoencoder=AUTOENCODER,
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text), masked=False),
    )
    monkeypatch.setattr(original, "VARIANTS", [*original.VARIANTS[:-1], variant])
    config = UNETS["SD 1"]
    params = random_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()))
    words = random_params(lambda: ClipText(text, rngs=any_rngs()))
    ldm = unet_originals(unet_keys.unet_to_torch(params), config)
    for name, value in clip_keys.clip_to_torch(words, text).items():
        ldm[f"cond_stage_model.transformer.{name}"] = value
    ldm["model_ema.decay"] = np.ones(1, np.float32)
    ldm |= autoencoder_original(random_params(lambda: Autoencoder(AUTOENCODER, rngs=any_rngs())))
    save_file({k: np.ascontiguousarray(v) for k, v in ldm.items()}, tmp_path / "sd.safetensors")
    Tokenizer.train(["a red pea"], vocab_size=540).save(str(tmp_path))
    monkeypatch.setattr(original, "download_tokenizer", lambda: tmp_path)
    file = tmp_path / "sd.safetensors"
    bundle = load_bundle(file)
    assert bundle.spec == read_spec(file)
    expected = bundle.tokenizers["text"](["a red pea"])
    np.testing.assert_array_equal(read_tokenizers(file)["text"](["a red pea"]), expected)
    jax.tree.map(np.testing.assert_array_equal, bundle.params["denoiser"], params)
    jax.tree.map(np.testing.assert_array_equal, bundle.params["text_encoders"]["text"], words)
    images = Pipeline(bundle)("a red pea", num_steps=2, size=(16, 16))
    assert images.shape == (1, 16, 16, 3)
    save_file({"a": np.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no checkpoint of Stable Diffusion"):
        original.read_original(tmp_path / "other.safetensors")


def test_openclip_pads_with_zero(tmp_path, monkeypatch):
    Tokenizer.train(["a red pea"], vocab_size=540).save(str(tmp_path))
    monkeypatch.setattr(original, "download_tokenizer", lambda: tmp_path)
    for variant, pads in zip(
        original.VARIANTS,
        ({"text": 1, "text_2": 0}, {"text_2": 0}, {"text": 0}, {"text": 1}),
        strict=True,
    ):
        found = original._tokenizers(variant)
        assert {name: int(t([""])[0, -1] == t.end_id) for name, t in found.items()} == pads
        assert all(t([""])[0, -1] in (0, t.end_id) for t in found.values())
