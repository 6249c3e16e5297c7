"""How hosts meet, what goes wrong there, and that the loss of one ends the others."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from jaxdiff.distributed.distributed_init import (
    Hosts,
    Meeting,
    is_host_lost,
    join_hosts,
    launched_together,
    meet,
    settle,
)
from jaxdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_flags_go_before_the_environment():
    environment = {
        "JAXDIFF_HOSTS_ADDRESS": "first:1234",
        "JAXDIFF_HOSTS_COUNT": "4",
        "JAXDIFF_HOSTS_INDEX": "3",
    }
    assert settle(Hosts(), environment) == Meeting("first:1234", 4, 3)
    assert settle(Hosts(index=1), environment) == Meeting("first:1234", 4, 1)
    assert settle(Hosts(address="[::1]:80", count=2, index=0), {}) == Meeting("[::1]:80", 2, 0)


@pytest.mark.parametrize("hosts", [Hosts(), Hosts(count=1), Hosts(count=1, index=0)])
def test_one_host_needs_nothing_and_joins_nobody(hosts):
    assert settle(hosts, {}) is None
    with join_hosts(hosts):
        assert not jax.distributed.is_initialized()
    with pytest.raises(UserError, match="stays as it is"), join_hosts(hosts):
        raise UserError("stays as it is")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"address": "first:1234"}, r"--hosts.count .*JAXDIFF_HOSTS_COUNT.* and --hosts.index"),
        ({"address": "first:1234", "count": 2}, "--hosts.index .* is not given"),
        ({"address": "first:1234", "count": 2, "index": 2}, "hosts.index is 2, .* expected 0 to 1"),
        ({"address": "first:1234", "count": 0, "index": 0}, "hosts.index is 0, but hosts.count"),
        (
            {"address": "first", "count": 2, "index": 1},
            "hosts.address is first: expected HOST:PORT",
        ),
        ({"address": "first:1234", "count": -2, "index": 0}, "hosts.count is -2: expected a num"),
        ({"address": "first:1234", "count": 1, "index": 5}, "hosts.index is 5, but hosts.count is"),
    ],
)
def test_what_cannot_be_is_told(said, message):
    with pytest.raises(UserError, match=message):
        settle(Hosts(**said), {})
    environment = {f"JAXDIFF_HOSTS_{name.upper()}": str(value) for name, value in said.items()}
    with pytest.raises(UserError, match=message):
        settle(Hosts(), environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # the batch script, outside of srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod, alone or not
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_launchers_that_jax_knows_are_recognised(environment, expected):
    assert launched_together(environment) == expected


def met(*meetings: Meeting, timeout: int = 20) -> list[str]:
    """What each process is told when they meet, "" if it may go on."""

    def one(meeting: Meeting) -> str:
        try:
            meet(meeting, timeout)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(meetings)) as pool:
        return list(pool.map(one, meetings))


def test_hosts_that_agree_meet_in_any_order_and_leave_the_port_free(free_port):
    address = f"localhost:{free_port()}"
    assert met(*(Meeting(address, 4, index) for index in (3, 0, 2, 1))) == [""] * 4
    assert met(*(Meeting(address, 2, index) for index in (1, 0))) == [""] * 2


def test_hosts_that_contradict_each_other_are_all_told(free_port):
    address = f"localhost:{free_port()}"
    told = met(Meeting(address, 2, 0), Meeting(address, 3, 2))
    assert told[0] == told[1]
    assert "Host 2 says that there are 3 hosts, and host 0 that there are 2" in told[0]
    told = met(Meeting(address, 3, 0), Meeting(address, 3, 1), Meeting(address, 3, 1))
    assert len(set(told)) == 1
    assert "Two hosts say that they are number 1" in told[0]


def test_hosts_that_do_not_come_are_named_in_time(free_port):
    address = f"localhost:{free_port()}"
    start = time.monotonic()
    told = met(Meeting(address, 4, 0), Meeting(address, 4, 2), timeout=1)
    assert "Of 4 hosts number 1, 3 did not come" in told[0]
    assert "within 1 s" in told[1]
    (told,) = met(Meeting(address, 2, 1), timeout=1)
    assert f"Host 0 could not be reached at {address} within 1 s (Connection refused)" in told
    assert time.monotonic() - start < 10


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (told,) = met(Meeting(f"localhost:{port}", 2, 0))
    assert f"Port {port} of hosts.address cannot be listened at (Address already in use)" in told


def test_strangers_at_the_port_are_not_counted(free_port):
    port = free_port()

    def stranger() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                time.sleep(0.02)

    thread = threading.Thread(target=stranger)
    thread.start()
    leading = threading.Thread(target=meet, args=(Meeting(f"localhost:{port}", 2, 0), 20))
    leading.start()
    thread.join()
    assert met(Meeting(f"localhost:{port}", 2, 1)) == [""]
    leading.join()


def test_alone_nobody_is_lost():
    assert not is_host_lost(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))


TWO = """
import sys, time
import numpy as np
from jaxdiff.errors import UserError
from jaxdiff.distributed.distributed_init import Hosts, join_hosts

with join_hosts(Hosts(address=sys.argv[1], count=2, index=int(sys.argv[2]), timeout=120)):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxdiff.distributed.multihost import (
        AnyHost, broadcast_text, run_on_host0, from_host, is_host0, to_host, sum_over_hosts
    )
    from jaxdiff.data.loader import host_rows
    from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh

    me = jax.process_index()
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
    assert (jax.process_count(), jax.device_count(), is_host0()) == (2, 4, me == 0)

    whole = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.float32(3)}
    places = {
        "a": NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    spread = from_host(whole, places)
    assert not spread["a"].is_fully_addressable
    assert spread["a"].addressable_shards[0].data.shape == (1, 6)
    for tree in (spread, jax.jit(lambda x: x)(spread)):
        jax.tree.map(np.testing.assert_array_equal, to_host(tree), whole)

    assert host_rows(batch_sharding(mesh), 8) == list(range(4 * me, 4 * me + 4))
    assert sum_over_hosts(me + 1) == 3
    assert broadcast_text("höchst " + "ab"[me]) == "höchst a"
    assert broadcast_text("") == ""
    ballot = AnyHost(mesh)
    assert [bool(ballot(me == who)) for who in (0, 1, 2)] == [True, True, False]
    done = []
    run_on_host0(lambda: done.append(me))
    assert done == ([0] if me == 0 else [])

    def mistake():
        raise UserError("so not")

    try:
        run_on_host0(mistake)
    except UserError as error:
        assert str(error) == "so not"
    else:
        raise AssertionError
    print("ready", flush=True)
    while True:
        sum_over_hosts(1)
        time.sleep(0.01)
"""


def test_two_processes_work_as_one_until_one_is_killed(free_port):
    """Also: the other one then ends, soon, with a message and without a traceback."""
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(index)],
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
        both[0].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, told = both[1].communicate(timeout=60)
        assert time.monotonic() - start < 30
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1].returncode not in (0, -signal.SIGKILL)
    assert "another host has died" in told or "another task died" in told
