"""Schedule and sampler of a checkpoint, from diffusers' `scheduler_config.json`."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import ConsistencyGrid, KarrasGrid, LogSnrGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import Fixed, check_config
from jaxdiff.sampling.solvers import AnySolver
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, DPMSolverPP2M, Euler, Heun
from jaxdiff.sampling.solvers_sde import DDPM, LCM, DPMSolverPP2MSDE, DPMSolverPPSDE, EulerAncestral
from jaxdiff.sampling.unipc import UniPC

WHAT = "scheduler/scheduler_config.json"

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

_DPM, _UNIPC, _LCM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"

SCHEDULERS = {
    ("DDIMScheduler",): DDIM,
    ("DDPMScheduler",): DDPM,
    ("PNDMScheduler",): PLMS,
    ("EulerDiscreteScheduler",): Euler,
    ("EulerAncestralDiscreteScheduler",): EulerAncestral,
    ("HeunDiscreteScheduler",): Heun,
    (_DPM, "dpmsolver++", 2): DPMSolverPP2M,
    (_DPM, "sde-dpmsolver++", 2): DPMSolverPP2MSDE,
    (_DPM, "sde-dpmsolver++", 1): DPMSolverPPSDE,
    (_UNIPC,): UniPC,
    (_LCM,): LCM,
}
"""Our solvers by diffusers' class, and for one of them by algorithm_type and solver_order."""

# These start at the noise of their first step, which may lie between training steps.
_EULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
_SPACED_BY_NOISE = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", _DPM, _UNIPC)

