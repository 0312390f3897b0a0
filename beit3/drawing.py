"""What a model found, drawn over the picture: boxes, masks and names of objects; regions with a legend.

Shapes: H, W sides of the picture in pixels.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from beit3.data.label_maps import BACKGROUND
from beit3.predict import FoundObject

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_COVER = 115
"""Opacity of a region's colour over the picture, of 255."""
_MOST_NAMES = 24
"""Rows of a legend; the largest regions come first."""
_LONGEST = 28
"""Characters of a name; longer ones are cut."""
_LEAST = 320
"""Pixels of the longer side: smaller pictures are enlarged, so that names can be read."""
_HUES = 8


def draw_objects(image: Image.Image, objects: Sequence[FoundObject]) -> Image.Image:
    """Draw objects over a picture, the best on top; each name has its own colour.

    Args:
        image: RGB, at its own size.
        objects: with boxes and masks in pixels of the picture, best first.

    Returns:
        RGB; small pictures enlarged by a whole number.
    """
    drawn, factor = _enlarged(image)
    pen, font, line = ImageDraw.Draw(drawn), _font(drawn), _line(drawn)
    colors = colors_of(found.name for found in objects)
    for found in reversed(objects):
        _tint(drawn, found, factor, colors[found.name])
    for found in reversed(objects):
        left, top, right, bottom = (factor * side for side in found.box)
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=colors[found.name], width=line)
    texts = [f"{_shortened(found.name)} {found.score:.2f}" for found in objects]
    places: list[Rectangle] = []
    for found, text in zip(objects, texts, strict=True):  # the best choose first
        box = (factor * found.box[0], factor * found.box[1], factor * found.box[2], factor * found.box[3])
        places.append(_place(box, _size_of(text, pen, font), drawn.size, places))
    for found, text, place in reversed(list(zip(objects, texts, places, strict=True))):
        pen.rectangle(place, fill=colors[found.name])
        pen.text((place[0] + 3, place[1] + 1), text, fill=_ink(colors[found.name]), font=font)
    return drawn


