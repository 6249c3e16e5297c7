"""Each solver that diffusers has makes the same image as its scheduler: same latents, same noises.

The exact denoiser of a known mixture stands in for a U-Net.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.pretrained.scheduler import read_scheduling, write_scheduling
from jaxdiff.sampling.loop import STEP_NOISE, keys_from_seeds, sample
from jaxdiff.sampling.solver import noise_like, stateless

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
STEPS = 20

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN = "HeunDiscreteScheduler"

CASES = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DDPM, leading": ("DDPMScheduler", {"clip_sample": False, **LEADING}),
    "DDPM, trailing": ("DDPMScheduler", {"clip_sample": False, **TRAILING}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, **LEADING}),
    "Euler": (EULER, {}),
    "Euler, Karras": (EULER, KARRAS),
    "Euler, exponential": (EULER, EXPONENTIAL),
    "Euler ancestral": (ANCESTRAL, {}),
    "Euler ancestral, leading": (ANCESTRAL, LEADING),
    "Euler ancestral, trailing": (ANCESTRAL, TRAILING),
    "Heun": (HEUN, {}),
    "Heun, leading": (HEUN, LEADING),
    "Heun, Karras": (HEUN, KARRAS),
    "2M": (DPM, {}),
    "2M, Karras": (DPM, KARRAS),
    "2M, exponential": (DPM, EXPONENTIAL),
    "2M, even lambda": (DPM, {"use_lu_lambdas": True}),
    "2M SDE": (DPM, SDE),
    "2M SDE, Karras": (DPM, SDE | KARRAS),
    "2M SDE, trailing": (DPM, SDE | TRAILING),
    "SDE": (DPM, SDE | {"solver_order": 1}),
    "UniPC": (UNIPC, {}),
    "UniPC, bh1": (UNIPC, {"solver_type": "bh1"}),
    "UniPC, leading": (UNIPC, LEADING),
    "UniPC, Karras": (UNIPC, KARRAS),
    "LCM": ("LCMScheduler", {}),
}


def expected_x0(x, alpha, sigma):
    """E[x0 | x_t] where x0 is one of two normals."""
    mean, std = 0.6, 0.3
    variance = (alpha * std) ** 2 + sigma**2
    side = jnp.tanh(alpha * mean * x / variance) * mean
    return side + alpha * std**2 / variance * (x - alpha * side)


def noise_to_data(scheduler, t):
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler | diffusers.HeunDiscreteScheduler):
        return float(scheduler.sigmas[scheduler.step_index])
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[scheduler.step_index or 0])
    alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    return np.sqrt(1 / alpha_bar - 1)


@pytest.mark.parametrize("name", CASES)
def test_a_scheduler_comes_back_and_diffusers_opens_it(name):
    kind, changes = CASES[name]
    ours = read_scheduling({**SD, **changes, "_class_name": kind})
    written = write_scheduling(ours)
    assert read_scheduling(written) == ours
    restored = getattr(diffusers, kind).from_config(written)
    assert read_scheduling({**restored.config, "_class_name": kind}) == ours


def theirs(scheduler, latents, noises, monkeypatch):
    """Sample with diffusers' scheduler, with noises[i] as the fresh noise of step i."""
    taken = iter(noises)
    monkeypatch.setattr(
        importlib.import_module(type(scheduler).__module__),
        "randn_tensor",
        lambda *args, **kwargs: torch.tensor(np.asarray(next(taken))),
        raising=False,
    )
    scheduler.set_timesteps(STEPS)
    if scheduler.config.get("solver_type") == "bh1":
        scheduler.sigmas[-1] = 1e-6  # at 0 diffusers multiplies an infinite B(h) by 0
    x = torch.tensor(np.asarray(latents)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = jnp.asarray(scheduler.scale_model_input(x, t).numpy())
        ratio = noise_to_data(scheduler, t)
        alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        eps = (x_t - alpha * expected_x0(x_t, alpha, sigma)) / sigma
        x = scheduler.step(torch.tensor(np.asarray(eps)), t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_image_is_that_of_diffusers(name, monkeypatch):
    kind, changes = CASES[name]
    scheduler = getattr(diffusers, kind)(**SD, **changes)
    scheduling = read_scheduling({**scheduler.config, "_class_name": kind})
    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    seeds = jnp.array([3, 4])
    keys = keys_from_seeds(seeds, STEP_NOISE)
    noises = [
        noise_like(latents, jax.vmap(jax.random.fold_in, (0, None))(keys, i)) for i in range(STEPS)
    ]
    expected = theirs(scheduler, latents, noises, monkeypatch)

    def denoise(x, t):
        return expected_x0(x, scheduling.schedule.alpha(t), scheduling.schedule.sigma(t))

    found = sample(
        stateless(denoise),
        scheduling.solver,
        scheduling.schedule,
        scheduling.grid,
        STEPS,
        latents,
        seeds,
        init_noise=scheduling.init_noise,
    ).images
    difference = np.abs(np.asarray(found) - expected).max()
    print(f"{name}: {difference:.1e}")
    assert expected.std() > 0.3  # the image is not empty
    assert difference <= 1e-3
