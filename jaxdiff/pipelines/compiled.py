"""Programs that are compiled ahead of time, in a folder.

    programs.json        what was compiled
    KEY.stablehlo        a program that needs no tracing, of `jax.export`
    executables/         of `jaxdiff.distributed.compilation_cache`: needs no compilation either

A program belongs to a model without its weights, to a size and to a batch size; its key also holds
the versions and jaxdiff's own code. Nothing is unpickled, but a program is one: use folders of
people whose code you would run.
"""

import dataclasses
import hashlib
import warnings
from importlib.util import find_spec
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.distributed.compilation_cache import read_executables
from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes
from jaxdiff.io.text import read_json
from jaxdiff.io.user_cache import package_digest
from jaxdiff.pipelines.program import SampleInputs, SamplerSpec, Steps, compiled_sampler

MANIFEST = "programs.json"
EXECUTABLES = "executables"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """An entry of the manifest.

    Attributes:
      key: name of the program's file.
      model: its name.
      width: of the images.
      height: of the images.
      batch_size: images that each replica samples at a time.
      platform: cpu, gpu or tpu.
      devices: their number.
      replicas: of the model on them.
    """

    key: str
    model: str
    width: int
    height: int
    batch_size: int
    platform: str
    devices: int
    replicas: int


class CompiledFolder:
    """The programs of a folder, read on demand; the pipeline compiles those that it lacks.

    Raises:
      UserError: the folder holds no programs.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)
        self._loaded: dict[str, LoadedProgram | None] = {}
        self.programs = read_programs(self._folder)
        read_executables(self._folder / EXECUTABLES)

    def batch_size(self, width: int, height: int, mesh: Mesh) -> int | None:
        """Return the batch size of the programs for a size on these devices; None without any."""
        kind = width, height, mesh.devices.flat[0].platform, mesh.size, num_replicas(mesh)
        for p in self.programs:
            if (p.width, p.height, p.platform, p.devices, p.replicas) == kind:
                return p.batch_size
        return None

    def sampler(self, spec: SamplerSpec) -> "CompiledSampler":
        """Return the sampler of a specification, in place of `compiled_sampler`."""
        return CompiledSampler(spec, self)

    def load(self, spec: SamplerSpec, arguments: PyTree) -> "LoadedProgram | None":
        """Return the program for arguments of these shapes; None if the folder has none."""
        wanted = describe_program(spec, arguments)
        if wanted.key not in self._loaded:
            there = any(program.key == wanted.key for program in self.programs)
            self._loaded[wanted.key] = load_program(self._folder, wanted.key) if there else None
            if not there:
                warnings.warn(
                    f"{self._folder} has no program for {wanted.width}x{wanted.height}, batches of "
                    f"{wanted.batch_size} on {wanted.devices} {wanted.platform} and these "
                    "settings, or is of other versions: compiling.",
                    stacklevel=2,
                )
        return self._loaded[wanted.key]


class LoadedProgram:
    """A stored program, to be called with flat arguments."""

    def __init__(self, exported: Any):
        self.call = jax.jit(exported.call)
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals]


class CompiledSampler:
    """A sampler of a folder, called like that of `compiled_sampler`; its state is a list."""

    def __init__(self, spec: SamplerSpec, folder: CompiledFolder):
        self._spec, self._folder = spec, folder

    def eval_shape(
        self, params: PyTree, inputs: SampleInputs, steps: Steps, state: None
    ) -> tuple[Any, Any]:
        """Return the shapes of the state, second."""
        loaded = self._folder.load(self._spec, (params, inputs, steps))
        if loaded is None:
            return compiled_sampler(self._spec).eval_shape(params, inputs, steps, state)
        return None, loaded.shapes[len(jax.tree.leaves((params, inputs, steps))) :]

    def __call__(
        self, params: PyTree, inputs: SampleInputs, steps: Steps, state: Any
    ) -> tuple[Any, Any]:
        """Take a segment of the steps."""
        loaded = self._folder.load(self._spec, (params, inputs, steps))
        if loaded is None:
            return compiled_sampler(self._spec)(params, inputs, steps, state)
        images, *state = loaded.call(*jax.tree.leaves((params, inputs, steps, state)))
        return images, state


def describe_program(spec: SamplerSpec, arguments: PyTree) -> CompiledProgram:
    """Describe the program of a specification for (params, inputs, steps) of these shapes."""
    leaves, tree = jax.tree.flatten(arguments)
    static = [
        repr(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
        if field.name not in ("mesh", "model", "guide")
    ]
    # The representation of a model holds all that its hash does.
    models = [repr(spec.model), repr(spec.guide)]
    platform, sizes = spec.mesh.devices.flat[0].platform, tuple(spec.mesh.shape.values())
    shapes = [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves]
    parts = [jax.__version__, package_digest(), platform, sizes, *static, *models, tree, shapes]
    height, width = (side * spec.model.downsampling for side in spec.shape[:2])
    return CompiledProgram(
        key=hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32],
        model=spec.model.name,
        width=width,
        height=height,
        batch_size=len(arguments[1].seeds) // num_replicas(spec.mesh),
        platform=platform,
        devices=spec.mesh.size,
        replicas=num_replicas(spec.mesh),
    )


def read_programs(folder: epath.Path) -> list[CompiledProgram]:
    """Read the programs that a folder holds.

    Raises:
      UserError: it holds none, or its manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} holds no compiled programs: expected {MANIFEST} in it; run `jaxdiff compile "
            "MODEL --out FOLDER`."
        )
    try:
        return [CompiledProgram(**program) for program in read_json(folder / MANIFEST)["programs"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is not that of compiled programs ({error}): compile again."
        ) from error


def load_program(folder: epath.Path, key: str) -> LoadedProgram:
    """Read a program of a folder.

    Raises:
      UserError: its file is missing or damaged, or flatbuffers is not installed.
    """
    data = read_bytes(folder / f"{key}.stablehlo", "the whole folder of compiled programs")
    try:
        return LoadedProgram(exporter().deserialize(bytearray(data)))
    except Exception as error:  # of flatbuffers, which has no class of its own for damage
        raise UserError(
            f"{folder / key}.stablehlo is damaged ({type(error).__name__}): compile again."
        ) from error


def exporter() -> Any:
    """Return `jax.export`.

    Raises:
      UserError: the package that it reads and writes files with is missing.
    """
    import jax.export

    if find_spec("flatbuffers") is None:
        raise UserError(
            "Compiled programs need the package flatbuffers, which is not installed: run "
            "pip install -e '.[compile]' in a clone of jaxdiff."
        )
    return jax.export
