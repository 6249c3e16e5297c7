"""An embedding map as one self-contained HTML file, with panning, zooming and neighbours."""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from jaxdiff.explore.axes import Axis, rescale

TEMPLATE = Path(__file__).with_name("page.html")
THUMBNAIL = 64  # largest side, in pixels


class Space(NamedTuple):
    """The images as one model represents them."""

    name: str
    axes: list[Axis]
    views: dict[str, tuple[str, str]]  # name to the keys of its two axes; the first one is shown
    near: Int[np.ndarray, "n k"]  # indices of the neighbours, nearest first


def nearest_neighbours(vectors: Float[np.ndarray, "n d"], count: int) -> Int[np.ndarray, "n k"]:
    """Indices of the nearest other points by Euclidean distance, nearest first."""
    square = np.sum(vectors**2, axis=1)
    distance = square[:, None] + square - 2 * vectors @ vectors.T
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]


def render_page(
    title: str, images: UInt8[np.ndarray, "n h w 3"], captions: list[str], spaces: list[Space]
) -> str:
    """Render the page as HTML text that contains thumbnails, captions and coordinates."""
    thumb = min(THUMBNAIL, images.shape[1])
    columns = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (columns * thumb, math.ceil(len(images) / columns) * thumb))
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((thumb, thumb), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % columns * thumb, i // columns * thumb))
    data = {
        "thumb": thumb,
        "columns": columns,
        "captions": captions,
        "spaces": [_space(space) for space in spaces],
    }
    # Only "<" could end the script element; JSON can escape it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title), "SHEET": _data_url(sheet), "DATA": text}
    before, *rest = TEMPLATE.read_text(encoding="utf-8").split("{{")
    return before + "".join(
        parts[name] + after for name, _, after in (part.partition("}}") for part in rest)
    )


def _space(space: Space) -> dict:
    axes = [
        {
            "key": axis.key,
            "name": axis.name,
            "low": axis.low,
            "high": axis.high,
            "group": axis.group,
            "values": [round(value, 4) for value in rescale(axis.values).tolist()],
        }
        for axis in space.axes
    ]
    return {"name": space.name, "axes": axes, "views": space.views, "near": space.near.tolist()}


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
