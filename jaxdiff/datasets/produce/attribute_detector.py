"""Reads a drawn scene back from its pixels by rules; nothing here is learned.

Bodies are the colourful pixels, stems the dark ones. A body's colour is its median hue, its size
its longest extent, and its kind the one whose silhouette, drawn at many poses, overlaps it best:
analysis by synthesis with the shapes of `jaxdiff.datasets.produce.rendering`. A body that fits no
silhouette closely is of no kind, so that mush is not read as something.
"""

import colorsys
import functools
import itertools
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy import ndimage

from jaxdiff.datasets.produce.rendering import EXTENT, HUE, MAX_TURN, coverage, template, turning
from jaxdiff.datasets.produce.scene import (
    COLOURS,
    DIRECTIONS,
    KINDS,
    SIZES,
    Colour,
    Item,
    Kind,
    Scene,
    Size,
)

BODY_CHROMA = 60.0  # least difference between a body pixel's channels; backgrounds stay below 30
STEM_LIGHT = 100.0  # a stem's pixels have no channel above this, a body's have one
LEAST_BODY = 20  # pixels; smaller specks are no objects
LEAST_STEM = 6
CENTRE_RADIUS = 3.25  # pixels: nearer to the picture's centre than this is "centre"
MISFIT_LIMIT = 0.15  # share of a body's area by which it may miss its kind's silhouette

WINDOW = 32  # bodies are compared on this grid, at a longest extent of FITTED pixels
FITTED = 23.0
SHIFTS = (0.0, -1.2, 1.2)  # of that grid's pixels, tried along both axes
LIKELIEST = 60

ATTRIBUTES = ("kind", "colour", "size", "stem", "position", "count", "relation")

Mask = Bool[np.ndarray, "h w"]
Plane = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One object as read; None where it is like nothing that is drawn.

    `centre` is (x, y) of the body's bounding box and `extent` the body's longest, both in pixels;
    `misfit` is the share of its area by which it misses the nearest silhouette.
    """

    kind: Kind | None
    colour: Colour | None
    size: Size | None
    stem: bool
    centre: tuple[float, float]
    extent: float
    misfit: float


def read(image: UInt8[np.ndarray, "h w 3"]) -> list[Reading]:
    """The objects of a 64x64 picture, from left to right."""
    pixels = image.astype(np.float32)
    light = pixels.max(-1)
    chroma = light - pixels.min(-1)
    dark = light < STEM_LIGHT
    bodies = _components((chroma > BODY_CHROMA) & ~dark, LEAST_BODY)
    owners = _stem_owners(dark, bodies)
    readings = [
        _read_body(pixels, chroma, body, dark, index in owners) for index, body in enumerate(bodies)
    ]
    return sorted(readings, key=lambda reading: reading.centre)


def check(scene: Scene, readings: list[Reading]) -> dict[str, bool]:
    """Which attributes of the scene the readings bear out, and "joint": all of them.

    Only the attributes that the scene has are in the result. Where there are two items, they are
    matched with the readings so that most attributes are right.
    """
    wanted = [item for item in scene.items for _ in range(scene.count)]
    best: dict[str, bool] = {}
    for match in itertools.permutations(readings, len(wanted)):
        found = _check_match(scene, wanted, match)
        if sum(found.values()) > sum(best.values()):
            best = found
    found = {name: best.get(name, False) for name in ("kind", "colour", "size", "stem")}
    found["count"] = len(readings) == len(wanted)
    if scene.position is not None:
        found["position"] = best.get("position", False)
    if scene.relation is not None:
        found["relation"] = best.get("relation", False)
    return {**found, "joint": all(found.values())}


def _check_match(scene: Scene, wanted: list[Item], match: tuple[Reading, ...]) -> dict[str, bool]:
    pairs = list(zip(wanted, match, strict=True))
    found = {
        name: all(getattr(item, name) == getattr(reading, name) for item, reading in pairs)
        for name in ("kind", "colour", "size", "stem")
    }
    if scene.position is not None:
        offset = np.array(match[0].centre) - 32
        found["position"] = _direction(offset, CENTRE_RADIUS) == DIRECTIONS[scene.position]
    if scene.relation is not None:
        offset = np.array(match[0].centre) - np.array(match[1].centre)
        found["relation"] = _direction(offset, CENTRE_RADIUS) == DIRECTIONS[scene.relation]
    return found


def _direction(offset: np.ndarray, radius: float) -> tuple[int, int]:
    """The sign along the longer axis; (0, 0) within the radius."""
    axis = int(np.argmax(np.abs(offset)))
    if abs(offset[axis]) < radius:
        return (0, 0)
    sign = int(np.sign(offset[axis]))
    return (sign, 0) if axis == 0 else (0, sign)


def _components(mask: Mask, least: int) -> list[Mask]:
    """Connected parts of at least so many pixels."""
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(mask))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == part for part in range(1, count + 1) if sizes[part] >= least]


def _stem_owners(dark: Mask, bodies: list[Mask]) -> set[int]:
    """The bodies that have a stem: each dark part belongs to the body that it touches most.

    A stem's root, with its calyx, lies along its body; its tip may touch another.
    """
    owners = set()
    near = [ndimage.binary_dilation(body, iterations=2) for body in bodies]
    for part in _components(dark, LEAST_STEM):
        contact = [int((part & around).sum()) for around in near]
        if contact and max(contact) >= LEAST_STEM // 2:
            owners.add(int(np.argmax(contact)))
    return owners


def _read_body(
    pixels: Float32[np.ndarray, "h w 3"], chroma: Plane, body: Mask, dark: Mask, stem: bool
) -> Reading:
    filled = np.asarray(ndimage.binary_fill_holes(body))
    # Seeds and gleams leave holes in the colour; larger ones are holes in the thing itself.
    if (filled & ~body & ~dark).sum() > 0.15 * body.sum():
        filled = body
    rows, columns = np.nonzero(filled)
    low = np.array([columns.min(), rows.min()])
    high = np.array([columns.max(), rows.max()])
    centre = (low + high + 1) / 2
    extent = _extent(columns, rows)
    around = ndimage.binary_dilation(body, iterations=2)
    inner = ndimage.binary_erosion(filled)
    cover = np.clip((chroma / np.median(chroma[body]) - 0.08) / 0.5, 0, 1)
    cover = np.where(inner, 1, np.where(around, cover, 0)).astype(np.float32)
    kind, misfit = _nearest_kind(cover, ~dark, centre, extent)
    return Reading(
        kind=kind,
        colour=_colour(pixels[body], chroma[body]),
        size=_size(extent),
        stem=stem,
        centre=(float(centre[0]), float(centre[1])),
        extent=extent,
        misfit=misfit,
    )


def _extent(x: np.ndarray, y: np.ndarray) -> float:
    """The longest distance across, over all directions."""
    angle = np.linspace(0, np.pi, 36, endpoint=False)
    along = x[:, None] * np.cos(angle) + y[:, None] * np.sin(angle)
    return float(np.ptp(along, axis=0).max() + 1)


def _size(extent: float) -> Size | None:
    """The nearest size, if the extent is within a quarter of it."""
    size = min(SIZES, key=lambda name: abs(np.log(extent / EXTENT[name])))
    return size if abs(extent / EXTENT[size] - 1) < 0.25 else None


def _colour(pixels: Float32[np.ndarray, "n 3"], chroma: np.ndarray) -> Colour | None:
    """The nearest hue to that of the body's more colourful half."""
    red, green, blue = pixels[chroma >= np.median(chroma)].mean(0) / 255
    hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
    away = {name: abs((hue - HUE[name] + 180) % 360 - 180) for name in COLOURS}
    colour = min(COLOURS, key=lambda name: away[name])
    return colour if away[colour] < 25 else None


