"""Each key of diffusers' schedulers is followed, refused by name, or without effect there as here.

A linear network stands in for a U-Net: both libraries call it with their x_t and time step, and
its output is of the config's prediction type.
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
from jaxdiff.errors import UserError
from jaxdiff.io.text import parse_json
from jaxdiff.pretrained.config_check import Unused
from jaxdiff.pretrained.scheduler import SCHEDULER_KEYS, read_scheduling, write_scheduling
from jaxdiff.sampling.loop import STEP_NOISE, keys_from_seeds, sample
from jaxdiff.sampling.solver import noise_like, stateless

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

STEPS = 5  # divides the 1000 training steps
SEEDS = jnp.array([3, 4])
LATENTS = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) / 4

BASES = {
    "stable diffusion": {"beta_schedule": "scaled_linear", "clip_sample": False},
    "zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "Karras": {"use_karras_sigmas": True},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
}

VALUES = {
    "num_train_timesteps": [500, 1000.0, "1000", 0, -1, None],
    "beta_start": [0.001, 0, 1.5, "0.1", None],
    "beta_end": [0.02, 2, None],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", None],
    "trained_betas": [np.linspace(0.001, 0.01, 1000).tolist()],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction", None],
    "timestep_spacing": ["leading", "trailing", "linspace", "odd", None],
    "steps_offset": [0, 1, 3, 1000, -1, None],
    "set_alpha_to_one": [True, False, None],
    "solver_order": [1, 2, 3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"],
    "variance_type": [None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"],
    "final_sigmas_type": ["sigma_min"],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "time_shift_type": ["linear"],
    "lambda_min_clipped": [-5.1, float("-inf")],
    "original_inference_steps": [20, 50, 2000, 0],
    "timestep_scaling": [1.0, 10.0, 0.0],
    "disable_corrector": [[0], [0, 1]],
    "solver_p": ["DDIMScheduler"],
    "shift_terminal": [0.1],
}


def keys_of(kind):
    return list(inspect.signature(getattr(diffusers, kind).__init__).parameters)[1:]


def values_of(kind, key):
    """Other values of a key: those above, or a switch flipped, or a number changed."""
    if key in VALUES:
        return VALUES[key]
    default = inspect.signature(getattr(diffusers, kind).__init__).parameters[key].default
    if isinstance(default, bool):
        return [not default, None]
    assert isinstance(default, float), f"no other values are known for {key}"
    return [default / 2, default * 2]


def network(x, step):
    """A linear function of x_t that changes slowly with the time step, counted from 0."""
    return (0.98 - 0.05 * (1 - step / 1000)) * x + 0.02 * x @ MIX


@pytest.fixture
def fresh_noises(monkeypatch):
    """Make diffusers' schedulers take the noises of jaxdiff's steps."""
    keys = keys_from_seeds(SEEDS, STEP_NOISE)

    def start(scheduler):
        noises = (
            noise_like(LATENTS, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
            for i in itertools.count()
        )
        monkeypatch.setattr(
            importlib.import_module(type(scheduler).__module__),
            "randn_tensor",
            lambda *_, **__: torch.tensor(np.asarray(next(noises))),
            raising=False,
        )

    return start


def theirs(scheduler, fresh_noises):
    fresh_noises(scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.tensor(np.asarray(LATENTS)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t).numpy()
        x = scheduler.step(torch.tensor(network(x_t, float(t))), t, x).prev_sample
    return x.numpy()


@functools.lru_cache
def ours(scheduling):
    """Return jaxdiff's image; without jit, as each scheduling would compile."""
    schedule, total = scheduling.schedule, scheduling.schedule.num_train_steps

    def denoise(x, t):
        output = network(x, jnp.maximum(t * total - 1, 0))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return to_x0_eps(scheduling.prediction, output, x, alpha, sigma)[0]

    def plain_loop(begin, end, body, carry):
        for i in range(begin, int(end)):
            carry = body(jnp.asarray(i), carry)
        return carry

    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "fori_loop", plain_loop)
        run = sample(
            stateless(denoise),
            scheduling.solver,
            schedule,
            scheduling.grid,
            STEPS,
            LATENTS,
            SEEDS,
            init_noise=scheduling.init_noise,
        )
    return np.asarray(run.images)


def read(config):
    """Return the scheduling of a config, or the message of its refusal."""
    try:
        return read_scheduling(parse_json(json.dumps(config), "config", infinities=True))
    except UserError as error:
        return str(error)


def expect(config, kind, fresh_noises):
    """Return diffusers' image, or None where it fails or is NaN."""
    try:
        image = theirs(getattr(diffusers, kind).from_config(config), fresh_noises)
    except Exception:  # an odd value may fail anywhere
        return None
    return image if np.isfinite(image).all() else None


def distance(found, expected):
    """Return the largest difference, in units of the image's deviation if that is above 1."""
    return np.abs(found - expected).max() / max(expected.std(), 1)


def bases(kind):
    """The configs of this class that jaxdiff reads, each with all keys, as diffusers writes it."""
    keys = keys_of(kind)
    for name, changes in BASES.items():
        if name == "stable diffusion" or not set(changes) - set(keys):
            given = {**BASES["stable diffusion"], **changes, "skip_prk_steps": True}
            scheduler = getattr(diffusers, kind)(**{k: v for k, v in given.items() if k in keys})
            config = json.loads(scheduler.to_json_string())
            if not isinstance(read(config), str):
                yield name, config


@pytest.mark.parametrize("kind", SCHEDULER_KEYS)
def test_every_key(kind, fresh_noises):
    keys = keys_of(kind)
    wrong = [f"{key} is not declared" for key in set(keys) - set(SCHEDULER_KEYS[kind])]
    refused, followed = 0, 0
    for name, base in bases(kind):
        unchanged = expect(base, kind, fresh_noises)
        changes = [(key, value) for key in keys for value in values_of(kind, key)]
        for key, value in changes:
            config, case = {**base, key: value}, f"{name}, {key}={str(value)[:40]}"
            scheduling = read(config)
            if isinstance(scheduling, str):
                refused += 1
                if key not in scheduling:
                    wrong.append(f"{case}: refused without its name: {scheduling}")
                continue
            expected = expect(config, kind, fresh_noises)
            if expected is None:
                continue
            followed += 1
            away = distance(ours(scheduling), expected)
            if not away <= 1e-3:
                wrong.append(f"{case}: {away:.1e} away")
            is_unused = isinstance(SCHEDULER_KEYS[kind].get(key), Unused)
            if is_unused and not np.array_equal(expected, unchanged):
                wrong.append(f"{case}: declared without effect, and has one")
            if read(write_scheduling(scheduling)) != scheduling:
                wrong.append(f"{case}: is written otherwise")
    print(f"{kind}: {followed} values followed, {refused} refused", *wrong, sep="\n")
    assert min(followed, refused) > 20
    assert wrong == []
