"""The same random weights, saved by diffusers and read by jaxdiff, give the same z and images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder, TinyAutoencoderConfig
from jaxdiff.models.layers import any_rngs, bind_build, bind_params
from jaxdiff.pretrained import autoencoder_keys, tiny_autoencoder_keys
from jaxdiff.pretrained.autoencoder_file import write_autoencoder_file
from jaxdiff.pretrained.autoencoder_folder import published_autoencoder, read_autoencoder_folder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity.torch_models import randomized

pytestmark = pytest.mark.parity

# Named as in diffusers' config.json: like SD 1.x and XL; like SD 3, FLUX.1 and Z-Image; of another
# shape.
VARIANTS = {
    "sd": {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4},
    "sd3": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "no attention": {
        "block_out_channels": (8,),
        "layers_per_block": 3,
        "latent_channels": 3,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}


FULL_FLUX1 = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}
FLUX2 = {
    "small": {
        "block_out_channels": (16, 32),
        "decoder_block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 6,
        "norm_num_groups": 4,
        "sample_size": 16,
        "batch_norm_eps": 1e-2,
    },
    "no quant convolutions": {
        "block_out_channels": (16,),
        "latent_channels": 2,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "full": {"block_out_channels": (128, 256, 512, 512)},
}


def torch_autoencoder(variant, kind="AutoencoderKL") -> torch.nn.Module:
    levels = len(variant["block_out_channels"])
    model = getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **variant,
    )
    torch.manual_seed(0)
    randomized(model, 0.02)
    if kind == "AutoencoderKLFlux2":
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.1, 4)
        model.bn.num_batches_tracked.fill_(123_456)
    return model


def as_nhwc(x) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_moments_and_images(name, tmp_path):
    config = AutoencoderConfig(**VARIANTS[name])
    theirs = torch_autoencoder(VARIANTS[name])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    ours = nnx.eval_shape(lambda: Autoencoder(config, rngs=any_rngs()))
    params = autoencoder_keys.autoencoder_from_torch(tensors, config)
    nnx.update(ours, jax.tree.map(jnp.asarray, params))

    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    side = config.downsampling
    z = rng.normal(size=(2, 16 // side, 24 // side, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample

    gaussian = jax.jit(ours.encode)(images)
    np.testing.assert_allclose(gaussian.mean, as_nhwc(moments.mean), rtol=0, atol=1e-4)
    np.testing.assert_allclose(gaussian.logvar, as_nhwc(moments.logvar), rtol=0, atol=1e-4)
    np.testing.assert_allclose(gaussian.kl(), moments.kl().numpy(), rtol=1e-4)
    np.testing.assert_allclose(jax.jit(ours.decode)(z), as_nhwc(decoded), rtol=0, atol=1e-4)


def test_our_tensors_load_into_diffusers():
    config = AutoencoderConfig(**VARIANTS["sd"])
    rng = np.random.default_rng(0)
    ours = nnx.eval_shape(lambda: Autoencoder(config, rngs=any_rngs()))
    shapes = nnx.to_pure_dict(nnx.state(ours))
    params = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), shapes)
    nnx.update(ours, params)
    tensors = autoencoder_keys.autoencoder_to_torch(params)
    theirs = torch_autoencoder(VARIANTS["sd"])
    theirs.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    z = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    with torch.no_grad():
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    np.testing.assert_allclose(jax.jit(ours.decode)(z), as_nhwc(decoded), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(56, 40), (32, 72)])
def test_tiles(height, width, tmp_path):
    """As diffusers cuts and blends them, to latents and back; tiles at the edges are smaller."""
    theirs = torch_autoencoder(VARIANTS["sd"] | {"sample_size": 32})
    theirs.enable_tiling()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    config = autoencoder_keys.read_autoencoder_config(dict(theirs.config))
    params = autoencoder_keys.autoencoder_from_torch(tensors, config)
    ours = bind_params(
        lambda: Autoencoder(config, rngs=any_rngs()), jax.tree.map(jnp.asarray, params)
    )
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    z = rng.normal(size=(2, height // 2, width // 2, 4)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mean
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    found = jax.jit(lambda x: ours.encode(x, "tiling").mean)(images)
    np.testing.assert_allclose(found, as_nhwc(mean), rtol=0, atol=1e-5)
    found = jax.jit(lambda z: ours.decode(z, "tiling"))(z)
    np.testing.assert_allclose(found, as_nhwc(decoded), rtol=0, atol=1e-5)
    assert np.abs(found - ours.decode(jnp.asarray(z))).max() > 1e-3


def test_tiny(tmp_path):
    """TAESD's: latents and images, and every tensor there and back."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
    ).eval()
    theirs.save_pretrained(tmp_path)
    config, params = read_autoencoder_folder(tmp_path, place=np.asarray)
    assert isinstance(config, TinyAutoencoderConfig)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    back = tiny_autoencoder_keys.tiny_autoencoder_to_torch(params)
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
    again = diffusers.AutoencoderTiny.from_config(
        tiny_autoencoder_keys.write_tiny_autoencoder_config(config)
    )
    ours, expected = (
        json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}))
        for model in (again, theirs)
    )
    assert ours == expected

    ours = bind_params(lambda: TinyAutoencoder(config, rngs=any_rngs()), params)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    z = 3 * rng.normal(size=(2, 4, 6, 4)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latents
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    found = jax.jit(lambda x: ours.encode(x).mode())(images)
    np.testing.assert_allclose(found, as_nhwc(latents), rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ours.decode)(z), as_nhwc(decoded), rtol=0, atol=1e-5)


