"""Parts of a third party: an objective, a data source, an evaluator, a solver and a guidance rule.

All of them are in one recipe, which trains, evaluates, and stores what it is made of.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising, LossInputs, LossOutputs, Objective
from jaxdiff.diffusion.process import add_noise, to_x0_eps
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.sampling.guidance.guidance import Estimates, Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solver import StepOutput, ddim_update
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.training.recipe import Config
from jaxdiff.training.run import run_recipe
from jaxdiff.training.tasks.diffusion import Pretrained
from jaxdiff.training.workdir import read_config


@dataclass(frozen=True, kw_only=True)
class StepDistillation(Objective):
    """Estimate at t what the average estimates at an earlier time, one step of the teacher away."""

    uses_teacher = True
    uses_ema = True
    step: float = 0.25

    def loss(self, inputs: LossInputs) -> LossOutputs:
        assert inputs.teacher is not None
        assert inputs.ema is not None
        time_keys, noise_keys = inputs.keys.split()
        uniform = jax.vmap(lambda key: jax.random.uniform(key, minval=self.step))
        t = uniform(time_keys.by_row())
        next_t = t - self.step
        x_t = add_noise(inputs.schedule, inputs.x0, noise_keys.normal(*inputs.x0.shape[1:]), t)
        x0, eps = self._estimate(inputs, inputs.teacher, x_t, t)
        target, _ = self._estimate(
            inputs, inputs.ema, add_noise(inputs.schedule, x0, eps, next_t), next_t
        )
        found, _ = self._estimate(inputs, inputs.model, x_t, t)
        error = jnp.mean((found - jax.lax.stop_gradient(target)) ** 2, axis=(1, 2, 3))
        return LossOutputs(error, t, {"teacher_norm": jnp.mean(x0**2)}, inputs.state)

    @staticmethod
    def _estimate(inputs: LossInputs, model: Any, x_t: jax.Array, t: jax.Array) -> Any:
        output, schedule = model(x_t, t, inputs.cond), inputs.schedule
        return to_x0_eps(inputs.prediction, output, x_t, schedule.alpha(t), schedule.sigma(t))


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Images that brighten from left to right, and from top to bottom."""

    length: int = 16

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        row = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
        image = np.stack([row if index % 2 else row.T] * 3, axis=-1)
        caption = "to the right" if index % 2 else "to the bottom"
        return {"image": image, "captions": [caption], "name": str(index)}

    def check(self) -> None:
        if self.length < 1:
            raise UserError(f"data.source.length is {self.length}: expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Brightness(Evaluator):
    """The mean of generated pixels, and an image of them."""

    name: ClassVar[str] = "brightness"
    samples: int = 2
    every: int = 2

    def check(self, spec: Any, data: Any) -> None:
        if not isinstance(data.source, Gradients):
            raise UserError("evaluator 'brightness' needs gradients: leave it out.")

    def evaluate(self, context: EvalContext) -> Report:
        images = context.generate(["to the right"] * self.samples)
        return Report(
            scalars={"mean": float(images.mean())}, images={"first": images[0]}, text="bright"
        )


@dataclass(frozen=True, kw_only=True)
class Midpoint:
    """A solver of second order: the estimate in the middle of a step is that of all of it."""

    def init(self, x: jax.Array) -> tuple[()]:
        return ()

    def step(self, denoise, x, solver_state, state, s, keys) -> StepOutput:
        first, next_state = denoise(x, s.t, state)
        middle = s._replace(
            next_t=(s.t + s.next_t) / 2,
            next_alpha=(s.alpha + s.next_alpha) / 2,
            next_sigma=(s.sigma + s.next_sigma) / 2,
        )
        x0, _ = denoise(ddim_update(x, first, middle), middle.next_t, state)
        return StepOutput(ddim_update(x, x0, s), first, solver_state, next_state)


@dataclass(frozen=True, kw_only=True)
class SmoothedGuidance:
    """Classifier-free guidance whose direction is a running mean over the steps."""

    decay: float = 0.5

    def init_state(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    def combine(
        self, estimates: Estimates, guidance_scale: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        state = self.decay * state + (1 - self.decay) * (estimates.cond - estimates.uncond)
        return estimates.cond + (guidance_scale - 1)[:, None, None, None] * state, state


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A rectified flow under another name."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def log_snr(self, t):
        return jnp.clip(2 * (jnp.log1p(-t) - jnp.log(t)), -40, 40)

    def time_at(self, noise_to_data):
        return noise_to_data / (1 + noise_to_data)


@dataclass(frozen=True, kw_only=True)
class EarlyGrid:
    """More steps at high noise."""

    def __call__(self, i, num_steps, num_tokens):
        return 1 - (i / num_steps) ** 2


@dataclass(frozen=True, kw_only=True)
class EarlyTimes:
    """More of the high noise."""

    def __call__(self, key, batch, num_tokens):
        return 1 - jax.random.uniform(key, batch) ** 2


@dataclass(frozen=True, kw_only=True)
class InverseWeighting:
    """Less of the low noise."""

    def __call__(self, log_snr, space):
        return jax.nn.sigmoid(-log_snr)


@dataclass(frozen=True, kw_only=True)
class SmoothThreshold:
    """A hyperbolic tangent."""

    def __call__(self, x0):
        return jnp.tanh(x0)


SMALLER_TYPES = (Linear, EarlyGrid, EarlyTimes, InverseWeighting, SmoothThreshold)
TYPES = (StepDistillation, Gradients, Brightness, Midpoint, SmoothedGuidance)


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tiny_bundle, tmp_path_factory) -> Config:
    """The tiny recipe with all of these parts; the tiny bundle is the teacher."""
    teacher = tmp_path_factory.mktemp("teacher")
    write_bundle(teacher, tiny_bundle, "float32")
    config = tiny_recipe(steps=4)
    sampler = Sampler(
        solver=Midpoint(), num_steps=3, guidance=Guidance(rule=SmoothedGuidance(decay=0.25))
    )
    task = dataclasses.replace(
        config.task,
        model=dataclasses.replace(config.task.model, sampler=sampler),
        objective=StepDistillation(),
        pretrained=Pretrained(denoiser=str(teacher), text_encoders=str(teacher)),
        curriculum=None,
    )
    data = dataclasses.replace(config.data, source=Gradients(), transforms=Transforms(size=32))
    return dataclasses.replace(config, task=task, data=data, evaluators=(Brightness(),))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert run_recipe(recipe, str(out)).finished
    return out


@pytest.fixture(scope="module")
def pipe(run):
    return jaxdiff.load(run, types=TYPES)


def test_an_objective_with_a_teacher_and_the_average_trains_on_a_foreign_source(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["teacher_norm"] > 0 for line in steps)
    assert len({line["teacher_norm"] for line in steps}) == 4


def test_an_evaluator_runs_at_its_interval_and_at_the_end(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "brightness/mean" in line] == [2, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["evaluation"]["brightness/mean"] < 255
    assert (run / "samples" / "step_000002_first.png").exists()


def test_a_run_is_read_with_the_types_that_the_user_names(run, recipe):
    assert read_config(run, TYPES) == recipe
    for missing in TYPES:
        if missing in (Midpoint, SmoothedGuidance):  # the model's; the others are the recipe's
            with pytest.raises(UserError, match=rf"is of type {missing.__name__}: .*types="):
                jaxdiff.load(run, types=[t for t in TYPES if t is not missing])
        with pytest.raises(UserError, match=rf"is of type {missing.__name__}: .*--plugin"):
            read_config(run, tuple(t for t in TYPES if t is not missing))


def test_the_model_samples_with_its_own_solver_and_guidance(pipe):
    assert pipe.spec.sampler.solver == Midpoint()
    own = pipe("to the right", guidance_scale=3.0)
    others = [Sampler(solver=DDIM()), Sampler(guidance=Guidance(rule=SmoothedGuidance()))]
    for sampler in others:
        assert not np.array_equal(own, pipe("to the right", guidance_scale=3.0, sampler=sampler))


def test_foreign_solvers_and_rules_recompile_for_no_scale_prompt_or_step_count(pipe, compilations):
    pipe("to the right", guidance_scale=3.0)
    compilations.clear()
    pipe("to the bottom", seeds=3, guidance_scale=2.0, num_steps=2)
    assert not compilations


def test_foreign_parts_work_on_a_pipeline_of_the_package(pipeline):
    sampler = Sampler(solver=Midpoint(), guidance=Guidance(rule=SmoothedGuidance()))
    image = pipeline("a small red pea", sampler=sampler, num_steps=2)
    again = pipeline(
        "a small red pea",
        sampler=sampler,
        num_steps=4,
        init=InitImage(image=image, strength=0.5),
    )
    assert image.shape == again.shape == (1, 32, 32, 3)


def test_an_image_has_the_same_bits_in_any_company(pipe):
    alone = pipe("to the right", seeds=5)
    both = pipe(["to the bottom", "to the right"], seeds=[4, 5])
    assert np.array_equal(alone[0], both[1])


def test_schedules_grids_times_weightings_and_thresholds_may_be_foreign(recipe, tmp_path):
    sampler = Sampler(solver=DDIM(), num_steps=2, grid=EarlyGrid(), threshold=SmoothThreshold())
    task = dataclasses.replace(
        recipe.task,
        model=dataclasses.replace(recipe.task.model, schedule=Linear(), sampler=sampler),
        objective=Denoising(times=EarlyTimes(), weighting=InverseWeighting()),
    )
    config = dataclasses.replace(recipe, task=task, evaluators=())
    assert run_recipe(config, str(tmp_path)).finished
    types = (*TYPES, *SMALLER_TYPES)
    assert read_config(tmp_path, types) == config
    for missing in SMALLER_TYPES:
        with pytest.raises(UserError, match=rf"is of type {missing.__name__}: .*types="):
            read_config(tmp_path, tuple(t for t in types if t is not missing))
    assert jaxdiff.load(tmp_path, types=types)("to the right").shape == (1, 32, 32, 3)
