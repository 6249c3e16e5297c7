"""One writer per output folder: a lock that a crash releases.

A local folder is locked by `flock` on a hidden file, which the system releases with the process. In
cloud storage the lock is a lease: an object that its holder renews, and that others may replace
once it has expired. Who finds a lease waits until it is renewed, whose holder is alive, or expires,
whose holder was killed. Both hold who took them, for the message of the one who is refused.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, make_folder, remove_partial

LOCK = ".jaxdiff-lock"
EXPIRES = 180.0  # seconds after the last renewal of a lease
RENEW = 45.0  # seconds between renewals
POLL = 3.0  # seconds between looks at another's lease

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def lock_folder(folder: epath.PathLike, *, share: str | None = None) -> Iterator[None]:
    """Hold the lock of an existing output folder within the context.

    Where a holder was killed, the next one that does not share removes its temporary files.

    Args:
      folder: local or `gs://`.
      share: holders with different names share the folder, such as the hosts of one `prepare`, but
        not with those without a name.

    Raises:
      UserError: another process holds it; says which, on which host and since when. In `gs://`
        after `RENEW` seconds at most.
    """
    path = epath.Path(folder)
    with contextlib.ExitStack() as stack:
        if not is_local(path):
            name = LOCK if share is None else f"{LOCK}-{share}"
            stack.enter_context(_lease(GoogleStorage(str(path / name)), folder))
            # Each holder writes its lease first, then looks for those that it may not be beside.
            others = path.glob(f"{LOCK}-*") if share is None else [path / LOCK]
            for other in others:
                _wait_for_end(GoogleStorage(str(other)), folder)
        else:
            stack.enter_context(_flock(path / LOCK, folder, exclusive=share is None))
            if share is not None:
                own = path / f"{LOCK}-{share}"
                stack.enter_context(_flock(own, folder, exclusive=True, alone=False))
        yield


@contextlib.contextmanager
def output_folder(folder: epath.PathLike, *, share: str | None = None) -> Iterator[epath.Path]:
    """Create a folder to write into, and hold its lock within the context.

    Raises:
      UserError: as `make_folder` and `lock_folder`.
    """
    path = make_folder(folder)
    with lock_folder(path, share=share):
        yield path


def _holder() -> bytes:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:2]])
    who = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "since": now}
    return json.dumps(who).encode()


def _in_use(folder: epath.PathLike, holder: bytes) -> str:
    who: dict[str, Any] = dict.fromkeys(("host", "pid", "command", "since"), "?")
    with contextlib.suppress(ValueError, TypeError):
        who |= json.loads(holder)
    return (
        f"{folder} is in use by process {who['pid']} ({who['command']}) on {who['host']} since "
        f"{who['since']}"
    )


def _refusal(folder: epath.PathLike, holder: bytes) -> UserError:
    return UserError(f"{_in_use(folder, holder)}: wait for its end, or choose another folder.")


@contextlib.contextmanager
def _flock(
    path: epath.Path, folder: epath.PathLike, *, exclusive: bool, alone: bool = True
) -> Iterator[None]:
    """Hold a lock file; `alone`: nobody else writes to its folder, which may be cleaned up."""
    import fcntl  # not on Windows, where folders are not locked

    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 4096)
            os.close(file)
            raise _refusal(folder, holder) from error
        except OSError as error:
            os.close(file)
            if error.errno not in _WITHOUT_LOCKS:
                raise
            logging.getLogger(__name__).warning("%s cannot be locked on its file system.", folder)
            yield
            return
        # The holder before removed the file that this one had opened already: open the new one.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                break
        os.close(file)
    try:
        if exclusive and alone and os.fstat(file).st_size:  # its holder was killed
            remove_partial(path.parent)
        with contextlib.suppress(OSError):  # a full disk is for the work to find
            os.truncate(file, 0)
            os.pwrite(file, _holder(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            if exclusive:
                os.unlink(path)
        os.close(file)


class Stored(NamedTuple):
    """An object in cloud storage.

    Attributes:
      data: its contents.
      generation: changes with every write.
      age: seconds since it was written.
    """

    data: bytes
    generation: int
    age: float


@runtime_checkable
class Store(Protocol):
    """One object in storage with generation preconditions."""

    def read(self) -> Stored | None:
        """Return the object; None where there is none."""
        ...

    def write(self, data: bytes, generation: int) -> int | None:
        """Write if the object has this generation, 0 for none; return the new one, or None."""
        ...

    def delete(self, generation: int) -> None:
        """Delete the object if it has this generation."""
        ...


@contextlib.contextmanager
def _lease(store: Store, folder: epath.PathLike) -> Iterator[None]:
    """Hold a lease: written where there is none or an expired one, renewed until the end."""
    there = _wait_for_end(store, folder)
    holder = _holder()
    generation = store.write(holder, 0 if there is None else there.generation)
    if generation is None:  # somebody else was faster
        there = store.read()
        raise _refusal(folder, b"" if there is None else there.data)
    done, held = threading.Event(), [generation]

    def keep() -> None:
        while not done.wait(RENEW):
            try:
                new = store.write(holder, held[0])
            except Exception as error:  # the storage client's exceptions share no base class
                logging.getLogger(__name__).warning("%s: lease not renewed (%s).", folder, error)
                continue
            if new is None:
                logging.getLogger(__name__).error(
                    "Another process took over %s, as this one did not renew its lease in time: "
                    "stop one of them.",
                    folder,
                )
                return
            held[0] = new

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        try:
            store.delete(held[0])
        except Exception as error:  # no reason to fail what is finished
            logging.getLogger(__name__).warning("%s: lease not removed (%s).", folder, error)


def _wait_for_end(store: Store, folder: epath.PathLike) -> Stored | None:
    """Return an expired lease, or None where there is none.

    Raises:
      UserError: its holder renews it.
    """
    first = there = store.read()
    while there is not None and there.age < EXPIRES:
        if there is first:
            logging.getLogger(__name__).warning(
                "%s, or was killed: waiting for up to %.0f s until that is known.",
                _in_use(folder, there.data),
                EXPIRES - there.age,
            )
        time.sleep(POLL)
        there = store.read()
        if there is not None and first is not None and there.generation != first.generation:
            raise _refusal(folder, there.data)
    return there


@dataclass(frozen=True)
class GoogleStorage:
    """An object of Google Cloud Storage, through its JSON API (`ifGenerationMatch`)."""

    path: str

    @property
    def _place(self) -> tuple[Any, str, str]:
        import gcsfs  # the extra gcs; `check_reachable` says so where it is missing

        bucket, _, key = self.path.removeprefix("gs://").partition("/")
        return gcsfs.GCSFileSystem(), bucket, key

    def read(self) -> Stored | None:
        """As `Store.read`."""
        system, bucket, key = self._place
        try:
            about = system.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
            data = system.call(
                "GET", "b/{}/o/{}", bucket, key, alt="media", generation=about["generation"]
            )[1]
        except FileNotFoundError:
            return None
        written = datetime.datetime.fromisoformat(about["updated"]).timestamp()
        return Stored(bytes(data), int(about["generation"]), time.time() - written)

    def write(self, data: bytes, generation: int) -> int | None:
        """As `Store.write`."""
        system, bucket, key = self._place
        url = f"{system.base.split('/storage/')[0]}/upload/storage/v1/b/{bucket}/o"
        try:
            about = system.call(
                "POST",
                url,
                uploadType="media",
                name=key,
                ifGenerationMatch=str(generation),
                data=data,
                json_out=True,
            )
        except FileExistsError:  # gcsfs' name for 412, Precondition Failed
            return None
        return int(about["generation"])

    def delete(self, generation: int) -> None:
        """As `Store.delete`."""
        system, bucket, key = self._place
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # of another holder
            system.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=str(generation))
