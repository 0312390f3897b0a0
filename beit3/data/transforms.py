"""Pictures to tensors: random crops for training, squashed resizing for evaluation (`EvalResize`), normalization.

Shapes: B batch, S side of a square picture, H height, W width. Pictures are uint8 (3, H, W) until `normalize`, which
runs on the whole batch, wherever the batch lies.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from beit3.config import config, require
from beit3.data.resize import EvalResize, to_tensor

__all__ = ["CropConfig", "EvalResize", "RandomCrop", "Views", "normalize", "to_tensor"]

_LUMA = (0.299, 0.587, 0.114)
_BICUBIC = Image.Resampling.BICUBIC


@config
class CropConfig:
    """How a training picture is cropped and varied."""

    size: int
    """Side of the square crop in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of a crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of mirroring left and right; 0 where captions name sides or pictures hold writing."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter: factors from [1 - c, 1 + c]; 0 varies nothing."""
    grayscale: float = 0.0
    """Probability of dropping all colour."""
    tokenizer_size: int | None = None
    """Side of the same crop for an image tokenizer or teacher; None: the same tensor serves both."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"size must be at least 1, not {self.size}")
        require(self.tokenizer_size is None or self.tokenizer_size >= 1, "tokenizer_size must be at least 1 or None")
        require(0 < self.scale[0] <= self.scale[1] <= 1, f"scale must rise within 0..1, not {self.scale}")
        require(0 < self.ratio[0] <= self.ratio[1] < inf, f"ratio must rise from above 0, not {self.ratio}")
        require(0 <= self.color_jitter <= 1, f"color_jitter must lie in 0..1, not {self.color_jitter}")
        for name in ("flip", "grayscale"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is a probability, not {value}")


class Views(NamedTuple):
    """One crop at the sizes its readers want."""

    image: Tensor
    """uint8 (3, S, S)"""
    tokenizer_image: Tensor | None
    """uint8 (3, S', S') of the same crop; None where both readers want the same"""
    box: tuple[int, int, int, int] | None = None
    """top, left, height, width in pixels of the picture; None: all of it"""


class RandomCrop:
    """Crop at random, mirror, vary the colours, resize (bicubic). Draws from torch's global generator only."""

    def __init__(self, config: CropConfig) -> None:
        self.config = config
        self._scale = list(config.scale)
        self._ratio = list(config.ratio)

    def __call__(self, image: Image.Image) -> Views:
        """Draw one crop of an RGB picture.

        Args:
            image: RGB picture of any size.

        Returns:
            The crop, uint8 (3, S, S), and the same crop at `tokenizer_size` if that differs.
        """
        settings = self.config
        box = v2.RandomResizedCrop.get_params(image, self._scale, self._ratio)
        top, left, height, width = box
        region = image.crop((left, top, left + width, top + height))
        flip, gray, *factors = torch.rand(5).tolist()
        view = region.resize((settings.size, settings.size), _BICUBIC)
        matrix = self._color_matrix(view, factors, gray < settings.grayscale)
        mirrored = flip < settings.flip
        if settings.tokenizer_size is None or settings.tokenizer_size == settings.size:
            return Views(_finish(view, matrix, mirrored), None, box)
        second = region.resize((settings.tokenizer_size, settings.tokenizer_size), _BICUBIC)
        return Views(_finish(view, matrix, mirrored), _finish(second, matrix, mirrored), box)

    def _color_matrix(self, view: Image.Image, factors: list[float], gray: bool) -> tuple[float, ...] | None:
        """Write brightness, contrast, saturation and greying as one affine map of colours (3 x 4, row by row).

        Brightness scales, contrast mixes with the mean luminance, saturation with each pixel's own; none of the three
        changes what another one mixes with, so their order does not matter and one pass over the pixels does all.
        """
        strength = self.config.color_jitter
        if not strength and not gray:
            return None
        brightness, contrast, saturation = (1 + strength * (2 * factor - 1) for factor in factors)
        if gray:
            saturation = 0.0
        mean = sum(weight * channel for weight, channel in zip(_LUMA, _mean_color(view), strict=True))
        scale, offset = brightness * contrast, brightness * (1 - contrast) * mean
        row = [scale * (1 - saturation) * weight for weight in _LUMA]
        keep = scale * saturation
        red, green, blue = row
        return (keep + red, green, blue, offset, red, keep + green, blue, offset, red, green, keep + blue, offset)


def _mean_color(view: Image.Image) -> tuple[int, int, int]:
    """Average the pixels of an RGB picture."""
    pixel = view.reduce(view.size).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def _finish(view: Image.Image, matrix: tuple[float, ...] | None, mirrored: bool) -> Tensor:
    """Apply the colour map and the mirroring, and turn the picture into a uint8 tensor (3, H, W)."""
    if mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if matrix is not None:
        view = view.convert("RGB", matrix)
    return to_tensor(view)


def normalize(images: Tensor) -> Tensor:
    """Bring pixels to the range of the model (mean and standard deviation 0.5 per channel).

    Args:
        images: (B, 3, H, W), uint8 or float in 0..255.

    Returns:
        Float (B, 3, H, W) in [-1, 1]; float32 for uint8, otherwise the type that came in.
    """
    pixels = images if images.is_floating_point() else images.float()
    return pixels * (1 / 127.5) - 1