# diffusers' defaults of missing keys, by the kind of scheduler.
_MISSING = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "timestep_spacing": "linspace",
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_MISSING_OF = {
    "DDIMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "DDPMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "PNDMScheduler": {"skip_prk_steps": False, "timestep_spacing": "leading"},
    "HeunDiscreteScheduler": _SD_BETAS,
    _LCM: {**_SD_BETAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
}

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
_NOISE_SPACINGS = {
    "use_karras_sigmas": KarrasGrid,
    "use_exponential_sigmas": LogSnrGrid,
    "use_lu_lambdas": LogSnrGrid,
}
_READ_OF = {
    _DPM: {"algorithm_type", "solver_order"},
    _UNIPC: {"solver_type"},
    _LCM: {"original_inference_steps", "timestep_scaling"},
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
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "predict_x0": (True,),
    "disable_corrector": ([], ()),
    "solver_p": (None,),
    "lower_order_final": None,  # the last step, to no noise, is of first order in any case
    "euler_at_final": None,
    "lambda_min_clipped": (None, float("-inf")),
    "variance_type": (None, "fixed_small"),
    "flow_shift": None,
    "time_shift_type": None,
}


GRIDS = (TrainStepGrid, KarrasGrid, LogSnrGrid, ConsistencyGrid)


class Scheduling(NamedTuple):
    """A checkpoint's schedule and sampler; `init_noise` is that of `Sampler`."""

    schedule: ScaledLinear
    prediction: Prediction
    solver: AnySolver
    grid: TrainStepGrid | KarrasGrid | LogSnrGrid | ConsistencyGrid
    init_noise: Literal["unit", "schedule"]


def read_scheduling(config: Mapping[str, Any]) -> Scheduling:
    """Read schedule, prediction type, solver and time grid of a checkpoint.

    Raises:
      UserError: the config asks for what jaxdiff does not have; it names the key.
    """
    kind = str(config.get("_class_name", "DDIMScheduler"))
    kinds = list(dict.fromkeys(key[0] for key in SCHEDULERS))
    if kind not in kinds:
        raise UserError(
            f"{WHAT}: jaxdiff does not support {kind}: expected {', '.join(kinds)}; change "
            "_class_name, as the network works with any of them."
        )
    config = {**_MISSING, **_MISSING_OF.get(kind, {}), **config}
    by_noise = _NOISE_SPACINGS if kind in _SPACED_BY_NOISE else {}
    check_config(WHAT, config, {*_READ, *by_noise, *_READ_OF.get(kind, ())}, _FIXED)
    prediction, spacing = config.get("prediction_type", "epsilon"), config["timestep_spacing"]
    if prediction not in PREDICTIONS or spacing not in ("leading", "trailing", "linspace"):
        raise UserError(
            f"{WHAT}: prediction_type is {prediction!r} and timestep_spacing {spacing!r}: expected "
            f"{', '.join(PREDICTIONS)}, and leading, trailing or linspace; change the config."
        )
    schedule = ScaledLinear(
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        num_train_steps=config.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
    )
    solver, grid = _solver(kind, config), _grid(kind, config, schedule)
    starts_at_sigma = kind in _EULERS and spacing != "leading"
    init_noise = "schedule" if starts_at_sigma else "unit"
    return Scheduling(schedule, PREDICTIONS[prediction], solver, grid, init_noise)


def _solver(kind: str, config: Mapping[str, Any]) -> AnySolver:
    if kind == "HeunDiscreteScheduler":
        return Heun(variable="sigma")
    if kind == _LCM:
        steps = config.get("num_train_timesteps", 1000)
        return LCM(time_scale=config.get("timestep_scaling", 10.0) * steps)
    if kind == _UNIPC:
        variant = config.get("solver_type", "bh2")
        if variant not in ("bh1", "bh2"):
            raise UserError(
                f"{WHAT}: solver_type is {variant!r}: expected bh1 or bh2; change the config."
            )
        return UniPC(variant=variant)
    if kind != _DPM:
        return SCHEDULERS[(kind,)]()
    algorithm, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    if (kind, algorithm, order) not in SCHEDULERS:
        raise UserError(
            f"{WHAT}: algorithm_type is {algorithm!r} and solver_order {order!r}: expected "
            "dpmsolver++ with 2, or sde-dpmsolver++ with 1 or 2; change the config."
        )
    return SCHEDULERS[(kind, algorithm, order)]()


def _grid(
    kind: str, config: Mapping[str, Any], schedule: ScaledLinear
) -> TrainStepGrid | KarrasGrid | LogSnrGrid | ConsistencyGrid:
    steps, spacing = schedule.num_train_steps, config["timestep_spacing"]
    if kind == _LCM:
        distilled = config.get("original_inference_steps", 50)
        return ConsistencyGrid(distilled_steps=distilled, num_train_steps=steps)
    for key, by_noise in _NOISE_SPACINGS.items():
        if not config.get(key):
            continue
        if kind in _EULERS and spacing != "linspace":
            raise UserError(
                f"{WHAT}: {key} is set and timestep_spacing is {spacing!r}, which jaxdiff does not "
                "support: expected linspace; change the config."
            )
        return by_noise(schedule=schedule, last=1 / steps)
    has_end = kind in ("DDIMScheduler", "PNDMScheduler")
    to_data = not has_end or config.get("set_alpha_to_one", kind == "DDIMScheduler")
    return TrainStepGrid(
        spacing=spacing,
        offset=config.get("steps_offset", 0) if spacing == "leading" else 0,
        skip_last=kind in (_DPM, _UNIPC) and spacing != "trailing",
        rounded=kind not in _EULERS,
        ends_at="data" if to_data else "first_step",
        num_train_steps=steps,
    )


def write_scheduling(scheduling: Scheduling) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_scheduling`.

    Raises:
      UserError: diffusers has no such solver, or not with this grid.
    """
    schedule, grid, solver = scheduling.schedule, scheduling.grid, scheduling.solver
    kind, *variant = {solver: key for key, solver in SCHEDULERS.items()}[type(solver)]
    kind = str(kind)
    if isinstance(solver, Heun) and solver != Heun(variable="sigma"):
        raise UserError(
            "diffusers has no such Heun: expected Heun(variable='sigma') without churn; change the "
            "model's solver."
        )
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    config = {
        "_class_name": kind,
        "num_train_timesteps": schedule.num_train_steps,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": predictions[scheduling.prediction],
        **_grid_config(kind, grid, schedule),
        **dict(zip(("algorithm_type", "solver_order"), variant, strict=False)),
    }
    if kind not in ("PNDMScheduler", "HeunDiscreteScheduler"):
        config["rescale_betas_zero_snr"] = schedule.zero_terminal_snr
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        config["clip_sample"] = False
    if kind == "PNDMScheduler":
        config["skip_prk_steps"] = True
    if isinstance(solver, UniPC):
        config["solver_type"] = solver.variant
    if isinstance(solver, LCM):
        config["timestep_scaling"] = solver.time_scale / schedule.num_train_steps
    return config


def _grid_config(
    kind: str,
    grid: TrainStepGrid | KarrasGrid | LogSnrGrid | ConsistencyGrid,
    schedule: ScaledLinear,
) -> dict[str, Any]:
    """Return the part of a scheduler's config that states its steps."""
    if isinstance(grid, ConsistencyGrid) and kind == _LCM:
        return {"original_inference_steps": grid.distilled_steps}
    if isinstance(grid, TrainStepGrid) and kind != _LCM:
        config = {"timestep_spacing": grid.spacing, "steps_offset": grid.offset}
        if kind in ("DDIMScheduler", "PNDMScheduler"):
            config["set_alpha_to_one"] = grid.ends_at == "data"
        return config
    if kind in _SPACED_BY_NOISE:
        for key, by_noise in _NOISE_SPACINGS.items():
            if grid == by_noise(schedule=schedule, last=1 / schedule.num_train_steps):
                return {"timestep_spacing": "linspace", key: True}
    raise UserError(
        f"diffusers' {kind} does not have the steps of {grid}: expected a "
        f"{'ConsistencyGrid' if kind == _LCM else 'TrainStepGrid'}; change the model's time grid."
    )
