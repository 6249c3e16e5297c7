import datetime
import json
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io import lock
from jaxdiff.io.files import partial_path
from jaxdiff.io.lock import LOCK, Stored, lock_folder, output_folder

IN_USE = r"in use by process \d+ \(.+\) on .+ since \d{4}-"


def test_a_folder_has_one_writer(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match=IN_USE), lock_folder(tmp_path):
            pass
        with pytest.raises(UserError, match=IN_USE), lock_folder(tmp_path, share="host1"):
            pass
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_hosts_of_one_job_share_a_folder(tmp_path):
    with lock_folder(tmp_path, share="host0"), lock_folder(tmp_path, share="host1"):
        for share in (None, "host0"):
            with pytest.raises(UserError, match=IN_USE), lock_folder(tmp_path, share=share):
                pass
    with lock_folder(tmp_path):
        pass


def test_a_crash_releases_the_lock(tmp_path):
    program = """
        import sys, time
        from jaxdiff.io.lock import output_folder
        with output_folder(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
        """
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out")]
    other = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with (
        pytest.raises(UserError, match=rf"in use by process {other.pid} "),
        output_folder(tmp_path / "out"),
    ):
        pass
    other.kill()
    other.wait()
    assert (tmp_path / "out" / LOCK).exists()
    with output_folder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "file", "file/below", "loop"])
def test_a_folder_that_cannot_be_one_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be written to as a folder"), output_folder(name):
        pass


class Memory:
    """An object in memory that honours generations; `clock` is the time."""

    def __init__(self):
        self.clock, self.generation, self.data, self.written = 0.0, 0, b"", 0.0
        self.changed = threading.Event()

    def read(self) -> Stored | None:
        if not self.generation:
            return None
        return Stored(self.data, self.generation, self.clock - self.written)

    def write(self, data: bytes, generation: int) -> int | None:
        if generation != self.generation:
            return None
        self.generation, self.data, self.written = self.generation + 1, data, self.clock
        self.changed.set()
        return self.generation

    def delete(self, generation: int) -> None:
        if generation == self.generation:
            self.generation = 0


@pytest.fixture
def renewed_often(monkeypatch):
    monkeypatch.setattr(lock, "RENEW", 0.01)
    monkeypatch.setattr(lock, "POLL", 0.05)


def lease(store: Memory):
    return lock._lease(store, "gs://bucket/out")


def test_a_lease_has_one_holder_and_ends_with_it(renewed_often, caplog):
    store = Memory()
    with lease(store):
        with pytest.raises(UserError, match=r"gs://bucket/out is " + IN_USE), lease(store):
            pass
        assert store.read() is not None
    assert store.read() is None
    (line,) = (record.getMessage() for record in caplog.records)
    assert "or was killed: waiting for up to 180 s" in line


def test_a_lease_is_renewed_while_it_is_held(renewed_often):
    store = Memory()
    with lease(store):
        store.clock = 100.0
        store.changed.clear()
        assert store.changed.wait(5)
        store.clock = 200.0  # 100 s after the renewal
        with pytest.raises(UserError, match=IN_USE), lease(store):
            pass
    assert store.read() is None


@pytest.mark.parametrize("age", [0.0, 170.0, 181.0])
def test_the_lease_of_a_killed_process_is_waited_for(age, monkeypatch):
    store, waits = Memory(), []
    crashed = lease(store)
    crashed.__enter__()
    store.clock = age

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        store.clock += seconds

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with lease(store):
        assert 180 <= age + sum(waits) < 185
        taken = store.generation
        crashed.__exit__(None, None, None)  # does not delete what another holds
        assert store.generation == taken


def test_a_lease_that_ends_while_it_is_waited_for_is_taken(monkeypatch):
    store = Memory()
    ending = lease(store)
    ending.__enter__()
    monkeypatch.setattr(lock.time, "sleep", lambda _: ending.__exit__(None, None, None))
    with lease(store):
        assert store.generation == 1


def test_the_loser_of_a_race_is_refused(monkeypatch):
    store = Memory()
    read = store.read

    def late():
        there = read()
        store.write(b'{"pid": 7}', store.generation)
        monkeypatch.setattr(store, "read", read)
        return there

    monkeypatch.setattr(store, "read", late)
    with pytest.raises(UserError, match="in use by process 7 "), lease(store):
        pass