def from_folder(folder):
    """Read an autoencoder, and check that every tensor and setting is written as it was read."""
    config, params = read_autoencoder_folder(folder, place=np.asarray)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    written, back = published_autoencoder(config, params)
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    theirs = getattr(diffusers, written["_class_name"])
    ours, expected = (
        {k: v for k, v in theirs.from_config(x).config.items() if not k.startswith("_")}
        for x in (written, json.loads((folder / "config.json").read_text()))
    )
    assert json.dumps(ours) == json.dumps(expected)
    return config, bind_params(bind_build(config), jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", ["sd3", pytest.param("full", marks=pytest.mark.nightly)])
def test_the_folder_of_flux1_and_z_image(name, tmp_path):
    """Latents as their pipelines compute them, around both halves."""
    theirs = torch_autoencoder(FULL_FLUX1 if name == "full" else VARIANTS[name])
    theirs.save_pretrained(tmp_path)
    config, ours = from_folder(tmp_path)
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    rng, side = np.random.default_rng(0), config.downsampling
    images = rng.uniform(-1, 1, (1, 8 * side, 4 * side, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 8, 4, 16)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mode()
        encoded = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
        z = torch.from_numpy(latents.transpose(0, 3, 1, 2))
        decoded = theirs.decode(z / theirs.config.scaling_factor + theirs.config.shift_factor)
    found = jax.jit(lambda x: ours.to_latents(ours.encode(x).mode()))(images)
    np.testing.assert_allclose(found, as_nhwc(encoded), rtol=0, atol=1e-4)
    found = jax.jit(lambda z: ours.decode(ours.from_latents(z)))(latents)
    np.testing.assert_allclose(found, as_nhwc(decoded.sample), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [name if name != "full" else pytest.param(name, marks=pytest.mark.nightly) for name in FLUX2],
)
def test_flux2(name, tmp_path):
    """Latents as FLUX.2's pipelines pack and normalise them, and images of latents."""
    theirs = torch_autoencoder(FLUX2[name], "AutoencoderKLFlux2")
    theirs.save_pretrained(tmp_path)
    config, ours = from_folder(tmp_path)
    pipeline = diffusers.Flux2KleinPipeline
    rng, side = np.random.default_rng(0), config.downsampling
    images = rng.uniform(-1, 1, (2, 4 * side, 6 * side, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 4, 6, config.latent_channels)).astype(np.float32)
    mean = theirs.bn.running_mean[:, None, None]
    deviation = torch.sqrt(theirs.bn.running_var + theirs.config.batch_norm_eps)[:, None, None]
    with torch.no_grad():
        z = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mode()
        encoded = (pipeline._patchify_latents(z) - mean) / deviation
        z = torch.from_numpy(latents.transpose(0, 3, 1, 2)) * deviation + mean
        decoded = theirs.decode(pipeline._unpatchify_latents(z)).sample
    found = jax.jit(lambda x: ours.to_latents(ours.encode(x).mode()))(images)
    np.testing.assert_allclose(found, as_nhwc(encoded), rtol=0, atol=1e-4)
    found = jax.jit(lambda z: ours.decode(ours.from_latents(z)))(latents)
    np.testing.assert_allclose(found, as_nhwc(decoded), rtol=0, atol=1e-4)


def test_tiles_of_flux2(tmp_path):
    theirs = torch_autoencoder(FLUX2["small"], "AutoencoderKLFlux2")
    theirs.enable_tiling()
    theirs.save_pretrained(tmp_path)
    _, ours = from_folder(tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 28, 20, 3)).astype(np.float32)
    with torch.no_grad():
        z = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mode()
        packed = diffusers.Flux2KleinPipeline._patchify_latents(z)
        decoded = theirs.decode(z).sample
    found = jax.jit(lambda x: ours.encode(x, "tiling").mean)(images)
    np.testing.assert_allclose(found, as_nhwc(packed), rtol=0, atol=1e-5)
    found = jax.jit(lambda z: ours.decode(z, "tiling"))(as_nhwc(packed))
    np.testing.assert_allclose(found, as_nhwc(decoded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLFlux2"])
def test_files_of_the_original_code_are_read_as_diffusers_reads_them(kind, tmp_path):
    """Of FLUX.2's names, diffusers' converter knows all but those of the quant convolutions."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    variant = VARIANTS["sd3"] if kind == "AutoencoderKL" else FLUX2["small"]
    theirs = torch_autoencoder(variant, kind)
    theirs.save_pretrained(tmp_path)
    config, params = read_autoencoder_folder(tmp_path, place=np.asarray)
    write_autoencoder_file(tmp_path / "ae.safetensors", params, config)
    original = {
        name: torch.from_numpy(value)
        for name, value in load_file(tmp_path / "ae.safetensors").items()
    }
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": [None] * levels, "up_block_types": [None] * levels}
    wanted = convert_ldm_vae_checkpoint(dict(original), blocks)
    tensors = theirs.state_dict()
    moved = {x for x in tensors if "quant_conv" in x or x.startswith("bn.")}
    assert wanted.keys() | moved == tensors.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(value.numpy(), tensors[name].numpy(), err_msg=name)
    for name in moved:
        half = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(name.split(".")[0], "")
        np.testing.assert_array_equal(original[half + name].numpy(), tensors[name].numpy())
