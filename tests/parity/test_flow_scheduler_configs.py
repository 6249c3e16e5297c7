"""Each key of diffusers' flow-matching scheduler is followed, refused by name, or without effect.

A closed-form velocity stands in for a network.
"""

import functools
import importlib
import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.process import to_x0_eps
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.pretrained.flow_scheduler import (
    FLOW_KEYS,
    KIND,
    read_flow_scheduling,
    write_flow_scheduling,
)
from jaxdiff.sampling.loop import STEP_NOISE, keys_from_seeds, sample
from jaxdiff.sampling.solver import noise_like, stateless

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

pytestmark = pytest.mark.parity

STEPS, TOKENS = 5, 1024
SEEDS = jnp.array([3, 4])
NOISE = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) / 4

BASES = {  # as published with FLUX.1-schnell, FLUX.1-dev, FLUX.2-klein and Z-Image
    "schnell": ({"shift": 1.0}, False),
    "dev": ({"shift": 3.0, "use_dynamic_shifting": True}, False),
    "klein": ({"shift": 3.0, "use_dynamic_shifting": True}, True),
    "Z-Image": ({"shift": 3.0}, False),
}
VALUES = {
    "num_train_timesteps": [1000, 1000.0, 500, None],
    "shift": [1.0, 3.0, 6, 0.0, -1.0, "3", None],
    "base_shift": [0.25, 0.5, 2.0, 0.0, None],
    "max_shift": [0.6, 1.15, 0.1, "1", None],
    "base_image_seq_len": [64, 256.0, 4096, 0, None],
    "max_image_seq_len": [1024, 8192, 256, 1.5, None],
    "shift_terminal": [None, 0.02, 0.1, 1.0, -0.1, "0.1"],
    "time_shift_type": ["exponential", "linear", "other", None],
}


def keys():
    kind = getattr(diffusers, KIND)
    return {k: p.default for k, p in list(inspect.signature(kind.__init__).parameters.items())[1:]}


def velocity(x, t):
    """A linear function of x_t that changes with the time."""
    return (0.9 - 0.3 * t) * x + 0.2 * x @ MIX


@pytest.fixture
def fresh_noises(monkeypatch):
    """Make diffusers' scheduler take the noises of jaxdiff's steps."""
    step_keys = keys_from_seeds(SEEDS, STEP_NOISE)

    def start():
        noises = (
            noise_like(NOISE, jax.vmap(jax.random.fold_in, (0, None))(step_keys, i))
            for i in itertools.count()
        )
        monkeypatch.setattr(
            importlib.import_module("diffusers.schedulers.scheduling_flow_match_euler_discrete"),
            "randn_tensor",
            lambda *_, **__: torch.tensor(np.asarray(next(noises))),
        )

    return start


def theirs(config, by_steps):
    """Return the image of diffusers' scheduler as the pipelines use it."""
    scheduler = getattr(diffusers, KIND).from_config(config)
    get = scheduler.config.get
    shifts = [
        get("base_image_seq_len"),
        get("max_image_seq_len"),
        get("base_shift"),
        get("max_shift"),
    ]
    mu = compute_empirical_mu(TOKENS, STEPS) if by_steps else calculate_shift(TOKENS, *shifts)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
    x = torch.tensor(np.asarray(NOISE))
    for t in scheduler.timesteps:
        output = torch.tensor(velocity(x.numpy(), float(t) / 1000))
        x = scheduler.step(output, t, x).prev_sample
    return x.numpy()


@functools.cache
def compiled(solver):
    schedule = RectifiedFlow()

    def denoise(x, t):
        return to_x0_eps("velocity", velocity(x, t), x, 1 - t, t)[0]

    @jax.jit
    def run(times):
        return sample(
            stateless(denoise), solver, schedule, lambda i, *_: times[i], STEPS, NOISE, SEEDS
        ).images

    return run


def ours(scheduling):
    return np.asarray(compiled(scheduling.solver)(scheduling.grid(jnp.arange(6), STEPS, TOKENS)))


def read(config, by_steps):
    try:
        return read_flow_scheduling(config, by_steps=by_steps)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("base", BASES)
def test_every_key(base, fresh_noises):
    changes, by_steps = BASES[base]
    config = json.loads(getattr(diffusers, KIND)(**changes).to_json_string())
    assert set(keys()) <= set(FLOW_KEYS)
    wrong, followed, refused = [], 0, 0
    for key, default in keys().items():
        for value in VALUES.get(key, [not default, default, None]):
            changed, case = {**config, key: value}, f"{key}={value!r}"
            scheduling = read(changed, by_steps)
            if isinstance(scheduling, str):
                refused += 1
                if key not in scheduling:
                    wrong.append(f"{case}: refused without its name: {scheduling}")
                continue
            fresh_noises()
            try:
                expected = theirs(changed, by_steps)
            except Exception:  # an odd value may fail anywhere
                continue
            followed += 1
            away = np.abs(ours(scheduling) - expected).max()
            if not away <= 1e-5:
                wrong.append(f"{case}: {away:.1e} away")
            if read(write_flow_scheduling(scheduling), by_steps) != scheduling:
                wrong.append(f"{case}: is written otherwise")
    print(f"{followed} values followed, {refused} refused", *wrong, sep="\n")
    assert min(followed, refused) > 10
    assert wrong == []


@pytest.mark.parametrize("base", BASES)
def test_diffusers_reads_what_is_written(base):
    changes, by_steps = BASES[base]
    written = write_flow_scheduling(read(changes, by_steps))
    np.testing.assert_array_equal(theirs(written, by_steps), theirs(changes, by_steps))
