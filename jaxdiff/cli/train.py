"""`jaxdiff train`: train a recipe, or print its resolved keys."""

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from typing import Annotated

import jax
import tyro
from jax.sharding import AbstractMesh, Mesh

from jaxdiff.cli.parsing import NO_PREFIX
from jaxdiff.cli.recipe_flags import parse_recipe_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.serialization import flatten, to_json
from jaxdiff.distributed.distributed_init import Hosts, join_hosts
from jaxdiff.distributed.mesh import AXES, MeshConfig, abstract_mesh, make_mesh, parse_slices
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import write_text
from jaxdiff.io.text import check_text
from jaxdiff.planning.plan import count_params, state_bytes_per_device
from jaxdiff.training.abstract import abstract_frozen, abstract_state
from jaxdiff.training.recipe import Config
from jaxdiff.training.run import run_recipe


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a recipe.

    The recipe comes first: its name (`jaxdiff recipes` lists them) or a Python file; `produce` by
    default. Every key of it is a flag. The same command resumes an interrupted run.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    topology: str | None = None
    """Hardware that the recipe has settings for, such as v5e:16x16: mesh, micro-batches, remat."""
    out: str | None = None
    """Folder of the run, local or gs://; runs/NAME by default."""
    resume: bool = False
    """Resume from the newest checkpoint in the folder, which is the default."""
    fresh: bool = False
    """Remove the run in the folder and start from step 0."""
    show: bool = False
    """Print the resolved recipe, its parameters and the bytes of state per device, then exit."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Print errors and warnings only."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Also log what JAX compiles."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


def train_command(arguments: list[str]) -> None:
    """Run `jaxdiff train [RECIPE] [--path.to.key VALUE ...] [--out DIR] [--resume | --fresh]`."""
    options = parse_recipe_flags(TrainOptions, arguments, prog="jaxdiff train")
    for one, other in (("resume", "fresh"), ("quiet", "verbose")):
        if getattr(options, one) and getattr(options, other):
            raise UserError(f"--{one} and --{other} exclude each other: give one of them.")
    known = [planned.topology for planned in options.config.slices]
    if options.topology is not None and parse_slices(options.topology)[1] not in known:
        raise UserError(
            f"--topology {options.topology}: {options.config.name} has no settings for it: "
            f"expected one of {', '.join(known) or 'none'}; give --mesh.data and --mesh.fsdp."
        )
    if options.show:
        write_text(describe_recipe(options.config))
        return
    out = options.out or f"runs/{options.config.name}"
    check_text(out, "The folder of the run")
    with (
        _silenced(options.quiet),
        jax.log_compiles(options.verbose),
        join_hosts(options.hosts),
    ):
        result = run_recipe(options.config, out, fresh=options.fresh)
    # Status 0 after SIGTERM, which a scheduler sends before it starts the command again.
    if result.stopped_by is not None and result.stopped_by != signal.SIGTERM:
        raise SystemExit(128 + result.stopped_by)


@contextlib.contextmanager
def _silenced(quiet: bool) -> Iterator[None]:
    """Discard standard output if `quiet`; errors and warnings go to standard error."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def describe_recipe(config: Config) -> str:
    """Return every key of a recipe with its value, then parameter counts and state sizes.

    Nothing is allocated, read or downloaded. The state is that of one device: parameters, EMA,
    optimizer state and frozen weights, sharded over the recipe's mesh.

    Raises:
      UserError: the recipe's mesh does not fit the devices.
    """
    lines = []
    for key, value in flatten(to_json(config)).items():
        name = key.removesuffix("type").removesuffix(".")
        if key.endswith(".type"):
            lines.append(f"{name} = {value}")
        elif key != "type":
            lines.append(f"{key} = {json.dumps(value)}")
    mesh = _mesh_of(config.mesh)
    state, frozen = abstract_state(config), abstract_frozen(config)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    mib = state_bytes_per_device(config, mesh) / 2**20
    lines += [
        "",
        f"trained parameters: {count_params(state.params):,}",
        f"frozen parameters: {count_params(frozen):,}",
        f"state per device: {mib:,.1f} MiB ({axes or 'one device'})",
    ]
    return "\n".join(lines)


def _mesh_of(config: MeshConfig) -> Mesh | AbstractMesh:
    """Return the recipe's mesh: abstract if its size is given, else over the devices here."""
    is_given = all(getattr(config, axis) > 0 for axis in AXES)
    return abstract_mesh(config) if is_given else make_mesh(config)
