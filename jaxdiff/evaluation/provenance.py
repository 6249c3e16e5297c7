"""What figures depend on, written beside them, and the comparison of two files of figures."""

import datetime
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.io.text import read_json

_PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def figures_json(report: Report, settings: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """Return the content of `evaluation.json`.

    Args:
      report: of all evaluators.
      settings: of the evaluation, such as the guidance scale.
      about: what is stated but does not decide whether figures are comparable, such as the sampler.
    """
    about = {**provenance_of(report), **about}
    return {**settings, "figures": dict(report.scalars), "provenance": about}


def provenance_of(report: Report) -> dict[str, Any]:
    """Return what each figure depends on, and the versions, devices and day of its computation."""
    return {
        "figures": {name: dict(report.provenance.get(name, {})) for name in report.scalars},
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
        return None


def compare_figures(ours: epath.PathLike, theirs: epath.PathLike) -> str:
    """Return a table of the figures that two files share, one line each.

    Figures that depend on different data, networks, resizings, sample counts or settings have the
    reason in the place of their difference.

    Raises:
      UserError: a file cannot be read, or no figure is comparable.
    """
    a, b = _read(ours), _read(theirs)
    shared = [name for name in a["figures"] if name in b["figures"]]
    width = max([43, *map(len, shared)]) + 1
    lines, refused = [f"{'':<{width}}{'first':>12}{'second':>12}{'difference':>13}"], {}
    for name in shared:
        x, y = (data["figures"][name] for data in (a, b))
        reason = _difference(*(data["provenance"]["figures"][name] for data in (a, b)))
        if reason:
            refused[name] = reason
        both = f"{name:<{width}}{x:>12.5g}{y:>12.5g}"
        lines.append(f"{both}  not comparable: {reason}" if reason else f"{both}{y - x:>+13.5g}")
    if len(refused) == len(shared):
        reason = next(iter(refused.values()), "they share no figure")
        raise UserError(
            f"{ours} and {theirs} are not comparable ({reason}): expected figures of the same "
            "data, network, resizing and number of images; evaluate one of them again."
        )
    return "\n".join(lines)


def _read(path: epath.PathLike) -> dict[str, Any]:
    data, figures = read_json(epath.Path(path), "a file that jaxdiff evaluate wrote"), {}
    try:
        # NaN is written as null.
        figures = {name: math.nan if x is None else x for name, x in data["figures"].items()}
        known = data["provenance"]["figures"]
        usable = set(known) == set(figures)
        usable &= all(isinstance(about, dict) for about in known.values())
        usable &= all(type(figure) in (int, float) for figure in figures.values())
    except (AttributeError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            f"{path} does not state what its figures depend on: expected an evaluation.json of "
            "this version; evaluate again."
        )
    return {**data, "figures": figures}


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the first difference of what two figures depend on; "" for none."""
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            return (
                f"{key} is {_short(a.get(key))} in the first and {_short(b.get(key))} in the second"
            )
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
