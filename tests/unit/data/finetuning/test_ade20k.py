"""ADE20K's indexes from its published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beit3.data.finetuning.ade20k import prepare_ade20k
from beit3.data.labels import read_labels
from beit3.errors import ConfigError, DataMissingError

HEAD = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
NAMES = ["wall", "building, edifice", *(f"thing {number}" for number in range(3, 151))]


def touch(root: Path, *names: str) -> None:
    """Put files where pictures are expected; none is opened."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for split, folder, count in (("train", "training", 2), ("val", "validation", 1)):
        for number in range(1, count + 1):
            name = f"{folder}/ADE_{split}_{number:08d}"
            touch(root, f"images/{name}.jpg", f"annotations/{name}.png")
    lines = [f"{number}\t0.1\t10\t2\t0\t{name}\n" for number, name in enumerate(NAMES, start=1)]
    (root / "objectInfo150.txt").write_text(HEAD + "".join(lines))
    return root


@pytest.mark.parametrize("place", ["", "ADEChallengeData2016/"])
def test_pictures_are_paired_with_their_masks(ade: Path, place: str) -> None:
    root = ade.parent if place else ade
    report = prepare_ade20k(root)
    assert rows(root / "ade20k.train.jsonl") == [
        {
            "image_path": f"{place}images/training/ADE_train_0000000{number}.jpg",
            "mask_path": f"{place}annotations/training/ADE_train_0000000{number}.png",
            "reduce_zero_label": True,
        }
        for number in (1, 2)
    ]
    assert rows(root / "ade20k.val.jsonl") == [
        {
            "image_path": f"{place}images/validation/ADE_val_00000001.jpg",
            "mask_path": f"{place}annotations/validation/ADE_val_00000001.png",
            "reduce_zero_label": True,
        }
    ]
    assert read_labels(root / "labels.json") == NAMES
    assert report.lines() == [
        f"{root}: ade20k",
        "  ade20k.train.jsonl: 2 rows; 2 images (published: 20,210)",
        "  ade20k.val.jsonl: 1 rows; 1 images (published: 2,000)",
        "  labels.json: 150 classes (as published)",
    ]


def test_what_has_no_counterpart_is_counted(ade: Path) -> None:
    (ade / "annotations/training/ADE_train_00000001.png").unlink()
    touch(ade, "annotations/training/ADE_train_00000009.png", "images/training/index.txt")
    report = prepare_ade20k(ade)
    assert report.parts["train"].left_out.counts == {"missing_mask": 1, "not_a_picture": 1, "mask_without_image": 1}
    assert len(rows(ade / "ade20k.train.jsonl")) == 1


def test_without_names_classes_are_numbered_and_it_is_said(ade: Path) -> None:
    (ade / "objectInfo150.txt").unlink()
    report = prepare_ade20k(ade)
    assert read_labels(ade / "labels.json")[::149] == ["class 1", "class 150"]
    assert report.left_out.counts == {"missing_names": 1}
    assert "objectInfo150.txt: labels.json numbers the classes" in report.lines()[-1]


@pytest.mark.parametrize("content", [HEAD, HEAD + "1\t0.1\t1\t1\t0\twall\n", HEAD + "one\twall\n"])
def test_names_in_another_form_are_refused(ade: Path, content: str) -> None:
    (ade / "objectInfo150.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"objectInfo150\.txt .*unpack it again"):
        prepare_ade20k(ade)
    assert not list(ade.glob("*.jsonl"))


def test_a_split_that_is_not_there_is_said(ade: Path, tmp_path: Path) -> None:
    (ade / "images" / "validation").rename(tmp_path / "elsewhere")
    report = prepare_ade20k(ade)
    assert not (ade / "ade20k.val.jsonl").exists()
    assert "  ade20k.val.jsonl: not written, there are no pictures in " in "\n".join(report.lines())
    with pytest.raises(DataMissingError, match="holds no images with training and validation"):
        prepare_ade20k(tmp_path / "elsewhere")
