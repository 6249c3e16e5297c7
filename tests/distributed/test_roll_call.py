"""The roll call: processes that agree continue, all others end with the same error."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jaxdiff.distributed.roll_call import ProcessSpec, roll_call
from jaxdiff.errors import UserError


def errors(*processes: ProcessSpec, timeout: float = 20.0) -> list[str]:
    """Run the roll call of several processes at once; the error of each, "" for none."""

    def one(process: ProcessSpec) -> str:
        try:
            roll_call(process, timeout)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_processes_start_in_any_order_and_the_port_is_free_afterwards(free_port):
    address = f"localhost:{free_port()}"
    assert errors(*(ProcessSpec(address, 4, index) for index in (3, 0, 2, 1))) == [""] * 4
    assert errors(*(ProcessSpec(address, 2, index) for index in (1, 0))) == [""] * 2


def test_a_different_count_is_an_error_on_all_hosts(free_port):
    address = f"localhost:{free_port()}"
    found = errors(ProcessSpec(address, 2, 0), ProcessSpec(address, 3, 2))
    assert found[0] == found[1]
    assert "hosts.count is 3 on host 2, but 2 on host 0: expected one number" in found[0]


def test_a_duplicate_index_is_an_error_on_all_hosts(free_port):
    address = f"localhost:{free_port()}"
    found = errors(*(ProcessSpec(address, 3, index) for index in (0, 1, 1)))
    assert len(set(found)) == 1
    assert "Two hosts have hosts.index 1: expected one host for each index" in found[0]


def test_missing_hosts_are_named_within_the_timeout(free_port):
    address = f"localhost:{free_port()}"
    start = time.monotonic()
    found = errors(ProcessSpec(address, 4, 0), ProcessSpec(address, 4, 2), timeout=0.5)
    assert f"2 of 4 hosts joined at {address} within 0.5 s, missing hosts.index 1, 3:" in found[0]
    assert "within 0.5 s" in found[1]
    (found,) = errors(ProcessSpec(address, 2, 1), timeout=0.3)
    assert f"Host 0 cannot be reached at {address} within 0.3 s (Connection refused)" in found
    assert time.monotonic() - start < 10


def test_a_port_in_use_is_an_error():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (found,) = errors(ProcessSpec(f"localhost:{port}", 2, 0))
    assert f"Host 0 cannot listen on port {port} of hosts.address (Address already in use)" in found


def test_unrelated_connections_are_ignored(free_port):
    port = free_port()

    def unrelated() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                time.sleep(0.02)

    thread = threading.Thread(target=unrelated)
    thread.start()
    host0 = threading.Thread(target=roll_call, args=(ProcessSpec(f"localhost:{port}", 2, 0), 20.0))
    host0.start()
    thread.join()
    assert errors(ProcessSpec(f"localhost:{port}", 2, 1)) == [""]
    host0.join()
