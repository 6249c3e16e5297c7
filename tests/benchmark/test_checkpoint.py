import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.checkpoint import time_checkpoints
from jaxdiff.distributed.mesh import make_mesh


def test_saves_are_timed_until_on_disk_and_removed(tiny_recipe, tmp_path):
    config, folder, trace = tiny_recipe(), tmp_path / "checkpoints", tmp_path / "trace"
    folder.mkdir()
    found = time_checkpoints(config, warmup=0, repeats=3, folder=str(folder), trace=str(trace))
    assert list(trace.glob("plugins/profile/*/*.trace.json.gz"))
    assert len(found.seconds) == 3
    metrics = found.metrics
    assert 0 < metrics["training_blocked_s"] <= max(found.seconds)
    assert metrics["restore_s"] > 0
    state, _ = synthetic.initial_state(config, make_mesh(config.mesh))
    parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert metrics["parameter_bytes"] == parameters
    # Parameters, EMA and two moments.
    assert metrics["disk_bytes"] > 3.5 * parameters
    assert list(folder.iterdir()) == []
