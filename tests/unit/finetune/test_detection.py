"""The detection Task: from index files to COCO's figures, whatever a picture holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.compose import ComposeConfig
from beit3.data.dense_views import DetectionViewConfig
from beit3.data.masks import decode_mask, encode_mask
from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.evaluate import Evaluation, evaluate
from beit3.finetune.detection import Detection, DetectionConfig
from beit3.model.detection import Detections, DetectionSettings
from beit3.model.presets import ModelConfig
from beit3.model.store import load_model
from beit3.predict import load
from beit3.train import loop

NAMES = ["disc", "square"]
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 44, "name": "square"}]
Make = Callable[..., DetectionConfig]


def draw(random: np.random.Generator, height: int, width: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Bright discs and squares on dark noise, none upon another, as rows of an index have them."""
    pixels = random.integers(0, 40, (height, width, 3), dtype=np.uint8)
    taken = np.zeros((height, width), bool)
    rows, columns = np.mgrid[:height, :width]
    objects = []
    for _ in range(random.integers(1, 4)):
        side, label = int(random.integers(8, 15)), int(random.integers(0, 2))
        top, left = (int(random.integers(0, limit - side)) for limit in (height, width))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if label == 0:
            inside = np.hypot(rows - top - side / 2 + 0.5, columns - left - side / 2 + 0.5) <= side / 2
        if (inside & taken).any():
            continue
        taken |= inside
        pixels[inside] = [(230, 60, 60), (60, 90, 240)][label]
        objects.append(annotation(inside, label))
    return Image.fromarray(pixels), objects


