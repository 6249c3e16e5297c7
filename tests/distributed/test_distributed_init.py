"""Process start-up: flags, launchers, errors, and the end of a run when one process is lost."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import pytest

from jaxdiff.cli.main import main
from jaxdiff.distributed import distributed_init
from jaxdiff.distributed.distributed_init import (
    Hosts,
    detect_launcher,
    is_host_lost,
    join_hosts,
    resolve,
)
from jaxdiff.distributed.roll_call import ProcessSpec
from jaxdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "32768.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def test_flags_override_the_environment():
    environment = {
        "JAXDIFF_HOSTS_ADDRESS": "first:1234",
        "JAXDIFF_HOSTS_COUNT": "4",
        "JAXDIFF_HOSTS_INDEX": "3",
    }
    assert resolve(Hosts(), environment) == ProcessSpec("first:1234", 4, 3)
    assert resolve(Hosts(index=1), environment) == ProcessSpec("first:1234", 4, 1)
    assert resolve(Hosts(address="[::1]:80", count=2, index=0), {}) == ProcessSpec("[::1]:80", 2, 0)


@pytest.mark.parametrize("hosts", [Hosts(), Hosts(count=1), Hosts(count=1, index=0)])
def test_a_single_process_needs_no_settings_and_does_not_initialise_jax(hosts):
    assert resolve(hosts, {}) is None
    with join_hosts(hosts):
        assert not jax.distributed.is_initialized()
    with pytest.raises(UserError, match="unchanged"), join_hosts(hosts):
        raise UserError("unchanged")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"address": "first:1234"},
            r"--hosts.count .*JAXDIFF_HOSTS_COUNT.* and --hosts.index .* missing",
        ),
        ({"address": "first:1234", "count": 2}, "--hosts.index .* missing: expected address"),
        ({"address": "first:1234", "count": 2, "index": 2}, "hosts.index is 2, .* expected 0 to 1"),
        ({"address": "first:1234", "count": 0, "index": 0}, "count is 0"),
        (
            {"address": "first", "count": 2, "index": 1},
            "hosts.address is first: expected HOST:PORT",
        ),
        (
            {"address": "first:70000", "count": 2, "index": 1},
            "hosts.address is first:70000: expected HOST:PORT",
        ),
        ({"address": "first:1234", "count": -2, "index": 0}, "ount is -2"),
        ({"address": "first:1234", "count": 1, "index": 5}, "hosts.index is 5, but hosts.count is"),
    ],
)
def test_invalid_settings_are_an_error(given, message):
    with pytest.raises(UserError, match=message):
        resolve(Hosts(**given), {})
    environment = {f"JAXDIFF_HOSTS_{name.upper()}": str(value) for name, value in given.items()}
    with pytest.raises(UserError, match=message):
        resolve(Hosts(), environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # the batch script, outside of srun
        (SLURM, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({**SLURM, "OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),  # mpirun in a SLURM allocation
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # every pod has it, also a single one
        ({"TPU_ML_PLATFORM": "JAX"}, "tpu"),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_launchers_that_jax_supports_are_detected(environment, expected):
    assert detect_launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        (SLURM, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "tpu"}, None),
    ],
)
def test_jax_finds_the_processes_of_a_launcher(monkeypatch, environment, method):
    """Also: its exceptions are an error that names the launcher and the way out."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed_init._initialize(Hosts(timeout=7))
    ((positional, keywords),) = calls
    assert positional == ()
    assert keywords["cluster_detection_method"] == method
    assert keywords["heartbeat_timeout_seconds"] == 60
    assert not distributed_init._initialize(Hosts(count=1))

    def fail(*_, **__):
        raise KeyError("SLURM_PROCID")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"started \(.*SLURM_PROCID.*--hosts\.count 1 to run"):
        distributed_init._initialize(Hosts(timeout=7))


def test_a_join_that_takes_too_long_ends_the_process(monkeypatch, capfd):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with distributed_init._time_limit(0.01, 300):
        time.sleep(0.2)
    with distributed_init._time_limit(0.1, 300):
        pass
    time.sleep(0.2)
    assert statuses == [2]
    assert capfd.readouterr().err.startswith("jaxdiff: Not all hosts joined within 300 s: expected")


