import jax

from jaxdiff.benchmark import checkpoint, synthetic
from jaxdiff.distributed.mesh import make_mesh


def test_saves_are_timed_until_on_disk_and_leave_nothing_behind(tiny_recipe, tmp_path):
    config = tiny_recipe()
    found = checkpoint.measure(config, warmup=0, repeats=3, folder=str(tmp_path))
    assert len(found.seconds) == 3
    figures = found.figures
    assert 0 < figures["training_held_up_s"] <= max(found.seconds)
    assert figures["restore_s"] > 0
    state, _ = synthetic.fresh_state(config, make_mesh(config.mesh))
    parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert figures["parameter_bytes"] == parameters
    # Parameters, their average and two moments.
    assert figures["disk_bytes"] > 3.5 * parameters
    assert list(tmp_path.iterdir()) == []