@functools.cache
def _silhouettes() -> tuple[list[Kind], Float32[np.ndarray, "s p"], Float32[np.ndarray, "s p"]]:
    """Every kind at many poses, as coverage of the window: kinds, flat pixels, their squares."""
    axis = np.arange(WINDOW, dtype=np.float32) + 0.5 - WINDOW / 2
    x, y = axis[None, :], axis[:, None]
    kinds, covers = [], []
    for kind in KINDS:
        shape = template(kind)
        body = shape.planes[..., 0]
        symmetric = np.abs(body - body[:, ::-1]).max() < 0.02
        poses = itertools.product(
            np.linspace(-MAX_TURN - 4, MAX_TURN + 4, 13),
            (1.0,) if symmetric else (1.0, -1.0),
            FITTED * np.array([1.0, 1.06, 1.12, 1.18, 1.25]),  # a stem hides some of the extent
        )
        for degrees, mirror, extent in poses:
            turn = turning(degrees, mirror)
            outline = shape.outline @ turn.T * extent
            left, top = (outline.min(0) + outline.max(0)) / 2
            u = (x + left) * turn[0, 0] + (y + top) * turn[1, 0]
            v = (x + left) * turn[0, 1] + (y + top) * turn[1, 1]
            distance = shape.sample(u / extent, v / extent)[..., 0] * extent
            kinds.append(kind)
            covers.append(coverage(distance / 1.4).ravel())  # about the blur of the resampling
    silhouettes = np.stack(covers).astype(np.float32)
    return kinds, silhouettes, silhouettes**2


def _nearest_kind(
    cover: Float32[np.ndarray, "h w"], visible: Mask, centre: np.ndarray, extent: float
) -> tuple[Kind | None, float]:
    """The kind of the silhouette that misses the body least, and by what share of its area.

    Where a stem hides the body, nothing is compared.
    """
    kinds, silhouettes, squares = _silhouettes()
    x, y = _window_positions()
    pixel = extent / FITTED
    at = [centre[1] + y * pixel - 0.5, centre[0] + x * pixel - 0.5]
    body = ndimage.map_coordinates(cover, at, order=1)
    weight = ndimage.map_coordinates(visible.astype(np.float32), at, order=1)

    def misfits(shifts: slice, poses: np.ndarray | slice) -> Float32[np.ndarray, "k s"]:
        weighted = weight[shifts] * body[shifts]
        area = weight[shifts] @ squares[poses].T
        own = (weighted * body[shifts]).sum(-1, keepdims=True)
        return (own - 2 * weighted @ silhouettes[poses].T + area) / area

    # Only the likeliest poses, unshifted, are worth shifting.
    poses = np.argsort(misfits(slice(1), slice(None))[0])[:LIKELIEST]
    misfit = misfits(slice(None), poses).min(0)
    nearest = int(np.argmin(misfit))
    least = float(misfit[nearest])
    return (kinds[poses[nearest]] if least < MISFIT_LIMIT else None), least


@functools.cache
def _window_positions() -> tuple[Float32[np.ndarray, "k p"], Float32[np.ndarray, "k p"]]:
    """x and y of the window's pixels from its centre, under every shift; the first is none."""
    axis = np.arange(WINDOW) + 0.5 - WINDOW / 2
    shift_y, shift_x, y, x = np.meshgrid(SHIFTS, SHIFTS, axis, axis, indexing="ij")
    pixels = WINDOW * WINDOW
    x, y = (x + shift_x).reshape(-1, pixels), (y + shift_y).reshape(-1, pixels)
    return x.astype(np.float32), y.astype(np.float32)
