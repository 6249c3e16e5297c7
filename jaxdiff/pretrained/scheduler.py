"""How a checkpoint wants to be sampled, from diffusers' `scheduler_config.json`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.schedules import ScaledLinear, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.pretrained.foreign_config import Fixed, check_config
from jaxdiff.sampling.solvers import DDIM, PLMS, DPMSolverPP2M, Euler, Heun

WHAT = "scheduler/scheduler_config.json"

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

SOLVERS = {
    "DDIMScheduler": DDIM,
    "PNDMScheduler": PLMS,
    "EulerDiscreteScheduler": Euler,
    "DPMSolverMultistepScheduler": DPMSolverPP2M,
}

# What diffusers takes where a config is silent, by the kind of scheduler.
_SPACING = {"DDIMScheduler": "leading", "PNDMScheduler": "leading"}  # the others: linspace
_SILENT = {"beta_schedule": "linear"}
_SILENT_OF = {"DDIMScheduler": {"clip_sample": True}, "PNDMScheduler": {"skip_prk_steps": False}}

_READ = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
}

_FIXED: Fixed = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "clip_sample": (False,),
    "clip_sample_range": None,
    "thresholding": (False,),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
    "skip_prk_steps": (True,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "lower_order_final": None,  # the last step, into no noise at all, is of first order anyhow
    "euler_at_final": None,
    "lambda_min_clipped": (None, float("-inf")),
    "variance_type": (None,),
    "flow_shift": None,
    "time_shift_type": None,
}


class Scheduling(NamedTuple):
    """A checkpoint's noise and its way of sampling."""

    schedule: ScaledLinear
    prediction: Prediction
    solver: DDIM | Euler | Heun | DPMSolverPP2M | PLMS
    grid: TrainStepGrid
    unit_noise: bool  # it starts at variance 1, whatever sigma says of the first step


def read_scheduling(config: Mapping[str, Any], what: str = WHAT) -> Scheduling:
    """Schedule, prediction type, solver and time grid of a checkpoint.

    Raises:
      UserError: the config asks for what jaxdiff does not have; it names the key.
    """
    kind = str(config.get("_class_name", "DDIMScheduler"))
    if kind not in SOLVERS:
        raise UserError(
            f"{what}: jaxdiff does not have {kind}: expected {', '.join(SOLVERS)}; change "
            "_class_name to one of them, with which the same network samples as well."
        )
    check_config(what, {**_SILENT, **_SILENT_OF.get(kind, {}), **config}, _READ, _FIXED)
    prediction = config.get("prediction_type", "epsilon")
    spacing = config.get("timestep_spacing", _SPACING.get(kind, "linspace"))
    if prediction not in PREDICTIONS or spacing not in ("leading", "trailing", "linspace"):
        raise UserError(
            f"{what}: prediction_type is {prediction!r} and timestep_spacing {spacing!r}: expected "
            f"{', '.join(PREDICTIONS)}, and leading, trailing or linspace."
        )
    steps = config.get("num_train_timesteps", 1000)
    schedule = ScaledLinear(
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        num_train_steps=steps,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
    )
    to_data = config.get("set_alpha_to_one", kind != "PNDMScheduler")
    is_dpm, is_euler = kind == "DPMSolverMultistepScheduler", kind == "EulerDiscreteScheduler"
    grid = TrainStepGrid(
        spacing=spacing,
        offset=config.get("steps_offset", 0) if spacing == "leading" else 0,
        skip_last=is_dpm and spacing != "trailing",
        rounded=not is_euler,
        ends_at="data" if to_data or is_dpm or is_euler else "first_step",
        num_train_steps=steps,
    )
    unit_noise = not (is_euler and spacing != "leading")
    return Scheduling(schedule, PREDICTIONS[prediction], SOLVERS[kind](), grid, unit_noise)


def write_scheduling(scheduling: Scheduling) -> dict[str, Any]:
    """The config that `read_scheduling` reads the same from, and diffusers too."""
    schedule, grid = scheduling.schedule, scheduling.grid
    kinds = {solver: kind for kind, solver in SOLVERS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    kind = kinds[type(scheduling.solver)]
    config = {
        "_class_name": kind,
        "num_train_timesteps": schedule.num_train_steps,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": predictions[scheduling.prediction],
        "timestep_spacing": grid.spacing,
        "steps_offset": grid.offset,
    }
    if kind != "PNDMScheduler":
        config["rescale_betas_zero_snr"] = schedule.zero_terminal_snr
    if kind in ("DDIMScheduler", "PNDMScheduler"):
        config["set_alpha_to_one"] = grid.ends_at == "data"
    if kind == "DDIMScheduler":
        config["clip_sample"] = False
    if kind == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return config
