"""Render scenes from shaded, anti-aliased signed-distance shapes in random poses.

A kind's shape is evaluated once, on a fine grid, as a `Template`: its signed distance, the slope of
its inflated surface, and a tone (creases, ridges, seeds). Rendering an object samples the template
through a rotation, a reflection and a scale, so a scene takes less than a millisecond.

Lengths in a template are in units of the body's longest extent, with the centre of its bounding box
at the origin and y up; lengths in `render` are in pixels of a 64-pixel image with y down.
"""

import colorsys
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from jaxdiff.datasets.produce.scene import Colour, Item, Kind, Scene, Size
from jaxdiff.datasets.scenes import DIRECTIONS

EXTENT: dict[Size, float] = {"small": 17.0, "medium": 26.0, "large": 37.0}  # longest, in pixels
HUE: dict[Colour, float] = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 52.0,
    "green": 118.0,
    "blue": 214.0,
    "purple": 284.0,
}  # degrees

POSITION_OFFSET = 12.0  # from the image's centre, in pixels of a 64-pixel image
PAIR_OFFSET = 14.5
MARGIN = 0.5  # least distance to the border
MAX_TURN = 20.0  # degrees, in either direction
GAP = 1.5  # least distance between two objects

TEXELS = 96
HALF = 0.64  # a template covers [-HALF, HALF] squared
LIGHT = np.array([-0.45, -0.6, 0.66], np.float32)  # from the upper left, towards the viewer

Plane = np.ndarray  # [h, w], float
Shape = Callable[[Plane, Plane], tuple[Plane, Plane]]  # (x, y) -> signed distance, tone


def _tube(x: Plane, y: Plane, spine_x: Plane, spine_y: Plane, radius: Plane) -> Plane:
    """Return the distance to a union of discs along a spine."""
    distance = np.hypot(x[..., None] - spine_x, y[..., None] - spine_y) - radius
    return distance.min(-1)


def _bump(x: Plane, width: float) -> Plane:
    return np.exp(-((x / width) ** 2))


def _bumps(x: Plane, width: float, centres: Iterable[Plane | float]) -> Plane:
    return np.sum([_bump(x - centre, width) for centre in centres], axis=0)


def _banana(x, y):
    t = np.linspace(-1, 1, 48)
    bend = 0.9
    distance = _tube(
        x,
        y,
        bend * np.sin(1.15 * t),
        bend - bend * np.cos(1.15 * t),
        0.07 + 0.2 * (1 - np.abs(t) ** 2.2),
    )
    ridge = _bump(np.hypot(x, y - bend) - bend - 0.04, 0.035)
    return distance, 1 - 0.16 * ridge


def _tomato(x, y):
    angle = np.arctan2(x, y)  # from the top
    radius = 1 / np.hypot(np.sin(angle), np.cos(angle) / 0.78)
    lobes = 1 + 0.02 * np.cos(6 * angle) - 0.15 * _bump(angle, 0.35)
    away = np.hypot(x, y - 0.62)
    crease = _bumps(x, 0.05, [a * (0.15 + 0.8 * away) for a in (-0.75, -0.3, 0.3, 0.75)])
    fade = np.clip(away, 0, 0.3) * np.clip(1 - away, 0, 1)
    return (np.hypot(x, y) - radius * lobes) * 0.85, 1 - 0.6 * crease * fade


def _pea_pod(x, y):
    t = np.linspace(-1, 1, 64)
    distance = _tube(
        x, y, t, 0.22 * t**2, 0.012 + (0.19 + 0.014 * np.cos(10 * t)) * (1 - np.abs(t) ** 2.5)
    )
    peas = np.zeros_like(x)
    for centre in (-0.6, -0.3, 0.0, 0.3, 0.6):
        away = np.hypot(x - centre, y - 0.22 * centre**2)
        peas += 0.45 * _bump(away, 0.085) - 0.2 * _bump(away - 0.15, 0.045)
    return distance, 1 + peas


def _pea(x, y):
    return np.hypot(x, y) - 1, np.ones_like(x)


def _carrot(x, y):
    t = np.linspace(0, 1, 48)
    distance = _tube(x, y, 0 * t, 0.8 - 1.8 * t, 0.03 + 0.29 * (1 - t) ** 0.85)
    rings = np.zeros_like(x)
    for height, side in ((0.75, -1), (0.5, 1), (0.2, -0.8), (-0.05, 0.7), (-0.35, -0.4)):
        rings += _bump(y - height, 0.035) * _bump(x - side * 0.14, 0.13)
    return distance, 1 - 0.22 * rings