@pytest.mark.nightly
def test_a_host_that_a_launcher_did_not_start_is_an_error():
    """JAX itself would abort with a stack trace."""
    code = (
        "from jaxdiff.distributed.distributed_init import *\nwith join_hosts(Hosts(timeout=1)): 0"
    )
    environment = {**os.environ, **SLURM, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("jaxdiff: Not all hosts joined within 1 s: expected")
    assert result.stderr.count("\n") == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        (SLURM, ("SLURM_PROCID", "SLURM_LOCALID")),
        (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ],
)
def test_processes_of_a_launcher_join(variables, ranks):
    code = (
        "from jaxdiff.distributed.distributed_init import *\nwith join_hosts(Hosts(timeout=60)):"
        " print(jax.process_index(), jax.process_count())"
    )
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | dict.fromkeys(ranks, str(index)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    assert [p.communicate(timeout=100)[0] for p in both] == ["0 2\n", "1 2\n"]


def test_commands_end_with_status_2_and_one_sentence(free_port, capsys):
    address = f"localhost:{free_port()}"
    hosts = ["--hosts.address", address, "--hosts.count", "2", "--hosts.index", "1"]
    assert main(["evaluate", "run", *hosts, "--hosts.timeout", "1"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"jaxdiff: Host 0 cannot be reached at {address} within 1 s")
    assert stderr.count("\n") == 1


def test_a_single_process_loses_no_host():
    assert not is_host_lost(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))


TWO = """
import sys, time
import numpy as np
from jaxdiff.errors import UserError
from jaxdiff.distributed import distributed_init
from jaxdiff.distributed.distributed_init import Hosts, join_hosts

distributed_init.HEARTBEAT_TIMEOUT = int(sys.argv[3])

with join_hosts(Hosts(address=sys.argv[1], count=2, index=int(sys.argv[2]), timeout=120)):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxdiff.distributed.multihost import (
        AnyHost, broadcast_text, from_host, is_host0, run_on_host0, sum_over_hosts, to_host
    )
    from jaxdiff.data.loader import host_rows
    from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh

    me = jax.process_index()
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
    assert (jax.process_count(), jax.device_count(), is_host0()) == (2, 4, me == 0)

    whole = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.float32(3)}
    shardings = {
        "a": NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    sharded = from_host(whole, shardings)
    assert not sharded["a"].is_fully_addressable
    assert sharded["a"].addressable_shards[0].data.shape == (1, 6)
    for tree in (sharded, jax.jit(lambda x: x)(sharded)):
        jax.tree.map(np.testing.assert_array_equal, to_host(tree), whole)

    assert host_rows(batch_sharding(mesh), 8) == list(range(4 * me, 4 * me + 4))
    assert sum_over_hosts(me + 1) == 3
    assert broadcast_text("höchst " + "ab"[me]) == "höchst a"
    assert broadcast_text("") == ""
    any_host = AnyHost(mesh)
    assert [bool(any_host(me == who)) for who in (0, 1, 2)] == [True, True, False]
    done = []
    run_on_host0(lambda: done.append(me))
    assert done == ([0] if me == 0 else [])

    def fail():
        raise UserError("wrong")

    try:
        run_on_host0(fail)
    except UserError as error:
        assert str(error) == "wrong"
    else:
        raise AssertionError
    print("ready", flush=True)
    while True:
        sum_over_hosts(1)
        time.sleep(0.01)
"""


@contextlib.contextmanager
def two_processes(address: str, heartbeat: int) -> Iterator[list[subprocess.Popen]]:
    """Two processes that have joined and passed all checks."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(index), str(heartbeat)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in both:
            assert process.stdout is not None
            if not any(line == "ready\n" for line in process.stdout):
                pytest.fail("\n".join(p.communicate(timeout=60)[1] for p in both))
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def check_end(process: subprocess.Popen, seconds: float) -> None:
    """Expect the process to end within `seconds`, with a message and a status other than 0."""
    start = time.monotonic()
    _, stderr = process.communicate(timeout=seconds)
    print(f"the other host ended after {time.monotonic() - start:.1f} s")
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "another host was lost" in stderr or "another task died" in stderr


def test_two_processes_work_as_one_until_one_is_killed(free_port):
    with two_processes(f"127.0.0.1:{free_port()}", heartbeat=60) as both:
        both[0].send_signal(signal.SIGKILL)
        check_end(both[1], 30)


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_stops_sending_heartbeats_is_lost(free_port, victim):
    """A stopped process keeps its connections open, as a machine does that leaves the network."""
    with two_processes(f"127.0.0.1:{free_port()}", heartbeat=10) as both:
        both[victim].send_signal(signal.SIGSTOP)
        check_end(both[1 - victim], 40)
