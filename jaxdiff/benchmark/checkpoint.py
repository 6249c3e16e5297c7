"""Times checkpoints: how long a save holds up the training, until it is on disk, and its return."""

import shutil
import tempfile
import time

import jax
from etils import epath

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measured
from jaxdiff.benchmark.timing import median, peak_memory
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState

GB = 1e9


def measure(config: Config, *, warmup: int, repeats: int, folder: str | None) -> Measured:
    """Seconds that a recipe's train state takes to be saved, until it is whole on disk.

    Args:
      config: the recipe.
      warmup: saves before those that count.
      repeats: saves that count.
      folder: to write into, local or `gs://`, emptied in the end; a temporary one by default.

    Raises:
      UserError: there is no room, or the folder may not be written to.
    """
    state = _as_if_trained(*synthetic.fresh_state(config, make_mesh(config.mesh)))
    place = epath.Path(folder or tempfile.mkdtemp()) / "bench-checkpoints"
    held, whole = [], []
    try:
        with Checkpoints(place, keep=1) as checkpoints:
            for step in range(warmup + repeats):
                state = state.replace(step=state.step + 1)
                jax.block_until_ready(state.step)
                start = time.perf_counter()
                checkpoints.save(state)
                blocked = time.perf_counter() - start
                checkpoints.wait()
                if step >= warmup:
                    held.append(blocked)
                    whole.append(time.perf_counter() - start)
            size = sum(path.stat().length for path in _files(place))
        restored = _restore(place, state)
    finally:
        if folder is None:
            shutil.rmtree(place.parent)
        elif place.exists():
            place.rmtree()
    memory, bytes_of_state = peak_memory(), sum(x.nbytes for x in jax.tree.leaves(state.params))
    return Measured(
        name="jaxdiff",
        what="save",
        seconds=whole,
        figures={
            "training_held_up_s": median(held),
            "restore_s": restored,
            "disk_bytes": float(size),
            "parameter_bytes": float(bytes_of_state),
            "written_gb_per_s": size / GB / median(whole),
            "restored_gb_per_s": size / GB / restored,
            "peak_memory_bytes": memory.bytes,
        },
        notes=[
            "A restore reads every file twice, the first time to check it.",
            f"Peak memory is that of {memory.of}.",
        ],
    )


def _as_if_trained(state: TrainState, shardings: TrainState) -> TrainState:
    """With noise in all arrays: the zeros of a fresh optimizer are compressed to nothing."""
    arrays = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    places = {name: getattr(shardings, name) for name in arrays}
    return state.replace(**jax.device_put(synthetic.random_like(arrays), places))


def _files(folder: epath.Path) -> list[epath.Path]:
    inner = [path for path in folder.iterdir() if path.is_dir()]
    files = [path for path in folder.iterdir() if not path.is_dir()]
    return files + [file for path in inner for file in _files(path)]


def _restore(folder: epath.Path, state: TrainState) -> float:
    """Seconds until the arrays are on the devices again."""

    def describe(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    abstract = jax.tree.map(describe, state)
    with Checkpoints(folder, keep=1) as checkpoints:
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(abstract))
        return time.perf_counter() - start
