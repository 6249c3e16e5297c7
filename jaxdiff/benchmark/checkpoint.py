"""Time checkpoints: how long a save blocks training, until it is on disk, and to restore it."""

import shutil
import tempfile
import time
from statistics import median

import jax
from etils import epath

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.timing import peak_memory
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.profiler import traced
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState

GB = 1e9


def time_checkpoints(
    config: Config, *, warmup: int, repeats: int, folder: str | None, trace: str | None = None
) -> Measurement:
    """Time saving a recipe's train state, until all of it is on disk.

    `folder`, by default a temporary one, may be local or `gs://`, and is emptied at the end.
    `trace` is the folder of a trace of restoring the state.

    Raises:
      UserError: the disk is full, or the folder is not writable.
    """
    state = _with_noise(*synthetic.initial_state(config, make_mesh(config.mesh)))
    path = epath.Path(folder or tempfile.mkdtemp()) / "bench-checkpoints"
    blocked, saved = [], []
    try:
        with Checkpoints(path, keep=1) as checkpoints:
            for step in range(warmup + repeats):
                state = state.replace(step=state.step + 1)
                jax.block_until_ready(state.step)
                start = time.perf_counter()
                checkpoints.save(state)
                returned = time.perf_counter() - start
                checkpoints.wait()
                if step >= warmup:
                    blocked.append(returned)
                    saved.append(time.perf_counter() - start)
            size = sum(file.stat().length for file in _files(path))
        restored = _restore(path, state)
        if trace is not None:
            with traced(trace):
                _restore(path, state)
    finally:
        if folder is None:
            shutil.rmtree(path.parent)
        elif path.exists():
            path.rmtree()
    memory, parameter_bytes = peak_memory(), sum(x.nbytes for x in jax.tree.leaves(state.params))
    return Measurement(
        name="jaxdiff",
        unit="save",
        seconds=saved,
        metrics={
            "training_blocked_s": median(blocked),
            "restore_s": restored,
            "disk_bytes": float(size),
            "parameter_bytes": float(parameter_bytes),
            "written_gb_per_s": size / GB / median(saved),
            "restored_gb_per_s": size / GB / restored,
            "peak_memory_bytes": memory.bytes,
        },
        notes=[
            "A restore reads every file twice: to verify it, then to load it.",
            f"Peak memory is that of {memory.of}.",
        ],
    )


def _with_noise(state: TrainState, shardings: TrainState) -> TrainState:
    """Fill all arrays with noise: the zeros of a new optimizer state compress to nothing."""
    arrays = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    targets = {name: getattr(shardings, name) for name in arrays}
    return state.replace(**jax.device_put(synthetic.random_like(arrays), targets))


def _files(folder: epath.Path) -> list[epath.Path]:
    inner = [path for path in folder.iterdir() if path.is_dir()]
    files = [path for path in folder.iterdir() if not path.is_dir()]
    return files + [file for path in inner for file in _files(path)]


def _restore(folder: epath.Path, state: TrainState) -> float:
    """Return the seconds until the arrays are on the devices."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpoints(folder, keep=1) as checkpoints:
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(abstract))
        return time.perf_counter() - start
