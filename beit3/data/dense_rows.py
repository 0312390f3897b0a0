"""Rows of detection and of segmentation: pictures with boxes and masks, or with a label for each pixel.

A box is x, y, width, height in pixels from the top left corner of the picture, as in COCO.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from beit3.data.index_files import Fields, Row, is_number
from beit3.data.masks import Segmentation, check_segmentation
from beit3.errors import BadSampleError, ConfigError

CATEGORIES = "categories.json"
"""Beside `labels.json`: [{"id", "name"}] in the order of labels, `id` being the number in the set's own files."""


@dataclass(frozen=True, slots=True)
class DetectedObject:
    """One object of a picture."""

    box: tuple[float, float, float, float]
    """x, y, width, height in pixels; both sides above 0."""
    label: int
    is_crowd: bool
    """True for a region of several objects of a class that nobody told apart."""
    area: float
    """Pixels; what small, medium and large are told by. Of the box where the set does not say."""
    segmentation: Segmentation | None
    """Polygons or RLE; None where only the box is known."""

    @classmethod
    def parse(cls, fields: Fields, height: int, width: int) -> Self:
        """Read an object of a picture of this size.

        Raises:
            BadSampleError: `invalid_bbox`, `invalid_label`, `label_out_of_range`, `invalid_iscrowd`, `invalid_area`. A
                segmentation that is none leaves the object its box, and is counted as `invalid_segmentation`.
        """
        box = fields.several("bbox")
        if len(box) != 4 or not all(map(is_number, box)) or min(box[2:]) <= 0:
            raise BadSampleError("invalid_bbox", str(box))
        label = fields.label(fields.required("label"), "label")
        crowd = fields.integer("iscrowd") if fields.has("iscrowd") else 0
        if crowd not in (0, 1):
            raise BadSampleError("invalid_iscrowd", str(crowd))
        area = fields.number("area") if fields.has("area") else float(box[2] * box[3])
        if area < 0:
            raise BadSampleError("invalid_area", str(area))
        segmentation = None
        if fields.has("segmentation"):
            try:
                segmentation = check_segmentation(fields.required("segmentation"), height, width)
            except BadSampleError as error:
                fields.drop(error.reason)
        x, y, wide, high = map(float, box)
        return cls((x, y, wide, high), label, bool(crowd), area, segmentation)


@dataclass(frozen=True, slots=True)
class DetectionRow(Row):
    """A picture and the objects in it; none where they are secret, or where it shows none."""

    image_id: int
    height: int
    """Of the picture as `read_picture` shows it."""
    width: int
    objects: tuple[DetectedObject, ...]

    unique: ClassVar[str | None] = "image_id"

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row. Broken objects are dropped and counted; an unknown class loses the row, for it would be taken
        for background (`label_out_of_range`).
        """
        height, width = fields.integer("height"), fields.integer("width")
        if min(height, width) < 1:
            raise BadSampleError("invalid_height" if height < 1 else "invalid_width", f"{height} x {width}")
        objects = []
        for part in fields.parts("objects"):
            try:
                objects.append(DetectedObject.parse(part, height, width))
            except BadSampleError as error:
                if error.reason == "label_out_of_range":
                    raise
                fields.drop(error.reason)
        return cls(fields.picture("image_path"), fields.integer("image_id"), height, width, tuple(objects))


@dataclass(frozen=True, slots=True)
class SegmentationRow(Row):
    """A picture and the label of each of its pixels."""

    mask_path: str
    """Where the map of labels lies, for `beit3.data.masks.read_label_map`."""
    reduce_zero_label: bool
    """Whether 0 in the map stands for no class, and 1 for the first one (ADE20K)."""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        reduce = fields.flag("reduce_zero_label")
        return cls(fields.picture("image_path"), fields.picture("mask_path"), reduce)


def category_ids(index: Path, num_labels: int) -> list[int]:
    """Numbers of the classes in the set's own files, from `categories.json` beside an index; 1, 2, ... without it.

    Args:
        index: path of the index file.
        num_labels: classes known.

    Raises:
        ConfigError: the file is broken, or has another number of classes.
    """
    path = index.with_name(CATEGORIES)
    if not os.path.isfile(path):
        return list(range(1, num_labels + 1))
    try:
        ids = [row["id"] for row in json.loads(path.read_bytes())]
        if not all(type(number) is int for number in ids) or len(set(ids)) != len(ids):
            raise ValueError("an id is no whole number, or is there twice")
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is no list of categories ({error}): prepare the data again") from error
    if len(ids) != num_labels:
        raise ConfigError(f"{path} has {len(ids)} categories, {num_labels} labels are known: prepare the data again")
    return ids
