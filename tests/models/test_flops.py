import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxdiff.models import attention
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder, TinyAutoencoderConfig
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.dit import DiT, DiTConfig
from jaxdiff.models.denoisers.flux import FLUX1, Flux, FluxConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig, UNet2DConditionModel
from jaxdiff.models.denoisers.unet_small import UNet, UNetConfig
from jaxdiff.models.denoisers.z_image import ZImage, ZImageConfig
from jaxdiff.models.layers import any_rngs
from jaxdiff.models.text_encoders.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig

BATCH = 2
DIT = DiTConfig(
    channels=4, patch_size=2, width=256, depth=1, heads=4, text_width=192, pooled_width=96
)
TEXT = ClipTextConfig(vocab_size=64, length=77, width=256, depth=1, heads=4, projection_dim=128)
VISION = ClipVisionConfig(image_size=112, width=256, depth=1, heads=4, projection_dim=128)
UNET = UNetConfig(
    channels=4,
    patch_size=1,
    widths=(64, 128),
    attention=(False, True),
    text_width=192,
    pooled_width=96,
)
STABLE_DIFFUSION = UNet2DConditionConfig(  # transformers of one block: XLA counts a scan's once
    block_out_channels=(64, 128, 128),
    transformer_layers=(1, 1, 0),
    heads=(4, 4, 4),
    cross_attention_dim=96,
    time_id_width=16,
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(64, 128))


@pytest.fixture(autouse=True)
def attention_at_once(monkeypatch):
    """Of a loop, as attention is on a CPU, XLA counts the body once."""
    monkeypatch.setattr(attention, "_MIN_CPU_LOGITS", math.inf)


def counted(model: nnx.Module, call, *inputs) -> float:
    """XLA's count for one example of a batch; lowers the program, neither compiles nor runs it."""
    graphdef, params = nnx.split(model)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((BATCH, *x.shape), x.dtype), inputs)
    lowered = jax.jit(lambda p, *x: call(nnx.merge(graphdef, p), *x)).lower(params, *inputs)
    return lowered.cost_analysis()["flops"] / BATCH


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted_denoiser(kind, config, text_length):
    cond = Conditioning(
        shape(text_length, config.text_width),
        shape(text_length, dtype=jnp.bool_),
        shape(config.pooled_width),
    )
    return counted(
        nnx.eval_shape(lambda: kind(config, rngs=any_rngs())),
        lambda model, x, t, cond: model(x, t, cond),
        shape(32, 48, config.channels),
        shape(),
        cond,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"text": "joint"}, {"patch_size": 8, "bottleneck": 64, "channels": 3}],
    ids=["cross", "joint", "pixels"],
)
def test_dit_agrees_with_xla(changes):
    config = dataclasses.replace(DIT, **changes)
    ours = config.flops(height=32, width=48, text_length=64)
    assert ours == pytest.approx(counted_denoiser(DiT, config, 64), rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"blocks": 2, "attention": (True, True)}])
def test_unet_agrees_with_xla(changes):
    config = dataclasses.replace(UNET, **changes)
    ours = config.flops(height=32, width=48, text_length=64)
    assert ours == pytest.approx(counted_denoiser(UNet, config, 64), rel=0.04)


@pytest.mark.parametrize("changes", [{}, {"added_width": 160, "use_linear_projection": True}])
def test_stable_diffusions_unet_agrees_with_xla(changes):
    config = dataclasses.replace(STABLE_DIFFUSION, **changes)
    cond = Conditioning(shape(77, config.cross_attention_dim))
    if config.added_width is not None:
        pooled = shape(config.added_width - 6 * config.time_id_width)
        cond = cond._replace(pooled=pooled, size_crop=shape(6))
    xla = counted(
        nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=any_rngs())),
        lambda model, x, t, cond: model(x, t, cond),
        shape(16, 24, config.in_channels),
        shape(),
        cond,
    )
    ours = config.flops(height=16, width=24, text_length=77)
    assert ours == pytest.approx(xla, rel=0.04)


SMALL_FLUX: dict[str, Any] = dict(heads=2, double_depth=1, single_depth=1, text_width=192)


