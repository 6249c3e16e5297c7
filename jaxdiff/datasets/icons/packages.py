"""Icon sets and emoji names as packages of the npm registry.

A package is a folder as npm unpacks it, or an archive as `npm pack` writes it. Archives are read,
and never unpacked: no path in them becomes a file.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxdiff.errors import UserError
from jaxdiff.io.text import parse_json

NAMES = "emojibase-data"
"""The package with names of emoji (MIT license, Miles Johnson)."""
VERSIONS = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    NAMES: "17.0.0",
}
_MINUTES = 10  # for one package
_LARGEST = 2**28  # bytes of a file in a package; those of published sets have up to 2**25


def package_of(icon_set: str) -> str:
    """Return the npm package of an Iconify set."""
    return f"@iconify-json/{icon_set}"


def find_package(folder: Path, package: str, *, download: bool) -> Path:
    """Return the folder or archive of a package in `folder`.

    Args:
      folder: with the package as `node_modules` has it, under the last part of its name, or as an
        archive.
      package: its name on npm.
      download: fetch it with `npm pack` if it is not there.

    Raises:
      UserError: it is not there, or cannot be fetched.
    """
    short = package.rpartition("/")[2]
    for place in (folder / package, folder / short):
        if (place / "package.json").is_file():
            return place
    stem = re.escape(package.lstrip("@").replace("/", "-"))
    archives = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path for path in archives if re.fullmatch(rf"{stem}-\d.*\.tgz", path.name))
    if found:
        return found[-1]
    if not download:
        raise UserError(
            f"{folder} has no npm package {package}: expected its folder or its archive; set "
            "data.source.download to True to fetch it with npm, or data.source.folder to a folder "
            "that has it."
        )
    return _fetch(folder, package)


def _fetch(folder: Path, package: str) -> Path:
    """Fetch the archive of a package into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm, which fetches {package}, is not installed: install Node.js, or set "
            "data.source.folder to a folder that has the package."
        )
    wanted = f"{package}@{VERSIONS[package]}" if package in VERSIONS else package
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".npm-") as fresh:
            done = subprocess.run(
                [npm, "pack", "--silent", "--ignore-scripts", wanted],
                cwd=fresh,
                capture_output=True,
                text=True,
                timeout=60 * _MINUTES,
            )
            archives = list(Path(fresh).glob("*.tgz"))
            if done.returncode or len(archives) != 1:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                raise OSError(lines[0] if lines else "it wrote no archive")
            return archives[0].replace(folder / archives[0].name)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"npm pack {wanted} failed in {folder} ({error}): check the network and the folder, or "
            "set data.source.folder to a folder that has the package."
        ) from error


def read_member(place: Path, name: str) -> bytes | None:
    """Return a file of a package; None if the package has none.

    Raises:
      UserError: the package cannot be read.
    """
    try:
        if place.is_dir():
            path = place / name
            return path.read_bytes() if path.is_file() else None
        with tarfile.open(place) as archive:
            for member in archive:
                if member.isfile() and member.name == f"package/{name}":
                    if member.size > _LARGEST:
                        raise ValueError(f"{name} is too large")
                    file = archive.extractfile(member)
                    return None if file is None else file.read()
        return None
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{place} cannot be read as an npm package ({error}): remove it and fetch it again."
        ) from error


@contextmanager
def damaged_package_as_user_error(folder: object) -> Iterator[None]:
    """Raise `UserError` where a package has other JSON values than its format has."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"A package in {folder} is damaged ({type(error).__name__}: {error}): expected the "
            "format of Iconify or emojibase; remove it and fetch it again."
        ) from error


def read_object(place: Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """Return a JSON object of a package; {} for an optional file that is not there.

    Raises:
      UserError: a required file is missing, or it is no JSON object.
    """
    value = _json(place, name, required)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} of {place} is no JSON object: fetch the package again.")
    return value


def read_list(place: Path, name: str) -> list[Any]:
    """Return a JSON list of a package.

    Raises:
      UserError: it is missing, or no list.
    """
    value = _json(place, name, True)
    if not isinstance(value, list):
        raise UserError(f"{name} of {place} is no JSON list: fetch the package again.")
    return value


def _json(place: Path, name: str, required: bool) -> Any:
    data = read_member(place, name)
    if data is not None:
        return parse_json(data, f"{name} of {place}")
    if required:
        raise UserError(f"{place} has no {name}: expected an npm package of Iconify or emojibase.")
    return None


def content_digest(place: Path, *names: str) -> str:
    """Return a digest of an archive, or of these files of a folder."""
    hashed = hashlib.sha256()
    for path in [place] if place.is_file() else [place / name for name in names]:
        if path.is_file():
            hashed.update(path.read_bytes())
    return hashed.hexdigest()


def text_digest(parts: list[str]) -> str:
    """Return a digest of several texts, in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
