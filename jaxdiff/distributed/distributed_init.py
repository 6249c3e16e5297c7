"""Process start-up: join the processes of a run, and end all of them when one is lost.

`jax.distributed.initialize` joins them. On TPU pods, under SLURM and under Open MPI it finds out by
itself how many processes there are and which one this is; elsewhere flags or environment variables
give address, count and index. A process started without any of these runs alone.
"""

import contextlib
import os
import re
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

import jax

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.distributed.roll_call import ProcessSpec, roll_call
from jaxdiff.errors import Stopped, UserError
from jaxdiff.io.terminal import flush_output, write_line

VARIABLES = {
    "address": "JAXDIFF_HOSTS_ADDRESS",
    "count": "JAXDIFF_HOSTS_COUNT",
    "index": "JAXDIFF_HOSTS_INDEX",
}
HEARTBEAT_TIMEOUT = 60
"""Seconds without a heartbeat after which JAX counts a process as dead.

For machines that vanish from the network. A killed process closes its connections, which the others
notice at once.
"""
_LAUNCHERS = {"ompi": "Open MPI", "slurm": "SLURM", "tpu": "the TPU pod"}
_HOST_LOST = re.compile(
    "Gloo|NCCL|Connection (closed|reset)|UNAVAILABLE|heartbeat|coordination service|Barrier"
)


