"""What a model found, drawn over the picture: boxes, masks and names of objects; regions with a legend.

Shapes: H, W sides of the picture in pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from beit3.predict import FoundObject

_COVER = 0.45
"""Share of a region's colour over the picture."""
_GOLDEN = 0.618034
_MOST_NAMES = 24
"""Rows of a legend; the largest regions come first."""
_LEAST = 320
"""Pixels of the longer side: smaller pictures are enlarged, so that names can be read."""


def draw_objects(image: Image.Image, objects: Sequence[FoundObject]) -> Image.Image:
    """Draw objects over a picture, the best on top; each name has its own colour.

    Args:
        image: RGB, at its own size.
        objects: with boxes and masks in pixels of the picture.

    Returns:
        RGB; small pictures enlarged by a whole number.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    for found in reversed(objects):
        pixels = _tint(pixels, found.mask.numpy(), colour_of(found.name))
    drawn, factor = _enlarge(Image.fromarray(pixels.round().astype(np.uint8)))
    pen, font = ImageDraw.Draw(drawn), _font(drawn)
    line = max(1, max(drawn.size) // 400)
    for found in reversed(objects):
        colour = colour_of(found.name)
        left, top, right, bottom = (factor * side for side in found.box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
    for found in reversed(objects):
        left, top = factor * found.box[0], factor * found.box[1]
        _write(pen, (left, top), f"{found.name} {found.score:.2f}", colour_of(found.name), font, drawn.size)
    return drawn


def draw_regions(image: Image.Image, labels: NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """Tint the regions of a picture and name them beside it.

    Args:
        image: RGB, H x W.
        labels: (H, W) number of each pixel's name; other numbers stay as they are.
        names: of the labels.

    Returns:
        RGB, wider than the picture by the legend.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    present = [(int((labels == label).sum()), int(label)) for label in np.unique(labels) if 0 <= label < len(names)]
    for _, label in present:
        pixels = _tint(pixels, labels == label, colour_of(names[label]))
    drawn, _ = _enlarge(Image.fromarray(pixels.round().astype(np.uint8)))
    legend = [(names[label], count / labels.size) for count, label in sorted(present, reverse=True)[:_MOST_NAMES]]
    return _with_legend(drawn, legend)


def colour_of(name: str) -> tuple[int, int, int]:
    """The colour of a name: always the same, and well apart from most others."""
    number = sum(ord(letter) * (index + 1) for index, letter in enumerate(name))
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, 0.9 if number % 2 else 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)


def _tint(pixels: NDArray[np.float32], region: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.float32]:
    cover = np.where(region[..., None], np.float32(_COVER), np.float32(0))
    mixed: NDArray[np.float32] = pixels * (1 - cover) + cover * np.asarray(colour, dtype=np.float32)
    return mixed


def _enlarge(image: Image.Image) -> tuple[Image.Image, int]:
    factor = max(1, -(-_LEAST // max(image.size)))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST), factor


def _font(image: Image.Image) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=max(11, max(image.size) // 50))


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write on a coloured ground above a place, or as near to it as the picture allows."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right + 4, bottom + 3
    x = min(max(0.0, place[0]), max(0.0, size[0] - width))
    y = min(max(0.0, place[1] - height), max(0.0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 2 - left / 2, y + 1 - top / 4), text, fill="white", font=font)


def _with_legend(image: Image.Image, rows: Sequence[tuple[str, float]]) -> Image.Image:
    """Put a column of names with their shares of the picture beside it."""
    font = _font(image)
    pen = ImageDraw.Draw(image)
    texts = [f"{name} {100 * share:.0f} %" for name, share in rows]
    line = int(pen.textbbox((0, 0), "Ag", font=font)[3]) + 6
    widest = max((int(pen.textbbox((0, 0), text, font=font)[2]) for text in texts), default=0)
    page = Image.new("RGB", (image.width + line + widest + 12, max(image.height, line * len(rows) + 6)), "white")
    page.paste(image)
    pen = ImageDraw.Draw(page)
    for number, ((name, _), text) in enumerate(zip(rows, texts, strict=True)):
        x, y = image.width + 6, 4 + number * line
        pen.rectangle((x, y, x + line - 6, y + line - 6), fill=colour_of(name))
        pen.text((x + line, y), text, fill="black", font=font)
    return page
