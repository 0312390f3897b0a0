"""`beit3 evaluate` on two ranks: the figures of one process, over every picture once.

As a program (`test_evaluate.py PORT ...`) this is one of the processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3.cli import run_command
from beit3.config import replace
from beit3.data.labels import labels_file, read_labels
from beit3.data.preprocess import Preprocess
from beit3.model.build import build_model
from tests.conftest import Workspace
from tests.processes import free_ports, run_ranks
from tests.unit.pretrain.conftest import TINY

pytestmark = pytest.mark.distributed
SCENES, MAPS, FOUND = (f"{folder}coco_detection.val.jsonl" for folder in ("data/coco/", "data/coco/label_maps/", ""))
"""Three held-out scenes, as boxes and as maps; the same with some of what a detector finds in them as objects."""
INDEXES = {"detection": FOUND, "segmentation": MAPS}


def evaluate(task: str, index: str, out: str, batch_size: int) -> int:
    """One picture a rank and batch, so that all processes compute alike."""
    return run_command(
        ["evaluate", task, "--data", index, "--out", out, "--device", "cpu", "--batch-size", str(batch_size)]
    )


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with random models."""
    workspace.link(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = replace(TINY, fusion_layers=0)
    for task, index in (("detection", SCENES), ("segmentation", MAPS)):
        names = read_labels(Path(index).with_name("labels.json"))
        model = build_model(config, task, num_classes=len(names), pyramid_width=16, head_width=16)
        model.save_pretrained(task, files={**Preprocess.of_task(config, task).file(), **labels_file(names)})
    assert evaluate("detection", SCENES, "first", 1) == 0
    with Path(FOUND).open("w") as file:
        for line in Path("first/predictions.jsonl").read_text().splitlines():
            row = json.loads(line)
            objects = [item for item in row["found"][::9] if min(item["bbox"][2:]) > 0]
            file.write(json.dumps({**row, "image_path": row["picture"], "objects": objects}) + "\n")
    return tmp_path


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_measures(place: Path) -> None:
    run_ranks(__file__, free_ports(len(INDEXES)), place, 2)
    torch.set_num_threads(1)
    for task, figures in (("detection", ("box_ap", "mask_ap")), ("segmentation", ("mean_iou", "pixel_accuracy"))):
        assert evaluate(task, INDEXES[task], f"{task}-alone", 1) == 0
        found, wanted = (metrics_of(place / f"{task}-{name}") for name in ("ranks", "alone"))
        assert found["examples"] == 3
        assert found == pytest.approx(wanted)
        assert all(0 < wanted[name] < 1 for name in figures)


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def main() -> None:
    torch.set_num_threads(1)
    for port, (task, index) in zip(sys.argv[1:], INDEXES.items(), strict=True):
        os.environ["MASTER_PORT"] = port
        assert evaluate(task, index, f"{task}-ranks", 2) == 0


if __name__ == "__main__":
    main()