@checked
@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The processes of a run, where no launcher that JAX knows starts them."""

    address: str | None = None
    """HOST:PORT of host 0, or JAXDIFF_HOSTS_ADDRESS; detected on TPU pods, under SLURM and under
    Open MPI."""
    count: Count | None = None
    """Number of processes, or JAXDIFF_HOSTS_COUNT; 1 ignores the launcher and runs alone."""
    index: Natural | None = None
    """Index of this process, from 0, or JAXDIFF_HOSTS_INDEX."""
    timeout: Count = 300
    """Seconds to wait for the other processes."""


@contextlib.contextmanager
def join_hosts(hosts: Hosts) -> Iterator[None]:
    """Join the processes of a run, before JAX initialises its devices.

    An exception that leaves the block on one host ends the processes of all hosts. This one exits
    at once and skips JAX's shutdown, which would wait for the others, which wait for this one.

    Raises:
      UserError: the processes do not join within `hosts.timeout` seconds, or disagree.
    """
    if not _initialize(hosts):
        yield
        return
    try:
        yield
    except BaseException as error:
        _exit(error)


def resolve(hosts: Hosts, environment: Mapping[str, str] = os.environ) -> ProcessSpec | None:
    """Return what flags, then environment variables, give; None for nothing or a single process.

    Raises:
      UserError: a value is missing, not a number, or out of range.
    """
    given: dict[str, str] = {}
    for name, variable in VARIABLES.items():
        flag = getattr(hosts, name)
        if flag is not None or environment.get(variable):
            given[name] = str(environment[variable] if flag is None else flag)
    for name in ("count", "index"):
        if not re.fullmatch(r"\d{1,9}", given.get(name, "0")):
            raise UserError(
                f"hosts.{name} is {given[name]}: expected a whole number; give --hosts.{name} or "
                f"{VARIABLES[name]} one."
            )
    alone = given.get("count") == "1" and given.get("index", "0") == "0"
    if alone or not given:
        return None
    if missing := [name for name in VARIABLES if name not in given]:
        flags = " and ".join(f"--hosts.{name} ({VARIABLES[name]})" for name in missing)
        raise UserError(f"{flags} missing: expected address, count and index; give all three.")
    address, count, index = given["address"], int(given["count"]), int(given["index"])
    if not re.fullmatch(r".+:\d{1,5}", address) or int(address.rsplit(":", 1)[1]) > 65535:
        raise UserError(
            f"hosts.address is {address}: expected HOST:PORT; give the address of host 0 and a "
            "free port there."
        )
    if not index < count:
        raise UserError(
            f"hosts.index is {index}, but hosts.count is {count}: expected 0 to {count - 1}; give "
            "each host its own --hosts.index."
        )
    return ProcessSpec(address, count, index)


def detect_launcher(
    environment: Mapping[str, str] = os.environ,
) -> Literal["ompi", "slurm", "tpu"] | None:
    """Return the launcher that started this process as one of several, if JAX supports it."""

    def several(variable: str) -> bool:
        return environment.get(variable, "").isdecimal() and int(environment[variable]) > 1

    if several("OMPI_COMM_WORLD_SIZE"):
        return "ompi"
    # A batch script has SLURM_NTASKS too; only a process started by srun has a node list.
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return "slurm"
    # JAX sets TPU_ML_PLATFORM when it is imported on a machine with TPU chips.
    if environment.get("TPU_ML_PLATFORM") == "JAX" and environment.get("JAX_PLATFORMS") != "cpu":
        return "tpu"
    return None


def is_host_lost(error: BaseException | None) -> bool:
    """Whether an error means that another process of this run has died."""
    types = RuntimeError, ValueError  # JAX raises either
    several = jax.distributed.is_initialized()
    return several and isinstance(error, types) and bool(_HOST_LOST.search(str(error)))


def _initialize(hosts: Hosts) -> bool:
    """Join the other processes and return True, or return False where this one runs alone."""
    process = resolve(hosts)
    if process is not None:
        deadline = time.monotonic() + hosts.timeout
        roll_call(process, float(hosts.timeout))
        remaining = max(deadline - time.monotonic(), 10.0)
        with _time_limit(remaining, hosts.timeout):
            _join(hosts.timeout, "deactivate", process)
        return True
    alone = hosts.count == 1 or os.environ.get(VARIABLES["count"]) == "1"
    launcher = None if alone else detect_launcher()
    if launcher is None:
        return False
    try:
        with _time_limit(float(hosts.timeout), hosts.timeout):
            # JAX distinguishes kinds of TPU pods itself.
            _join(hosts.timeout, None if launcher == "tpu" else launcher)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"JAX cannot join the processes that {_LAUNCHERS[launcher]} started ({error}): "
            "expected complete variables of the launcher and a free port on host 0; give "
            "--hosts.address, --hosts.count and --hosts.index, or --hosts.count 1 to run this "
            "process alone."
        ) from error
    return True


def _join(timeout: int, detection: str | None, process: ProcessSpec | None = None) -> None:
    # JAX's own service would catch SIGTERM; the training loop shares the signal between hosts.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=process.address if process else None,
        num_processes=process.count if process else None,
        process_id=process.index if process else None,
        cluster_detection_method=detection,
        initialization_timeout=timeout + 60,  # `_time_limit` ends the process before JAX aborts it
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
    )


@contextlib.contextmanager
def _time_limit(seconds: float, timeout: int) -> Iterator[None]:
    """Exit with status 2 and one sentence unless the block ends within `seconds`.

    After its own time-out JAX aborts the process from C++, which Python cannot catch.
    """

    def give_up() -> None:
        write_line(
            f"jaxdiff: Not all hosts joined within {timeout} s: expected the launcher to start "
            "every process; check the logs of the others, or give more time by --hosts.timeout.",
            stderr=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit(error: BaseException) -> NoReturn:
    """Report an error and end the process, without waiting for other processes."""
    host = f"jaxdiff: host {jax.process_index()} of {jax.process_count()}"
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, UserError):
        status = 2
        write_line(f"{host}: {error}", stderr=True)
    elif isinstance(error, KeyboardInterrupt):
        stopped = error if isinstance(error, Stopped) else Stopped()
        status = 128 + stopped.number
        write_line(f"{host}: {stopped}", stderr=True)
    elif is_host_lost(error):
        write_line(
            f"{host}: another host was lost ({str(error).splitlines()[0][:200]}): expected all "
            "hosts to run until the end; start all of them again with the same command to resume "
            "from the last checkpoint.",
            stderr=True,
        )
    else:
        traceback.print_exception(error)
    flush_output()
    if jax.process_index() == 0:
        time.sleep(1)  # JAX aborts the others when host 0 ends: let them print their errors first
    os._exit(status)
