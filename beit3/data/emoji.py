"""The embedded emoji corpus: 1,570 concepts, each drawn by four vendors, with English names and keywords.

The protocol: train on `TRAIN_VENDORS` and the concepts that are not held out, test on Twemoji. Two of the training
vendors come from one designer, so only Twemoji is an unseen hand.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from beit3.config import nearest
from beit3.data.shard_writer import FolderWriter, PrepareReport
from beit3.errors import ConfigError

VENDORS = ("google", "twitter", "fluent-emoji-flat", "fluent-3d")
TRAIN_VENDORS = ("google", "fluent-emoji-flat", "fluent-3d")
HELD_OUT_VENDOR = "twitter"
CELL = 48
"""Side of an emoji in pixels."""

_COLUMNS = 50


@dataclass(frozen=True, slots=True)
class EmojiCell:
    """One emoji as one vendor draws it."""

    image: Image.Image
    """RGB, 48 x 48, on white."""
    caption: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    hex: str
    """Unicode code points joined by '-'."""
    heldout: bool
    """True for the 172 concepts that no training set holds."""


@functools.cache
def _concepts() -> list[dict[str, Any]]:
    """Read the table of concepts."""
    concepts: list[dict[str, Any]] = json.loads(_embedded("meta.json"))
    return concepts


def _embedded(name: str) -> bytes:
    """Read a file that is shipped with the package."""
    return (files("beit3.data") / "embedded" / name).read_bytes()


def load_cells(vendor: str, heldout: bool | None = None) -> list[EmojiCell]:
    """Load the emoji of one vendor in a fixed order.

    Args:
        vendor: one of `VENDORS`.
        heldout: True for the held-out concepts, False for the others, None for all.

    Raises:
        ConfigError: unknown vendor.
    """
    if vendor not in VENDORS:
        raise ConfigError(f"no emoji vendor '{vendor}'; {nearest(vendor, VENDORS)}")
    sheet = Image.open(io.BytesIO(_embedded(f"{vendor}-{CELL}.webp"))).convert("RGB")
    cells = []
    for concept in _concepts():
        if heldout is None or concept["heldout"] == heldout:
            x, y = concept["i"] % _COLUMNS * CELL, concept["i"] // _COLUMNS * CELL
            image = sheet.crop((x, y, x + CELL, y + CELL))
            names = {name: concept[name] for name in ("caption", "group", "subgroup", "hex", "heldout")}
            cells.append(EmojiCell(image=image, keywords=tuple(concept["keywords"]), **names))
    return cells


def texts_of(cell: EmojiCell) -> Iterator[str]:
    """Write what is known about a concept as short texts: its name, its keywords, its place among the groups."""
    yield cell.caption
    if cell.keywords:
        yield f"{cell.caption}: {', '.join(cell.keywords)}"
    yield f"{cell.caption}, {cell.group}, {cell.subgroup}"


TEST_PARTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "test_vendor": ((HELD_OUT_VENDOR,), False),
    "test_concept": (TRAIN_VENDORS, True),
    "test_both": ((HELD_OUT_VENDOR,), True),
}
"""Prepared folders of the held-out parts: their vendors, and whether their concepts are the held-out ones."""


def write_emoji(folder: Path, *, overwrite: bool = False) -> PrepareReport:
    """Write the corpus as prepared data.

    `pairs` (also the image stream) and `text` are for training: training vendors, seen concepts. `test_vendor` (seen
    concepts, unseen vendor), `test_concept` (unseen concepts, seen vendors) and `test_both` are held out.

    Args:
        folder: gets the sub-folders.
        overwrite: replace them where they exist.

    Returns:
        The report of the training pairs; those of the others lie in their folders.
    """
    with FolderWriter(folder / "text", "text", overwrite=overwrite) as texts:
        for cell in load_cells(TRAIN_VENDORS[0], heldout=False):
            for text in texts_of(cell):
                texts.add_text(text)
    for part, (vendors, heldout) in TEST_PARTS.items():
        _write_pairs(folder / part, vendors, heldout, overwrite)
    return _write_pairs(folder / "pairs", TRAIN_VENDORS, False, overwrite)


def _write_pairs(out: Path, vendors: tuple[str, ...], heldout: bool, overwrite: bool) -> PrepareReport:
    """Write one folder of pairs."""
    with FolderWriter(out, "pairs", overwrite=overwrite) as pairs:
        for vendor in vendors:
            for index, cell in enumerate(load_cells(vendor, heldout=heldout)):
                meta = {"keywords": cell.keywords, "vendor": vendor, "hex": cell.hex, "group": cell.group}
                image = io.BytesIO()
                cell.image.save(image, "WEBP", lossless=True, quality=0, method=0)
                key = f"{vendor}-{index:04d}"
                parts = {"webp": image.getvalue(), "txt": cell.caption.encode(), "json": json.dumps(meta).encode()}
                pairs.add(key, parts)
    return pairs.report