def draw_regions(image: Image.Image, labels: NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """Tint and outline the regions of a picture, and name them beside it; the background stays as it is.

    Args:
        image: RGB, H x W.
        labels: (H, W) number of each pixel's name; other numbers stay as they are.
        names: of the labels.

    Returns:
        RGB, wider than the picture by the legend; small pictures enlarged by a whole number.
    """
    drawn, factor = _enlarged(image)
    numbers = np.where((labels >= 0) & (labels < len(names)), labels, len(names))
    counts = np.bincount(numbers.ravel(), minlength=len(names))[: len(names)]
    largest = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    tinted = [label for label in largest if names[label] != BACKGROUND]
    colors = colors_of(names[label] for label in tinted)
    inks, cover = np.zeros((len(names) + 1, 3), np.uint8), np.zeros(len(names) + 1, np.uint8)
    for label in tinted:
        inks[label], cover[label] = colors[names[label]], _COVER
    numbers = numbers.repeat(factor, axis=0).repeat(factor, axis=1)
    opacity = cover[numbers]
    opacity[_edges(numbers, _line(drawn)) & (opacity > 0)] = 255
    drawn.paste(Image.fromarray(inks[numbers]), mask=Image.fromarray(opacity))
    rows = [(names[label], colors.get(names[label]), counts[label] / labels.size) for label in largest]
    return _with_legend(drawn, rows)


def colors_of(names: Iterable[str]) -> dict[str, Color]:
    """A colour for each name: the same everywhere, unless a name before it in the picture has it already.

    24 names get different colours, further ones share.
    """
    tones = ((0.85, 0.95), (0.9, 0.65), (0.4, 1.0))  # saturation and value
    number = _HUES * len(tones)
    free, found = set(range(number)), dict[str, Color]()
    for name in dict.fromkeys(names):
        first = zlib.crc32(name.encode(errors="replace")) % number
        chosen = next((place for step in range(number) if (place := (first + step) % number) in free), first)
        free.discard(chosen)
        red, green, blue = colorsys.hsv_to_rgb(chosen % _HUES / _HUES, *tones[chosen // _HUES])
        found[name] = (round(255 * red), round(255 * green), round(255 * blue))
    return found


def _tint(drawn: Image.Image, found: FoundObject, factor: int, color: Color) -> None:
    """Lay a colour over the object."""
    mask = found.mask.numpy()
    height, width = mask.shape
    left, top = max(0, math.floor(found.box[0])), max(0, math.floor(found.box[1]))
    right, bottom = min(width, math.ceil(found.box[2])), min(height, math.ceil(found.box[3]))
    if left < right and top < bottom:  # nothing of it lies elsewhere
        cover = (mask[top:bottom, left:right] * np.uint8(_COVER)).repeat(factor, axis=0).repeat(factor, axis=1)
        drawn.paste(color, (factor * left, factor * top), Image.fromarray(cover))


def _edges(numbers: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Pixels of (H, W) that are this near to one of another number, up, down or across."""
    edges = np.zeros(numbers.shape, np.bool_)
    down, across = numbers[width:] != numbers[:-width], numbers[:, width:] != numbers[:, :-width]
    edges[width:] |= down
    edges[:-width] |= down
    edges[:, width:] |= across
    edges[:, :-width] |= across
    return edges


def _place(box: Rectangle, size: tuple[int, int], page: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Where a text covers the least of the texts that are there: above its box if it can, else in it or below."""
    (left, top, right, bottom), (width, height) = box, size
    spots = [(left, top - height), (left, top), (left, bottom), (right - width, top - height), (left, bottom - height)]
    places: list[Rectangle] = []
    for x, y in spots:
        x, y = min(max(0.0, x), max(0.0, page[0] - width)), min(max(0.0, y), max(0.0, page[1] - height))
        places.append((x, y, x + width - 1, y + height - 1))
    return min(places, key=lambda place: sum(_common(place, other) for other in taken))


def _common(one: Rectangle, other: Rectangle) -> float:
    """Area that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """A copy in RGB, and how many times as large it is."""
    factor = max(1, -(-_LEAST // max(image.size)))
    size = (factor * image.width, factor * image.height)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC), factor


def _line(image: Image.Image) -> int:
    """Width of lines that can be seen."""
    return max(1, round(math.sqrt(image.width * image.height) / 400))


def _font(image: Image.Image) -> Font:
    return ImageFont.load_default(size=max(12, round(math.sqrt(image.width * image.height) / 45)))


def _size_of(text: str, pen: ImageDraw.ImageDraw, font: Font) -> tuple[int, int]:
    """Width and height of a text with a little room around it; all texts are equally high."""
    return int(pen.textbbox((0, 0), text, font=font)[2]) + 6, int(pen.textbbox((0, 0), "Ag", font=font)[3]) + 4


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}\u2026"


def _ink(ground: Color) -> str:
    """What can be read on a colour."""
    red, green, blue = ground
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _with_legend(image: Image.Image, rows: Sequence[tuple[str, Color | None, float]]) -> Image.Image:
    """Put a column of colours, names and shares of the picture beside it."""
    font = _font(image)
    pen = ImageDraw.Draw(image)
    shown = rows[:_MOST_NAMES]
    texts = [
        f"{_shortened(name)} {100 * share:.0f} %" if share >= 0.005 else f"{_shortened(name)} < 1 %"
        for name, _, share in shown
    ]
    texts += [f"and {len(rows) - len(shown)} more"] if len(rows) > len(shown) else []
    sizes = [_size_of(text, pen, font) for text in texts]
    line = _size_of("", pen, font)[1] + 2
    width = line + 8 + max((size[0] for size in sizes), default=0)
    page = Image.new("RGB", (image.width + width, max(image.height, line * len(texts) + 6)), "white")
    page.paste(image)
    pen = ImageDraw.Draw(page)
    for number, text in enumerate(texts):
        x, y = image.width + 6, 4 + number * line
        if number < len(shown):
            pen.rectangle((x, y, x + line - 6, y + line - 6), fill=shown[number][1], outline="grey")
        pen.text((x + line, y), text, fill="black", font=font)
    return page
