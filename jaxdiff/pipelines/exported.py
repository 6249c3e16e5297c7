"""Samplers as stored programs, which are called without being traced.

A program belongs to a model without its weights, to a size, a batch size and a kind of device; its
key also holds the versions, jaxdiff's own code and JAX's settings. A program is code, but nothing
is unpickled.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import flax
import jax
from jax._src.lax import linalg
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.distributed.compilation_cache import trace_settings
from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.errors import UserError
from jaxdiff.io.user_cache import package_digest
from jaxdiff.models.text_to_image import Params, TextToImage
from jaxdiff.pipelines.program import (
    SampleInputs,
    SamplerSpec,
    Steps,
    anonymous,
    compiled_sampler,
)

_CUDNN = "__cudnn$fmhaSoftmax"  # the kernel of `models.attention` on GPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What a program is for.

    Attributes:
      key: SHA-256 of all that decides on it, in hex.
      model: its name.
      model_key: SHA-256 of its specification and the shapes of its weights, in hex.
      width: of the images.
      height: of the images.
      batch_size: images that each replica samples at a time.
      device_kind: as JAX names it, such as "TPU v5 lite".
      devices: their number.
      replicas: of the model on them.
    """

    key: str
    model: str
    model_key: str
    width: int
    height: int
    batch_size: int
    device_kind: str
    devices: int
    replicas: int


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
    device, sizes = spec.mesh.devices.flat[0], tuple(spec.mesh.shape.values())
    shapes = _shapes(leaves)
    own = {name: part for name, part in arguments[0].items() if name not in ("clip", "guide")}
    made_by = [jax.__version__, flax.__version__, package_digest(), *trace_settings()]
    # Attention's blocks depend on the kind of TPU.
    parts = [*made_by, device.platform, device.device_kind, sizes, *static, *models, tree, shapes]
    height, width = (side * spec.model.downsampling for side in spec.shape[:2])
    return CompiledProgram(
        key=hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest(),
        model=spec.model.name,
        model_key=model_key(spec.model, own),
        width=width,
        height=height,
        batch_size=len(arguments[1].seeds) // num_replicas(spec.mesh),
        device_kind=device.device_kind,
        devices=spec.mesh.size,
        replicas=num_replicas(spec.mesh),
    )


def model_key(model: TextToImage, params: Params) -> str:
    """Return the SHA-256, in hex, of what programs depend on in a model and its parameters."""
    leaves, tree = jax.tree.flatten(params)
    parts = [repr(anonymous(model)), tree, _shapes(leaves)]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _shapes(leaves: Iterable[Any]) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves]


def export_program(spec: SamplerSpec, arguments: PyTree) -> bytes:
    """Trace the sampler of a specification for (params, inputs, steps); return it as a program.

    Raises:
      UserError: it has calls that `jax.export` does not support, or flatbuffers is not installed.
    """
    program = compiled_sampler(spec)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    state = program.eval_shape(*abstract, None)[1]
    leaves, tree = jax.tree.flatten((*abstract, state))

    def sample(*leaves):
        images, state = program(*jax.tree.unflatten(tree, leaves))
        return images, *jax.tree.leaves(state)

    platform = spec.mesh.devices.flat[0].platform
    export = _exporter()
    # The key names the versions, and so calls need no stability over these.
    allowed = [export.DisabledSafetyCheck.custom_call(_CUDNN)]
    try:
        exported = export.export(
            jax.jit(sample),
            platforms=["cuda" if platform == "gpu" else platform],
            disabled_checks=allowed,
        )
        return bytes(exported(*leaves).serialize())
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"The sampler cannot be stored as a program ({str(error).splitlines()[0]}): leave out "
            "the options that need it."
        ) from error


class LoadedProgram:
    """A stored program, to be called with flat arguments.

    Raises:
      UserError: flatbuffers is not installed.
      Exception: of flatbuffers, which has no class of its own for damage.
    """

    def __init__(self, data: bytes):
        exported = _exporter().deserialize(bytearray(data))
        self.jitted = jax.jit(exported.call)
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals]
        # Names of calls, or a path that has the word.
        self._lapack = b"lapack" in exported.mlir_module_serialized

    def __call__(self, *leaves: Any) -> Any:
        """Run it."""
        with contextlib.nullcontext() if self._lapack else _without_lapack():
            return self.jitted(*leaves)


@runtime_checkable
class Programs(Protocol):
    """Stored programs, such as those of a folder."""

    def batch_size(
        self, model: TextToImage, params: Params, size: tuple[int, int], mesh: Mesh
    ) -> int | None:
        """Return the batch size for a model's images of a size; None where any will do."""
        ...

    def load(self, spec: SamplerSpec, arguments: PyTree) -> LoadedProgram | None:
        """Return the program for arguments of these shapes; None if there is none."""
        ...


class StoredSampler:
    """A sampler of stored programs, called like that of `compiled_sampler`; its state is a list."""

    def __init__(self, spec: SamplerSpec, programs: Programs):
        self._spec, self._programs = spec, programs

    def eval_shape(
        self, params: PyTree, inputs: SampleInputs, steps: Steps, state: None
    ) -> tuple[Any, Any]:
        """Return the shapes of the state, second."""
        loaded = self._programs.load(self._spec, (params, inputs, steps))
        if loaded is None:
            return compiled_sampler(self._spec).eval_shape(params, inputs, steps, state)
        return None, loaded.shapes[len(jax.tree.leaves((params, inputs, steps))) :]

    def __call__(
        self, params: PyTree, inputs: SampleInputs, steps: Steps, state: Any
    ) -> tuple[Any, Any]:
        """Take a segment of the steps."""
        loaded = self._programs.load(self._spec, (params, inputs, steps))
        if loaded is None:
            return compiled_sampler(self._spec)(params, inputs, steps, state)
        images, *state = loaded(*jax.tree.leaves((params, inputs, steps, state)))
        return images, state


def _exporter() -> Any:
    """Return `jax.export`.

    Raises:
      UserError: the package that it reads and writes files with is missing.
    """
    import jax.export

    if find_spec("flatbuffers") is None:
        raise UserError(
            "Stored programs need the package flatbuffers, which is not installed: run "
            "pip install flatbuffers."
        )
    return jax.export


_needs_lapack = ContextVar("_needs_lapack", default=True)


@contextlib.contextmanager
def _without_lapack() -> Iterator[None]:
    """Let JAX call a program on a CPU without importing SciPy, 0.3 s, for calls of LAPACK."""
    token = _needs_lapack.set(False)
    try:
        yield
    finally:
        _needs_lapack.reset(token)


def _if_needed(initialize: Callable[[], None]) -> Callable[[], None]:
    return lambda: initialize() if _needs_lapack.get() else None


if hasattr(linalg, "initialize_lapack"):  # JAX 0.10.2 to 0.12.0
    linalg.initialize_lapack = _if_needed(linalg.initialize_lapack)
