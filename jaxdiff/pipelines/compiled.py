"""Programs that are compiled ahead of time, in a folder.

    programs.json        what was compiled
    KEY.stablehlo        a program that needs no tracing, of `jax.export`
    executables/         of `jaxdiff.distributed.compilation_cache`: needs no compilation either

A program belongs to a model without its weights, to a size and to a batch size; its key also holds
the versions and jaxdiff's own code. Nothing is unpickled, but a program is one: use folders of
people whose code you would run.
"""

import warnings

from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.distributed.compilation_cache import read_executables
from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes
from jaxdiff.io.text import read_json
from jaxdiff.models.text_to_image import Params, TextToImage
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.exported import (
    CompiledProgram,
    LoadedProgram,
    describe_program,
    model_key,
)
from jaxdiff.pipelines.program import SamplerSpec

MANIFEST = "programs.json"
EXECUTABLES = "executables"


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

    def batch_size(
        self, model: TextToImage, params: Params, size: tuple[int, int], mesh: Mesh
    ) -> int | None:
        """Return the batch size of a model's programs for a size on these devices.

        Of several it is the default one, or else the largest; None without any.
        """
        device = mesh.devices.flat[0]
        here = device.device_kind, mesh.size, num_replicas(mesh)
        wanted = model_key(model, params), *size, *here
        sizes = {
            p.batch_size
            for p in self.programs
            if (p.model_key, p.width, p.height, p.device_kind, p.devices, p.replicas) == wanted
        }
        usual = default_batch_size(*size, device.platform)
        return usual if usual in sizes else max(sizes, default=None)

    def load(self, spec: SamplerSpec, arguments: PyTree) -> LoadedProgram | None:
        """Return the program for arguments of these shapes; None if the folder has none."""
        wanted = describe_program(spec, arguments)
        if wanted.key not in self._loaded:
            there = any(program.key == wanted.key for program in self.programs)
            self._loaded[wanted.key] = load_program(self._folder, wanted.key) if there else None
            if not there:
                warnings.warn(
                    f"{self._folder} has no program for {wanted.width}x{wanted.height}, batches of "
                    f"{wanted.batch_size} on {wanted.devices} {wanted.device_kind} and these "
                    "settings, or is of other versions: compiling.",
                    stacklevel=2,
                )
        return self._loaded[wanted.key]


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
        return LoadedProgram(data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder / key}.stablehlo is damaged ({type(error).__name__}): compile again."
        ) from error
