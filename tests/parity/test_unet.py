"""The same random weights, saved by diffusers and read by jaxdiff, give the same predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionModel
from jaxdiff.models.layers import any_rngs, bind_params
from jaxdiff.pretrained import unet_keys

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity.torch_models import randomized, relative, tensors_of

pytestmark = pytest.mark.parity

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}

# Every feature of the published configs at small width: depth, heads, projections, conditions.
SD15 = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
VARIANTS = {
    "SD 1.5": SD15,
    "SD 2.1": {
        **SD15,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "inpainting": {**SD15, "in_channels": 9},
    "SDXL base": {
        "block_out_channels": (16, 32, 64),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "norm_num_groups": 8,
    },
    "SDXL refiner": {
        "block_out_channels": (24, 48, 96, 96),
        "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
        "layers_per_block": 2,
        "transformer_layers_per_block": 4,
        "attention_head_dim": (3, 6, 12, 12),
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 5 * 8,
        "norm_num_groups": 8,
    },
}


def torch_unet(name: str):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    up = tuple(UP[kind] for kind in reversed(variant["down_block_types"]))
    return randomized(diffusers.UNet2DConditionModel(up_block_types=up, **variant), 0.02)


def inputs(variant, config, height=16, width=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, config.in_channels)).astype(np.float32)
    tokens = rng.normal(size=(2, 7, config.cross_attention_dim)).astype(np.float32)
    if config.added_width is None:
        return x, Conditioning(tokens=tokens)
    pooled = rng.normal(size=(2, 20)).astype(np.float32)
    count = (config.added_width - 20) // config.time_id_width
    size_crop = rng.integers(0, 1024, (2, 6)).astype(np.float32)
    cond = Conditioning(tokens=tokens, pooled=pooled, size_crop=size_crop)
    if count == 5:  # the refiner
        cond = cond._replace(aesthetic_score=np.array([6, 2.5], np.float32))
    return x, cond


def theirs(model, x, step, cond):
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    added = None
    if cond.pooled is not None:
        time_ids = cond.size_crop
        if cond.aesthetic_score is not None:
            time_ids = np.concatenate([time_ids[:, :4], cond.aesthetic_score[:, None]], axis=1)
        added = {
            "text_embeds": torch.from_numpy(cond.pooled),
            "time_ids": torch.from_numpy(time_ids),
        }
    return model(
        nchw,
        torch.tensor(step),
        torch.from_numpy(cond.tokens),
        added_cond_kwargs=added,
    ).sample


@pytest.mark.parametrize("name", VARIANTS)
def test_prediction(name, tmp_path):
    model = torch_unet(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    config = unet_keys.read_unet_config(dict(model.config))
    params = unet_keys.unet_from_torch(tensors, config)
    ours = nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=any_rngs()))
    nnx.update(ours, jax.tree.map(jnp.asarray, params))
    x, cond = inputs(VARIANTS[name], config)
    step = np.array([981, 1])
    predicted = jax.jit(ours.__call__)(x, jnp.asarray((step + 1) / 1000, jnp.float32), cond)
    with torch.no_grad():
        expected = theirs(model, x, step, cond).numpy().transpose(0, 2, 3, 1)
    assert relative(predicted, expected) <= 1e-5

    back = unet_keys.unet_to_torch(params)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL base"])
def test_gradients_of_the_fine_tuning_loss(name):
    """Of the mean squared error, with respect to every parameter of the U-Net."""
    model = torch_unet(name)
    config = unet_keys.read_unet_config(dict(model.config))
    params = unet_keys.unet_from_torch(tensors_of(model), config)
    x, cond = inputs(VARIANTS[name], config, height=8, width=8)
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    step = np.array([500, 20])

    def loss(params):
        ours = bind_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()), params)
        arguments = jax.tree.map(jnp.asarray, (x, (step + 1) / 1000, cond))
        return jnp.mean((ours(*arguments) - target) ** 2)

    found = unet_keys.unet_to_torch(jax.jit(jax.grad(loss))(params))
    predicted = theirs(model, x, step, cond)
    nchw = torch.from_numpy(target.transpose(0, 3, 1, 2).copy())
    torch.nn.functional.mse_loss(predicted, nchw).backward()
    expected = {key: value.grad.numpy() for key, value in model.named_parameters()}
    assert set(found) == set(expected)
    ours, others = (
        np.concatenate([grads[key].ravel() for key in sorted(expected)])
        for grads in (found, expected)
    )
    assert relative(ours, others) <= 1e-4
