"""Traces have the steps, scopes and phases that are looked for, and change nothing else."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.training import profiler
from jaxdiff.training.abstract import abstract_batch, abstract_frozen, abstract_state
from jaxdiff.training.loop import compile_step, train
from jaxdiff.training.profiler import StepTrace, traced


def quiet(_: str) -> None:
    pass


def events(folder) -> list[dict]:
    (path,) = epath.Path(folder).glob("plugins/profile/*/*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


@pytest.fixture(scope="module")
def profiled(tiny_recipe, tmp_path_factory):
    """A run whose steps 2 and 3 are traced, what it logged, and its folder."""
    folder, logged = tmp_path_factory.mktemp("profiled"), []
    config = tiny_recipe(steps=4, checkpoint_every=4, profile_at=2, profile_steps=2)
    return train(config, folder, log=logged.append), logged, folder


def test_a_trace_has_the_steps_that_were_asked_for(profiled):
    _, logged, folder = profiled
    assert f"Trace: {folder / 'trace'}" in logged
    found = events(folder / "trace")
    steps = [event for event in found if event.get("name") == "train"]
    assert [event["args"]["step_num"] for event in steps] == ["2", "3"]
    phases = [event["name"] for event in found if event.get("name") in ("data", "device wait")]
    assert phases == ["data", "device wait"] * 2  # a step's results are read during the next


def test_a_step_that_the_run_does_not_take_is_said(tmp_path):
    logged = []
    with StepTrace(epath.Path(tmp_path), first=9, steps=3, log=logged.append) as trace:
        trace.before(1, None)
    assert logged == ["No trace: this run did not take step 9 (train.profile_at)."]


def test_a_trace_does_not_change_the_fingerprint(profiled, tiny_recipe, tmp_path):
    result = train(tiny_recipe(steps=4, checkpoint_every=4), tmp_path, log=quiet)
    assert result.summary["fingerprint"] == profiled[0].summary["fingerprint"]
    assert not (tmp_path / "trace").exists()


def test_the_program_names_its_parts(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(), mesh=MeshConfig(data=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, frozen = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    step = compile_step(config, mesh, *(state_shardings(t, mesh, axes) for t in (state, frozen)))
    text = step.lower(state, frozen, abstract_batch(config)).as_text(debug_info=True)
    for scope in ("jvp(loss)", "transpose(jvp(loss))", "optimizer", "ema"):
        assert f"jit(train_step)/{scope}/" in text
    for scope in ("text_encoder", "block/attention"):
        assert f"/{scope}/" in text


def test_a_run_that_ends_within_a_trace_writes_it(tmp_path):
    with StepTrace(epath.Path(tmp_path), first=1, steps=9, log=quiet) as trace:
        trace.before(1, jax.numpy.zeros(()))
    assert events(tmp_path / "trace")


def test_storage_that_is_not_local_receives_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "is_local", lambda _: False)
    with traced(tmp_path / "there"):
        np.asarray(jax.jit(lambda x: x + 1)(1.0))
    names = {path.suffix for path in (tmp_path / "there").rglob("*.*")}
    assert names == {".gz", ".pb"}
    assert events(tmp_path / "there")
