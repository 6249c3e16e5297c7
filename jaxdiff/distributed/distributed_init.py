"""Many hosts as one run: how they meet, and how the loss of one ends all the others.

A TPU pod, SLURM and Open MPI tell every process which it is, and JAX knows where they do so. On
other machines an address, a count and an index do, by flags or by the environment. Started in
neither way, a process is alone and nothing is done.
"""

import contextlib
import functools
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import jax

from jaxdiff.errors import UserError

VARIABLES = {
    "address": "JAXDIFF_HOSTS_ADDRESS",
    "count": "JAXDIFF_HOSTS_COUNT",
    "index": "JAXDIFF_HOSTS_INDEX",
}
# Seconds without a sign of life after which a process counts as dead. One that is killed closes its
# connections, which is seen at once; this is for machines that vanish from the network.
HEARTBEAT = 60
_LOST = re.compile(
    "Gloo|NCCL|Connection (closed|reset)|UNAVAILABLE|heartbeat|coordination service|Barrier"
)


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The processes of one run, where no launcher tells them of each other."""

    address: str | None = None
    """HOST:PORT of the first process, or JAXDIFF_HOSTS_ADDRESS; found out on TPU pods, under SLURM
    and under Open MPI."""
    count: int | None = None
    """How many processes there are, or JAXDIFF_HOSTS_COUNT; 1 keeps to this one."""
    index: int | None = None
    """Which one this is, from 0, or JAXDIFF_HOSTS_INDEX."""
    timeout: int = 300
    """Seconds to wait for the others."""


class Meeting(NamedTuple):
    """Where processes meet, how many, and which this is."""

    address: str
    count: int
    index: int


@contextlib.contextmanager
def join_hosts(hosts: Hosts) -> Iterator[None]:
    """Joins this process with those of the other hosts, before JAX looks at any device.

    What ends the block in one process ends all of them: this one exits then and there, since the
    orderly way out would wait for the others, which wait for this one.

    Raises:
      UserError: the others cannot be met within `hosts.timeout` seconds, or contradict this one.
    """
    if not _start(hosts):
        yield
        return
    try:
        yield
    except BaseException as error:
        _leave(error)


def settle(hosts: Hosts, environment: Mapping[str, str] = os.environ) -> Meeting | None:
    """What flags and environment say; None where they say nothing, or that there is one process.

    Raises:
      UserError: something is missing, no number, or out of range.
    """
    said: dict[str, str] = {}
    for name, variable in VARIABLES.items():
        flag = getattr(hosts, name)
        if flag is not None or environment.get(variable):
            said[name] = str(environment[variable] if flag is None else flag)
    for name in ("count", "index"):
        if not re.fullmatch(r"\d{1,9}", said.get(name, "0")):
            raise UserError(f"hosts.{name} is {said[name]}: expected a number of processes.")
    alone = said.get("count") == "1" and said.get("index", "0") == "0"
    if alone or not said:
        return None
    if missing := [name for name in VARIABLES if name not in said]:
        flags = " and ".join(f"--hosts.{name} ({VARIABLES[name]})" for name in missing)
        raise UserError(f"Of the processes to be joined {flags} is not given: give all three.")
    address, count, index = said["address"], int(said["count"]), int(said["index"])
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"hosts.address is {address}: expected HOST:PORT of the first process.")
    if not index < count:
        raise UserError(
            f"hosts.index is {index}, but hosts.count is {count}: expected 0 to {count - 1}."
        )
    return Meeting(address, count, index)


def is_host_lost(error: BaseException | None) -> bool:
    """Whether an error says that another process has died."""
    kinds = RuntimeError, ValueError  # JAX raises either
    several = jax.distributed.is_initialized()
    return several and isinstance(error, kinds) and bool(_LOST.search(str(error)))


def launched_together(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher that JAX asks for its processes has started this one."""

    def several(variable: str) -> bool:
        return environment.get(variable, "").isdecimal() and int(environment[variable]) > 1

    slurm = several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment
    # JAX says so itself when it is imported where there are TPU chips.
    tpu = environment.get("TPU_ML_PLATFORM") == "JAX" and environment.get("JAX_PLATFORMS") != "cpu"
    return slurm or several("OMPI_COMM_WORLD_SIZE") or tpu


