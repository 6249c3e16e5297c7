"""Stable Diffusion XL's refiner takes over from the base model as in diffusers."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.sampling.sampler import Sampler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.parity.test_stable_diffusion import (
    SCHEDULERS,
    STEPS,
    padded_tokenizer,
    stable_diffusion_xl,
    text_encoder,
    unet_xl,
    vae,
)

pytestmark = pytest.mark.parity


def refiner(tokenizer, scheduler):
    torch.manual_seed(1)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text_encoder(tokenizer, 24, projected=True),
        tokenizer=None,
        tokenizer_2=padded_tokenizer(tokenizer),
        unet=unet_xl(24, 5),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ 2M"])
@pytest.mark.parametrize("share", [0.8, 0.45])
def test_the_refiner_takes_over(name, share, tokenizer, tmp_path):
    pipelines = [make(tokenizer, SCHEDULERS[name]) for make in (stable_diffusion_xl, refiner)]
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    noisy = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    options = {"negative_prompt": ["a banana"], "num_inference_steps": STEPS, "guidance_scale": 5.0}
    for pipeline, folder in zip(pipelines, ("base", "refiner"), strict=True):
        pipeline.save_pretrained(tmp_path / folder)
        pipeline.set_progress_bar_config(disable=True)
    base, refine = pipelines
    noisy = base(
        ["a red pea"], latents=noisy, denoising_end=share, output_type="latent", **options
    ).images
    expected = refine(
        ["a red pea"], image=noisy, denoising_start=share, output_type="np", **options
    ).images

    options = {"negative_prompt": ["a banana"], "num_steps": STEPS, "guidance_scale": 5.0}
    found = jaxdiff.load(tmp_path / "base")(
        ["a red pea"],
        latents=latents,
        sampler=Sampler(denoising_interval=(0, share)),
        output="latents",
        **options,
    )
    found = jaxdiff.load(tmp_path / "refiner")(
        ["a red pea"],
        latents=found,
        sampler=Sampler(denoising_interval=(share, 1)),
        output="float",
        **options,
    )
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-3)