def _aubergine(x, y):
    t = np.linspace(0, 1, 48)
    spine_x = -0.3 * (1 - t) ** 2 + 0.5 * t * (1 - t) + 0.5 * t**2
    distance = _tube(x, y, spine_x, -0.55 + 1.3 * t, 0.44 - 0.2 * t**0.8)
    return distance, np.ones_like(x)


def _pear(x, y):
    t = np.linspace(0, 1, 48)
    fade = t * t * (3 - 2 * t)
    return _tube(x, y, 0 * t, -0.4 + 1.05 * t, 0.62 - 0.38 * fade), np.ones_like(x)


def _pepper(x, y):
    fat = x / (1 + 0.13 * np.clip(y, -0.8, 0.8))
    side = np.abs(fat) - 0.4
    outer = np.hypot(side, np.maximum(np.abs(y + 0.02) - 0.5, 0)) - 0.33
    inner = np.hypot(fat, np.maximum(np.abs(y + 0.08) - 0.52, 0)) - 0.3
    distance = np.minimum(outer, inner)
    crease = _bumps(fat, 0.055, [-0.2, 0.2])
    return distance, 1 - 0.22 * crease


def _lemon(x, y):
    body = (np.hypot(x / 0.84, y / 0.6) - 1) * 0.64
    tips = np.hypot(np.abs(x) - 0.86, y) - 0.14
    blend = np.clip(0.5 + (tips - body) / 0.5, 0, 1)  # polynomial smooth minimum
    distance = tips + (body - tips) * blend - 0.25 * blend * (1 - blend)
    return distance, np.ones_like(x)


def _strawberry(x, y):
    t = np.linspace(0, 1, 40)
    distance = _tube(np.abs(x), y, 0.3 * (1 - t), 0.3 - 1.0 * t, 0.46 - 0.32 * t)
    row = np.round(y / 0.27)
    column_x = (x - 0.16 * (row % 2)) / 0.32
    away = np.hypot((column_x - np.round(column_x)) * 0.32, y - row * 0.27)
    inside = np.clip(-distance / 0.12, 0, 1)
    return distance, 1 + inside * (0.75 * _bump(away, 0.06) - 0.12 * _bump(away - 0.1, 0.04))


