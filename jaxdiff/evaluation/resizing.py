"""Resizing as the published feature networks have it; figures of other resizings differ.

FID differs by whole units between implementations of bilinear resizing (Parmar et al. 2022).
"""

import functools

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w 3"]
Levels = Float32[np.ndarray, "s s 3"]  # 0 to 255


def tensorflow_bilinear(image: Pixels, size: int) -> Levels:
    """Resize as TensorFlow 1 does: corners aligned at the upper left, without antialiasing."""
    return _bilinear(image, size, half_pixel=False)


def pytorch_bilinear(image: Pixels, size: int) -> Levels:
    """Resize as PyTorch's `interpolate` does: pixels' centres aligned, without antialiasing."""
    return _bilinear(image, size, half_pixel=True)


def _bilinear(image: Pixels, size: int, *, half_pixel: bool) -> Levels:
    (top, below, down), (left, right, across) = (
        _taps(side, size, half_pixel) for side in image.shape[:2]
    )
    x = image.astype(np.float32)
    x = x[:, left] + (x[:, right] - x[:, left]) * across[:, None]
    return x[top] + (x[below] - x[top]) * down[:, None, None]


@functools.lru_cache(maxsize=64)
def _taps(
    side: int, size: int, half_pixel: bool
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Float32[np.ndarray, " s"]]:
    """Return the two source positions of each pixel, and the weight of the second."""
    scale = np.float32(side / size)
    centre = np.arange(size, dtype=np.float32)
    if half_pixel:
        centre = np.maximum((centre + np.float32(0.5)) * scale - np.float32(0.5), 0)
    else:
        centre = centre * scale
    low = np.minimum(centre.astype(np.int64), side - 1)
    return low, np.minimum(low + 1, side - 1), (centre - low).astype(np.float32)


def pillow_bicubic(image: Pixels, size: int, *, crop: bool) -> UInt8[np.ndarray, "s s 3"]:
    """Resize with Pillow's bicubic filter, antialiased, to whole levels.

    Args:
      image: of any size.
      size: side of the result.
      crop: cut out the largest square in the centre; else the image is distorted to a square.
    """
    height, width = image.shape[:2]
    if crop and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
