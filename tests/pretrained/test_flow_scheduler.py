"""The config of diffusers' flow-matching scheduler: what is read, written and refused."""

import pytest

from jaxdiff.diffusion.time_grids import FlowGrid, TimeGrid
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift
from jaxdiff.errors import UserError
from jaxdiff.pretrained.flow_scheduler import (
    RENOISE,
    FlowScheduling,
    read_flow_scheduling,
    write_flow_scheduling,
)
from jaxdiff.sampling.solvers_ode import DDIM, Euler, Heun


@pytest.mark.parametrize(
    "scheduling",
    [
        FlowScheduling(Euler(), FlowGrid(shift=3.0)),
        FlowScheduling(Euler(), FlowGrid(token_shift=TokenShift(base=0.4, form="linear"))),
        FlowScheduling(RENOISE, FlowGrid(token_shift=EmpiricalShift(), terminal=0.02)),
    ],
)
def test_writing_is_the_inverse_of_reading(scheduling):
    by_steps = isinstance(scheduling.grid.token_shift, EmpiricalShift)
    written = write_flow_scheduling(scheduling)
    assert read_flow_scheduling(written, by_steps=by_steps) == scheduling


def test_ddim_is_the_euler_method_on_a_rectified_flow():
    written = write_flow_scheduling(FlowScheduling(DDIM(), FlowGrid()))
    assert read_flow_scheduling(written) == FlowScheduling(Euler(), FlowGrid())


@pytest.mark.parametrize(
    ("solver", "grid", "message"),
    [
        (Heun(), FlowGrid(), "Heun with FlowGrid"),
        (Euler(), TimeGrid(), "Euler with TimeGrid"),
        (Euler(), FlowGrid(shift=2.0, token_shift=TokenShift()), "one shift"),
    ],
)
def test_what_diffusers_lacks_is_refused(solver, grid, message):
    with pytest.raises(UserError, match=message):
        write_flow_scheduling(FlowScheduling(solver, grid))


def test_another_scheduler_is_refused():
    with pytest.raises(UserError, match="does not support UniPCMultistepScheduler"):
        read_flow_scheduling({"_class_name": "UniPCMultistepScheduler"})


@pytest.mark.parametrize("config", [None, [], "x"])
def test_a_config_is_an_object(config):
    with pytest.raises(UserError, match="expected a JSON object"):
        read_flow_scheduling(config)
