"""Compile a pipeline's sampler ahead of time, into a folder that `CompiledFolder` reads."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json
from jaxdiff.pipelines.compiled import MANIFEST, load_program, read_programs
from jaxdiff.pipelines.exported import CompiledProgram, describe_program, export_program
from jaxdiff.pipelines.inputs import SampleRequest
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.program import SamplerSpec
from jaxdiff.sampling.sampler import Sampler


def compile_sampler(
    pipe: Pipeline,
    folder: epath.PathLike,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    mesh: Mesh | None = None,
    params: PyTree = None,
) -> CompiledProgram:
    """Trace and compile the sampler of plain prompts; nothing is sampled.

    Args:
      pipe: the pipeline.
      folder: to write into; JAX's compilation cache keeps the executable.
      size: width and height; the training images' by default.
      batch_size: images that each device samples at a time.
      sampler: settings, as for `Pipeline`.
      mesh: devices, which need not be attached; the pipeline's by default.
      params: parameters in the types of those devices; the pipeline's by default.

    Raises:
      UserError: an invalid argument, a folder that cannot be written to, or a program with calls
        that `jax.export` does not support.
    """
    request = SampleRequest.of(prompts="", size=size, batch_size=batch_size, sampler=sampler)
    call = pipe.prepare(request)
    spec, own = call.spec, call.params
    _, inputs, steps = next(call.rows())
    devices = spec.mesh if mesh is None else mesh
    factor = num_replicas(devices) // num_replicas(spec.mesh)
    arguments = (own if params is None else params, *_scaled((inputs, steps), factor))
    spec = dataclasses.replace(spec, mesh=devices)
    program = _store(epath.Path(folder), pipe.spec.name, spec, arguments)
    shardings = state_shardings(arguments[0], devices, pipe.spec.param_axes())
    _compile(epath.Path(folder), program.key, jax.tree.leaves(shardings))
    return program


def _scaled(tree: PyTree, factor: int) -> PyTree:
    """Return the shapes of a tree with `factor` times as many rows."""

    def scaled(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = np.asarray(leaf)
        return jax.ShapeDtypeStruct((leaf.shape[0] * factor, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(scaled, tree)


def _store(folder: epath.Path, name: str, spec: SamplerSpec, arguments: PyTree) -> CompiledProgram:
    """Write the program and its entry in the manifest."""
    data = export_program(spec, arguments)
    described = dataclasses.replace(describe_program(spec, arguments), model=name)
    write_whole(folder / f"{described.key}.stablehlo", data)
    there = read_programs(folder) if (folder / MANIFEST).exists() else []
    programs = [*(p for p in there if p.key != described.key), described]
    text = format_json({"programs": [dataclasses.asdict(p) for p in programs]}, indent=2)
    write_whole(folder / MANIFEST, f"{text}\n".encode())
    return described


def _compile(folder: epath.Path, key: str, shardings: Sequence[NamedSharding]) -> None:
    """Compile a stored program, whose first arguments are parameters of these shardings."""
    loaded = load_program(folder, key)
    # As at run time, where only the parameters are on the devices already.
    placed = [
        x if sharding is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in itertools.zip_longest(loaded.shapes, shardings)
    ]
    loaded.jitted.lower(*placed).compile()
