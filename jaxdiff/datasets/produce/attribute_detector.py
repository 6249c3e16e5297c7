"""Detect the objects of a scene and their attributes in its pixels, by rules without learning.

Bodies are the saturated pixels, stems the dark ones. A body's colour is its mean hue, its size its
longest extent, and its kind that of the best-matching silhouette over many poses: analysis by
synthesis with the shapes of `jaxdiff.datasets.produce.rendering`. A body without a close match has
no kind.
"""

import colorsys
import functools
import itertools
from dataclasses import dataclass
from typing import cast

import numpy as np
from etils import epy
from jaxtyping import Bool, Float32, UInt8

from jaxdiff.datasets.produce.rendering import EXTENT, HUE, MAX_TURN, coverage, template, turning
from jaxdiff.datasets.produce.scene import (
    COLOURS,
    KINDS,
    SIZES,
    Colour,
    Item,
    Kind,
    Scene,
    Size,
)
from jaxdiff.datasets.scenes import DIRECTIONS

with epy.lazy_imports():
    from scipy import ndimage

BODY_CHROMA = 60.0  # least max - min over the channels of body pixels; backgrounds stay below 30
STEM_LIGHT = 100.0  # a stem's pixels have no channel above this, a body's have one
LEAST_BODY = 20  # pixels; smaller components are ignored
LEAST_STEM = 6
CENTRE_RADIUS = 3.25  # pixels: closer to the image's centre than this is "centre"
MISFIT_LIMIT = 0.15  # largest misfit to a silhouette, as a fraction of the body's area

WINDOW = 32  # bodies are compared on this grid, at a longest extent of FITTED pixels
FITTED = 23.0
SHIFTS = (0.0, -1.2, 1.2)  # in pixels of that grid, along both axes
LIKELIEST = 60  # poses that are also compared at shifts

ATTRIBUTES = ("kind", "colour", "size", "stem", "position", "count", "relation")

Mask = Bool[np.ndarray, "h w"]
Plane = np.ndarray


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """A detected object; attributes are None where nothing is close enough.

    `centre` is (x, y) of the body's bounding box and `extent` the body's longest, both in pixels;
    `misfit` is the squared difference from the nearest silhouette, as a fraction of its area.
    """

    kind: Kind | None
    colour: Colour | None
    size: Size | None
    stem: bool
    centre: tuple[float, float]
    extent: float
    misfit: float


def detect(image: UInt8[np.ndarray, "h w 3"]) -> list[DetectedObject]:
    """Detect the objects of a 64x64 image, from left to right."""
    pixels = image.astype(np.float32)
    light = pixels.max(-1)
    chroma = light - pixels.min(-1)
    dark = light < STEM_LIGHT
    bodies = _components((chroma > BODY_CHROMA) & ~dark, LEAST_BODY)
    owners = _stem_owners(dark, bodies)
    objects = [
        _describe(pixels, chroma, body, dark, index in owners) for index, body in enumerate(bodies)
    ]
    return sorted(objects, key=lambda one: one.centre)


def match_attributes(scene: Scene, objects: list[DetectedObject]) -> dict[str, bool]:
    """Whether the objects have each attribute of the scene, and all of them ("joint").

    The result has only attributes of the scene. Objects are assigned to items such that most
    attributes match.
    """
    wanted = [item for item in scene.items for _ in range(scene.count)]
    best: dict[str, bool] = {}
    for assigned in itertools.permutations(objects, len(wanted)):
        found = _match_assigned(scene, wanted, assigned)
        if sum(found.values()) > sum(best.values()):
            best = found
    found = {name: best.get(name, False) for name in ("kind", "colour", "size", "stem")}
    found["count"] = len(objects) == len(wanted)
    if scene.position is not None:
        found["position"] = best.get("position", False)
    if scene.relation is not None:
        found["relation"] = best.get("relation", False)
    return {**found, "joint": all(found.values())}


def _match_assigned(
    scene: Scene, wanted: list[Item], objects: tuple[DetectedObject, ...]
) -> dict[str, bool]:
    pairs = list(zip(wanted, objects, strict=True))
    found = {
        name: all(getattr(item, name) == getattr(one, name) for item, one in pairs)
        for name in ("kind", "colour", "size", "stem")
    }
    if scene.position is not None:
        offset = np.array(objects[0].centre) - 32
        found["position"] = _direction(offset, CENTRE_RADIUS) == DIRECTIONS[scene.position]
    if scene.relation is not None:
        offset = np.array(objects[0].centre) - np.array(objects[1].centre)
        found["relation"] = _direction(offset, CENTRE_RADIUS) == DIRECTIONS[scene.relation]
    return found


def _direction(offset: np.ndarray, radius: float) -> tuple[int, int]:
    """Return the sign along the longer axis; (0, 0) within the radius."""
    axis = int(np.argmax(np.abs(offset)))
    if abs(offset[axis]) < radius:
        return (0, 0)
    sign = int(np.sign(offset[axis]))
    return (sign, 0) if axis == 0 else (0, sign)


