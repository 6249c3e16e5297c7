"""What a benchmark found, with all that it depends on: printed, written as JSON, compared."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxdiff.benchmark.timing import median, p90, standard_error
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.training.recipe import Config, flatten, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")

ERRORS = 3.0  # standard errors of a difference that are taken for noise
LEAST = 0.02  # share of a time that is, however steady it was
ONCE = 0.1  # share of a figure that was measured only once that is


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contender's figures.

    Attributes:
      name: of the contender.
      what: one repeat is, such as "step".
      seconds: of each repeat.
      images: of one repeat; 0 where there are none.
      figures: others, each measured once, by a name that ends in its unit.
      notes: what a reader must know of them.
    """

    name: str
    what: str
    seconds: list[float]
    images: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_report(
    kind: str, config: Config, options: dict[str, Any], found: Sequence[Measured]
) -> dict:
    """All that is to be known of a benchmark, as JSON takes it."""
    results = {}
    for one in found:
        entry = {"what": one.what, "median_s": median(one.seconds), "p90_s": p90(one.seconds)}
        if one.images:
            rate = one.images / median(one.seconds)
            entry |= {"images_per_s": rate, "images_per_s_per_device": rate / jax.device_count()}
        results[one.name] = entry | one.figures | {"notes": one.notes, "seconds": one.seconds}
    return {
        "benchmark": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "command": sys.argv,
        "options": options,
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "versions": {"python": platform.python_version()} | _versions(),
        "hardware": hardware(),
        "config": to_json(config),
        "results": results,
    }


def hardware() -> dict[str, Any]:
    """The machine: its devices by JAX's names, and the processor that feeds them."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any]:
    """The commit of the code, and whether files differ from it; {} where there is no repository."""
    folder = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def format_report(found: dict) -> str:
    """A report as text, for people."""
    machine, config = found["hardware"], found["config"]
    devices = f"{machine['devices']} x {machine['device']}"
    lines = [f"{found['benchmark']} of {config['name']} on {devices} ({machine['processor']})"]
    first = next(iter(found["results"].values()))["median_s"]
    for name, result in found["results"].items():
        middle, repeats = result["median_s"], len(result["seconds"])
        lines.append(
            f"{name}: median {_seconds(middle)} a {result['what']}, p90 "
            f"{_seconds(result['p90_s'])}, {repeats} repeats"
        )
        if middle != first:
            lines.append(f"  {'ratio to the first':<28}{middle / first:>14.2f}")
        lines += [
            f"  {key:<28}{value:>14,.4g}"
            for key, value in result.items()
            if key not in ("median_s", "p90_s") and isinstance(value, float | int)
        ]
        lines += [f"  {note}" for note in result["notes"]]
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.3f} s"


def write_report(path: epath.PathLike, found: dict) -> None:
    """Writes a report, whole."""
    write_whole(epath.Path(path), (json.dumps(found, indent=2) + "\n").encode())


def read_report(path: epath.PathLike) -> dict:
    """What `write_report` wrote.

    Raises:
      UserError: there is no such file, or it is no report.
    """
    try:
        found = json.loads(epath.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a report.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): give what --json wrote.") from error
    if not isinstance(found, dict) or not {"benchmark", "results", "config"} <= set(found):
        raise UserError(f"{path} is no report of a benchmark: give what --json wrote.")
    return found


def compare(before: dict, after: dict) -> str:
    """What moved beyond noise between two reports, and what else differs between them.

    A median of repeats has moved if it differs by more than 3 standard errors of the difference and
    by more than 2 %; a figure that was measured once, by more than 10 %.

    Raises:
      UserError: they are of different benchmarks, or have no contender in common.
    """
    kinds = before["benchmark"], after["benchmark"]
    if kinds[0] != kinds[1]:
        raise UserError(f"The first report is of bench {kinds[0]}, the second of {kinds[1]}.")
    shared = [name for name in before["results"] if name in after["results"]]
    if not shared:
        raise UserError("The two reports have no contender in common: compare others.")
    lines = [
        f"differs: {key} is {a!r} in the first and {b!r} in the second"
        for part in ("git", "versions", "flags", "hardware", "options", "config")
        for key, a, b in _differences(flatten({part: before[part]}), flatten({part: after[part]}))
    ]
    for name in shared:
        lines += _moved(name, before["results"][name], after["results"][name])
    rule = (
        f"A median moved if by over {ERRORS:g} standard errors and {LEAST:.0%}; a figure measured "
        f"once, if by over {ONCE:.0%}."
    )
    return "\n".join([*lines, rule])


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*a, *b])
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _moved(name: str, before: dict, after: dict) -> list[str]:
    old, new = before["median_s"], after["median_s"]
    error = math.hypot(standard_error(before["seconds"]), standard_error(after["seconds"]))
    beyond = abs(new - old) > max(ERRORS * error, LEAST * old)
    lines = [_line(f"{name}: median", _seconds(old), _seconds(new), new / old, beyond)]
    for key in before:
        # What follows from the median moves with it.
        if key.startswith(("median", "p90", "images_per_s", "mfu")) or key not in after:
            continue
        old, new = before[key], after[key]
        if not isinstance(old, float | int) or not isinstance(new, float | int) or not old:
            continue
        beyond = abs(new - old) > ONCE * abs(old)
        lines.append(_line(f"{name}: {key}", f"{old:.4g}", f"{new:.4g}", new / old, beyond))
    return lines


def _line(what: str, old: str, new: str, ratio: float, beyond: bool) -> str:
    verdict = ("rose" if ratio > 1 else "fell") if beyond else "within noise"
    return f"{what}: {old} -> {new} ({ratio:.3f}), {verdict}"
