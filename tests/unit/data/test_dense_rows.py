"""Rows of detection and segmentation: what is broken is dropped or left out, and counted either way."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3.data.dense_rows import CATEGORIES, DetectedObject, DetectionRow, SegmentationRow, category_ids
from beit3.data.index_files import read_index
from beit3.errors import ConfigError, DataMissingError

Json = dict[str, Any]
TRIANGLE = [[1.0, 1.0, 6.0, 1.0, 3.0, 7.0]]
OBJECT = {"bbox": [1, 1, 5.5, 6], "label": 2, "iscrowd": 0, "area": 15.5, "segmentation": TRIANGLE}
ROW = {"image_path": "a.png", "image_id": 7, "height": 8, "width": 10, "objects": [OBJECT]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures `a.png` and `b.png`."""
    for name in ("a", "b"):
        Image.new("RGB", (10, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: Json) -> Path:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_row_holds_a_picture_and_its_objects(folder: Path) -> None:
    rle = {"size": [8, 10], "counts": [40, 10, 30]}
    crowd = {"bbox": [0, 0, 10, 8], "label": 0, "iscrowd": 1, "segmentation": rle}
    plain = {"bbox": [2, 3, 4, 2], "label": 1}
    index = read_index(write(folder, {**ROW, "objects": [OBJECT, crowd, plain]}), DetectionRow)
    assert index[0] == DetectionRow(
        str(folder / "a.png"),
        7,
        8,
        10,
        (
            DetectedObject((1.0, 1.0, 5.5, 6.0), 2, False, 15.5, TRIANGLE),
            DetectedObject((0.0, 0.0, 10.0, 8.0), 0, True, 80.0, rle),
            DetectedObject((2.0, 3.0, 4.0, 2.0), 1, False, 8.0, None),
        ),
    )
    assert not index.skipped
    assert not index.dropped
    assert pickle.loads(pickle.dumps(index))[0] == index[0]


def test_a_picture_without_objects_stays(folder: Path) -> None:
    rows = [{**ROW, "objects": []}, {key: value for key, value in {**ROW, "image_id": 8}.items() if key != "objects"}]
    assert [row.objects for row in read_index(write(folder, *rows), DetectionRow)] == [(), ()]


BROKEN_OBJECTS: list[tuple[Any, str]] = [
    ("no object", "invalid_objects"),
    ({**OBJECT, "bbox": None}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 3]}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 0, 4]}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 3, -4]}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 3, float("nan")]}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 3, 10**400]}, "invalid_bbox"),
    ({**OBJECT, "bbox": [1, 2, 3, "4"]}, "invalid_bbox"),
    ({**OBJECT, "bbox": "1 2 3 4"}, "invalid_bbox"),
    ({**OBJECT, "label": None}, "missing_label"),
    ({**OBJECT, "label": -1}, "invalid_label"),
    ({**OBJECT, "label": "cat"}, "invalid_label"),
    ({**OBJECT, "iscrowd": 2}, "invalid_iscrowd"),
    ({**OBJECT, "iscrowd": "no"}, "invalid_iscrowd"),
    ({**OBJECT, "area": -3}, "invalid_area"),
    ({**OBJECT, "area": float("inf")}, "invalid_area"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN_OBJECTS, ids=[str(item)[:60] for item, _ in BROKEN_OBJECTS])
def test_a_broken_object_is_counted_and_the_others_of_its_picture_stay(folder: Path, broken: Any, reason: str) -> None:
    index = read_index(write(folder, {**ROW, "objects": [OBJECT, broken, OBJECT]}), DetectionRow, num_labels=3)
    assert index.dropped == {reason: 1}
    assert not index.skipped
    assert [item.label for item in index[0].objects] == [2, 2]
    assert reason in index.report()


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [10, 8], "counts": [80]},
        {"size": [8, 10], "counts": "zzz~~"},
        {"size": [8, 10], "counts": "ZZZZ"},
        {"size": [8, 10], "counts": "1"},
    ],
)
def test_an_object_keeps_its_box_when_its_mask_is_broken(folder: Path, mask: Json) -> None:
    broken = {**OBJECT, "segmentation": mask}
    index = read_index(write(folder, {**ROW, "objects": [broken]}), DetectionRow)
    assert index.dropped == {"invalid_segmentation": 1}
    assert index[0].objects == (DetectedObject((1.0, 1.0, 5.5, 6.0), 2, False, 15.5, None),)


BROKEN_ROWS: list[tuple[Json, str]] = [
    ({**ROW, "objects": [OBJECT, {**OBJECT, "label": 3}]}, "label_out_of_range"),
    ({**ROW, "objects": "many"}, "invalid_objects"),
    ({**ROW, "height": 0}, "invalid_height"),
    ({**ROW, "width": -1}, "invalid_width"),
    ({**ROW, "width": 10.0}, "invalid_width"),
    ({**ROW, "height": None}, "missing_height"),
    ({**ROW, "image_id": "seven"}, "invalid_image_id"),
    ({**ROW, "image_path": "c.png"}, "picture_not_found"),
    (ROW, "duplicate_image_id"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN_ROWS, ids=[reason for _, reason in BROKEN_ROWS])
def test_a_broken_row_is_left_out_and_counted(folder: Path, broken: Json, reason: str) -> None:
    index = read_index(write(folder, ROW, broken), DetectionRow, num_labels=3)
    assert index.skipped == {reason: 1}
    assert len(index) == 1


def test_a_segmentation_row_needs_both_its_files(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image_path": "a.png", "mask_path": "b.png"},
        {"image_path": "a.png", "mask_path": "b.png", "reduce_zero_label": True},
        {"image_path": "a.png", "mask_path": "b.png", "reduce_zero_label": 1},
        {"image_path": "a.png", "mask_path": "c.png"},
        {"image_path": "a.png"},
    ]
    index = read_index(write(folder, *rows), SegmentationRow)
    places = str(folder / "a.png"), str(folder / "b.png")
    assert list(index) == [SegmentationRow(*places, False), SegmentationRow(*places, True)]
    assert index.skipped == {"picture_not_found": 1, "missing_mask_path": 1, "invalid_reduce_zero_label": 1}
    with pytest.raises(DataMissingError, match="no usable SegmentationRow"):
        read_index(write(folder, rows[-1]), SegmentationRow)


def test_categories_lead_back_to_the_numbers_of_the_set(tmp_path: Path) -> None:
    index = tmp_path / "x.jsonl"
    assert category_ids(index, 3) == [1, 2, 3]
    (tmp_path / CATEGORIES).write_text('[{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]')
    assert category_ids(index, 2) == [1, 90]
    with pytest.raises(ConfigError, match="has 2 categories, 3 labels are known"):
        category_ids(index, 3)


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"name": "a"}]', '[{"id": "1"}]', '[{"id": 1}, {"id": 1}]', "[" * 9999]
)
def test_broken_categories_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / CATEGORIES).write_text(content)
    with pytest.raises(ConfigError, match=r"categories\.json is no list of categories"):
        category_ids(tmp_path / "x.jsonl", 1)
