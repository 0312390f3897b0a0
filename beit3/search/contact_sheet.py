"""A contact sheet: what was found, drawn on one picture with scores and names."""

from __future__ import annotations

import functools
import os
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from beit3.config import require
from beit3.data.images import decode_image
from beit3.errors import BadSampleError, DataMissingError
from beit3.search.index import Hit, Index, names_picture
from beit3.search.pictures import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_PICTURES = 500
"""Largest number of pictures on one sheet."""

_COLUMNS = 5
_SIDE, _PAD, _LABEL = 208, 10, 50  # pixels: largest picture, around it in its card, below it for score and name
_GAP, _MARGIN = 16, 32
_CARD = (_SIDE + 2 * _PAD, _SIDE + 2 * _PAD + _LABEL)
_WIDTH = 2 * _MARGIN + _COLUMNS * _CARD[0] + (_COLUMNS - 1) * _GAP
_QUERY_SIDE = 96  # of a picture that was searched with
_QUERY_LINES, _QUERY_LETTERS = 3, 80
_LARGEST_ZOOM = 4
_PAGE, _PAPER, _LINE, _INK, _SOFT, _ACCENT = "#f3f5f7", "#ffffff", "#d8dee4", "#1b1f24", "#57606a", "#0b5cad"


def contact_sheet(queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> Image.Image:
    """Draw hits as cards, best first, under a heading for each query.

    Args:
        queries: sentences or paths of pictures.
        found: hits of each query, as `Index.search` returns them.

    Returns:
        RGB picture, 1,268 pixels wide; its height follows the number of hits.

    Raises:
        ConfigError: more than `MOST_PICTURES` hits.
    """
    number = sum(len(hits) for hits in found)
    require(number <= MOST_PICTURES, f"a sheet shows at most {MOST_PICTURES} pictures, not {number:,}")
    blocks = [block for query, hits in zip(queries, found, strict=True) for block in (_heading(query), _cards(hits))]
    sheet = Image.new("RGB", (_WIDTH, sum(block.height for block in blocks) + _MARGIN), _PAGE)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def check_sheet(path: Path, queries: Sequence[str], index: Index) -> None:
    """Refuse a file that cannot be written as a sheet, or that is one of the pictures; called before the search.

    Raises:
        DataMissingError: its folder does not exist.
        ConfigError: its name has another ending, or it is a picture of the index or a query.
    """
    require(path.suffix.lower() in SUFFIXES, f"a sheet is a picture: let {path} end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise DataMissingError(f"{path.parent}: no such folder for the sheet")
    pictures = {os.path.abspath(query) for query in queries}
    pictures |= {str(index.path(row)) for row in range(len(index))}
    require(os.path.abspath(path) not in pictures, f"{path} is one of the pictures: choose another file for the sheet")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet beside its place and rename it; an older file of that name is replaced."""
    beside = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        sheet.save(beside, quality=92)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _heading(query: str) -> Image.Image:
    """A sentence in quotes, or a picture with its name beside it."""
    font = _font(22, bold=True)
    shown = _open(Path(query), _QUERY_SIDE) if names_picture(query) else None
    text = printable(Path(query).name) if shown else f"\u201c{printable(query)}\u201d"
    lines = textwrap.wrap(text, _QUERY_LETTERS, max_lines=_QUERY_LINES, placeholder=" \u2026")
    height = max(30 * len(lines), _QUERY_SIDE if shown else 0)
    block = Image.new("RGB", (_WIDTH, _MARGIN + height + _GAP), _PAGE)
    left = _MARGIN
    if shown:
        block.paste(shown, (left, _MARGIN + (height - shown.height) // 2))
        left += shown.width + _GAP
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        middle = _MARGIN + height / 2 + 30 * (number - (len(lines) - 1) / 2)
        draw.text((left, middle), line, _INK, font, anchor="lm")
    return block


def _cards(hits: Sequence[Hit]) -> Image.Image:
    """A grid of cards, row by row."""
    width, height = _CARD
    rows = -(-len(hits) // _COLUMNS)
    block = Image.new("RGB", (_WIDTH, rows * (height + _GAP)), _PAGE)
    for number, hit in enumerate(hits):
        row, column = divmod(number, _COLUMNS)
        block.paste(_card(hit), (_MARGIN + column * (width + _GAP), row * (height + _GAP)))
    return block


def _card(hit: Hit) -> Image.Image:
    """One hit: the picture, its score, folder and name."""
    width, height = _CARD
    card = Image.new("RGB", _CARD, _PAGE)
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), 8, _PAPER, _LINE)
    picture = _open(hit.path, _SIDE)
    if picture is None:
        draw.text((width / 2, _PAD + _SIDE / 2), "not readable", _SOFT, _font(14), anchor="mm")
    else:
        card.paste(picture, ((width - picture.width) // 2, _PAD + (_SIDE - picture.height) // 2))
    line = _PAD + _SIDE + 18
    draw.text((_PAD, line), f"{hit.score:.3f}", _ACCENT, _font(15, bold=True), anchor="lm")
    draw.text((width - _PAD, line), _shorten(hit.path.parent.name, _SIDE - 60), _SOFT, _font(13), anchor="rm")
    draw.text((_PAD, line + 22), _shorten(hit.path.name, _SIDE), _INK, _font(13), anchor="lm")
    return card


def _open(path: Path, side: int) -> Image.Image | None:
    """A picture at most `side` pixels wide and high, a small one enlarged; None if it cannot be read."""
    try:
        image = decode_image(path.read_bytes())
    except (OSError, BadSampleError):
        return None
    zoom = min(side / max(image.size), _LARGEST_ZOOM)
    width, height = (max(1, round(length * zoom)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _shorten(name: str, width: float) -> str:
    """A name cut in its middle until it fits; beginning and ending tell files apart."""
    font = _font(13)
    short = text = printable(name)
    kept = len(text)
    while font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept - kept // 2]}\u2026{text[len(text) - kept // 2 :]}"
    return short


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic and more."""
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
