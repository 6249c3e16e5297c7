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
from jaxdiff.models.layers import any_rngs, bind_params
from jaxdiff.pretrained import autoencoder_keys, tiny_autoencoder_keys
from jaxdiff.pretrained.autoencoder_folder import read_autoencoder_folder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

# Named as in diffusers' config.json: like SD 1.x and XL; like SD 3 and FLUX; of another shape.
VARIANTS = {
    "sd": {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4},
    "sd3": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": {
        "block_out_channels": (8,),
        "layers_per_block": 3,
        "latent_channels": 3,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}


def torch_autoencoder(variant) -> torch.nn.Module:
    levels = len(variant["block_out_channels"])
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **variant,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


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

    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    side = config.downsampling
    z = draw.normal(size=(2, 16 // side, 24 // side, config.latent_channels)).astype(np.float32)
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
    draw = np.random.default_rng(0)
    ours = nnx.eval_shape(lambda: Autoencoder(config, rngs=any_rngs()))
    shapes = nnx.to_pure_dict(nnx.state(ours))
    params = jax.tree.map(lambda p: jnp.asarray(0.1 * draw.normal(size=p.shape), p.dtype), shapes)
    nnx.update(ours, params)
    tensors = autoencoder_keys.autoencoder_to_torch(params)
    theirs = torch_autoencoder(VARIANTS["sd"])
    theirs.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    z = draw.normal(size=(1, 4, 4, 4)).astype(np.float32)
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
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    z = draw.normal(size=(2, height // 2, width // 2, 4)).astype(np.float32)
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
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    z = 3 * draw.normal(size=(2, 4, 6, 4)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latents
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    found = jax.jit(lambda x: ours.encode(x).mode())(images)
    np.testing.assert_allclose(found, as_nhwc(latents), rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ours.decode)(z), as_nhwc(decoded), rtol=0, atol=1e-5)
