"""Compiled programs on disk."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from etils import epath

from jaxdiff.distributed import compilation_cache
from jaxdiff.distributed.compilation_cache import cache_folder, use_compilation_cache
from jaxdiff.errors import UserError

SCRIPT = """
import jax
from jaxdiff.distributed.compilation_cache import use_compilation_cache
use_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.full((9, 9), 0.3)).tobytes().hex())
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def start(folder: object) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"JAXDIFF_CACHE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, int]:
    """The bytes of the result and the number of programs that were found."""
    out, err = process.communicate()
    assert (err, process.returncode) == ("", 0)
    bits, hits = out.split()
    return bits, int(hits)


def test_another_process_finds_the_program_and_computes_the_same_bits(tmp_path):
    folder = tmp_path / "cache"
    at_once = [start(folder) for _ in range(2)]
    first, again = (finish(process) for process in at_once)
    files = {file.name for file in folder.glob("compiled/*/*")}
    assert files
    assert not any(name.startswith(".partial") for name in files)
    later = finish(start(folder))
    assert later[0] == first[0] == again[0]
    assert later[1] == len(files)
    assert {file.name for file in folder.glob("compiled/*/*")} == files
    for file in folder.glob("compiled/*/*"):
        file.write_bytes(file.read_bytes()[:-9])
    # JAX names each damaged entry in a warning, compiles, and has it written again.
    bits = start(folder).communicate()[0].split()[0]
    assert bits == first[0]
    assert finish(start(folder)) == later


@pytest.mark.parametrize("folder", ["/dev/null/cache", "off"])
def test_without_a_folder_programs_are_compiled_in_silence(folder):
    assert finish(start(folder))[1] == 0


def test_programs_of_a_host_are_in_the_users_cache_unless_jax_has_its_own():
    host = cache_folder({}).name
    assert cache_folder({"JAXDIFF_CACHE": "gs://b/c"}) == epath.Path(f"gs://b/c/compiled/{host}")
    assert cache_folder({"JAXDIFF_CACHE": "off"}) is None
    assert cache_folder({"JAXDIFF_CACHE": "/c", "JAX_COMPILATION_CACHE_DIR": "/d"}) is None


def test_another_cache_of_jax_stays(monkeypatch):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    assert before[0] is not None  # that of the tests
    use_compilation_cache({})
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache) == before


def test_the_least_recently_used_programs_leave_a_full_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LARGEST", 30)
    host, another = tmp_path / ("0" * 16), tmp_path / ("a" * 16)
    cache = compilation_cache.FolderCache(epath.Path(host))
    names = [f"jit_{name}-{'0' * 64}" for name in "abcde"]
    old = another / names[0]
    another.mkdir()
    old.write_bytes(bytes(10))
    os.utime(old, (0, 0))
    for i, name in enumerate(names[:3]):
        cache.put(name, bytes(9))
        os.utime(host / name, (i + 1, i + 1))
    assert not old.exists()
    assert cache.get(names[0]) == bytes(9)  # used now
    cache.put(names[3], bytes(9))
    assert [cache.get(name) is not None for name in names[:4]] == [True, False, True, True]
    cache.put(names[4], bytes(31))
    assert cache.get(names[4]) is None


def test_files_that_are_no_programs_are_never_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LARGEST", 10)
    users = [tmp_path / "photos" / f"a-{'0' * 64}", tmp_path / ("0" * 16) / "notes.txt"]
    for file in users:
        file.parent.mkdir()
        file.write_bytes(bytes(20))
        os.utime(file, (0, 0))
    cache = compilation_cache.FolderCache(epath.Path(tmp_path / ("0" * 16)))
    for name in "ab":
        cache.put(f"jit_{name}-{'0' * 64}", bytes(9))
    assert all(file.stat().st_size == 20 for file in users)
    assert len(list(tmp_path.glob("*/jit*"))) == 1


def test_a_full_disk_does_no_harm(tmp_path, monkeypatch):
    def refuse(path: Path, data: bytes):
        raise UserError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(compilation_cache, "write_whole", refuse)
    cache = compilation_cache.FolderCache(epath.Path(tmp_path))
    cache.put("a", b"x")
    assert cache.get("a") is None
