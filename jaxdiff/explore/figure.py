"""An embedding map as a still image: thumbnails on a grid, close to their coordinates."""

import math
from typing import NamedTuple

import numpy as np
from etils import epy
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxdiff.explore.axes import Axis, rescale

with epy.lazy_imports():
    from scipy import optimize

CELLS_PER_IMAGE = 1.7  # empty cells show where there are no images
MARGIN = 64
BACKGROUND, INK, FAINT = (255, 255, 255), (32, 32, 32), (150, 150, 150)


class Panel(NamedTuple):
    """One map: its title, its horizontal and its vertical axis."""

    title: str
    x: Axis
    y: Axis


def assign_cells(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], side: int
) -> Int[np.ndarray, "n 2"]:
    """Assign each point of the unit square its own cell of a square grid.

    The assignment minimises the sum of squared distances that the points move.

    Args:
      x: horizontal, in [0, 1].
      y: vertical, in [0, 1]; row 0 is at the top, where y is 1.
      side: cells in a row, side^2 >= n.

    Returns:
      Column and row of each point, from 0.
    """
    centres = (np.arange(side) + 0.5) / side
    columns, rows = (c.ravel() for c in np.meshgrid(np.arange(side), np.arange(side)))
    cost = (x[:, None] - centres[columns]) ** 2 + (1 - y[:, None] - centres[rows]) ** 2
    _, assigned = optimize.linear_sum_assignment(cost)
    return np.stack([columns[assigned], rows[assigned]], axis=1)


def render_figure(
    images: UInt8[np.ndarray, "n h w 3"], title: str, panels: list[Panel], side: int = 960
) -> UInt8[np.ndarray, "height width 3"]:
    """Render panels side by side, each of about `side` pixels, with labelled axes."""
    columns = math.ceil(math.sqrt(CELLS_PER_IMAGE * len(images)))
    thumb = max(side // columns, 8)
    inner = thumb * columns
    tiles = [
        Image.fromarray(image).resize((thumb - 1, thumb - 1), Image.Resampling.LANCZOS)
        for image in images
    ]
    width = len(panels) * (inner + 2 * MARGIN)
    canvas = Image.new("RGB", (width, inner + 3 * MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 24), title, INK, _font(30))
    for i, panel in enumerate(panels):
        left, top = i * (inner + 2 * MARGIN) + MARGIN, 2 * MARGIN - 20
        cells = assign_cells(rescale(panel.x.values), rescale(panel.y.values), columns)
        for tile, (column, row) in zip(tiles, cells.tolist(), strict=True):
            canvas.paste(tile, (left + column * thumb, top + row * thumb))
        _label(canvas, panel, left, top, inner)
    return np.asarray(canvas)


def _label(canvas: Image.Image, panel: Panel, left: int, top: int, inner: int) -> None:
    """Write the title above the panel, and the axes' names and end labels along its sides."""
    draw = ImageDraw.Draw(canvas)
    middle = left + inner // 2
    draw.text((middle, top - 24), panel.title, INK, _font(22), anchor="mm")
    upright = Image.new("RGB", (inner, MARGIN // 2), BACKGROUND)
    for surface, axis, x0, y0 in (
        (draw, panel.x, left, top + inner + 22),
        (ImageDraw.Draw(upright), panel.y, 0, MARGIN // 4),
    ):
        end = x0 + inner - 1
        for tip, back in ((x0, 9), (end, -9)):  # arrow heads: Pillow's font has no arrows
            surface.polygon([(tip, y0), (tip + back, y0 - 6), (tip + back, y0 + 6)], INK)
        surface.text((x0 + 16, y0), axis.low, INK, _font(20), anchor="lm")
        surface.text((x0 + inner // 2, y0), axis.name, FAINT, _font(18), anchor="mm")
        surface.text((end - 16, y0), axis.high, INK, _font(20), anchor="rm")
    canvas.paste(upright.rotate(90, expand=True), (left - MARGIN // 2 - 8, top))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
