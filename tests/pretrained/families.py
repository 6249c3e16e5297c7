"""Tiny models of FLUX.1, FLUX.2 klein and Z-Image, with random weights."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Euler
from tests.data.language_tokenizers import write_qwen_tokenizer, write_t5_tokenizer

SMALL_VAE = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4}
VAE = AutoencoderConfig(
    **SMALL_VAE,
    latent_channels=4,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
FLUX = {"heads": 2, "head_width": 16, "double_depth": 1, "single_depth": 2}
QWEN = {"width": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp_width": 12}
CLIP_WORDS, T5_WORDS, QWEN_WORDS = 525, 60, 310


def qwen(depth: int, **options) -> Qwen3TextEncoder:
    return Qwen3TextEncoder(
        model=Qwen3Config(vocab_size=QWEN_WORDS, depth=depth, **QWEN), **options
    )


def flux1(guidance_embedding: bool) -> TextToImage:
    clip = ClipTextConfig(vocab_size=CLIP_WORDS, length=77, width=6, depth=1, heads=2)
    t5 = T5Config(vocab_size=T5_WORDS, width=8, depth=1, heads=2, head_dim=4, mlp_width=12)
    return TextToImage(
        denoiser=dataclasses.replace(
            FLUX1,
            **FLUX,
            channels=4,
            text_width=8,
            pooled_width=6,
            rope_axes=(4, 6, 6),
            guidance_embedding=guidance_embedding,
        ),
        conditioner=Flux1Conditioner(
            text=ClipTextEncoder(model=clip),
            text_2=T5TextEncoder(model=t5, max_length=512 if guidance_embedding else 256),
        ),
        autoencoder=VAE,
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=1024,
        sampler=Sampler(
            solver=Euler(),
            grid=FlowGrid(token_shift=TokenShift()) if guidance_embedding else FlowGrid(),
            num_steps=28 if guidance_embedding else 4,
            guidance_scale=3.5 if guidance_embedding else 1.0,
            guidance=None if guidance_embedding else Guidance(distilled=True),
        ),
    )


def klein(*, distilled: bool) -> TextToImage:
    return TextToImage(
        denoiser=FluxConfig(
            **FLUX, channels=16, text_width=24, time_width=16, rope_axes=(4, 4, 4, 4)
        ),
        conditioner=Flux2Conditioner(text=qwen(28, hidden_layers=(9, 18, 27))),
        autoencoder=Flux2AutoencoderConfig(**SMALL_VAE, z_channels=4),
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=1024,
        sampler=Sampler(
            solver=Euler(),
            grid=FlowGrid(token_shift=EmpiricalShift()),
            num_steps=4 if distilled else 50,
            guidance_scale=1.0 if distilled else 4.0,
            guidance=Guidance(distilled=True) if distilled else None,
        ),
    )


def z_image(*, turbo: bool) -> TextToImage:
    return TextToImage(
        denoiser=ZImageConfig(
            channels=4,
            heads=2,
            depth=2,
            refiner_depth=1,
            text_width=8,
            rope_axes=(4, 6, 6),
            rope_lengths=(1024, 64, 64),
        ),
        conditioner=ZImageConditioner(text=qwen(3, hidden_layers=(2,), thinking=True)),
        autoencoder=VAE,
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=1024,
        sampler=Sampler(
            solver=Euler(),
            grid=FlowGrid(shift=3.0 if turbo else 6.0),
            num_steps=8 if turbo else 50,
            guidance_scale=1.0 if turbo else 6.0,
            guidance=Guidance(distilled=True) if turbo else None,
        ),
    )


SPECS = {
    "FLUX.1 dev": flux1(guidance_embedding=True),
    "FLUX.1 schnell": flux1(guidance_embedding=False),
    "klein": klein(distilled=True),
    "klein base": klein(distilled=False),
    "Z-Image Turbo": z_image(turbo=True),
    "Z-Image": z_image(turbo=False),
}


def random_bundle(name: str, folder: Path, dtype=np.float32) -> Bundle:
    """Return one of `SPECS` with random weights, and tokenizers whose files are in `folder`."""
    spec = dataclasses.replace(SPECS[name], name="tiny")
    rng = np.random.default_rng(0)

    def random(path, x):
        if x.dtype == np.int32:  # FLUX.2's autoencoder counts batches
            return np.full(x.shape, 7, np.int32)
        value = 0.3 * rng.normal(size=x.shape)
        return (np.abs(value) if path[-1].key == "running_var" else value).astype(dtype)

    params = jax.tree_util.tree_map_with_path(random, spec.abstract_params())
    write = {Qwen3TextEncoder: write_qwen_tokenizer, T5TextEncoder: write_t5_tokenizer}
    tokenizers = {}
    for part, encoder in spec.conditioner.encoders.items():
        if isinstance(encoder, ClipTextEncoder):
            tokenizers[part] = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)
        else:
            files = write[type(encoder)](folder / part)
            tokenizers[part] = encoder.load_tokenizer(str(files))
    return Bundle(spec, params, tokenizers)