def test_a_holder_that_lost_its_lease_says_so(renewed_often, caplog):
    store = Memory()
    with lease(store):
        store.generation = 7
        for _ in range(500):
            if "took over" in caplog.text:
                break
            threading.Event().wait(0.01)
    assert "took over" in caplog.text
    assert store.generation == 7


def test_the_files_of_a_killed_holder_are_removed(tmp_path):
    below = tmp_path / "unet"
    below.mkdir()
    left = [partial_path(epath.Path(folder) / "a.png") for folder in (tmp_path, below)]
    for path in (*left, tmp_path / ".partial-of-a-user"):
        path.write_bytes(b"half")
    with lock_folder(tmp_path):
        assert left[0].exists()  # no holder was killed: these are of another program
    (tmp_path / LOCK).write_bytes(b"{}")
    with lock_folder(tmp_path):
        assert not any(path.exists() for path in left)
    assert (tmp_path / ".partial-of-a-user").exists()


def test_a_restarted_sharer_leaves_the_files_of_the_others(tmp_path):
    partial = partial_path(epath.Path(tmp_path) / "a.png")
    with lock_folder(tmp_path, share="host0"):
        partial.write_bytes(b"half")
        (tmp_path / f"{LOCK}-host1").write_bytes(b"{}")  # of a killed holder
        with lock_folder(tmp_path, share="host1"):
            assert partial.exists()
    with lock_folder(tmp_path):
        assert not partial.exists()


class Bucket(BaseHTTPRequestHandler):
    """The part of Google Cloud Storage's JSON API that leases need, with preconditions."""

    objects: ClassVar[dict[str, tuple[int, bytes, str]]] = {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        key, query = self._key(), self._query()
        if key not in self.objects:
            return self._answer(404, {})
        generation, data, updated = self.objects[key]
        if "alt" in query:
            return self._answer(200, data)
        return self._answer(200, {"generation": str(generation), "updated": updated})

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        query = self._query()
        key = query["name"][0]
        generation = self.objects.get(key, (0,))[0]
        if generation != int(query["ifGenerationMatch"][0]):
            return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        now = datetime.datetime.now(datetime.UTC).isoformat()
        self.objects[key] = generation + 1, data, now
        return self._answer(200, {"generation": str(generation + 1)})

    def do_DELETE(self):
        there = self.objects.get(self._key())
        if there is None:
            return self._answer(404, {})
        if there[0] != int(self._query()["ifGenerationMatch"][0]):
            return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        del self.objects[self._key()]
        return self._answer(204, b"")

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path.rpartition("/o/")[2])

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def _answer(self, status: int, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_a_lease_in_a_bucket(renewed_often, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    make = gcsfs.GCSFileSystem
    monkeypatch.setattr(gcsfs, "GCSFileSystem", lambda: make(token="anon", endpoint_url=endpoint))
    try:
        stores = [lock.GoogleStorage("gs://bucket/run 412/lock") for _ in range(2)]
        assert stores[0].read() is None
        with (
            lock._lease(stores[0], "gs://bucket/run 412"),
            pytest.raises(UserError, match=IN_USE),
            lock._lease(stores[1], "gs://bucket/run 412"),
        ):
            pass
        assert stores[0].read() is None
        assert stores[0].write(b"{}", 0) == 1
        assert stores[1].write(b"{}", 0) is None
        assert stores[1].write(b"{}", 1) == 2  # as after an expiry
        assert stores[0].write(b"{}", 1) is None
        there = stores[0].read()
        assert there is not None
        assert there[:2] == (b"{}", 2)
        assert 0 <= there.age < 60
        stores[0].delete(2)
        assert stores[0].read() is None
    finally:
        server.shutdown()


def test_leases_exclude_as_local_locks_do(renewed_often, monkeypatch):
    """One with a name and one without, in both orders."""
    stores: dict[str, Memory] = {}
    out = epath.Path("gs://bucket/out")
    monkeypatch.setattr(lock, "GoogleStorage", lambda path: stores.setdefault(path, Memory()))
    monkeypatch.setattr(
        type(out), "glob", lambda self, _: [epath.Path(x) for x in stores if "-lock-" in x]
    )
    refused = pytest.raises(UserError, match=IN_USE)
    with lock_folder(out, share="a"), lock_folder(out, share="b"), refused, lock_folder(out):
        pass
    with lock_folder(out), refused, lock_folder(out, share="a"):
        pass
    assert not any(store.read() for store in stores.values())
