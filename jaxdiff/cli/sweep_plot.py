"""Plot the quality of a model over its cost, with the Pareto front."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxdiff.evaluation.evaluator import Goal

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT, TOP, BOTTOM = 110, 40, 60, 80
BACKGROUND, INK, FAINT, FRONT = (255, 255, 255), (32, 32, 32), (205, 205, 205), (200, 60, 20)


class SweepPoint(NamedTuple):
    """One setting: what labels it, its cost, and its quality."""

    label: str
    cost: float
    quality: float


def pareto_front(points: Sequence[SweepPoint], goal: Goal) -> list[int]:
    """Return the indices of the points that no other beats in quality at its cost or less.

    Ascending in cost. Of equal points the first one counts; NaN is on no front.
    """
    sign = 1 if goal == "min" else -1
    order = sorted(range(len(points)), key=lambda i: (points[i].cost, sign * points[i].quality))
    front: list[int] = []
    for i in order:
        quality = points[i].quality
        best = points[front[-1]].quality if front else sign * np.inf
        if sign * quality < sign * best:  # never for NaN
            front.append(i)
    return front


def render_sweep(
    points: Sequence[SweepPoint], goal: Goal, *, title: str, cost: str, quality: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Render the points, the front as a line through labelled ones.

    Args:
      points: of finite cost; those whose quality is NaN are left out.
      goal: whether the least or the largest quality is best.
      title: above the plot.
      cost: name and unit of the horizontal axis.
      quality: name of the vertical axis.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    front = pareto_front(points, goal)
    shown = [point for point in points if not np.isnan(point.quality)]
    x_ticks = _ticks([point.cost for point in shown])
    y_ticks = _ticks([point.quality for point in shown])

    def place(point: SweepPoint) -> tuple[float, float]:
        x = LEFT + (point.cost - x_ticks[0]) / np.ptp(x_ticks) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_ticks[-1] - point.quality) / np.ptp(y_ticks) * (HEIGHT - TOP - BOTTOM)
        return float(x), float(y)

    _axes(canvas, x_ticks, y_ticks, title=title, cost=cost, quality=quality)
    corners = [place(points[i]) for i in front]
    if len(corners) > 1:
        pen.line(corners, FRONT, 3)
    for point in shown:
        x, y = place(point)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), FAINT, INK)
    _label_front(pen, [points[i].label for i in front], corners, [place(p) for p in shown])
    return np.asarray(canvas)


def _label_front(
    pen: ImageDraw.ImageDraw,
    labels: Sequence[str],
    corners: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float]],
) -> None:
    """Mark the points of the front, and label each where there is room, or leave its label out."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    font = _font(15)
    for (x, y), label in zip(corners, labels, strict=True):
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), FRONT, INK)
        width, height = pen.textlength(label, font), 18
        places = [
            (x + 12, y + 4),
            (x + 12, y - 22),
            (x - width - 12, y - 22),
            (x - width / 2, y + 12),
        ]
        for left, top in [*places, (x - width / 2, y - 32)]:
            box = (left, top, left + width, top + height)
            inside = (
                box[0] >= LEFT and box[2] <= WIDTH - 4 and TOP <= box[1] <= HEIGHT - BOTTOM - height
            )
            if inside and not any(_overlap(box, other) for other in taken):
                pen.text((left, top), label, INK, font)
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _axes(
    canvas: Image.Image,
    x_ticks: np.ndarray,
    y_ticks: np.ndarray,
    *,
    title: str,
    cost: str,
    quality: str,
) -> None:
    pen, small = ImageDraw.Draw(canvas), _font(15)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in x_ticks:
        x = LEFT + (tick - x_ticks[0]) / np.ptp(x_ticks) * (right - LEFT)
        pen.line((x, TOP, x, bottom), FAINT)
        pen.text((x, bottom + 8), f"{tick:.4g}", INK, small, anchor="mt")
    for tick in y_ticks:
        y = TOP + (y_ticks[-1] - tick) / np.ptp(y_ticks) * (bottom - TOP)
        pen.line((LEFT, y, right, y), FAINT)
        pen.text((LEFT - 10, y), f"{tick:.4g}", INK, small, anchor="rm")
    pen.rectangle((LEFT, TOP, right, bottom), outline=INK)
    pen.text((LEFT, 20), title, INK, _font(20))
    pen.text(((LEFT + right) // 2, HEIGHT - 30), cost, INK, _font(17), anchor="mm")
    upright = Image.new("RGB", (bottom - TOP, 26), BACKGROUND)
    text = ImageDraw.Draw(upright)
    text.text(((bottom - TOP) // 2, 13), quality, INK, _font(17), anchor="mm")
    canvas.paste(upright.rotate(90, expand=True), (8, TOP))


def _ticks(values: Sequence[float]) -> np.ndarray:
    """Return about six round numbers that span some values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
    return step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
