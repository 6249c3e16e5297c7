"""Schedule and sampler of a checkpoint, from diffusers' `scheduler_config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import (
    MOST_STEPS,
    ConsistencyGrid,
    KarrasGrid,
    LogSnrGrid,
    TrainStepGrid,
)
from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import (
    FLAG,
    OFF,
    Only,
    Schema,
    Unused,
    Used,
    choice,
    integer,
    number,
    read_keys,
)
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

# diffusers reads the names of other solvers as bh2.
_UNIPC_VARIANTS = {"bh1": "bh1", **dict.fromkeys(("bh2", "midpoint", "heun", "logrho"), "bh2")}

# These start at the noise of their first step, which may lie between training steps.
_EULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")

# These step in sigma / alpha, which zero terminal SNR would make infinite.
_IN_SIGMA = (*_EULERS, _DPM, _UNIPC)

LEAST_ALPHA_BAR = 2.0**-24
"""alpha_bar at the end of a schedule of zero terminal SNR, for solvers in sigma / alpha."""

_NOISE_SPACINGS = {
    "use_karras_sigmas": KarrasGrid,
    "use_exponential_sigmas": LogSnrGrid,
    "use_lu_lambdas": LogSnrGrid,
}

_SPACINGS = ("leading", "trailing", "linspace")

# Keys and defaults of diffusers. The classes differ in the defaults and in the keys that follow.
_SWITCH = Used(False, FLAG)
_COMMON: Schema = {
    "num_train_timesteps": Used(1000, integer(2, MOST_STEPS)),
    "beta_start": Used(0.0001, number(0, 1)),
    "beta_end": Used(0.02, number(0, 1)),
    "beta_schedule": Only("scaled_linear", default="linear"),
    "trained_betas": Only(None),
    "prediction_type": Used("epsilon", choice(PREDICTIONS)),
    "timestep_spacing": Used("linspace", choice(_SPACINGS)),
    "steps_offset": Used(0, integer(0, MOST_STEPS)),
}
_LEADING: Schema = {"timestep_spacing": Used("leading", choice(_SPACINGS))}
# diffusers steps down by num_train_timesteps // steps, whatever its spacing.
_EVEN: Schema = {"timestep_spacing": Used("leading", choice(("leading", "trailing")))}
_ZERO_SNR: Schema = {"rescale_betas_zero_snr": _SWITCH}
_SD_BETAS: Schema = {
    "beta_start": Used(0.00085, number(0, 1)),
    "beta_end": Used(0.012, number(0, 1)),
}
_CLIP: Schema = {
    "clip_sample": Only(False, None, default=True),
    "clip_sample_range": Unused("of clip_sample, which must be off"),
}
_NO_CLIP: Schema = {**_CLIP, "clip_sample": OFF}
_THRESHOLD: Schema = {
    "thresholding": OFF,
    "dynamic_thresholding_ratio": Unused("of thresholding, which must be off"),
    "sample_max_value": Unused("of thresholding, which must be off"),
}
_SIGMAS: Schema = {
    "use_karras_sigmas": _SWITCH,
    "use_exponential_sigmas": _SWITCH,
    "use_beta_sigmas": OFF,
}
_SIGMA_ENDS: Schema = {"sigma_min": Only(None), "sigma_max": Only(None)}
_FLOW: Schema = {
    "use_flow_sigmas": OFF,
    "use_dynamic_shifting": OFF,
    "flow_shift": Unused("of use_flow_sigmas, which must be off"),
    "time_shift_type": Unused("of use_flow_sigmas, which must be off"),
}
_ENDS_AT_ZERO: Schema = {"final_sigmas_type": Only("zero")}

_OWN: dict[str, Schema] = {
    "DDIMScheduler": {
        **_COMMON,
        **_EVEN,
        **_ZERO_SNR,
        **_CLIP,
        **_THRESHOLD,
        "set_alpha_to_one": Used(True, FLAG),
    },
    "DDPMScheduler": {
        **_COMMON,
        **_LEADING,
        **_ZERO_SNR,
        **_CLIP,
        **_THRESHOLD,
        "variance_type": Only("fixed_small"),
    },
    "PNDMScheduler": {
        **_COMMON,
        **_EVEN,
        "prediction_type": Used("epsilon", choice({"epsilon": "eps"})),  # v it averages otherwise
        "skip_prk_steps": Only(True, default=False),
        "set_alpha_to_one": _SWITCH,
    },
    "EulerDiscreteScheduler": {
        **_COMMON,
        **_ZERO_SNR,
        **_SIGMAS,
        **_SIGMA_ENDS,
        **_ENDS_AT_ZERO,
        "interpolation_type": Only("linear"),
        "timestep_type": Only("discrete"),
    },
    "EulerAncestralDiscreteScheduler": {
        **_COMMON,
        **_ZERO_SNR,
        "prediction_type": Used("epsilon", choice({"epsilon": "eps", "v_prediction": "v"})),
    },
    "HeunDiscreteScheduler": {**_COMMON, **_SD_BETAS, **_SIGMAS, **_NO_CLIP},
    _DPM: {
        **_COMMON,
        **_ZERO_SNR,
        **_SIGMAS,
        **_THRESHOLD,
        **_FLOW,
        **_ENDS_AT_ZERO,
        "use_lu_lambdas": _SWITCH,
        "algorithm_type": Used("dpmsolver++", choice(("dpmsolver++", "sde-dpmsolver++"))),
        "solver_order": Used(2, integer(1, 2)),
        "solver_type": Only("midpoint", "logrho", "bh1", "bh2"),  # diffusers reads all as midpoint
        "lower_order_final": Unused("the step to no noise is of first order in any case"),
        "euler_at_final": Unused("the step to no noise is of first order in any case"),
        "lambda_min_clipped": Only(float("-inf")),
        "variance_type": Only(None, "fixed_small", "fixed_large"),
    },
    _UNIPC: {
        **_COMMON,
        **_ZERO_SNR,
        **_SIGMAS,
        **_SIGMA_ENDS,
        **_THRESHOLD,
        **_FLOW,
        **_ENDS_AT_ZERO,
        "solver_order": Only(2),
        "solver_type": Used("bh2", choice(_UNIPC_VARIANTS)),
        "predict_x0": Only(True),
        "lower_order_final": Only(True),
        "disable_corrector": Only([], ()),
        "solver_p": Only(None),
        "shift_terminal": Only(None),
    },
    _LCM: {
        **_COMMON,
        **_SD_BETAS,
        **_ZERO_SNR,
        **_NO_CLIP,
        **_THRESHOLD,
        "beta_schedule": Only("scaled_linear"),
        "timestep_spacing": Unused("original_inference_steps states the steps"),
        "steps_offset": Unused("original_inference_steps states the steps"),
        "set_alpha_to_one": Unused("the last step ends without noise in any case"),
        "original_inference_steps": Used(50, integer(1, MOST_STEPS)),
        "timestep_scaling": Used(10.0, number(0.5, 1e6)),
    },
}

# diffusers keeps the keys of a class in the config of another, and does not read them there.
_FOREIGN: Schema = {
    **{
        key: Unused("of another scheduler's class")
        for schema in _OWN.values()
        for key in schema
        if key not in _COMMON
    },
    **dict.fromkeys([*_NOISE_SPACINGS, "use_beta_sigmas", "use_flow_sigmas"], OFF),
}

SCHEDULER_KEYS: dict[str, Schema] = {
    kind: {**keys, **{key: rule for key, rule in _FOREIGN.items() if key not in keys}}
    for kind, keys in _OWN.items()
}
"""Schemas of `scheduler_config.json`, by diffusers' class."""


