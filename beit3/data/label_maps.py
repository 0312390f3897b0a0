"""Objects to label maps: what a detection set says of its pictures, in the form that segmentation learns from.

Shapes: H, W height and width of a picture in pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3.config import require
from beit3.data.dense_rows import DetectedObject, DetectionRow
from beit3.data.finetuning.layout import progress
from beit3.data.index_files import read_index
from beit3.data.labels import FILE as LABELS
from beit3.data.labels import labels_beside, labels_file, read_labels
from beit3.data.masks import decode_mask
from beit3.errors import DataMissingError
from beit3.model.segmentation import IGNORED

BACKGROUND = "background"
"""Name of label 0: whatever belongs to no object."""


def label_map(objects: Sequence[DetectedObject], height: int, width: int) -> NDArray[np.uint8]:
    """Lay objects into a map: uint8 (H, W), 0 for the background, 1 for the first class.

    Smaller objects lie upon larger ones. Crowd regions, and boxes without a mask, are 255 where nothing else lies:
    what there is exactly is not known.
    """
    labels = np.zeros((height, width), np.uint8)
    unknown = np.zeros((height, width), bool)
    known = [item for item in objects if item.segmentation is not None and not item.is_crowd]
    for item in objects:
        if item.segmentation is None:
            left, top, wide, high = item.box
            unknown[max(0, int(top)) : int(np.ceil(top + high)), max(0, int(left)) : int(np.ceil(left + wide))] = True
        elif item.is_crowd:
            unknown |= decode_mask(item.segmentation, height, width) > 0
    for item in sorted(known, key=lambda item: -item.area):
        assert item.segmentation is not None
        labels[decode_mask(item.segmentation, height, width) > 0] = item.label + 1
    labels[unknown & (labels == 0)] = IGNORED
    return labels


def write_label_maps(index: Path, out: Path) -> Path:
    """Write a map for every picture of a detection index, and an index of segmentation of the same name.

    Args:
        index: of detection (`beit3 prepare coco-detection`), with `labels.json` beside it.
        out: folder of the maps, the index and `labels.json`, which begins with "background"; made if need be.

    Returns:
        Path of the new index; the pictures stay where they are.

    Raises:
        DataMissingError: the index or its labels do not exist.
        ConfigError: there are more classes than a map can hold.
        BadSampleError: a mask cannot be read.
    """
    labels = labels_beside(index)
    if labels is None:
        raise DataMissingError(f"there is no labels.json beside {index}: prepare the data again")
    names = read_labels(labels)
    require(len(names) < IGNORED, f"{labels} names {len(names)} classes: maps hold {IGNORED - 1} at most")
    require(out.resolve() != index.parent.resolve(), f"{index} lies in {out}: choose another folder for its maps")
    folder = out / f"{index.stem}.maps"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in progress(read_index(index, DetectionRow, num_labels=len(names)), f"{index.stem} maps"):
        name = f"{row.image_id}.png"
        Image.fromarray(label_map(row.objects, row.height, row.width)).save(folder / name)
        picture = os.path.relpath(Path(row.image_path).resolve(), out.resolve())
        lines.append(json.dumps({"image_path": picture, "mask_path": f"{folder.name}/{name}"}, ensure_ascii=False))
    written = out / index.name
    written.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / LABELS).write_bytes(labels_file([BACKGROUND, *names])[LABELS])
    return written
