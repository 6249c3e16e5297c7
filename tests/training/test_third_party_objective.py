"""A user's objective with two times, a teacher, the EMA and a state."""

import dataclasses
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.objectives import LossInputs, LossOutputs, Objective
from jaxdiff.diffusion.process import add_noise
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import TextInputs, full_size_crop
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.denoisers.dit import DiT, DiTConfig
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.training.initial_weights import abstract_frozen_params
from jaxdiff.training.loop import train
from jaxdiff.training.tasks.diffusion import Pretrained
from jaxdiff.training.workdir import read_config

pytestmark = pytest.mark.slow

STEPS = 4


class TwoTimeDiT(DiT):
    """A DiT that also reads the time that it is to go to."""

    def __call__(self, x, t, cond, next_t=None):
        out = super().__call__(x, t, cond)
        if next_t is None:
            return out
        return out + 0.1 * (t - next_t)[:, None, None, None] * super().__call__(x, next_t, cond)


@dataclass(frozen=True, kw_only=True)
class TwoTimeDiTConfig(Denoiser):
    """Its size."""

    base: DiTConfig

    @property
    def channels(self):
        return self.base.channels

    @property
    def text_width(self):
        return self.base.text_width

    @property
    def pooled_width(self):
        return self.base.pooled_width

    @property
    def size_multiple(self):
        return self.base.size_multiple

    def build(self, *, rngs):
        return TwoTimeDiT(self.base, rngs=rngs)

    def flops(self, *, height, width, text_length):
        return 2 * self.base.flops(height=height, width=width, text_length=text_length)


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """Match the average's estimate at a second time, and a guided teacher's at the first.

    The scale of the teacher's term is a running mean of its size, which is carried along.
    """

    uses_uncond = True
    uses_teacher = True
    uses_ema = True

    decay: float = 0.5
    guidance: float = 2.0

    def init_state(self):
        return {"steps": jnp.zeros((), jnp.int32), "size": jnp.ones(())}

    def loss(self, inputs: LossInputs) -> LossOutputs:
        time_keys, noise_keys = inputs.keys.split()
        both = jax.vmap(lambda key: jax.random.uniform(key, 2))(time_keys.by_row())
        t, next_t = jnp.sort(both.T, axis=0)[::-1]
        eps = noise_keys.normal(*inputs.x0.shape[1:])
        x_t, x_next = (add_noise(inputs.schedule, inputs.x0, eps, s) for s in (t, next_t))
        assert inputs.teacher is not None
        assert inputs.ema is not None
        given, absent = (inputs.teacher(x_t, t, c) for c in (inputs.cond, inputs.uncond))
        guided = jax.lax.stop_gradient(absent + self.guidance * (given - absent))
        target = jax.lax.stop_gradient(inputs.ema(x_next, next_t, inputs.cond))
        output = inputs.model(x_t, t, inputs.cond, next_t)
        mean = lambda error: jnp.mean(error**2, axis=(1, 2, 3))  # noqa: E731
        teaching = mean(output - guided)
        size = self.decay * inputs.state["size"] + (1 - self.decay) * jnp.mean(teaching)
        size = jax.lax.stop_gradient(size)
        state = {"steps": inputs.state["steps"] + 1, "size": size}
        loss = mean(output - target) + teaching / size
        return LossOutputs(loss, t, {"teaching": jnp.mean(teaching)}, state)


