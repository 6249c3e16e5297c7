"""Programs that are compiled ahead of time, and what a pipeline does with them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxdiff.distributed.compilation_cache import keep_executables
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.pipelines import exported
from jaxdiff.pipelines.compile import compile_sampler
from jaxdiff.pipelines.compiled import EXECUTABLES, MANIFEST, CompiledFolder
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Euler, Heun

pytestmark = pytest.mark.optimized  # compares bits of what users compile
PEA, TOMATO = "a small red pea", "a green tomato with a stem"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline, tiny_bundle):
    """A folder with the tiny model's program, and with another one for two devices."""
    folder = tmp_path_factory.mktemp("compiled")
    compile_sampler(pipeline, folder, batch_size=3)
    single = Pipeline(tiny_bundle, devices=jax.devices()[:1])
    pair = local_mesh(jax.devices()[:2])
    compile_sampler(single, folder, batch_size=2, sampler=Sampler(solver=Heun()), mesh=pair)
    return folder


@pytest.fixture
def untraced(monkeypatch):
    """Fail where a sampler is traced."""

    def refuse(spec):
        raise AssertionError("traced")

    monkeypatch.setattr(exported, "compiled_sampler", refuse)


def test_a_stored_program_gives_the_same_bits_without_tracing(
    folder, pipeline, untraced, jax_cache
):
    stored = pipeline.with_programs(CompiledFolder(folder))
    assert (stored.batch_size(32, 32), stored.batch_size(64, 32)) == (3, 4)
    arguments = {"seeds": [5, 6, 7, 8], "num_steps": [3, 3, 2, 4], "output": "float"}
    prompts = [PEA, TOMATO, PEA, TOMATO]
    images = stored(prompts, **arguments)
    expected = pipeline(prompts, **arguments, batch_size=3)
    np.testing.assert_array_equal(images, expected)
    seen = []
    shown = stored(prompts, **arguments, callback=lambda step, x: seen.append((step, x.shape)))
    np.testing.assert_array_equal(shown, expected)
    assert seen[0] == (1, (4, 32, 32, 3))


def test_a_program_for_other_devices_is_found_there(folder, tiny_bundle, untraced, jax_cache):
    pair = Pipeline(tiny_bundle, devices=jax.devices()[2:4])
    stored = pair.with_programs(CompiledFolder(folder))
    asked = {"seeds": [1, 2, 3], "sampler": Sampler(solver=Heun()), "output": "float"}
    assert stored.batch_size(32, 32) == 2
    expected = pair([PEA] * 3, **asked, batch_size=2)
    np.testing.assert_array_equal(stored([PEA] * 3, **asked), expected)


def test_a_program_that_is_not_there_is_compiled_and_named(folder, pipeline, jax_cache):
    stored = pipeline.with_programs(CompiledFolder(folder))
    with pytest.warns(UserWarning, match=r"no program for 32x32, batches of 3 .* compiling"):
        image = stored([PEA], sampler=Sampler(solver=Euler()))
    expected = pipeline([PEA], sampler=Sampler(solver=Euler()), batch_size=3)
    np.testing.assert_array_equal(image, expected)


def test_the_batch_size_is_that_of_the_models_own_programs(folder, pipeline, tiny_bundle, tmp_path):
    spec = dataclasses.replace(tiny_bundle.spec, prediction="eps")
    others = Pipeline(tiny_bundle._replace(spec=spec)), Pipeline(tiny_bundle, quantize="int8")
    for other in others:
        assert other.with_programs(CompiledFolder(folder)).batch_size(32, 32) == 4
    program = CompiledFolder(folder).programs[0]
    for sizes, expected in (((2, 3, 1), 3), ((3, 4, 8), 4), ((8, 2), 8)):
        programs = [dataclasses.replace(program, batch_size=size) for size in sizes]
        manifest = {"programs": [dataclasses.asdict(p) for p in programs]}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        stored = pipeline.with_programs(CompiledFolder(tmp_path))
        assert stored.batch_size(32, 32) == expected


def test_executables_are_found_again(tmp_path, pipeline, jax_cache):
    jax.clear_caches()
    keep_executables(jax_cache(tmp_path) / EXECUTABLES, attached=True)
    compile_sampler(pipeline, tmp_path, batch_size=1)
    (file,) = (tmp_path / EXECUTABLES).glob("*/jit_call-*")
    jax.clear_caches()
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    pipeline.with_programs(CompiledFolder(tmp_path))([PEA])
    assert events.count("/jax/compilation_cache/cache_hits") >= 1
    assert list((tmp_path / EXECUTABLES).glob("*/jit_call-*")) == [file]


def test_a_folder_that_holds_no_programs_or_damaged_ones_is_refused(
    folder, pipeline, tmp_path, jax_cache
):
    with pytest.raises(UserError, match="holds no compiled programs"):
        CompiledFolder(tmp_path)
    for content in ({}, {"programs": [{}]}, {"programs": 3}):
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match="not that of compiled programs"):
            CompiledFolder(tmp_path)
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    stored = pipeline.with_programs(CompiledFolder(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        stored([PEA])
    for program in CompiledFolder(folder).programs:
        data = (folder / f"{program.key}.stablehlo").read_bytes()
        (tmp_path / f"{program.key}.stablehlo").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        stored([PEA])