@pytest.mark.parametrize("references", [0, 160])
@pytest.mark.parametrize(
    "config",
    [
        FluxConfig(**SMALL_FLUX, guidance_embedding=True),
        dataclasses.replace(FLUX1, **SMALL_FLUX, pooled_width=96, guidance_embedding=True),
    ],
    ids=["flux2", "flux1"],
)
def test_flux_agrees_with_xla(config, references):
    cond = Conditioning(
        shape(64, config.text_width),
        pooled=None if config.pooled_width is None else shape(config.pooled_width),
        guidance=shape(),
    )
    if references:
        cond = cond._replace(
            reference=shape(references, config.patch_channels),
            reference_positions=shape(references, len(config.rope_axes), dtype=jnp.int32),
        )
    xla = counted(
        nnx.eval_shape(lambda: Flux(config, rngs=any_rngs())),
        lambda model, x, t, cond: model(x, t, cond),
        shape(16, 24, config.channels),
        shape(),
        cond,
    )
    ours = config.flops(height=16, width=24, text_length=64, reference_tokens=references)
    assert ours == pytest.approx(xla, rel=0.03)


def test_z_image_agrees_with_xla():
    config = ZImageConfig(heads=2, depth=1, refiner_depth=1, text_width=192)
    xla = counted(
        nnx.eval_shape(lambda: ZImage(config, rngs=any_rngs())),
        lambda model, x, t, cond: model(x, t, cond),
        shape(16, 28, config.channels),
        shape(),
        Conditioning(shape(90, config.text_width), shape(90, dtype=jnp.bool_)),
    )
    ours = config.flops(height=16, width=28, text_length=90)
    assert ours == pytest.approx(xla, rel=0.03)


def test_clip_text_agrees_with_xla():
    xla = counted(
        nnx.eval_shape(lambda: ClipText(TEXT, rngs=any_rngs())),
        lambda model, ids: model(ids),
        shape(TEXT.length, dtype=jnp.int32),
    )
    assert TEXT.flops() == pytest.approx(xla, rel=0.03)


def test_clip_vision_agrees_with_xla():
    xla = counted(
        nnx.eval_shape(lambda: ClipVision(VISION, rngs=any_rngs())),
        lambda model, images: model(images),
        shape(112, 112, 3),
    )
    assert VISION.flops() == pytest.approx(xla, rel=0.03)


BARE = dict(
    layers_per_block=1,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def test_the_tiny_autoencoder_agrees_with_xla():
    config = TinyAutoencoderConfig(encoder_blocks=(1, 2, 1), decoder_blocks=(1, 1, 1))
    xla = counted(
        nnx.eval_shape(lambda: TinyAutoencoder(config, rngs=any_rngs())),
        lambda model, images: model.encode(images).mean,
        shape(128, 192, 3),
    )
    assert config.encode_flops(height=128, width=192) == pytest.approx(xla, rel=0.04)
    decoder = nnx.eval_shape(lambda: TinyAutoencoder(config, rngs=any_rngs()))
    xla = counted(decoder, lambda model, z: model.decode(z), shape(32, 48, 4))
    assert config.decode_flops(height=128, width=192) == pytest.approx(xla, rel=0.04)


@pytest.mark.parametrize("changes", [{}, BARE, {"patch_size": 2}], ids=["full", "bare", "patches"])
def test_autoencoder_agrees_with_xla(changes):
    config = dataclasses.replace(AUTOENCODER, **changes)
    model = nnx.eval_shape(lambda: Autoencoder(config, rngs=any_rngs()))
    xla = counted(model, lambda model, x: model.encode(x).mean, shape(128, 192, 3))
    assert config.encode_flops(height=128, width=192) == pytest.approx(xla, rel=0.04)
    sides = (128 // config.downsampling, 192 // config.downsampling)
    xla = counted(model, lambda model, z: model.decode(z), shape(*sides, 4))
    assert config.decode_flops(height=128, width=192) == pytest.approx(xla, rel=0.04)


def test_a_training_step_costs_three_forward_passes():
    def step(params, x):
        return jax.grad(lambda p, x: jnp.sum(((x @ p[0]) @ p[1]) ** 2), argnums=(0, 1))(params, x)

    params = [shape(64, 96), shape(96, 32)]
    xla = jax.jit(step).lower(params, shape(512, 64)).cost_analysis()["flops"]
    assert pytest.approx(xla, rel=0.03) == 3 * 2.0 * 512 * (64 * 96 + 96 * 32)


def test_a_deeper_model_costs_each_block_once_more():
    costs = [
        dataclasses.replace(DIT, depth=depth).flops(height=32, width=32, text_length=16)
        for depth in (1, 2, 9)
    ]
    assert costs[2] - costs[0] == pytest.approx(8 * (costs[1] - costs[0]))
