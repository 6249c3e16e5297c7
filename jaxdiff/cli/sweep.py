"""Measure a model at several values of its settings; figures are saved after each."""

import decimal
import math
import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

from etils import epath

from jaxdiff.distributed.multihost import broadcast_text, is_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.evaluation.provenance import provenance_of
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, parse_json, read_json

_MOST = 1000  # values of one range


def parse_values(text: str, name: str) -> tuple[float | int | str, ...]:
    """Return the values of LOW:HIGH:STEP, both ends included, or of A,B,C.

    Raises:
      UserError: the text is neither; `name` begins the message.
    """
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    if ":" not in text:
        words = text.split(",")
        if not all(words):
            raise UserError(f"{name} is {text!r}: expected values such as 8,12,20 or 1:4:0.25.")
        return tuple(_value(word) if re.fullmatch(number, word) else word for word in words)
    match = re.fullmatch(rf"({number}):({number}):({number})", text)
    low, high, step = map(decimal.Decimal, match.groups()) if match else (0, 0, 0)
    if not match or step <= 0 or high < low or (high - low) / step >= _MOST:
        raise UserError(
            f"{name} is {text!r}: expected LOW:HIGH:STEP of at most {_MOST} values, such as "
            "1:4:0.25, or values with commas."
        )
    count = int((high - low) / step) + 1
    return tuple(_value(str(low + i * step)) for i in range(count))


def _value(text: str) -> float | int:
    return int(text) if re.fullmatch(r"[+-]?\d{1,9}", text) else float(text)


class SavedFigures:
    """Figures by point, in a file that is rewritten after each: the same command resumes.

    Args:
      path: of the file.
      settings: all that the figures depend on beside the point; a file of other settings is
        replaced. Hosts call with the same points, and the first one's file and
        settings count.

    Raises:
      UserError: the file is no JSON.
    """

    def __init__(self, path: epath.Path, settings: Mapping[str, Any]):
        self._path = path
        self._settings = parse_json(broadcast_text(format_json(settings)), "settings")
        read = read_json(path) if is_host0() and path.exists() else {}
        earlier = parse_json(broadcast_text(format_json(read)), path)
        self._points: list[dict[str, Any]] = []
        if isinstance(earlier, dict) and earlier.get("settings") == self._settings:
            self._points = _points_of(earlier, path)

    def measure(self, point: Mapping[str, Any], measure: Callable[[], Report]) -> dict[str, float]:
        """Return the figures of a point, measured unless they are saved.

        The file states what each figure depends on, too.
        """
        wanted = _as_read(point)
        for saved in self._points:
            if saved["point"] == wanted:
                return saved["figures"]
        report = measure()
        about = provenance_of(report)
        figures = dict(report.scalars)
        self._points.append({"point": wanted, "figures": figures, "provenance": about})
        text = format_json({"settings": self._settings, "points": self._points}, indent=2)
        if is_host0():
            write_whole(self._path, f"{text}\n".encode())
        return self._points[-1]["figures"]


def _points_of(earlier: dict[str, Any], path: epath.Path) -> list[dict[str, Any]]:
    points = earlier.get("points")
    if not isinstance(points, list) or not all(
        isinstance(point, dict)
        and isinstance(point.get("point"), dict)
        and isinstance(point.get("figures"), dict)
        and all(type(figure) in (int, float, NoneType) for figure in point["figures"].values())
        for point in points
    ):
        raise UserError(f"{path} is damaged: expected points with figures; remove it.")
    for point in points:  # NaN is written as null
        found = point["figures"].items()
        point["figures"] = {name: math.nan if x is None else x for name, x in found}
    return points


def _as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value as it comes back from a file of JSON."""
    return parse_json(format_json(value), "settings")