def _start(hosts: Hosts) -> bool:
    """Whether this process is now one of several, or of a launcher's."""
    meeting = settle(hosts)
    alone = hosts.count == 1 or os.environ.get(VARIABLES["count"]) == "1"
    if meeting is None and (alone or not launched_together()):
        return False
    # It would take SIGTERM for itself; the training loop asks all hosts when one gets it.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=hosts.timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    if meeting is not None:
        meet(meeting, hosts.timeout)
        initialize(*meeting, cluster_detection_method="deactivate")
        return True
    try:
        initialize()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"This process could not be joined with the others that its launcher started ({error}):"
            " tell all of them of each other by --hosts.address, --hosts.count and --hosts.index, "
            "or keep to this one by --hosts.count 1."
        ) from error
    return True


def _leave(error: BaseException) -> NoReturn:
    """Says what happened and ends the process, without waiting for any other."""
    who = f"jaxdiff: host {jax.process_index()} of {jax.process_count()}"
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, UserError):
        status = 2
        print(f"{who}: {error}", file=sys.stderr)
    elif is_host_lost(error):
        print(
            f"{who}: another host has died or was taken away "
            f"({str(error).splitlines()[0][:200]}); the last checkpoint is whole: start all of "
            "them again by the same command.",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)  # with it ends what joins the others, who have their own last words to say
    os._exit(status)


def meet(meeting: Meeting, timeout: int) -> None:
    """Returns once all processes are there and say the same; JAX then joins them.

    JAX by itself would abort the process where another one is missing or says something else.

    Raises:
      UserError: the first process cannot be reached, or others do not come, within `timeout`
        seconds; or two of them contradict each other.
    """
    deadline = time.monotonic() + timeout
    if meeting.index:
        _come(meeting, deadline, timeout)
    else:
        _receive(meeting, deadline, timeout)


def _receive(meeting: Meeting, deadline: float, timeout: int) -> None:
    """The first process: waits for all others, and tells them whether they may go on."""
    host, port = meeting.address.rsplit(":", 1)
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    there: set[int] = set()
    guests: list[socket.socket] = []
    wrong = ""
    with contextlib.ExitStack() as stack:
        try:
            server = socket.create_server(("", int(port)), family=kind)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(
                f"Port {port} of hosts.address cannot be listened at ({reason}): choose another."
            ) from error
        with server:
            while not wrong and len(there) < meeting.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    guest = stack.enter_context(server.accept()[0])
                    guest.settimeout(10)
                    count, index = json.loads(_line(guest))
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue  # one that says nothing is none of ours
                    missing = [i for i in range(1, meeting.count) if i not in there]
                    wrong = (
                        f"Of {meeting.count} hosts number {', '.join(map(str, missing))} did not "
                        f"come to {meeting.address} within {timeout} s: start them with the "
                        "same --hosts.address and --hosts.count, each with its own --hosts.index."
                    )
                    break
                except (OSError, ValueError, TypeError):
                    continue
                if count != meeting.count:
                    wrong = (
                        f"Host {index} says that there are {count} hosts, and host 0 that there "
                        f"are {meeting.count}: give all of them the same --hosts.count."
                    )
                elif index in there:
                    wrong = (
                        f"Two hosts say that they are number {index}: give each its own "
                        "--hosts.index."
                    )
                there.add(index)
                guests.append(guest)
        # The port is free again: those who hear of it find JAX there.
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(f"{json.dumps(wrong)}\n".encode())
    if wrong:
        raise UserError(wrong)


def _come(meeting: Meeting, deadline: float, timeout: int) -> None:
    """Any other process: tells the first one that it is there, and waits until all are."""
    host, port = meeting.address.rsplit(":", 1)
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as first:
                first.sendall(f"{json.dumps([meeting.count, meeting.index])}\n".encode())
                wrong = json.loads(_line(first))
        except (OSError, ValueError) as error:  # it may yet be started
            reason = getattr(error, "strerror", None) or str(error) or reason
            time.sleep(0.1)
            continue
        if wrong:
            raise UserError(wrong)
        return
    raise UserError(
        f"Host 0 could not be reached at {meeting.address} within {timeout} s ({reason}): "
        "check that it was started, that --hosts.address is the same everywhere, and that its port "
        "is open."
    )


def _line(connection: socket.socket) -> str:
    with connection.makefile(encoding="utf-8", errors="replace") as file:
        return file.readline(1000)
