"""Reports of benchmarks: printed, written as JSON with everything they depend on, compared."""

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
from statistics import median
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxdiff.benchmark.timing import standard_error
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, lines_of, read_json, read_text
from jaxdiff.training.recipe import Config, flatten, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")

NOISE_ERRORS = 3.0  # standard errors of a difference that count as noise
NOISE_FRACTION = 0.02  # fraction of a median that counts as noise, whatever its standard error
NOISE_FRACTION_SINGLE = 0.1  # fraction of a metric measured once that counts as noise


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The times and metrics of one contender.

    Attributes:
      name: of the contender.
      unit: what one repeat is, such as "step".
      seconds: of each repeat.
      images: in one repeat; 0 if none.
      metrics: other numbers, each measured once; names end in the unit.
      notes: remarks on how to read them.
    """

    name: str
    unit: str
    seconds: list[float]
    images: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_report(
    kind: str, config: Config, options: dict[str, Any], measurements: Sequence[Measurement]
) -> dict:
    """Return a JSON-compatible report: results, machine, versions, flags, options and recipe."""
    results = {}
    for one in measurements:
        p90 = float(np.percentile(one.seconds, 90))
        entry = {"unit": one.unit, "median_s": median(one.seconds), "p90_s": p90}
        if one.images:
            rate = one.images / median(one.seconds)
            entry |= {"images_per_s": rate, "images_per_s_per_device": rate / jax.device_count()}
        results[one.name] = entry | one.metrics | {"notes": one.notes, "seconds": one.seconds}
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
    """Return the devices by JAX's names, and the CPU."""
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
        lines = lines_of(read_text("/proc/cpuinfo"))
    except UserError:
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
    """Return the commit of the code, and whether files differ from it; {} outside a repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def format_report(report: dict) -> str:
    """Format a report as text."""
    machine, config = report["hardware"], report["config"]
    devices = f"{machine['devices']} x {machine['device']}"
    lines = [f"{report['benchmark']} of {config['name']} on {devices} ({machine['processor']})"]
    first = next(iter(report["results"].values()))["median_s"]
    for name, result in report["results"].items():
        middle, repeats = result["median_s"], len(result["seconds"])
        lines.append(
            f"{name}: median {_seconds(middle)} per {result['unit']}, p90 "
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


def write_report(path: epath.PathLike, report: dict) -> None:
    """Write a report atomically."""
    write_whole(epath.Path(path), (format_json(report, indent=2) + "\n").encode())


def read_report(path: epath.PathLike) -> dict:
    """Read a report that `write_report` wrote.

    Raises:
      UserError: the file does not exist, or is not a report.
    """
    report = read_json(path, "a report that --json wrote")
    if not {"benchmark", "results", "config"} <= set(report):
        raise UserError(f"{path} is not a benchmark report: expected a file that --json wrote.")
    return report


def compare(before: dict, after: dict) -> str:
    """Describe what changed by more than noise between two reports, and how their setups differ.

    A median changed if it differs by more than 3 standard errors of the difference and by more than
    2 %; a metric measured once, by more than 10 %.

    Raises:
      UserError: the benchmarks differ, or have no contender in common.
    """
    kinds = before["benchmark"], after["benchmark"]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"The first report is of bench {kinds[0]}, the second of bench {kinds[1]}: "
            "expected two of the same benchmark."
        )
    try:
        return _compare(before, after)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"A report is incomplete or edited ({type(error).__name__}: {error}): expected files "
            "that --json of this version wrote."
        ) from error


def _compare(before: dict, after: dict) -> str:
    shared = [name for name in before["results"] if name in after["results"]]
    if not shared:
        raise UserError("The two reports have no contender in common: expected at least one.")
    lines = [
        f"differs: {key} is {a!r} in the first and {b!r} in the second"
        for part in ("git", "versions", "flags", "hardware", "options", "config")
        for key, a, b in _differences(flatten({part: before[part]}), flatten({part: after[part]}))
    ]
    for name in shared:
        lines += _changes(name, before["results"][name], after["results"][name])
    rule = (
        f"A median changed if by more than {NOISE_ERRORS:g} standard errors and "
        f"{NOISE_FRACTION:.0%}; a metric measured once, if by more than "
        f"{NOISE_FRACTION_SINGLE:.0%}."
    )
    return "\n".join([*lines, rule])


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*a, *b])
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _changes(name: str, before: dict, after: dict) -> list[str]:
    old, new = before["median_s"], after["median_s"]
    error = math.hypot(standard_error(before["seconds"]), standard_error(after["seconds"]))
    beyond = abs(new - old) > max(NOISE_ERRORS * error, NOISE_FRACTION * old)
    lines = [_line(f"{name}: median", _seconds(old), _seconds(new), new / old, beyond)]
    for key in before:
        # These follow from the median.
        if key.startswith(("median", "p90", "images_per_s", "mfu")) or key not in after:
            continue
        old, new = before[key], after[key]
        if not isinstance(old, float | int) or not isinstance(new, float | int) or not old:
            continue
        beyond = abs(new - old) > NOISE_FRACTION_SINGLE * abs(old)
        lines.append(_line(f"{name}: {key}", f"{old:.4g}", f"{new:.4g}", new / old, beyond))
    return lines


def _line(what: str, old: str, new: str, ratio: float, beyond: bool) -> str:
    verdict = ("rose" if ratio > 1 else "fell") if beyond else "within noise"
    return f"{what}: {old} -> {new} ({ratio:.3f}), {verdict}"
