"""Check that the processes of a run agree on their number before JAX joins them.

`jax.distributed.initialize` cannot report a disagreement. In JAX 0.10 and 0.12 it aborts the
process from C++ (SIGABRT and a stack trace, no Python exception) when a host is missing, when host
0 cannot be reached, or when an index is given twice; it names no host, and the hosts that are not
aborted wait for the whole time-out. Host 0 therefore counts the others first, on the port that JAX
takes over afterwards, and reports one error to all of them.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.io.text import parse_json


class ProcessSpec(NamedTuple):
    """One process of a run.

    Attributes:
      address: HOST:PORT of host 0.
      count: number of processes.
      index: of this process, from 0 and below `count`.
    """

    address: str
    count: int
    index: int


def roll_call(process: ProcessSpec, timeout: float) -> None:
    """Return once all processes of the run are present and agree; host 0 then frees its port.

    Raises:
      UserError: on every process that is present, if one is missing after `timeout` seconds, if
        two have the same index, or if their counts differ; also if host 0 cannot be reached or
        cannot listen on its port.
    """
    deadline = time.monotonic() + timeout
    call = _count_others if process.index == 0 else _report_to_host0
    if error := call(process, deadline, timeout):
        raise UserError(error)


def _count_others(process: ProcessSpec, deadline: float, timeout: float) -> str:
    """Wait for the other processes on host 0, send them the verdict and return it ("": agreed)."""
    present = {0}
    error = ""
    with contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        with _listen(process.address) as server:
            for connection, count, index in _reports(server, deadline):
                connections.append(stack.enter_context(connection))
                if count != process.count:
                    error = (
                        f"hosts.count is {count} on host {index}, but {process.count} on host 0: "
                        "expected one number; give all hosts the same --hosts.count."
                    )
                elif index in present:
                    error = (
                        f"Two hosts have hosts.index {index}: expected one host for each index; "
                        "give each its own --hosts.index."
                    )
                present.add(index)
                if error or len(present) == process.count:
                    break
            else:
                missing = ", ".join(str(i) for i in range(process.count) if i not in present)
                error = (
                    f"{len(present)} of {process.count} hosts joined at {process.address} within "
                    f"{timeout:g} s, missing hosts.index {missing}: start every host with the same "
                    "--hosts.address and --hosts.count and with its own --hosts.index."
                )
        # The port is free by now: a host that gets its answer may find JAX listening there.
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{json.dumps(error)}\n".encode())
    return error


def _report_to_host0(process: ProcessSpec, deadline: float, timeout: float) -> str:
    """Send count and index to host 0 and return its verdict ("": all processes agree)."""
    host, port = process.address.rsplit(":", 1)
    reason = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            address = host.strip("[]"), int(port)
            with socket.create_connection(address, timeout=remaining) as connection:
                connection.sendall(f"{json.dumps([process.count, process.index])}\n".encode())
                return parse_json(_read_line(connection), "The answer of host 0")
        except (OSError, ValueError, UserError) as error:  # host 0 may start later than this one
            reason = getattr(error, "strerror", None) or str(error) or reason
            time.sleep(0.1)
    return (
        f"Host 0 cannot be reached at {process.address} within {timeout:g} s ({reason}): expected "
        "its process to listen there; start it, give all hosts the same --hosts.address, and open "
        "its port."
    )


def _listen(address: str) -> socket.socket:
    """Open the port of `address` on all interfaces."""
    host, port = address.rsplit(":", 1)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(("", int(port)), family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"Host 0 cannot listen on port {port} of hosts.address ({reason}): expected a free "
            "port; choose another one."
        ) from error


def _reports(server: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, int, int]]:
    """Yield (connection, count, index) of each process that connects before the deadline."""
    while (remaining := deadline - time.monotonic()) > 0:
        server.settimeout(remaining)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        try:
            connection.settimeout(10)
            count, index = parse_json(_read_line(connection), "A report")
        except (OSError, UserError, ValueError, TypeError):  # a port scan perhaps
            connection.close()
            continue
        yield connection, count, index


def _read_line(connection: socket.socket) -> str:
    with connection.makefile(encoding="utf-8", errors="replace") as file:
        return file.readline(1000)