GRIDS = (TrainStepGrid, KarrasGrid, LogSnrGrid, ConsistencyGrid)


class Scheduling(NamedTuple):
    """A checkpoint's schedule and sampler; `init_noise` is that of `Sampler`."""

    schedule: ScaledLinear
    prediction: Prediction
    solver: AnySolver
    grid: TrainStepGrid | KarrasGrid | LogSnrGrid | ConsistencyGrid
    init_noise: Literal["unit", "schedule"]


def read_scheduling(config: Any, kind: str | None = None) -> Scheduling:
    """Read schedule, prediction type, solver and time grid of a checkpoint.

    Args:
      config: the parsed JSON.
      kind: diffusers' class, as `model_index.json` names it; None takes the config's.

    Raises:
      UserError: the config asks for what jaxdiff does not have; it names the key.
    """
    if kind is None and isinstance(config, Mapping):
        kind = config.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or kind not in SCHEDULER_KEYS:
        raise UserError(
            f"{WHAT}: jaxdiff does not support {kind}: expected {', '.join(SCHEDULER_KEYS)}; "
            "change _class_name, as the network works with any of them."
        )
    values = read_keys(WHAT, config, SCHEDULER_KEYS[kind])
    steps, spacing = values["num_train_timesteps"], values.get("timestep_spacing")
    for key, most in (("steps_offset", steps - 1), ("original_inference_steps", steps)):
        if values.get(key, 0) > most:
            raise UserError(
                f"{WHAT}: {key} is {values[key]} of {steps} num_train_timesteps: expected at most "
                f"{most}; change the config."
            )
    is_zero = values.get("rescale_betas_zero_snr", False)
    if is_zero and values["prediction_type"] == "eps" and spacing != "leading":
        raise UserError(
            f"{WHAT}: rescale_betas_zero_snr is true, prediction_type epsilon and timestep_spacing "
            f"{spacing}: expected v_prediction, sample, or leading, as eps does not determine the "
            "image in pure noise; change the config."
        )
    schedule = ScaledLinear(
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        num_train_steps=steps,
        zero_terminal_snr=is_zero,
        terminal_alpha_bar=LEAST_ALPHA_BAR if is_zero and kind in _IN_SIGMA else 0.0,
    )
    solver, grid = _solver(kind, values), _grid(kind, values, schedule)
    starts_at_sigma = kind in _EULERS and spacing != "leading"
    init_noise = "schedule" if starts_at_sigma else "unit"
    return Scheduling(schedule, values["prediction_type"], solver, grid, init_noise)


