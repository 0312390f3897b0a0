"""Objects laid into label maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.data.dense_rows import DetectedObject, SegmentationRow
from beit3.data.index_files import read_index
from beit3.data.label_maps import label_map, write_label_maps
from beit3.data.masks import encode_mask, read_label_map
from beit3.errors import ConfigError, DataMissingError


def item(rows: slice, columns: slice, label: int, crowd: bool = False) -> DetectedObject:
    mask = np.zeros((6, 8), bool)
    mask[rows, columns] = True
    box = (float(columns.start), float(rows.start), float(columns.stop - columns.start), float(rows.stop - rows.start))
    return DetectedObject(box, label, crowd, float(mask.sum()), encode_mask(mask))


def test_smaller_objects_lie_upon_larger_ones() -> None:
    found = label_map([item(slice(2, 3), slice(2, 4), 4), item(slice(0, 5), slice(0, 6), 0)], 6, 8)
    wanted = np.zeros((6, 8), int)
    wanted[:5, :6] = 1
    wanted[2, 2:4] = 5
    assert found.tolist() == wanted.tolist()


def test_what_is_not_known_exactly_is_ignored() -> None:
    boxed = DetectedObject((5.5, 1.0, 2.0, 2.0), 1, False, 4.0, None)
    found = label_map([item(slice(4, 6), slice(0, 8), 0, crowd=True), boxed, item(slice(5, 6), slice(0, 2), 2)], 6, 8)
    wanted = np.zeros((6, 8), int)
    wanted[4:] = 255
    wanted[1:3, 5:8] = 255
    wanted[5, :2] = 3
    assert found.tolist() == wanted.tolist()


def test_a_detection_index_becomes_one_of_segmentation(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    one = item(slice(1, 3), slice(2, 5), 1)
    row = {"image_path": "a.png", "image_id": 7, "height": 6, "width": 8}
    shown = {"bbox": one.box, "label": 1, "area": one.area, "segmentation": one.segmentation}
    (tmp_path / "val.jsonl").write_text(json.dumps({**row, "objects": [shown]}) + "\n")
    with pytest.raises(DataMissingError, match=r"there is no labels\.json beside"):
        write_label_maps(tmp_path / "val.jsonl", tmp_path / "maps")
    (tmp_path / "labels.json").write_text(json.dumps(["cat", "dog"]))
    with pytest.raises(ConfigError, match="choose another folder for its maps"):
        write_label_maps(tmp_path / "val.jsonl", tmp_path)
    written = write_label_maps(tmp_path / "val.jsonl", tmp_path / "maps")
    found = read_index([written], SegmentationRow)[0]
    assert Path(found.image_path).resolve() == tmp_path / "a.png"
    labels = read_label_map(found.mask_path)
    assert labels.tolist() == label_map([one], 6, 8).tolist()
    assert json.loads((tmp_path / "maps" / "labels.json").read_text()) == ["background", "cat", "dog"]