def _components(mask: Mask, least: int) -> list[Mask]:
    """Return connected components of at least `least` pixels."""
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(mask))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == part for part in range(1, count + 1) if sizes[part] >= least]


def _stem_owners(dark: Mask, bodies: list[Mask]) -> set[int]:
    """Return indices of bodies with a stem: a dark component belongs to the body it touches most.

    A stem's root lies along its own body, while its tip may touch another one.
    """
    owners = set()
    near = [ndimage.binary_dilation(body, iterations=2) for body in bodies]
    for part in _components(dark, LEAST_STEM):
        contact = [int((part & around).sum()) for around in near]
        if contact and max(contact) >= LEAST_STEM // 2:
            owners.add(int(np.argmax(contact)))
    return owners


def _describe(
    pixels: Float32[np.ndarray, "h w 3"], chroma: Plane, body: Mask, dark: Mask, stem: bool
) -> DetectedObject:
    filled = np.asarray(ndimage.binary_fill_holes(body))
    # Small holes are seeds and highlights; larger ones are holes of the object.
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
    return DetectedObject(
        kind=kind,
        colour=_colour(pixels[body], chroma[body]),
        size=_size(extent),
        stem=stem,
        centre=(float(centre[0]), float(centre[1])),
        extent=extent,
        misfit=misfit,
    )


def _extent(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest width over all directions."""
    angle = np.linspace(0, np.pi, 36, endpoint=False)
    along = x[:, None] * np.cos(angle) + y[:, None] * np.sin(angle)
    return float(np.ptp(along, axis=0).max() + 1)


def _size(extent: float) -> Size | None:
    """Return the nearest size, if the extent is within 25 % of it."""
    size = min(SIZES, key=lambda name: abs(np.log(extent / EXTENT[name])))
    return size if abs(extent / EXTENT[size] - 1) < 0.25 else None


def _colour(pixels: Float32[np.ndarray, "n 3"], chroma: np.ndarray) -> Colour | None:
    """Return the colour nearest to the mean hue of the more saturated half, within 25 degrees."""
    red, green, blue = pixels[chroma >= np.median(chroma)].mean(0) / 255
    hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
    away = {name: abs((hue - HUE[name] + 180) % 360 - 180) for name in COLOURS}
    colour = min(COLOURS, key=lambda name: away[name])
    return colour if away[colour] < 25 else None


@functools.cache
def _silhouettes() -> tuple[list[Kind], Float32[np.ndarray, "s p"], Float32[np.ndarray, "s p"]]:
    """Return kinds in many poses, their coverage of the window's pixels, and its squares."""
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
            FITTED * np.array([1.0, 1.06, 1.12, 1.18, 1.25]),  # a stem may cover part of the extent
        )
        for degrees, mirror, extent in poses:
            turn = turning(degrees, mirror)
            outline = shape.outline @ turn.T * extent
            left, top = (outline.min(0) + outline.max(0)) / 2
            u = (x + left) * turn[0, 0] + (y + top) * turn[1, 0]
            v = (x + left) * turn[0, 1] + (y + top) * turn[1, 1]
            distance = shape.sample(u / extent, v / extent)[..., 0] * extent
            kinds.append(kind)
            covers.append(coverage(distance / 1.4).ravel())  # 1.4: the blur of resampling
    silhouettes = np.stack(covers).astype(np.float32)
    return kinds, silhouettes, silhouettes**2


def _nearest_kind(
    cover: Float32[np.ndarray, "h w"], visible: Mask, centre: np.ndarray, extent: float
) -> tuple[Kind | None, float]:
    """Return the kind of the best-matching silhouette, and its misfit.

    Pixels that a stem covers are ignored.
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

    # Compare all poses unshifted, then only the best ones at all shifts.
    poses = np.argsort(misfits(slice(1), slice(None))[0])[:LIKELIEST]
    misfit = misfits(slice(None), poses).min(0)
    nearest = int(np.argmin(misfit))
    least = float(misfit[nearest])
    return (kinds[poses[nearest]] if least < MISFIT_LIMIT else None), least


@functools.cache
def _window_positions() -> tuple[Float32[np.ndarray, "k p"], Float32[np.ndarray, "k p"]]:
    """Return x and y of the window's pixels from its centre, at every shift, first 0."""
    axis = np.arange(WINDOW) + 0.5 - WINDOW / 2
    shift_y, shift_x, y, x = np.meshgrid(SHIFTS, SHIFTS, axis, axis, indexing="ij")
    pixels = WINDOW * WINDOW
    x, y = (x + shift_x).reshape(-1, pixels), (y + shift_y).reshape(-1, pixels)
    return x.astype(np.float32), y.astype(np.float32)
