"""Traced samplers in the user's cache."""

import jax
import numpy as np
import pytest
from etils import epath
from jax._src.lax import linalg

from jaxdiff.config.serialization import accept_types
from jaxdiff.distributed.compilation_cache import FolderCache
from jaxdiff.pipelines import exported, program_cache
from jaxdiff.pipelines.exported import StoredSampler
from jaxdiff.pipelines.inputs import SampleRequest
from jaxdiff.pipelines.program_cache import ProgramCache
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Heun

PEA, TOMATO = "a small red pea", "a green tomato with a stem"


def programs_in(folder):
    return ProgramCache(FolderCache(epath.Path(folder)))


def arguments_of(pipeline, **asked):
    """The specification of a call, and what its program is called with."""
    call = pipeline.prepare(SampleRequest.of(prompts=[PEA], **asked))
    _, inputs, steps = next(call.rows())
    return call.spec, (call.params, inputs, steps)


@pytest.fixture
def traced(monkeypatch):
    """The specifications that are traced and stored."""
    traced = []

    def export(spec, arguments):
        traced.append(spec)
        return exported.export_program(spec, arguments)

    monkeypatch.setattr(program_cache, "export_program", export)
    return traced


@pytest.mark.optimized  # compares bits of what users compile
def test_a_later_run_traces_nothing_and_gives_the_same_bits(tmp_path, pipeline, traced):
    asked = {"seeds": [5, 6, 7, 8], "num_steps": [3, 3, 2, 4], "output": "float", "batch_size": 3}
    prompts = [PEA, TOMATO, PEA, TOMATO]
    expected = pipeline(prompts, **asked)
    for _ in range(2):
        stored, seen = pipeline.with_programs(programs_in(tmp_path)), []
        np.testing.assert_array_equal(stored(prompts, **asked), expected)
        shown = stored(prompts, **asked, callback=lambda step, x, seen=seen: seen.append(step))
        np.testing.assert_array_equal(shown, expected)
        assert (seen, len(traced)) == ([1, 2, 3, 4], 1)


def test_a_change_of_what_is_traced_is_another_program(tmp_path, pipeline, traced):
    def store(**asked):
        assert programs_in(tmp_path).load(*arguments_of(pipeline, **asked))
        return len(list(tmp_path.glob("sampler-*")))

    assert store() == 1
    assert store(num_steps=2, guidance_scale=3.0, seeds=[7]) == 1
    assert store(sampler=Sampler(solver=Heun())) == 2
    assert store(batch_size=1) == 3
    with jax.default_matmul_precision("bfloat16"):
        assert store() == 4
    assert store() == len(traced) == 4


def test_a_damaged_program_is_stored_again(tmp_path, pipeline, traced):
    call = arguments_of(pipeline)
    assert programs_in(tmp_path).load(*call)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:-100], b"\0" * 500):
        file.write_bytes(content)
        assert programs_in(tmp_path).load(*call)
        assert len(file.read_bytes()) == len(whole)
    assert len(traced) == 4


def test_what_cannot_be_stored_is_traced(tmp_path, pipeline, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no such call")

    monkeypatch.setattr(exported._exporter(), "export", refuse)
    spec, arguments = arguments_of(pipeline)
    programs = programs_in(tmp_path)
    assert programs.load(spec, arguments) is None
    assert not list(tmp_path.iterdir())
    shapes = exported.compiled_sampler(spec).eval_shape(*arguments, None)
    assert StoredSampler(spec, programs).eval_shape(*arguments, None) == shapes


def test_without_a_cache_or_with_a_plugin_there_are_none(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path))
    assert program_cache.program_cache() is not None
    with accept_types([Heun]):
        assert program_cache.program_cache() is None
    monkeypatch.setenv("JAXDIFF_CACHE", "off")
    assert program_cache.program_cache() is None


def test_scipy_is_imported_only_for_programs_that_need_it(monkeypatch):
    calls = []
    initialize = exported._if_needed(lambda: calls.append("imported"))
    monkeypatch.setattr(linalg, "initialize_lapack", initialize)

    def program(call):
        x = jax.ShapeDtypeStruct((3, 3), np.float32)
        return exported.LoadedProgram(bytes(jax.export.export(jax.jit(call))(x).serialize()))

    x = 2 * np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(program(lambda x: x + 1)(x), x + 1)
    assert calls == []
    np.testing.assert_allclose(program(jax.numpy.linalg.cholesky)(x), np.sqrt(x))
    assert calls == ["imported"]
