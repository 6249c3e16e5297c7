"""`jaxdiff env`: versions, devices and settings, for a bug report."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import jaxdiff
from jaxdiff.distributed.compilation_cache import cache_folder
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import write_line, write_text

_SETTINGS = re.compile(
    r"^(JAX_|JAXDIFF_|XLA_|TPU_|LIBTPU_|CUDA_VISIBLE|LD_PRELOAD$|HF_HOME$|HF_HUB_|TF_GPU_|OMP_NUM)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


def env_command(arguments: list[str]) -> None:
    """Run `jaxdiff env`.

    Raises:
      UserError: there are arguments.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        write_text("usage: jaxdiff env\n\nPrint versions, devices and settings for a bug report.")
        return
    if arguments:
        raise UserError(f"jaxdiff env takes no arguments, got {' '.join(arguments)}.")
    for title, lines in (
        (
            "jaxdiff",
            [f"version: {jaxdiff.__version__}", f"folder: {Path(jaxdiff.__file__).parent}"],
        ),
        ("system", _system()),
        ("packages", _packages()),
        ("devices", _devices()),
        ("settings", _settings()),
    ):
        write_line(f"{title}:")
        for line in lines:
            write_line(f"  {line}")


def _system() -> list[str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return [
        f"python: {platform.python_version()} ({sys.executable})",
        f"platform: {platform.platform()}",
        f"processors: {os.cpu_count()}, memory: {memory:.1f} GiB",
    ]


def _packages() -> list[str]:
    """Return `name: version` of each dependency, those of the extras included if installed."""
    try:
        requirements = importlib.metadata.requires("jaxdiff") or []
    except importlib.metadata.PackageNotFoundError:
        return ["jaxdiff is not installed"]
    names = {"jaxlib", "libtpu", *(re.split(r"[^\w.-]", line)[0] for line in requirements)}
    versions = {name: _version(name) for name in names - {"jaxdiff"}}
    return [f"{name}: {versions[name]}" for name in sorted(versions) if versions[name]]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import jax  # after --help and errors, which need no devices

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # no such platform as in JAX_PLATFORMS
        return [f"none: {(str(error) or 'JAX finds no such device').splitlines()[0]}"]
    lines = [f"backend: {jax.default_backend()}, processes: {jax.process_count()}"]
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        lines.append(f"{device.id}: {device.device_kind}{memory}")
    return lines


def _settings() -> list[str]:
    """Return environment variables of JAX and XLA, and the folders of the caches."""
    from huggingface_hub import constants

    names = sorted(name for name in os.environ if _SETTINGS.search(name))
    lines = [f"{name}={os.environ[name]}" for name in names if not _SECRET.search(name)]
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() or "none"
    return [
        *lines,
        f"compilation cache: {compiled}",
        f"Hugging Face cache: {constants.HF_HUB_CACHE}",
    ]