@pytest.fixture(scope="module")
def config(tiny_recipe, tmp_path_factory):
    """The tiny recipe with that network and that objective, and a teacher on disk."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_recipe(steps=STEPS)
    task = config.task
    model = dataclasses.replace(task.model, denoiser=TwoTimeDiTConfig(base=task.model.denoiser))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), task.model.abstract_params()
    )
    tokenizer = Tokenizer.train(["a small red pea"] * 9, vocab_size=600, length=16)
    write_bundle(folder, Bundle(task.model, params, {"text": tokenizer}), "float32")
    task = dataclasses.replace(
        task,
        model=model,
        objective=Consistency(),
        pretrained=Pretrained(denoiser=str(folder)),
        curriculum=None,
    )
    return dataclasses.replace(config, task=task)


def quiet(_):
    pass


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return train(config, folder, log=quiet), folder


def test_it_trains_and_carries_its_state_along(config, straight):
    result, folder = straight
    assert result.finished
    _, state = result.state.task_state
    assert int(state["steps"]) == STEPS
    assert float(state["size"]) != 1
    lines = records(folder)
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite([r["loss"], r["teaching"]]).all() for r in lines)
    assert len({r["teaching"] for r in lines}) == STEPS


def test_the_teacher_is_frozen_and_kept_apart_from_the_trained_denoiser(config, straight):
    result, _ = straight
    assert set(config.task.frozen_parts()) == {("teacher", "denoiser")}
    assert set(config.task.initial_parts()) == {("denoiser",)}
    assert set(abstract_frozen_params(config.task)) == {"teacher"}
    assert set(result.frozen) == {"teacher", "absent_text"}
    teacher = result.frozen["teacher"]["denoiser"]
    differs = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), teacher, result.state.params["denoiser"]
    )
    assert any(jax.tree.leaves(differs))
    # What is sampled, evaluated and exported has neither.
    full = config.task.model_params(result.state.ema, result.frozen)
    assert set(full) == {"denoiser", "text_encoders"}


def test_resuming_equals_a_run_without_a_stop_bit_for_bit(config, straight, tmp_path):
    expected, folder = straight
    half = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=2),
        optimizer=dataclasses.replace(config.optimizer),
    )
    assert train(half, tmp_path, log=quiet).summary["step"] == 2
    logged = []
    result = train(config, tmp_path, log=logged.append)
    assert f"Resuming at step 2 of {STEPS}." in logged
    assert result.summary["fingerprint"] == expected.summary["fingerprint"]
    jax.tree.map(np.testing.assert_array_equal, result.state.task_state, expected.state.task_state)
    figures = ("step", "loss", "teaching", "grad_norm")
    ours, theirs = ([[r[f] for f in figures] for r in records(x)] for x in (tmp_path, folder))
    assert ours == theirs


def test_the_recipe_of_the_run_is_read_with_the_types_that_it_names(config, straight):
    _, folder = straight
    with pytest.raises(UserError, match="is of type TwoTimeDiTConfig: expected DiTConfig"):
        read_config(folder)
    assert read_config(folder, (TwoTimeDiTConfig, Consistency)) == config


def test_gradients_reach_the_model_alone(config):
    """Neither the teacher, nor the average, nor the state is trained."""
    task = config.task
    rng = np.random.default_rng(1)

    def random_like(tree):
        return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), tree)

    params = random_like(jax.eval_shape(lambda: task.init_params(nnx.Rngs(0))))
    tokenizer = Tokenizer.train(["a small red pea"] * 9, vocab_size=600, length=16)
    frozen = random_like(abstract_frozen_params(task)) | jax.tree.map(
        jnp.asarray, task.constants({"text": tokenizer})
    )
    ids = jnp.asarray(tokenizer(["a red pea", "a pea"]))
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 32, 32, 3), np.uint8)),
        "text": TextInputs({"text": ids}, jnp.zeros(2, bool)),
        "size_crop": full_size_crop(32, 32, 2),
    }

    @jax.jit
    def gradients(params, ema, teacher):
        def loss(params, ema, teacher):
            return task.loss(
                params,
                frozen | {"teacher": teacher},
                batch,
                RowKeys.whole(jax.random.key(0), 2),
                task.init_state(),
                ema,
            )[0]

        return jax.grad(loss, argnums=(0, 1, 2))(params, ema, teacher)

    found, of_ema, of_teacher = gradients(params, random_like(params), frozen["teacher"])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 0
    assert not any(np.any(x) for x in jax.tree.leaves((of_ema, of_teacher)))


def test_an_objective_with_a_teacher_needs_a_pretrained_denoiser(config):
    with pytest.raises(UserError, match="objectives with a teacher need a trained denoiser"):
        dataclasses.replace(config.task, pretrained=Pretrained())
