"""A restored state equals the saved one bit for bit; damaged checkpoints are reported, not used."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdiff.errors import UserError
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.pretrained.checkpoint_folder import load_params
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.state import TrainState, fingerprint, no_skips

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step: int, *, width: int = 8) -> TrainState:
    key = jax.random.key(step)
    params = {"block": {"kernel": jax.random.normal(key, (16, width))}, "bias": jnp.ones((3,))}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        key=jax.random.key(7),
        params=params,
        ema=jax.tree.map(lambda x: x / 2, params),
        opt_state=OPTIMIZER.init(params),
        task_state={"level": jnp.asarray(3, jnp.int32)},
        nonfinite=no_skips(),
    )


def abstract(state, sharding=None):
    def describe(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x) if sharding else None)

    return jax.tree.map(describe, state)


def save_steps(folder, *steps: int, keep: int = 3) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step))


def restore(folder):
    """The restored state, and what was reported."""
    reports = []
    with Checkpoints(folder, report=reports.append) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None
    return restored, reports


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_state_round_trips(tmp_path):
    saved = make_state(20)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved)
    state, reports = restore(tmp_path)
    assert fingerprint(state) == fingerprint(saved)
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(saved.key).tolist()
    assert int(state.task_state["level"]) == 3
    assert reports == []


def test_a_state_deleted_right_after_save_is_saved_as_it_was(tmp_path):
    saved = make_state(1, width=1 << 16)
    expected = fingerprint(saved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved)
        for leaf in jax.tree.leaves(saved):
            leaf.delete()  # as a step that it is donated to may do
        checkpoints.wait()
        restored = checkpoints.restore(abstract(make_state(0, width=1 << 16)))
    assert restored is not None
    assert fingerprint(restored) == expected


def test_the_state_after_donation_does_not_reach_the_disk(tmp_path):
    state = make_state(1, width=1 << 16)
    expected = fingerprint(state)
    ruin = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        params = state.params
        for _ in range(3):
            params = ruin(params)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(make_state(0, width=1 << 16)))
    assert restored is not None
    assert fingerprint(restored) == expected


def test_another_mesh_restores_and_no_device_holds_a_whole_kernel(tmp_path):
    def on_mesh(shape, spec):
        mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        return lambda x: NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())

    before = on_mesh((2, 4), PartitionSpec("fsdp"))
    after = on_mesh((4, 2), PartitionSpec("data", "fsdp"))
    saved = make_state(4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(jax.tree.map(lambda x: jax.device_put(x, before(x)), saved))
        checkpoints.wait()
        restored = checkpoints.restore(abstract(saved, after))
    assert restored is not None
    assert fingerprint(restored) == fingerprint(saved)
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_equivalent_to(after(leaf), leaf.ndim)
        if leaf.ndim == 2:
            assert {shard.data.shape for shard in leaf.addressable_shards} == {(4, 4)}


def test_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_an_empty_folder_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(abstract(make_state(0))) is None
    with pytest.raises(UserError, match="no checkpoint"):
        load_params(tmp_path / "new")


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_bits(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [remove, truncate, flip_bits])
@pytest.mark.parametrize("name", ["the largest file", "SHA256SUMS", "arrays.json"])
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(tmp_path, damage, name):
    save_steps(tmp_path, 10, 20)
    path = largest_file(tmp_path / "20") if name == "the largest file" else tmp_path / "20" / name
    damage(path)
    state, reports = restore(tmp_path)
    assert fingerprint(state) == fingerprint(make_state(10))
    (report,) = reports
    assert str(tmp_path / "20") in report
    assert path.name in report


def test_damage_to_any_file_is_found(tmp_path):
    save_steps(tmp_path, 1)
    files = [p for p in (tmp_path / "1").rglob("*") if p.is_file()]
    assert len(files) > 10
    folder = epath.Path(tmp_path)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        with pytest.raises(UserError, match="damaged"):
            checkpoint_folder.latest_valid_step(folder, lambda _: None)
        path.write_bytes(content)
    assert checkpoint_folder.latest_valid_step(folder, lambda _: None) == 1


def test_a_run_with_only_damaged_checkpoints_does_not_restart(tmp_path):
    save_steps(tmp_path, 10, 20)
    truncate(largest_file(tmp_path / "10"))
    (tmp_path / "20" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"Every checkpoint .* is damaged"):
        restore(tmp_path)


def test_a_damaged_step_is_saved_again(tmp_path):
    save_steps(tmp_path, 10, 20)
    truncate(largest_file(tmp_path / "20"))
    with Checkpoints(tmp_path, keep=1, report=lambda _: None) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is not None
        # Retention does not count the damaged one, which would leave none that is good.
        checkpoints.save(make_state(15))
        checkpoints.wait()
        assert checkpoint_folder.steps(epath.Path(tmp_path)) == [15, 20]
        checkpoints.save(make_state(20))
    state, reports = restore(tmp_path)
    assert fingerprint(state) == fingerprint(make_state(20))
    assert reports == []


def test_a_step_is_not_written_twice(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(5))
        checkpoints.wait()
        written = largest_file(tmp_path / "5").stat().st_mtime_ns
        checkpoints.save(make_state(5))
    assert largest_file(tmp_path / "5").stat().st_mtime_ns == written


def test_leftovers_of_killed_saves_are_ignored_and_removed(tmp_path):
    save_steps(tmp_path, 10)
    leftovers = ["20.saving", "20.saving.orbax-checkpoint-tmp", "5.old"]
    for name in leftovers:
        shutil.copytree(tmp_path / "10", tmp_path / name)
    (tmp_path / "notes").mkdir()
    state, reports = restore(tmp_path)
    assert int(state.step) == 10
    assert reports == []
    save_steps(tmp_path, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "30", "notes"]


def test_on_an_object_store_the_checksums_complete_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "is_local", lambda folder: False)
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "SHA256SUMS").unlink()  # a save that was killed
    state, reports = restore(tmp_path)
    assert int(state.step) == 10
    assert reports == []
    save_steps(tmp_path, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "30"]


def test_a_folder_of_an_object_store_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint_folder.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert checkpoint_folder.absolute("run") == tmp_path / "run"


def test_sha256sum_checks_a_checkpoint_by_hand(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    save_steps(tmp_path, 1)
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "1").returncode == 0


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """Every write of this process beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_arrays_that_cannot_be_written_leave_the_checkpoint_before(tmp_path, caplog):
    save_steps(tmp_path, 10)
    checkpoints = Checkpoints(tmp_path)
    with files_no_larger_than(1 << 16):
        checkpoints.save(make_state(20, width=1 << 14))
        with pytest.raises(UserError, match=r"step 20 could not be written.*step 10 is kept"):
            checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["10"]
    checkpoints.save(make_state(30))
    checkpoints.close()
    assert int(restore(tmp_path)[0].step) == 30
    assert "Traceback" not in caplog.text


