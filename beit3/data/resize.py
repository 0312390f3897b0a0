"""Pictures resized to tensors; elongated ones without the gigabytes that Pillow would take on its way.

Shapes: H, W height and width in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_BICUBIC = Image.Resampling.BICUBIC
_MOST_BETWEEN = 100_000_000
"""Pixels of the picture between the two passes, rows resized and columns not yet: four bytes each."""
_LONGEST = 16
"""A side this many times the cut's is not resized outside the cut."""
_MOST_WINDOWS = 4


def squash(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize both sides on their own (bicubic)."""
    if width * image.height > _MOST_BETWEEN:  # Pillow resizes rows first: columns of such a picture come first
        image = image.resize((image.width, height), _BICUBIC)
    return image.resize((width, height), _BICUBIC)


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Fit the shorter side (bicubic) and cut the ends of the longer one; rounds as torchvision does."""
    if height * image.width >= width * image.height:
        fitted = (int(height * image.width / image.height), height)
    else:
        fitted = (width, int(width * image.height / image.width))
    left, top = round((fitted[0] - width) / 2), round((fitted[1] - height) / 2)
    if fitted[0] > _LONGEST * width or fitted[1] > _LONGEST * height:
        # The same to the rounding of coordinates, without the pixels that are cut off.
        x, y = image.width / fitted[0], image.height / fitted[1]
        return image.resize((width, height), _BICUBIC, box=(left * x, top * y, (left + width) * x, (top + height) * y))
    return image.resize(fitted, _BICUBIC).crop((left, top, left + width, top + height))


def inside(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest picture of this shape that fits into a canvas; no side is below one pixel."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, min(limit, round(side * scale))) for side, limit in zip(size, canvas, strict=True))
    return height, width


def around(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest picture of this shape that covers a window.

    A side is at most `_MOST_WINDOWS` windows long, so that a very elongated picture covers less (mmseg's ADE20K: 512
    pixels, at most 2,048).
    """
    scale = max(window[0] / size[0], window[1] / size[1])
    scale = min(scale, *(_MOST_WINDOWS * side / own for side, own in zip(window, size, strict=True)))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def letterbox(image: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Image.Image:
    """Fit a picture into a canvas (bicubic), at its top left; the rest has one colour."""
    rows, columns = inside((image.height, image.width), (height, width))
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(squash(image, rows, columns))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """Copy an RGB picture into a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class EvalResize:
    """Resize a picture (bicubic) to a fixed size without keeping its aspect ratio, so that nothing is cut off."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize an RGB picture.

        Args:
            image: RGB picture of any size.

        Returns:
            uint8 (3, H, W).
        """
        if image.size != (self.width, self.height):
            image = squash(image, self.height, self.width)
        return to_tensor(image)
