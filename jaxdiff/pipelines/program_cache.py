"""Traced samplers in the user's cache, so that only the first run of a kind traces.

A run of a command would otherwise trace the network and lower it, even where the executable is in
`jaxdiff.distributed.compilation_cache`, which also keeps these programs and bounds their size.
"""

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.config.serialization import accepted_types
from jaxdiff.distributed.compilation_cache import FolderCache, cache_folder
from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import Params, TextToImage
from jaxdiff.pipelines.exported import LoadedProgram, describe_program, export_program
from jaxdiff.pipelines.program import SamplerSpec


def program_cache() -> "ProgramCache | None":
    """Return the programs of the user's cache; None without a cache.

    A run of several processes has none, nor has one with `--plugin`, whose code is in no key.
    """
    folder = cache_folder()
    if folder is None or accepted_types() or jax.process_count() > 1:
        return None
    return ProgramCache(FolderCache(folder))


class ProgramCache:
    """Programs by their key; those that it lacks are traced and stored."""

    def __init__(self, files: FolderCache):
        self._files = files
        self._loaded: dict[str, LoadedProgram | None] = {}

    def batch_size(
        self, model: TextToImage, params: Params, size: tuple[int, int], mesh: Mesh
    ) -> None:
        """Return None: programs are made for any batch size."""

    def load(self, spec: SamplerSpec, arguments: PyTree) -> LoadedProgram | None:
        """Return the program for arguments of these shapes; None if it cannot be stored."""
        key = describe_program(spec, arguments).key
        if key not in self._loaded:
            self._loaded[key] = self._read(key) or self._store(key, spec, arguments)
        return self._loaded[key]

    def _read(self, key: str) -> LoadedProgram | None:
        data = self._files.get(_name(key))
        try:
            return None if data is None else LoadedProgram(data)
        except Exception:  # a damaged entry is one that is not there
            return None

    def _store(self, key: str, spec: SamplerSpec, arguments: PyTree) -> LoadedProgram | None:
        try:
            data = export_program(spec, arguments)
        except UserError:
            return None
        self._files.put(_name(key), data)
        # Read back, as the key of the executable belongs to what later runs compile.
        return LoadedProgram(data)


def _name(key: str) -> str:
    return f"sampler-{key}"
