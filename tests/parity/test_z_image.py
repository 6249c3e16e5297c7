"""The same random weights in diffusers' Z-Image and in ours predict the same velocity."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.pretrained import z_image_keys
from jaxdiff.pretrained.safetensors_io import Renamed
from jaxdiff.pretrained.z_image_original import original_z_image_rename, z_image_to_original

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity.torch_models import randomized, relative, tensors_of
from tests.parity.training_loss import assert_training_loss

pytestmark = pytest.mark.parity

SMALL = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 20,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 16, 16],
    "t_scale": 900.0,
}
FULL = {"n_layers": 1, "n_refiner_layers": 1}  # of the published width

LENGTHS = (5, 32, 40)
SIZES = [(8, 12), (16, 8)]  # of latents: 24 tokens, padded to 32, and 32


@functools.cache
def torch_z_image(full: bool = False):
    model = diffusers.ZImageTransformer2DModel(**(FULL if full else SMALL))
    torch.manual_seed(0)
    return randomized(model, 0.02)


def inputs(config, height, width, lengths=LENGTHS, *, left=False):
    """Return latents, times, and captions of several lengths, padded with noise."""
    rng = np.random.default_rng(0)
    count = len(lengths)
    x = rng.normal(size=(count, height, width, config.channels)).astype(np.float32)
    tokens = rng.normal(size=(count, max(lengths), config.text_width)).astype(np.float32)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    mask = mask[:, ::-1].copy() if left else mask
    t = np.linspace(0.1, 0.95, count).astype(np.float32)
    return x, t, Conditioning(tokens=tokens, mask=mask)


def theirs(model, x, t, cond):
    """Each image alone, as the pipeline calls the network; differentiable."""
    images = []
    for image, time, tokens, mask in zip(x, t, cond.tokens, cond.mask, strict=True):
        latents = torch.from_numpy(image.transpose(2, 0, 1).copy())[:, None]
        out = model([latents], torch.tensor([1 - time]), [torch.from_numpy(tokens[mask])]).sample
        images.append(-out[0][:, 0].permute(1, 2, 0))
    return torch.stack(images)


def ours(config, params):
    network = jax.jit(lambda params, *inputs: bind_params(bind_build(config), params)(*inputs))
    return functools.partial(network, jax.tree.map(jnp.asarray, params))


def read(model):
    config = z_image_keys.read_z_image_config(dict(model.config))
    return config, z_image_keys.z_image_from_torch(tensors_of(model), config)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("left", [False, True])
def test_a_batch_is_each_image_alone(height, width, left):
    """Captions of several lengths, padded on either side; neighbours have no effect."""
    model = torch_z_image()
    config, params = read(model)
    x, t, cond = inputs(config, height, width, left=left)
    with torch.no_grad():
        expected = theirs(model, x, t, cond).numpy()
    found = ours(config, params)(x, t, cond)
    for image, other in zip(found, expected, strict=True):
        assert relative(image, other) <= 1e-5


@pytest.mark.parametrize("length", [32, 20])
def test_captions_of_one_length_need_no_mask(length):
    model = torch_z_image()
    config, params = read(model)
    x, t, cond = inputs(config, 8, 8, (length,) * 2)
    with torch.no_grad():
        expected = theirs(model, x, t, cond).numpy()
    assert relative(ours(config, params)(x, t, cond._replace(mask=None)), expected) <= 1e-5


def test_gradients():
    """Of the mean squared error, with respect to every parameter."""
    model = torch_z_image()
    config, params = read(model)
    x, t, cond = inputs(config, 8, 12)
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(params):
        network = bind_params(bind_build(config), params)
        return jnp.mean((network(jnp.asarray(x), jnp.asarray(t), cond) - target) ** 2)

    params = jax.tree.map(jnp.asarray, params)
    found = z_image_keys.z_image_to_torch(jax.jit(jax.grad(loss))(params))
    model.zero_grad()
    torch.nn.functional.mse_loss(theirs(model, x, t, cond), torch.from_numpy(target)).backward()
    expected = {name: value.grad.numpy() for name, value in model.named_parameters()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert relative(found[name], value) <= 1e-4, name


def test_the_training_loss_is_diffusers():
    model = torch_z_image()
    config, params = read(model)
    latents, _, cond = inputs(config, 8, 12)
    assert_training_loss(ours(config, params), functools.partial(theirs, model), latents, cond)


def test_tensors_and_config_there_and_back(tmp_path):
    model = torch_z_image()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    config = z_image_keys.read_z_image_config(dict(model.config))
    back = z_image_keys.z_image_to_torch(z_image_keys.z_image_from_torch(tensors, config))
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    written = diffusers.ZImageTransformer2DModel.from_config(
        z_image_keys.write_z_image_config(config)
    )
    ours, expected = (
        json.dumps({k: v for k, v in x.config.items() if not k.startswith("_")}, sort_keys=True)
        for x in (written, model)
    )
    assert ours == expected


def test_files_of_the_original_code_are_read_as_diffusers_reads_them():
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers as convert,
    )

    model = torch_z_image()
    config, params = read(model)
    original = z_image_to_original(z_image_keys.z_image_to_torch(params), config)
    assert any(name.endswith(".attention.qkv.weight") for name in original)
    comfy = {f"model.diffusion_model.{k}": torch.from_numpy(x) for k, x in original.items()}
    found, tensors = Renamed(original, original_z_image_rename(config)), model.state_dict()
    for converted in (convert(comfy), {name: torch.from_numpy(x) for name, x in found.items()}):
        assert converted.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(converted[name].numpy(), value.numpy(), err_msg=name)


@pytest.mark.nightly
def test_the_published_width():
    model = torch_z_image(full=True)
    config, params = read(model)
    assert config.width == 3840
    x, t, cond = inputs(config, 16, 24, (20, 64))
    with torch.no_grad():
        expected = theirs(model, x, t, cond).numpy()
    found = ours(config, params)(x, t, cond)
    for image, other in zip(found, expected, strict=True):
        assert relative(image, other) <= 1e-5