def _solver(kind: str, values: Mapping[str, Any]) -> AnySolver:
    if kind == "HeunDiscreteScheduler":
        return Heun(variable="sigma")
    if kind == _LCM:
        return LCM(time_scale=values["timestep_scaling"] * values["num_train_timesteps"])
    if kind == _UNIPC:
        return UniPC(variant=values["solver_type"])
    if kind != _DPM:
        return SCHEDULERS[(kind,)]()
    algorithm, order = values["algorithm_type"], values["solver_order"]
    if (kind, algorithm, order) not in SCHEDULERS:
        raise UserError(
            f"{WHAT}: algorithm_type is {algorithm!r} and solver_order {order!r}: expected "
            "dpmsolver++ with 2, or sde-dpmsolver++ with 1 or 2; change the config."
        )
    return SCHEDULERS[(kind, algorithm, order)]()


def _grid(
    kind: str, values: Mapping[str, Any], schedule: ScaledLinear
) -> TrainStepGrid | KarrasGrid | LogSnrGrid | ConsistencyGrid:
    steps = schedule.num_train_steps
    if kind == _LCM:
        distilled = values["original_inference_steps"]
        return ConsistencyGrid(distilled_steps=distilled, num_train_steps=steps)
    spacing, chosen = values["timestep_spacing"], [k for k in _NOISE_SPACINGS if values.get(k)]
    if len(chosen) > 1 or (chosen and schedule.zero_terminal_snr):
        others = [*chosen[1:], "rescale_betas_zero_snr"]
        raise UserError(
            f"{WHAT}: {chosen[0]} and {others[0]} are set, which jaxdiff does not support: "
            "expected one of them; change the config."
        )
    if chosen and kind in _EULERS and spacing != "linspace":
        raise UserError(
            f"{WHAT}: {chosen[0]} is set and timestep_spacing is {spacing!r}, which jaxdiff does "
            "not support: expected linspace; change the config."
        )
    if chosen:
        return _NOISE_SPACINGS[chosen[0]](schedule=schedule, last=1 / steps)
    return TrainStepGrid(
        spacing=spacing,
        offset=values["steps_offset"] if spacing == "leading" else 0,
        skip_last=kind in (_DPM, _UNIPC) and spacing != "trailing",
        rounded=kind not in _EULERS,
        ends_at="data" if values.get("set_alpha_to_one", True) else "first_step",
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
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    config = {
        "_class_name": kind,
        "num_train_timesteps": schedule.num_train_steps,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": predictions.get(scheduling.prediction, scheduling.prediction),
        **_grid_config(kind, grid, schedule),
        **dict(zip(("algorithm_type", "solver_order"), variant, strict=False)),
    }
    own = _OWN[kind]
    if "rescale_betas_zero_snr" in own:
        config["rescale_betas_zero_snr"] = schedule.zero_terminal_snr
    if "clip_sample" in own:
        config["clip_sample"] = False
    if "skip_prk_steps" in own:
        config["skip_prk_steps"] = True
    if isinstance(solver, UniPC):
        config["solver_type"] = solver.variant
    if isinstance(solver, LCM):
        config["timestep_scaling"] = solver.time_scale / schedule.num_train_steps
    read = read_scheduling(config)
    same_end = dataclasses.replace(schedule, terminal_alpha_bar=read.schedule.terminal_alpha_bar)
    expected = scheduling._replace(schedule=same_end)
    for name, ours, theirs in zip(Scheduling._fields, expected, read, strict=True):
        if ours != theirs:
            raise UserError(
                f"diffusers' {kind} has the {name} {theirs}, and this model {ours}: expected the "
                "former; change the model's sampler."
            )
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
        if "set_alpha_to_one" in _OWN[kind]:
            config["set_alpha_to_one"] = grid.ends_at == "data"
        return config
    for key, by_noise in _NOISE_SPACINGS.items():
        same = grid == by_noise(schedule=schedule, last=1 / schedule.num_train_steps)
        if same and isinstance(_OWN[kind].get(key), Used):
            return {"timestep_spacing": "linspace", key: True}
    raise UserError(
        f"diffusers' {kind} does not have the steps of {grid}: expected a "
        f"{'ConsistencyGrid' if kind == _LCM else 'TrainStepGrid'}; change the model's time grid."
    )
