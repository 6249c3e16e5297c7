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
    files = {file.name for file in folder.glob("*/*")}
    assert files
    assert not any(name.startswith(".partial") for name in files)
    later = finish(start(folder))
    assert later[0] == first[0] == again[0]
    assert later[1] == len(files)
    assert {file.name for file in folder.glob("*/*")} == files
    for file in folder.glob("*/*"):
        file.write_bytes(file.read_bytes()[:-9])
    # JAX names each damaged entry in a warning, compiles, and has it written again.
    bits = start(folder).communicate()[0].split()[0]
    assert bits == first[0]
    assert finish(start(folder)) == later


@pytest.mark.parametrize("folder", ["/dev/null/cache", "off"])
def test_without_a_folder_programs_are_compiled_in_silence(folder):
    assert finish(start(folder))[1] == 0


def test_the_folder_is_the_users_cache_unless_variables_say_otherwise(monkeypatch):
    monkeypatch.setenv("HOME", "/home/pea")
    host = cache_folder({}).name
    assert cache_folder({}) == epath.Path(f"/home/pea/.cache/jaxdiff/compiled/{host}")
    here = cache_folder({"XDG_CACHE_HOME": "/here"})
    assert here == epath.Path(f"/here/jaxdiff/compiled/{host}")
    assert cache_folder({"XDG_CACHE_HOME": "here"}) == cache_folder({})
    assert cache_folder({"JAXDIFF_CACHE": "~/c"}) == epath.Path(f"/home/pea/c/{host}")
    assert cache_folder({"JAXDIFF_CACHE": "gs://b/c"}) == epath.Path(f"gs://b/c/{host}")
    assert cache_folder({"JAXDIFF_CACHE": "off"}) is None
    assert cache_folder({"JAXDIFF_CACHE": "/c", "JAX_COMPILATION_CACHE_DIR": "/d"}) is None


def test_another_cache_of_jax_stays(monkeypatch):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    assert before[0] is not None  # that of the tests
    use_compilation_cache({})
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache) == before


def test_the_least_recently_used_programs_leave_a_full_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LARGEST", 30)
    cache = compilation_cache._Cache(epath.Path(tmp_path / "host"))
    old = tmp_path / "another"
    old.mkdir()
    (old / "x").write_bytes(bytes(10))
    os.utime(old / "x", (0, 0))
    for i, name in enumerate("abc"):
        cache.put(name, bytes(9))
        os.utime(tmp_path / "host" / name, (i + 1, i + 1))
    assert not (old / "x").exists()
    assert cache.get("a") == bytes(9)  # used now
    cache.put("d", bytes(9))
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    cache.put("e", bytes(31))
    assert cache.get("e") is None


def test_a_full_disk_does_no_harm(tmp_path, monkeypatch):
    def refuse(path: Path, data: bytes):
        raise UserError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(compilation_cache, "write_whole", refuse)
    cache = compilation_cache._Cache(epath.Path(tmp_path))
    cache.put("a", b"x")
    assert cache.get("a") is None