def annotation(mask: np.ndarray[Any, Any], label: int, **more: Any) -> dict[str, Any]:
    left, top, right, bottom = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    box = [left, top, right + 1 - left, bottom + 1 - top]
    return {"bbox": box, "label": label, "area": int(mask.sum()), "segmentation": encode_mask(mask), **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        rows = []
        for number in range(count):
            height, width = 40 + 2 * (number % 5), 52 - 3 * (number % 4)
            image, objects = draw(random, height, width)
            image.save(tmp_path / f"{split}{number}.png")
            row = {"image_path": f"{split}{number}.png", "image_id": 1000 + number, "height": height, "width": width}
            rows.append({**row, "objects": objects})
        write(tmp_path / f"{split}.jsonl", rows)
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def config(data: Path) -> Make:
    shape: dict[str, Any] = {"width": 32, "num_layers": 2, "num_heads": 2, "ffn_width": 64, "patch_size": 8}

    def make(**changes: Any) -> DetectionConfig:
        values: dict[str, Any] = {
            "model": ModelConfig(**shape, image_size=(48, 48), vocab_size=8, max_text_positions=4, fusion_layers=0),
            "train": "train.jsonl",
            "eval": "test.jsonl",
            "batch_size": 4,
            "eval_batch_size": 4,
            "labels": data / "labels.json",
            "stages": 2,
            "pyramid_width": 32,
            "head_width": 32,
            "boxes_per_image": 16,
            "view": DetectionViewConfig(scale=(0.8, 1.2)),
            "settings": DetectionSettings(max_proposals=50),
        }
        return DetectionConfig(**{**values, **changes})

    return make


def run_of(task: DetectionConfig, data: Path, **changes: Any) -> Run:
    run = Run(
        name="run",
        task=task,
        data=data,
        out=data / "runs",
        device="cpu",
        optim=OptimConfig(name="adamw", lr=2e-3, warmup_steps=1, weight_decay=0.05),
        loop=LoopConfig(steps=2, log_every=1, save_every=2),
    )
    return replace(run, **changes)


def evaluated(task: Detection, run: Run) -> list[dict[str, Any]]:
    loader = task.eval().eval_loader(run)
    assert loader is not None
    with torch.no_grad():
        return [row for batch in loader for row in task.predict(batch)]


def test_what_was_trained_is_loaded_measured_and_detects(config: Make, data: Path) -> None:
    run = run_of(config(settings=DetectionSettings()), data, precision="fp32")
    loop.fit(run)
    folder = run.folder / "export"
    predictor = load(folder)
    assert predictor.labels == NAMES
    assert predictor.preprocess.resize == "pad"
    found = predictor.detect([data / "test0.png", data / "test1.png"], score_threshold=0.0, max_detections=5)
    assert [len(objects) for objects in found] == [5, 5]
    assert {item.name for item in found[0]} <= set(NAMES)
    assert found[0][0].mask.shape == (40, 52)
    evaluate(Evaluation(checkpoint=str(folder), data=data / "test.jsonl", out=data / "out", device="cpu"))
    measured, known = (json.loads((place / "metrics.json").read_text()) for place in (data / "out", run.folder))
    assert {name: value for name, value in measured.items() if name != "examples"} == pytest.approx(known)
    submitted = json.loads((data / "out" / "submission.json").read_text())
    assert {row["category_id"] for row in submitted} <= {7, 44}
    assert len(submitted) > 6


@pytest.mark.slow
def test_discs_and_squares_are_found(config: Make, data: Path) -> None:
    run = run_of(config(), data, **{"loop.steps": 300, "loop.save_every": 300, "optim.warmup_steps": 20})
    loop.fit(run)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["box_ap50"] > 0.6
    assert metrics["mask_ap50"] > 0.6


@pytest.mark.parametrize("looks", [{}, {"scales": (1.0, 0.5), "flip": True}])
def test_detections_that_are_the_objects_score_one(
    looks: dict[str, Any], config: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back from the canvas, the masks, and the measure: whatever is between a model and its figure."""
    task = config(settings=DetectionSettings(max_proposals=50, **looks)).build()
    rows = {row["image_path"]: row["objects"] for row in read(data / "test.jsonl")}
    sizes = {row["image_path"]: (row["height"], row["width"]) for row in read(data / "test.jsonl")}
    order = iter(rows)

    def on_canvas(images: torch.Tensor, valid: torch.Tensor, _: object) -> list[Detections]:
        return [truth(next(order), tuple(size)) for size in valid.tolist()]

    def truth(name: str, size: tuple[int, ...]) -> Detections:
        scale = torch.tensor([size[1] / sizes[name][1], size[0] / sizes[name][0]] * 2)
        boxes = torch.tensor([item["bbox"] for item in rows[name]])
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        masks = torch.stack([cut(item, *sizes[name]) for item in rows[name]])
        labels = torch.tensor([item["label"] for item in rows[name]])
        return Detections(boxes * scale, torch.linspace(0.9, 0.5, len(labels)), labels, masks)

    def cut(item: dict[str, Any], height: int, width: int) -> torch.Tensor:
        left, top, wide, high = map(int, item["bbox"])
        mask = torch.from_numpy(decode_mask(item["segmentation"], height, width))[top : top + high, left : left + wide]
        return torch.nn.functional.interpolate(mask[None, None].float(), (28, 28), mode="bilinear")[0, 0]

    monkeypatch.setattr(task.model, "detect", on_canvas)
    monkeypatch.setattr(
        "beit3.finetune.detection.detect_views", lambda model, views, size, settings: truth(next(order), size)
    )
    measured = task.measure(evaluated(task, run_of(task.config, data)))
    assert measured["box_ap"] == pytest.approx(1)
    assert measured["mask_ap50"] == pytest.approx(1)
    assert measured["mask_ap"] > 0.9
    assert measured["box_ap/disc"] == measured["box_ap/square"] == pytest.approx(1)


def test_results_carry_the_numbers_of_the_sets_own_files(config: Make, data: Path) -> None:
    task = config().build()
    rows = evaluated(task, run_of(task.config, data))
    rows[0]["found"] = [
        {"label": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": {"size": [1, 1], "counts": "1"}}
    ]
    submitted = task.submission(rows[:1])
    assert submitted == [
        {"image_id": 1000, "category_id": 44, **{k: rows[0]["found"][0][k] for k in ("bbox", "score", "segmentation")}}
    ]


def odd_objects(height: int, width: int) -> dict[str, list[dict[str, Any]]]:
    whole, dot = np.ones((height, width), bool), np.zeros((height, width), bool)
    dot[5, 7] = True
    return {
        "nothing": [],
        "a crowd alone": [annotation(whole, 0, iscrowd=1)],
        "one pixel": [annotation(dot, 1)],
        "outside": [{"bbox": [width - 2.0, height - 2.0, 30, 30], "label": 0}],
        "no mask": [{"bbox": [3, 4, 20, 10], "label": 0}],
        "the whole picture": [annotation(whole, 1)],
    }


@pytest.mark.parametrize("kind", odd_objects(40, 52))
def test_pictures_with_odd_objects_are_learned_from_and_measured(kind: str, config: Make, data: Path) -> None:
    for split in ("train", "test"):
        rows = read(data / f"{split}.jsonl")
        for row in rows:
            row["objects"] = odd_objects(row["height"], row["width"])[kind]
        write(data / f"{split}.jsonl", rows)
    task = config().build()
    run = run_of(task.config, data)
    batch = next(iter(task.train_loader(run, 0, 1)))
    losses = task(batch)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    metrics = task.measure(evaluated(task, run))
    assert bool(metrics) == (kind not in ("nothing", "a crowd alone"))
    assert any(name.startswith("mask") for name in metrics) == (kind in ("one pixel", "the whole picture"))


def test_a_picture_of_4000_pixels_is_learned_from_and_measured(config: Make, data: Path) -> None:
    rows = read(data / "train.jsonl")[:4]
    mask = np.zeros((4000, 3000), bool)
    mask[100:3000, 200:2500] = True
    Image.new("RGB", (3000, 4000), "green").save(data / "large.png")
    rows[0] = {
        "image_path": "large.png",
        "image_id": 1,
        "height": 4000,
        "width": 3000,
        "objects": [annotation(mask, 0)],
    }
    write(data / "train.jsonl", rows)
    write(data / "test.jsonl", rows[:1])
    task = config(settings=DetectionSettings(max_proposals=20, max_detections=3)).build()
    run = run_of(task.config, data)
    assert task(next(iter(task.train_loader(run, 0, 1))))["loss"].isfinite()
    found = evaluated(task, run)[0]["found"]
    assert all(item["segmentation"]["size"] == [4000, 3000] for item in found)


def test_scenes_are_composed_in_the_run(config: Make, data: Path) -> None:
    compose = ComposeConfig(size=(48, 48), objects=(1, 2))
    task = config(compose=compose, labels=None, num_classes=9, eval=None).build()
    run = run_of(task.config, data)
    loader = task.train_loader(run, 0, 1)
    first = [next(iter(loader)) for _ in range(2)]
    again = [next(iter(task.train_loader(run, 0, 1)))]
    assert torch.equal(first[0].images, again[0].images)
    assert not torch.equal(first[0].images, first[1].images)
    assert sum(len(target.labels) for target in first[0].targets) >= 3
    with pytest.raises(ConfigError, match=r"scenes have 9 classes .*, not 2"):
        config(compose=compose).build().train_loader(run, 0, 1)


@pytest.mark.parametrize("name", ["detection", "compose"])
def test_what_is_wrong_with_the_evaluation_is_said_before_training(name: str, config: Make, data: Path) -> None:
    compose = ComposeConfig(size=(48, 48), objects=(1, 2)) if name == "compose" else None
    task = config(compose=compose, labels=None, num_classes=9, eval="none.jsonl").build()
    with pytest.raises(DataMissingError, match=r"index .*none\.jsonl does not exist"):
        task.train_loader(run_of(task.config, data), 0, 1)
    task.train_loader(run_of(task.config, data), 1, 2)  # rank 0 evaluates


def test_broken_masks_are_counted_and_their_boxes_measured(config: Make, data: Path) -> None:
    """Strings over which the overlap of masks never ends, or that end it in a crash after all predictions."""
    rows = read(data / "test.jsonl")
    size = [rows[0]["height"], rows[0]["width"]]
    for item, counts in zip(rows[0]["objects"] * 2, ("zzz~~", "ZZZZ"), strict=False):
        item["segmentation"] = {"size": size, "counts": counts}
    write(data / "test.jsonl", rows)
    task = config().build()
    metrics = task.measure(evaluated(task, run_of(task.config, data)))
    assert "box_ap" in metrics
    assert not any(name.startswith("mask") for name in metrics)
    index = task.examples([data / "test.jsonl"], training=False).index
    assert index.dropped == {"invalid_segmentation": len(rows[0]["objects"])}
    assert index[0].objects[0].segmentation is None


def test_what_does_not_fit_is_said(config: Make, data: Path) -> None:
    for changes, said in (
        ({"labels": None}, "give num_classes, or labels to count them"),
        ({"num_classes": 5}, "names 2 classes, num_classes is 5"),
        ({"boxes_per_image": 0}, "boxes_per_image must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(**changes).build()
    Image.new("RGB", (9, 9)).save(data / "test0.png")
    task = config().build()
    with pytest.raises(BeitError, match=r"picture_of_another_size: .*test0\.png: \(9, 9\), not \(40, 52\)"):
        evaluated(task, run_of(task.config, data))
    (data / "categories.json").write_text(json.dumps(CATEGORIES[:1]))
    with pytest.raises(ConfigError, match="has 1 categories, 2 labels are known"):
        config().build().examples([data / "test.jsonl"], training=False)


def test_a_detector_starts_from_a_detector_of_other_classes(config: Make, data: Path) -> None:
    """Objects365, then COCO: whatever has the same shape is kept."""
    source = config(labels=None, num_classes=3).build()
    source.model.save_pretrained(data / "first", files=source.preprocess.file())
    task = config(init_from=data / "first").build()
    ours, theirs = task.model.state_dict(), load_model(data / "first").state_dict()
    other = (
        {name for name in ours if not torch.equal(ours[name], theirs[name])} if ours.keys() == theirs.keys() else None
    )
    assert other is not None
    assert other == {name for name in ours if "cls_score" in name or "mask_predictor.mask_fcn_logits" in name}


@pytest.mark.parametrize("stages", [1, 2])
def test_classes_of_other_names_begin_at_random_however_many_there_are(
    stages: int, config: Make, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two sets of two classes each; of the other layers all is kept."""
    source = config(stages=stages).build()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    source.save(data / "first")
    theirs = source.model.state_dict()
    (data / "cars.json").write_text('["car", "van"]')
    of_classes = ["roi_heads.stages.0.box_predictor.cls_score", "roi_heads.stages.0.mask_predictor.mask_fcn_logits"]
    of_classes += ["roi_heads.stages.0.box_predictor.bbox_pred" if stages == 1 else of_classes[0].replace("0", "1")]
    for labels, renewed in (("labels.json", []), ("cars.json", of_classes)):
        with caplog.at_level("WARNING"):
            caplog.clear()
            ours = config(stages=stages, labels=data / labels, init_from=data / "first").build().model.state_dict()
        changed = {name.rpartition(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
        assert changed == set(renewed)
        said = f"{data / 'first'} is of other classes: random weights in {', '.join(sorted(renewed))}"
        assert caplog.messages == ([said] if renewed else [])


def test_a_start_of_other_windows_keeps_classes_of_the_same_names_alone(
    config: Make, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All shapes are the same; the log says nothing where nothing begins at random."""
    source = config(window_size=2, num_global_layers=1).build()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    source.save(data / "first")
    theirs = source.model.state_dict()
    with caplog.at_level("WARNING"):
        ours = config(init_from=data / "first").build().model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not caplog.messages
    (data / "cars.json").write_text('["car", "van"]')
    with caplog.at_level("WARNING"):
        ours = config(init_from=data / "first", labels=data / "cars.json").build().model.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if "cls_score" in name or "mask_fcn_logits" in name}
    assert "cls_score" in caplog.text