# Each kind: its shape, and the start and direction of its stem, in the shape's own units.
SHAPES: dict[Kind, tuple[Shape, tuple[float, float], tuple[float, float]]] = {
    "banana": (_banana, (0.83, 0.54), (0.5, 1.0)),
    "tomato": (_tomato, (0.0, 0.62), (0.1, 1.0)),
    "pea pod": (_pea_pod, (0.96, 0.2), (1.0, 0.45)),
    "pea": (_pea, (0.0, 0.96), (0.15, 1.0)),
    "carrot": (_carrot, (0.0, 1.08), (0.0, 1.0)),
    "aubergine": (_aubergine, (0.53, 0.92), (0.35, 1.0)),
    "pear": (_pear, (0.0, 0.86), (0.2, 1.0)),
    "pepper": (_pepper, (0.0, 0.64), (0.1, 1.0)),
    "lemon": (_lemon, (0.97, 0.0), (1.0, 0.1)),
    "strawberry": (_strawberry, (0.0, 0.66), (-0.1, 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class Template:
    """A kind's sampled shape; the planes are distance, slope along x and y, and tone."""

    planes: Float32[np.ndarray, "v u 4"]
    outline: Float32[np.ndarray, "n 2"]  # points on the body's edge
    stem_at: np.ndarray  # [2]
    stem_towards: np.ndarray  # [2], of length 1

    def sample(self, u: Plane, v: Plane) -> Float32[np.ndarray, "h w 4"]:
        """Sample bilinearly at template coordinates; outside, the border is repeated."""
        step = (TEXELS - 1) / (2 * HALF)
        x = np.clip((u + HALF) * step, 0, TEXELS - 1.001).astype(np.float32)
        y = np.clip((v + HALF) * step, 0, TEXELS - 1.001).astype(np.float32)
        column, row = x.astype(np.int32), y.astype(np.int32)
        x, y = (x % 1)[..., None], (y % 1)[..., None]
        corner = row * TEXELS + column
        flat = self.planes.reshape(-1, 4)
        upper = flat[corner] * (1 - x) + flat[corner + 1] * x
        lower = flat[corner + TEXELS] * (1 - x) + flat[corner + TEXELS + 1] * x
        return upper * (1 - y) + lower * y


@functools.cache
def template(kind: Kind) -> Template:
    """Return the template of a kind, in units of its longest extent."""
    shape, stem_at, stem_towards = SHAPES[kind]
    grid = np.linspace(-1.5, 1.5, 301)
    x, y = np.meshgrid(grid, grid)
    distance, _ = shape(x, y)
    edge = np.stack([x, y], -1)[np.abs(distance) < 0.008]
    angle = np.linspace(0, np.pi, 90, endpoint=False)
    extent = np.ptp(edge @ np.stack([np.cos(angle), np.sin(angle)]), axis=0).max()
    centre = (edge.min(0) + edge.max(0)) / 2

    grid = np.linspace(-HALF, HALF, TEXELS)
    x, y = np.meshgrid(grid, grid)
    distance, tone = shape(x * extent + centre[0], y * extent + centre[1])
    slope_y, slope_x = np.gradient(distance / extent, grid, grid)
    steepness = np.maximum(np.hypot(slope_x, slope_y), 0.5)  # rescales to a distance
    # The inflated surface is the blurred silhouette, which is smooth, unlike the distance.
    body = (distance < 0).astype(float)
    surface = _blur(body, 0.05) + _blur(body, 0.1) + 1.2 * _blur(body, 0.2)
    rise_y, rise_x = np.gradient(surface, grid, grid)
    planes = [distance / extent / steepness, rise_x, rise_y, tone]
    return Template(
        planes=np.stack(planes, -1).astype(np.float32),
        outline=((edge - centre) / extent).astype(np.float32),
        stem_at=(np.array(stem_at) - centre) / extent,
        stem_towards=np.array(stem_towards) / np.hypot(*stem_towards),
    )


def _blur(plane: Plane, width: float) -> Plane:
    """Gaussian blur by Fourier transform; the border is empty, so wrapping has no effect."""
    frequency = np.fft.fftfreq(TEXELS, 2 * HALF / (TEXELS - 1))
    decay = np.exp(-2 * (np.pi * width * frequency) ** 2)
    return np.fft.ifft2(np.fft.fft2(plane) * decay[:, None] * decay).real


@dataclass(frozen=True, kw_only=True)
class _Pose:
    """An object before placement; lengths in pixels, y down, from the centre of its body's box."""

    item: Item
    extent: float
    turn: np.ndarray  # [2, 2], from the template's axes to the image's
    origin: np.ndarray  # [2], the template's origin
    stem: np.ndarray  # [2, 2], the stem's two ends
    stem_width: float  # half the width
    rgb: np.ndarray  # [3] in [0, 1]
    body: np.ndarray  # [2], half of the body's box
    box: np.ndarray  # [2, 2], low and high corner around body and stem


def turning(degrees: float, mirror: float) -> Float64[np.ndarray, "2 2"]:
    """Map a template's axes (y up) to the image's (y down); `mirror` is 1, or -1 to flip x."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, -sin], [sin, cos]]) @ np.diag([mirror, -1.0])


def _pose(item: Item, mirror: float, rng: np.random.Generator) -> _Pose:
    shape = template(item.kind)
    turn = turning(rng.uniform(-MAX_TURN, MAX_TURN), mirror)
    extent = EXTENT[item.size] * rng.uniform(0.96, 1.04)
    stem_length = (4.6 + 0.05 * extent) * rng.uniform(0.95, 1.1)
    stem_width = 1.5 + 0.012 * extent
    outline = shape.outline @ turn.T * extent
    low, high = outline.min(0), outline.max(0)
    origin = -(low + high) / 2
    start = origin + turn @ shape.stem_at * extent
    stem = np.stack([start, start + turn @ shape.stem_towards * stem_length])
    body = (high - low) / 2
    box = np.stack([-body, body])
    if item.stem:
        box[0] = np.minimum(box[0], stem.min(0) - stem_width)
        box[1] = np.maximum(box[1], stem.max(0) + stem_width)
    hue = (HUE[item.colour] + rng.uniform(-4, 4)) / 360 % 1
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.74, 0.88), rng.uniform(0.86, 0.97))
    return _Pose(
        item=item,
        extent=extent,
        turn=turn,
        origin=origin,
        stem=stem,
        stem_width=stem_width,
        rgb=np.array(rgb, np.float32),
        body=body,
        box=box,
    )


def _places(scene: Scene, poses: list[_Pose], rng: np.random.Generator) -> list[np.ndarray]:
    """Return centres, in pixels of a 64-pixel image, of separate objects inside it."""
    if scene.position is not None:
        jitter = rng.uniform(-1.5, 1.5, 2)
        centres = [np.array(DIRECTIONS[scene.position]) * POSITION_OFFSET + jitter]
    elif scene.count == 3:
        centres = _places_of_three(poses, rng)
    else:
        relation = scene.relation or ("left of", "above")[rng.integers(2)]
        axis = np.array(DIRECTIONS[relation], float)
        across = axis[::-1] * rng.uniform(-3, 3, (2, 1))
        centres = [axis * PAIR_OFFSET + across[0], -axis * PAIR_OFFSET + across[1]]
        _separate(centres, poses, int(abs(axis[1])))
    limit = 32 - MARGIN
    return [
        32 + np.clip(centre, -limit - pose.box[0], limit - pose.box[1])
        for centre, pose in zip(centres, poses, strict=True)
    ]


def _separate(centres: list[np.ndarray], poses: list[_Pose], along: int) -> None:
    """Move two objects apart along an axis until they are separate, and into the image."""
    first, second = (0, 1) if centres[0][along] < centres[1][along] else (1, 0)
    gap = centres[second][along] + poses[second].box[0, along]
    gap -= centres[first][along] + poses[first].box[1, along]
    push = max(0.0, GAP - gap) / 2
    low = centres[first][along] - push + poses[first].box[0, along]
    high = centres[second][along] + push + poses[second].box[1, along]
    limit = 32 - MARGIN
    shift = max(0.0, -limit - low) - max(0.0, high - limit)
    centres[first][along] += shift - push
    centres[second][along] += shift + push


def _places_of_three(poses: list[_Pose], rng: np.random.Generator) -> list[np.ndarray]:
    """Return centres in a row if there is enough space, else in a triangle."""
    widths = np.array([pose.box[1, 0] - pose.box[0, 0] for pose in poses])
    gap = (64 - widths.sum()) / 4
    if gap >= GAP and rng.random() < 0.5:
        ends = np.cumsum(widths + gap) - 32
        x = ends - np.array([pose.box[1, 0] for pose in poses])
        return list(np.stack([x, rng.uniform(-6, 6, 3)], -1))
    centres = np.array([[-16.0, 12.0], [0.0, -12.0], [16.0, 12.0]])
    centres[:, 1] *= rng.choice([-1.0, 1.0])
    return list(centres + rng.uniform(-1.0, 1.0, (3, 2)))


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> UInt8[np.ndarray, "h w 3"]:
    """Render a scene at `size` pixels in sRGB; `rng` sets pose, shade and background."""
    items = [item for item in scene.items for _ in range(scene.count)]
    mirrors = rng.choice([-1.0, 1.0], len(scene.items))
    # A group shares its reflection, so that sideways stems do not meet.
    poses = [_pose(item, mirrors[i // scene.count], rng) for i, item in enumerate(items)]
    centres = _places(scene, poses, rng)
    scale = size / 64
    image = _background(rng, size)
    for pose, centre in zip(poses, centres, strict=True):
        _render_shadow(image, pose, centre, scale)
    for pose, centre in zip(poses, centres, strict=True):
        _render_body(image, pose, centre, scale)
        if pose.item.stem:
            _render_stem(image, pose, centre, scale, rng)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Render a light background of low saturation, and often a table of another tint."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    tint = np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.02, 0.1), rng.uniform(0.9, 0.98))
    )
    slope = rng.uniform(-0.04, 0.04, 2)
    light = 1 + slope[0] * axis[None, :] + slope[1] * axis[:, None]
    image = light[..., None].astype(np.float32) * tint.astype(np.float32)
    if rng.random() < 0.5:
        level = rng.uniform(0.35, 0.85)
        table = np.clip((axis - level) * size / 4 + 0.5, 0, 1)[:, None, None]
        shade = np.array([0.95, 0.93, 0.9], np.float32) ** np.float32(rng.uniform(0.5, 1.2))
        image *= 1 + table * (shade - 1)
    return image


def _window(
    image: np.ndarray, low: np.ndarray, high: np.ndarray, scale: float
) -> tuple[np.ndarray, Plane, Plane]:
    """Return the image region between two corners, with its x and y in 64-pixel units."""
    size = len(image)
    x0, y0 = np.clip(np.floor(low * scale), 0, size - 1).astype(int)
    x1, y1 = np.clip(np.ceil(high * scale), 1, size).astype(int)
    x = ((np.arange(x0, x1) + 0.5) / scale).astype(np.float32)
    y = ((np.arange(y0, y1) + 0.5) / scale).astype(np.float32)
    return image[y0:y1, x0:x1], x[None, :], y[:, None]


def _paint(window: np.ndarray, colour: np.ndarray, distance: Plane, scale: float) -> None:
    """Fill the inside of `distance`, which is in 64-pixel units, with a colour."""
    window += coverage(distance * scale)[..., None] * (colour - window)


def coverage(distance: Plane) -> Plane:
    """Return the fraction of a pixel inside a shape, from its distance to the edge in pixels."""
    inside = np.clip(0.5 - distance, 0, 1)
    return inside * inside * (3 - 2 * inside)


def _render_shadow(image: np.ndarray, pose: _Pose, centre: np.ndarray, scale: float) -> None:
    radius = np.array([pose.body[0] * 0.85 + 1, 1.6 + 0.06 * pose.extent])
    middle = centre + np.array([1.0, pose.body[1] - 0.3 * radius[1]])
    window, x, y = _window(image, middle - 2 * radius, middle + 2 * radius, scale)
    away = ((x - middle[0]) / radius[0]) ** 2 + ((y - middle[1]) / radius[1]) ** 2
    window *= 1 - 0.3 * np.exp(-1.2 * away)[..., None]


def _render_body(image: np.ndarray, pose: _Pose, centre: np.ndarray, scale: float) -> None:
    window, x, y = _window(image, centre - pose.body - 1, centre + pose.body + 1, scale)
    x, y = x - (centre + pose.origin)[0], y - (centre + pose.origin)[1]
    turn = pose.turn
    u, v = x * turn[0, 0] + y * turn[1, 0], x * turn[0, 1] + y * turn[1, 1]
    planes = template(pose.item.kind).sample(u / pose.extent, v / pose.extent)
    distance, rise_x, rise_y, tone = np.moveaxis(planes, -1, 0)
    slope_x = -0.11 * (rise_x * turn[0, 0] + rise_y * turn[0, 1])
    slope_y = -0.11 * (rise_x * turn[1, 0] + rise_y * turn[1, 1])
    facing = slope_x * LIGHT[0] + slope_y * LIGHT[1] + LIGHT[2]
    facing = facing / np.sqrt(1 + slope_x**2 + slope_y**2)
    light = 0.7 + 0.34 * np.clip(facing, -0.1, 1)
    gleam = 0.75 * np.clip((facing - 0.86) / 0.14, 0, 1) ** 2
    seeds = np.clip(tone - 1, 0, 0.6)
    colour = (light * np.minimum(tone, 1))[..., None] * pose.rgb
    colour += np.maximum(gleam, seeds)[..., None] * (np.array([1, 1, 0.94], np.float32) - colour)
    _paint(window, colour, distance * pose.extent, scale)


def _render_stem(
    image: np.ndarray, pose: _Pose, centre: np.ndarray, scale: float, rng: np.random.Generator
) -> None:
    """Render a stalk with a small calyx across its root, both darker than any body."""
    start, end = centre + pose.stem
    along = (end - start) / np.hypot(*(end - start))
    reach = pose.stem_width + 4 + 0.08 * pose.extent
    window, x, y = _window(image, centre + pose.box[0] - 6, centre + pose.box[1] + 6, scale)
    x, y = x - start[0], y - start[1]
    forward = x * along[0] + y * along[1]
    aside = y * along[0] - x * along[1]
    length = np.hypot(*(end - start))
    stalk = np.hypot(forward - np.clip(forward, 0, length), aside) - pose.stem_width
    half = 0.6 * reach - 1.2
    bend = forward + 0.1 * aside**2  # the calyx follows the body
    calyx = np.hypot(bend, aside - np.clip(aside, -half, half)) - 1.25
    colour = np.array([0.2, 0.21, 0.1], np.float32) * np.float32(rng.uniform(0.85, 1.1, 3))
    _paint(window, colour, np.minimum(stalk, calyx), scale)
