"""Average precision against pycocotools, the evaluation code that COCO published."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from beit3.errors import ConfigError
from beit3.metrics.detection import Kind, average_precision

CATEGORIES = [
    {"id": 3, "name": "cat"},
    {"id": 7, "name": "dog"},
    {"id": 90, "name": "bird"},
    {"id": 91, "name": "fish"},
]
SIDE = 200


def ellipse(box: tuple[int, int, int, int]) -> dict[str, Any]:
    """The mask that fills a box as an ellipse does: its area is three quarters of the box's."""
    left, top, width, height = box
    rows, columns = np.mgrid[:SIDE, :SIDE]
    down, across = (rows + 0.5 - top) * 2 / height - 1, (columns + 0.5 - left) * 2 / width - 1
    encoded = mask.encode(np.asfortranarray(down**2 + across**2 <= 1, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def draw_box(generator: np.random.Generator) -> tuple[int, int, int, int]:
    left, top = generator.integers(0, SIDE - 1, 2)
    width = generator.integers(1, SIDE - left + 1)
    height = generator.integers(1, SIDE - top + 1)
    return int(left), int(top), int(width), int(height)


def make(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pictures with objects of every size, crowds, pictures without objects, and detections near and far."""
    generator = np.random.default_rng(seed)
    images = [{"id": 100 + number, "height": SIDE, "width": SIDE} for number in range(12)]
    notes: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in images[:-2]:
        for _ in range(generator.integers(0, 9)):
            left, top, width, height = box = draw_box(generator)
            shape = ellipse(box)
            category = CATEGORIES[generator.integers(0, 3)]["id"]
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": list(box),
                    "area": int(mask.area(shape)),
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": shape,
                }
            )
            for _ in range(generator.integers(0, 3)):
                shift = generator.integers(-6, 7, 2)
                moved = (
                    int(np.clip(left + shift[0], 0, SIDE - 1)),
                    int(np.clip(top + shift[1], 0, SIDE - 1)),
                    width,
                    height,
                )
                found.append({"image_id": image["id"], "category_id": category, "box": moved})
    for image in images:
        for _ in range(3):
            wrong = CATEGORIES[generator.integers(0, 4)]["id"]
            found.append({"image_id": image["id"], "category_id": wrong, "box": draw_box(generator)})
    scores = generator.permutation(len(found)) / len(found)
    results = [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "score": float(score),
            "bbox": list(row["box"]),
            "segmentation": ellipse(row["box"]),
        }
        for row, score in zip(found, scores, strict=True)
    ]
    return {"images": images, "annotations": notes, "categories": CATEGORIES}, results


def published(truth: dict[str, Any], found: list[dict[str, Any]], kind: Kind) -> list[float]:
    """Of masks as they are handed in: a box beside one would be taken for its size."""
    found = [{name: value for name, value in row.items() if kind == "bbox" or name != "bbox"} for row in found]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        measured = COCOeval(known, known.loadRes(copy.deepcopy(found)), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return [float(value) for value in measured.stats[:9]]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed: int, kind: Kind) -> None:
    truth, found = make(seed)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    wanted = {name: value for name, value in zip(names, published(truth, found, kind), strict=True) if value >= 0}
    measured = average_precision(truth, found, kind)
    assert 0.01 < wanted["ap"] < 0.99
    assert {"ap_small", "ap_medium"} <= wanted.keys()
    assert {name: measured[name] for name in names if name in measured} == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_objects_themselves_score_one(kind: Kind) -> None:
    truth, _ = make(0)
    found = [{**note, "score": 1.0} for note in truth["annotations"] if not note["iscrowd"]]
    measured = average_precision(truth, found, kind)
    assert measured["ap"] == measured["ap50"] == measured["ar100"] == pytest.approx(1)
    assert "ap/fish" not in measured, "no picture shows one"


def test_nothing_found_scores_zero_where_pycocotools_does() -> None:
    truth, _ = make(1)
    nowhere = [
        {"image_id": 111, "category_id": 3, "score": 0.5, "bbox": [0, 0, 1, 1], "segmentation": ellipse((0, 0, 1, 1))}
    ]
    wanted = average_precision(truth, nowhere, "bbox")
    assert average_precision(truth, [], "bbox") == wanted
    assert set(wanted.values()) == {0.0}


def test_pictures_without_objects_have_no_precision() -> None:
    truth, found = make(2)
    crowds = [{**note, "iscrowd": 1} for note in truth["annotations"]]
    assert average_precision({**truth, "annotations": crowds}, found, "bbox") == {}
    assert average_precision({**truth, "annotations": []}, found, "bbox") == {}


def test_what_lies_in_a_crowd_is_not_wrong() -> None:
    truth, _ = make(3)
    image = {"id": 1, "height": SIDE, "width": SIDE}
    note = {"image_id": 1, "category_id": 3, "area": 400.0, "iscrowd": 0}
    one = {**note, "id": 1, "bbox": [0, 0, 20, 20]}
    crowd = {**note, "id": 2, "bbox": [100, 100, 80, 80], "area": 6400.0, "iscrowd": 1}
    found = [
        {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": [110, 110, 10, 10]},
        {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [0, 0, 20, 20]},
    ]
    known = {"images": [image], "annotations": [one, crowd], "categories": truth["categories"]}
    assert average_precision(known, found, "bbox")["ap"] == pytest.approx(1)
    assert average_precision({**known, "annotations": [one]}, found, "bbox")["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("counts", ["zzz~~", "ZZZZ", "PPYo1", "1"])
def test_run_lengths_that_fill_no_picture_are_refused_not_looped_over(counts: str) -> None:
    truth, found = make(0)
    broken = {"size": [SIDE, SIDE], "counts": counts}
    notes = [{**truth["annotations"][0], "segmentation": broken}, *truth["annotations"][1:]]
    image = notes[0]["image_id"]
    with pytest.raises(ConfigError, match=f"a mask of image {image} is broken"):
        average_precision({**truth, "annotations": notes}, found, "segm")
    with pytest.raises(ConfigError, match=r"a mask of image 1\d\d is broken"):
        average_precision(truth, [{**found[0], "segmentation": broken}, *found[1:]], "segm")
    assert average_precision({**truth, "annotations": notes}, found, "bbox")
