"""Solver and time grid of flow-matching checkpoints, from diffusers' `scheduler_config.json`.

The pipelines of these models pass sigmas 1, 1 - 1/n, ..., 1/n to FlowMatchEulerDiscreteScheduler.
With `use_dynamic_shifting` they also pass a shift: FLUX.1 and Z-Image one that is linear in the
image tokens, from the config's keys, and FLUX.2 one that depends on the steps too.
"""

from typing import Any, NamedTuple

from jaxdiff.diffusion.time_grids import AnyGrid, FlowGrid
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift
from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import (
    FLAG,
    OFF,
    Only,
    Schema,
    Used,
    choice,
    integer,
    named_fields,
    number,
    optional,
    read_keys,
    write_keys,
)
from jaxdiff.pretrained.scheduler import WHAT
from jaxdiff.sampling.solvers import AnySolver
from jaxdiff.sampling.solvers_ode import DDIM, Euler
from jaxdiff.sampling.solvers_sde import LCM

KIND = "FlowMatchEulerDiscreteScheduler"

RENOISE = LCM(time_scale=1e9)
"""The solver of `stochastic_sampling`: x' = alpha' x0 + sigma' n, without LCM's skip."""

FLOW_KEYS: Schema = {
    "num_train_timesteps": Only(1000),
    "shift": Used(1.0, number(0, 1e6)),
    "use_dynamic_shifting": Used(False, FLAG),
    "base_shift": Used(0.5, number(0, 100), "base"),
    "max_shift": Used(1.15, number(0, 100), "most"),
    "base_image_seq_len": Used(256, integer(1, 2**24), "base_tokens"),
    "max_image_seq_len": Used(4096, integer(1, 2**24), "most_tokens"),
    "time_shift_type": Used("exponential", choice(("exponential", "linear")), "form"),
    "shift_terminal": Used(None, optional(number(0, 1))),
    "invert_sigmas": OFF,
    "use_karras_sigmas": OFF,
    "use_exponential_sigmas": OFF,
    "use_beta_sigmas": OFF,
    "use_flow_sigmas": OFF,  # of another class, and read by pipelines
    "stochastic_sampling": Used(False, FLAG),
}


class FlowScheduling(NamedTuple):
    """Solver and time grid of a flow-matching checkpoint."""

    solver: AnySolver
    grid: AnyGrid


def read_flow_scheduling(config: Any, *, by_steps: bool = False) -> FlowScheduling:
    """Read solver and time grid of a checkpoint.

    Args:
      config: the parsed JSON.
      by_steps: whether the pipeline's dynamic shift depends on the steps too, as that of FLUX.2,
        which ignores the keys of the shift by tokens.

    Raises:
      UserError: the config asks for what jaxdiff does not have; it names the key.
    """
    kind = config.get("_class_name", KIND) if isinstance(config, dict) else KIND
    if kind != KIND:
        raise UserError(
            f"{WHAT}: jaxdiff does not support {kind} for this model: expected {KIND}; change "
            "_class_name, as the network works with it."
        )
    values = read_keys(WHAT, config, FLOW_KEYS)
    solver = RENOISE if values["stochastic_sampling"] else Euler()
    terminal = values["shift_terminal"]
    if not values["use_dynamic_shifting"]:
        return FlowScheduling(solver, FlowGrid(shift=values["shift"], terminal=terminal))
    if by_steps and values["time_shift_type"] != "exponential":
        raise UserError(
            f"{WHAT}: time_shift_type is linear, which jaxdiff does not support for this model: "
            "expected exponential; use another model."
        )
    try:
        token_shift = (
            EmpiricalShift() if by_steps else TokenShift(**named_fields(values, FLOW_KEYS))
        )
    except UserError as error:
        raise UserError(
            f"{WHAT}: base_shift, max_shift, base_image_seq_len, max_image_seq_len and "
            f"time_shift_type do not fit each other: {error}"
        ) from error
    return FlowScheduling(solver, FlowGrid(token_shift=token_shift, terminal=terminal))


def write_flow_scheduling(scheduling: FlowScheduling) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_flow_scheduling`.

    Raises:
      UserError: diffusers has no such solver, or not with this grid.
    """
    solver, grid = scheduling
    if not isinstance(grid, FlowGrid) or solver not in (Euler(), DDIM(), RENOISE):
        raise UserError(
            f"diffusers' {KIND} does not have {type(solver).__name__} with {type(grid).__name__}: "
            "expected Euler with FlowGrid; change the model's sampler."
        )
    shift = grid.token_shift
    if shift is not None and grid.shift != 1:
        raise UserError(
            f"diffusers' {KIND} has one shift, and the model's FlowGrid two: expected shift=1 "
            "beside token_shift; change the model's sampler."
        )
    return {
        "_class_name": KIND,
        "num_train_timesteps": 1000,
        "shift": grid.shift,
        "use_dynamic_shifting": shift is not None,
        **(write_keys(shift, FLOW_KEYS) if isinstance(shift, TokenShift) else {}),
        "shift_terminal": grid.terminal,
        "stochastic_sampling": solver == RENOISE,
    }
