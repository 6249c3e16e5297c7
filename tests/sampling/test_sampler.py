"""Sampler settings: inheritance, defaults, and JSON and back."""

import json
from dataclasses import dataclass

import pytest

from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.guidance.thresholds import StaticThreshold
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solver import StepOutput, ddim_update
from jaxdiff.sampling.solvers_ode import DDIM, DPMSolverPP2M

FULL = Guidance(
    interval=(0.1, 0.8),
    rescale=0.5,
    apg=APG(eta=0.5, momentum=-0.5, norm_threshold=8.0),
    cfg_zero_star=CFGZeroStar(zero_steps=2),
    clip=ClipGuidance(scale=2.0),
)


@dataclass(frozen=True, kw_only=True)
class OwnSolver:
    strength: float = 1.0

    def init(self, x):
        return ()

    def step(self, denoise, x, solver_state, state, s, keys):
        x0, state = denoise(x, s.t, state)
        return StepOutput(ddim_update(x, x0, s), x0, solver_state, state)


@pytest.mark.parametrize("value", [Sampler(), Sampler(guidance=FULL, wrap=(True, False)), FULL])
def test_settings_survive_json(value):
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def test_a_solver_of_ones_own_survives_json_where_its_type_is_named():
    value = Sampler(solver=OwnSolver(strength=0.5))
    stored = json.loads(json.dumps(to_json(value)))
    assert from_json(Sampler, stored, types=[OwnSolver]) == value
    with pytest.raises(UserError, match="name a type of your own"):
        from_json(Sampler, stored)


def test_fields_that_are_none_inherit():
    model = Sampler(solver=DDIM(), num_steps=7, guidance=Guidance(rescale=0.5, apg=APG()))
    asked = Sampler(num_steps=9, guidance=Guidance(rescale=0.0), threshold=StaticThreshold())
    found = asked.inherit(model)
    assert found.solver == DDIM()
    assert found.num_steps == 9
    assert found.guidance == Guidance(rescale=0.0, apg=APG())
    assert found.threshold == StaticThreshold()


def test_what_nobody_sets_has_a_default():
    found = Sampler().resolve()
    assert found.solver == DPMSolverPP2M()
    assert found.guidance.active_interval == (0.0, 1.0)
    assert found.guidance.rescale_fraction == 0
    assert found.threshold is None


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"resample_steps": 0}, {"overlap": 1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=r"is (0|1\.0)"):
        Sampler(**wrong)
