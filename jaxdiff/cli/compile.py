"""`jaxdiff compile`: compile a model's sampler ahead of time, for this machine or a TPU slice."""

import dataclasses
import os
from typing import Annotated

import jax
import tyro

from jaxdiff.cli.parsing import parse_flags
from jaxdiff.cli.progress import show_progress
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, flag
from jaxdiff.distributed.compilation_cache import keep_executables
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.io.files import make_folder
from jaxdiff.io.terminal import write_line
from jaxdiff.models.layers import ComputeType, cast
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.compile import compile_sampler
from jaxdiff.pipelines.compiled import EXECUTABLES
from jaxdiff.pipelines.exported import CompiledProgram
from jaxdiff.pipelines.load import DEFAULT_MODEL
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import resolve_settings
from jaxdiff.pipelines.settings import GenerationSettings
from jaxdiff.planning.topology import find_topology
from jaxdiff.pretrained.load import load_bundle


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Compile a model's sampler for prompts of one size and write it to a folder.

    `jaxdiff sample --compiled DIR` then neither traces nor compiles it. A folder takes several.
    """

    model: Annotated[str, tyro.conf.Positional] = DEFAULT_MODEL
    """Run, model folder, shipped:NAME or hub OWNER/NAME, as for `jaxdiff sample --model`."""
    out: str = "compiled"
    """Folder for the programs."""
    size: str | None = None
    """WIDTHxHEIGHT of the images; by default that of the training images."""
    batch_size: Count | None = None
    """Images that each device samples at a time; by default as many as `jaxdiff sample`."""
    topology: str | None = None
    """TPU slice to compile for, such as v5e:2x4, without a TPU; by default this machine."""
    solver: str | None = None
    """Solver; the model's by default."""
    dtype: ComputeType | None = None
    """Type to compute in, as for `jaxdiff sample`."""


def compile_command(arguments: list[str]) -> None:
    """Run `jaxdiff compile [MODEL] [--size WIDTHxHEIGHT] [--batch-size N] [--topology NAME] ...`.

    Raises:
      UserError: there is no such model or topology, or the size does not fit the model.
    """
    options = parse_flags(CompileOptions, arguments, prog="jaxdiff compile")
    if options.topology is not None and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # no other device is used
    compile_model(options)


def compile_model(options: CompileOptions) -> None:
    """Write the program that the options describe, and print what it is for.

    Raises:
      UserError: as `compile_command` raises.
    """
    with show_progress(f"Compiling {options.model}"):
        program = _compile(options)
    write_line(
        f"Wrote the program of {program.model} for {program.width}x{program.height}, batches of "
        f"{program.batch_size} on {program.devices} {program.device_kind}, to {options.out}"
    )


def _compile(options: CompileOptions) -> CompiledProgram:
    folder = make_folder(options.out)  # before minutes of compilation
    values = {"size": options.size, "solver": options.solver}
    asked = dataclasses.replace(GenerationSettings.read(values, flag), prompt="a prompt")
    bundle = load_bundle(options.model)
    pipe, mesh, params = Pipeline(bundle, dtype=options.dtype), None, None
    if options.topology is not None:
        topology = find_topology(options.topology)
        if topology.proxy_topology:
            raise UserError(
                f"--topology {options.topology}: XLA compiles for GPUs only where there is one; "
                "run jaxdiff compile there, without --topology."
            )
        devices = topology.devices
        pipe = Pipeline(bundle, dtype=options.dtype, devices=jax.local_devices()[:1])
        mesh, params = local_mesh(devices), bundle.params
        if options.dtype is not None:
            params = cast(params, options.dtype)
        elif devices[0].platform == "cpu":
            params = pipe.params
    settings = resolve_settings(asked, pipe, called=flag)
    batch_size = options.batch_size
    if batch_size is None and mesh is not None:
        batch_size = default_batch_size(*settings.size, mesh.devices.flat[0].platform)
    # Programs for the CPU need this host's instructions.
    is_here = mesh is None or mesh.devices.flat[0].platform == "cpu"
    keep_executables(folder / EXECUTABLES, attached=is_here)
    return compile_sampler(
        pipe,
        folder,
        size=settings.size,
        batch_size=batch_size,
        sampler=settings.sampler,
        mesh=mesh,
        params=params,
    )