def test_a_disk_that_fills_up_at_the_end_is_called_full(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_steps(tmp_path, 10)
    monkeypatch.setattr(checkpoint_folder, "_digests", no_space)
    with pytest.raises(UserError, match="disk is full"):
        save_steps(tmp_path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_folder, "_digests", no_space)
    reports = []

    def run():
        with Checkpoints(tmp_path, report=reports.append) as checkpoints:
            checkpoints.save(make_state(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "disk is full" in reports[0]


def test_another_model_is_refused_by_the_paths_that_differ(tmp_path):
    save_steps(tmp_path, 1)
    other = make_state(0, width=9)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"ema/block/kernel is float32\[16, 8\].*float32\[16, 9\]"),
    ):
        checkpoints.restore(abstract(other))


@pytest.mark.parametrize("which", ["ema", "params"])
def test_parameters_load_without_the_rest(tmp_path, which):
    save_steps(tmp_path, 1, 2)
    expected = getattr(make_state(2), which)
    shutil.rmtree(tmp_path / "2" / "training")  # not read, so not missed
    loaded, step = load_params(tmp_path, which)
    assert step == 2
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)

    reports = []
    flip_bits(largest_file(tmp_path / "2" / which))
    _, step = load_params(tmp_path, which, report=reports.append)
    assert step == 1
    assert "is damaged" in reports[0]


def test_killed_while_saving_the_run_resumes_from_a_whole_checkpoint(tmp_path):
    program = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_checkpoint import Checkpoints, make_state
        checkpoints = Checkpoints({str(tmp_path)!r}, keep=2)
        for step in range(10_000):
            checkpoints.save(make_state(step))
            print(step, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 5:
            break
    child.kill()
    child.communicate()
    state, reports = restore(tmp_path)
    assert int(state.step) >= 4
    assert fingerprint(state) == fingerprint(make_state(int(state.step)))
    assert reports == []
