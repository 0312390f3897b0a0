"""Detection and segmentation as a user types them: `detect`, `segment`, `evaluate`, `info`, `convert`; and loaded."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.data.emoji import load_cells
from beit3.data.example_loader import evaluation_batches
from beit3.data.labels import labels_file, read_labels
from beit3.data.masks import decode_mask
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError
from beit3.evaluate import Evaluation, batch_size_of
from beit3.finetune.common import FinetuneTask
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.predict import Predictor
from beit3.train.checkpoint import list_checkpoints
from tests.integration.conftest import Released

Row = dict[str, Any]
CPU = ["--device", "cpu"]
DETECT = ["detect", "pictures", *CPU, "--model", "detector", "--score-threshold", "0.05", "--max-detections", "3"]
SEGMENT = ["segment", "pictures", *CPU, "--model", "segmenter"]
MAPS = "data/coco/label_maps/coco_detection.val.jsonl"
SHAPE: dict[str, Any] = {"width": 32, "num_layers": 2, "num_heads": 2, "ffn_width": 64, "patch_size": 8}
SMALL: dict[str, Any] = {"image_size": (48, 48), "vocab_size": 8, "max_text_positions": 4, "fusion_layers": 0}


def write_model(folder: str, task: str, names: list[str], attention: Any = "shared", **options: Any) -> None:
    """A random model as a run exports it."""
    config = ModelConfig(**SHAPE, **SMALL, attention=attention)
    model = build_model(config, task, num_classes=len(names), pyramid_width=16, head_width=16, **options)
    model.save_pretrained(folder, files={**Preprocess.of_task(config, task).file(), **labels_file(names)})


@pytest.fixture
def here(place: Path) -> Path:
    """Random models of the classes of data/coco, pictures of several sizes, and one that is none."""
    torch.manual_seed(0)
    write_model("detector", "detection", read_labels(Path("data/coco/labels.json")), stages=1)
    write_model("segmenter", "segmentation", read_labels(Path("data/coco/label_maps/labels.json")))
    Path("pictures/more").mkdir(parents=True)
    for index, cell in enumerate(load_cells("google")[:5]):
        path = Path("pictures", "more" if index > 2 else ".", f"{index}.png")
        cell.image.resize((40 + 9 * index, 70 - 5 * index)).save(path)
    return place


def read_rows(path: str | Path) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics_of(folder: str | Path) -> Row:
    found: Row = json.loads(Path(folder, "metrics.json").read_text())
    return found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("beit3"))
    return line


def test_one_picture_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the Predictor finds, in words; drawings are nowhere."""
    picture = Path("pictures/0.png")
    options = ["--score-threshold", "0.05", "--max-detections", "2"]
    assert run_command(["detect", str(picture), *CPU, "--model", "detector", *options]) == 0
    found = beit3.load("detector", device="cpu").detect([picture], score_threshold=0.05, max_detections=2)[0]
    assert len(found) == 2
    line = capsys.readouterr().out.strip()
    for item in found:
        box = ", ".join(str(round(side, 2)) for side in item.box)
        assert f"{item.name} ({item.score:.2f}) at [{box}]" in line
    assert run_command(["detect", str(picture), *CPU, "--model", "detector", "--score-threshold", "1"]) == 0
    assert capsys.readouterr().out == "nothing\n"
    assert run_command(["segment", str(picture), *CPU, "--model", "segmenter"]) == 0
    predictor = beit3.load("segmenter", device="cpu")
    regions = predictor.segment([picture])[0]
    share = (regions == regions.flatten().mode().values).float().mean()
    name = predictor.output_names()[int(regions.flatten().mode().values)]
    assert capsys.readouterr().out.startswith(f"{name} ({100 * share:.0f} %)")
    assert sorted(path.name for path in here.iterdir()) == ["data", "detector", "pictures", "runs", "segmenter"]


def test_a_folder_without_out_is_a_line_for_each_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures/broken.png").write_bytes(b"<html>")
    for command in (DETECT, SEGMENT):
        assert run_command(command) == 0
        lines = capsys.readouterr()
        names = [line.split(":")[0] for line in lines.out.splitlines()]
        assert names == [f"pictures/{name}.png" for name in ("0", "1", "2", "more/3", "more/4")]
        assert "left out: picture pictures/broken.png cannot be read" in lines.err


def test_objects_are_written_with_boxes_masks_and_drawings(here: Path) -> None:
    Path("pictures/broken.png").write_bytes(b"<html>")
    assert run_command([*DETECT, "--out", "found"]) == 0
    predictor = beit3.load("detector", device="cpu")
    rows = read_rows("found/rows.jsonl")
    assert [row["picture"] for row in rows] == [f"pictures/{name}.png" for name in ("0", "1", "2", "more/3", "more/4")]
    for row in rows:
        with Image.open(row["picture"]) as image:
            assert (row["height"], row["width"]) == (image.height, image.width)
        expected = predictor.detect([row["picture"]], score_threshold=0.05, max_detections=3)[0]
        assert len(expected) == len(row["objects"]) == 3
        for item, written in zip(expected, row["objects"], strict=True):
            assert written["name"] == item.name
            assert written["score"] == pytest.approx(item.score, abs=1e-3)
            assert written["box"] == pytest.approx(item.box, abs=0.01)
            mask = torch.from_numpy(decode_mask(written["segmentation"], row["height"], row["width"]))
            assert (mask.bool() != item.mask).float().mean() < 0.01
        with Image.open(Path("found", row["drawing"])) as drawing:
            assert max(drawing.size) >= 320
    assert len({row["drawing"] for row in rows}) == 5
    assert sorted(path.name for path in Path("found").iterdir()) == sorted(
        ["rows.jsonl", *(row["drawing"] for row in rows)]
    )


def test_regions_are_written_with_maps_and_drawings(here: Path) -> None:
    assert run_command([*SEGMENT, "--out", "found"]) == 0
    predictor = beit3.load("segmenter", device="cpu")
    names = predictor.output_names()
    for row in read_rows("found/rows.jsonl"):
        with Image.open(Path("found", row["map"])) as image:
            assert image.mode == "L"
            regions = np.asarray(image)
        assert np.array_equal(regions, predictor.segment([row["picture"]])[0].numpy())
        shares = {names[label]: float((regions == label).mean()) for label in np.unique(regions)}
        assert row["shares"] == pytest.approx(shares, abs=1e-4)
        assert list(row["shares"].values()) == sorted(row["shares"].values(), reverse=True)
        with Image.open(Path("found", row["drawing"])) as drawing:
            assert drawing.width > max(320, row["width"])


@pytest.mark.parametrize(("command", "verb"), [(DETECT, "detect"), (SEGMENT, "segment")], ids=["detect", "segment"])
def test_an_interrupted_folder_is_gone_on_with(
    command: list[str], verb: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the third row; other settings are asked anew."""
    command = [*command, "--out", "found"]
    assert run_command(command) == 0
    rows = Path("found/rows.jsonl")
    whole = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(whole[:2]) + whole[2][:30])
    asked: list[int] = []
    original = getattr(Predictor, verb)

    def counted(self: Predictor, images: Any, **settings: Any) -> Any:
        images = list(images)
        asked.append(len(images))
        return original(self, images, **settings)

    monkeypatch.setattr(Predictor, verb, counted)
    capsys.readouterr()
    assert run_command(command) == 0
    assert capsys.readouterr().out == "found/rows.jsonl: 3 pictures written, 2 were there\n"
    assert sum(asked) == 3
    assert rows.read_text().splitlines(keepends=True) == whole
    assert run_command([*command, "--flip"]) == 0
    assert [row["flip"] for row in read_rows(rows)] == [False] * 5 + [True] * 5
    assert capsys.readouterr().out == "found/rows.jsonl: 5 pictures written\n"


def test_pictures_of_one_name_and_of_long_names_have_drawings_of_their_own(here: Path) -> None:
    Path("pictures/0.png").rename("pictures/more/1.png")
    Path("pictures/2.png").rename("pictures/" + 80 * "\u5927" + ".png")
    assert run_command([*SEGMENT, "--out", "found"]) == 0
    rows = read_rows("found/rows.jsonl")
    assert len({row["drawing"] for row in rows} | {row["map"] for row in rows}) == 10


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["detect", *CPU, "--model", "detector"], 2, "at least one picture"),
        (["detect", "none.png", *CPU, "--model", "detector", "--out", "new"], 3, "none.png does not exist"),
        (["detect", "pictures/0.png", *CPU, "--model", "none"], 3, "none does not exist"),
        (["detect", "pictures", *CPU, "--model", "segmenter"], 2, "detect needs a detection model; this is a segmenta"),
        (["segment", "pictures", *CPU, "--model", "detector"], 2, "segment needs a segmentation model; this is a det"),
        ([*DETECT, "--score-threshold", "2"], 2, "score_threshold must lie in 0..1, not 2.0"),
        ([*DETECT, "--max-detections", "0"], 2, "max_detections must be at least 1, not 0"),
        ([*DETECT, "--scales", "9"], 2, "must be one or more within 0.1..4, not (9.0,)"),
        ([*SEGMENT, "--scales", "0"], 2, "must be one or more within 0.1..4, not (0.0,)"),
        ([*SEGMENT, "--soft-nms"], 2, "no option --soft-nms"),
        ([*DETECT, "--image-size", "50"], 2, "50"),
        ([*SEGMENT, "--out", "pictures/0.png"], 2, "pictures/0.png is no folder"),
        ([*SEGMENT, "--out", "pictures/out"], 2, "pictures/out lies in pictures: drawings would be taken for pictures"),
        ([*SEGMENT, "--out", "pictures"], 2, "pictures lies in pictures"),
        ([*DETECT, "--labels", "two.json"], 2, "two.json names 2 outputs, the model has 9"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], code: int, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("two.json").write_text('["a", "b"]')
    assert run_command(arguments) == code
    assert line in said(capsys)
    assert not Path("new").exists()


def test_looks_at_several_scales_are_taken_and_kept_apart(here: Path) -> None:
    looks = ["--scales", "1", "1.5", "--flip"]
    assert run_command([*DETECT, "--soft-nms", *looks, "--out", "found"]) == 0
    assert run_command([*SEGMENT, *looks, "--out", "regions"]) == 0
    assert [row["scales"] for row in read_rows("found/rows.jsonl")] == [[1.0, 1.5]] * 5
    predictor = beit3.load("segmenter", device="cpu")
    row = read_rows("regions/rows.jsonl")[0]
    expected = predictor.segment([row["picture"]], scales=(1.0, 1.5), flip=True)[0]
    with Image.open(Path("regions", row["map"])) as image:
        assert np.array_equal(np.asarray(image), expected.numpy())


def evaluate(*arguments: str | Path, code: int = 0) -> None:
    assert run_command(["evaluate", *map(str, arguments), *CPU]) == code


def test_evaluation_of_a_detector_leaves_cocos_figures_and_results(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Path("data/coco/coco_detection.val.jsonl")
    evaluate("detector", "--data", index, "--out", "out")
    found = metrics_of("out")
    assert found["examples"] == 3
    assert {"box_ap", "box_ap50", "box_ar100", "mask_ap", "mask_ap50"} <= found.keys()
    assert "box_ap50" in capsys.readouterr().out
    submitted = json.loads(Path("out/submission.json").read_text())
    categories = {row["id"] for row in json.loads(index.with_name("categories.json").read_text())}
    assert submitted
    assert {row["category_id"] for row in submitted} <= categories
    assert {row["image_id"] for row in submitted} <= {row["image_id"] for row in read_rows(index)}
    assert all(set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"} for row in submitted)
    looks = ("--scales", "1", "0.5", "--flip", "--soft-nms")
    evaluate("detector", "--data", index, "--out", "out", *looks, code=2)
    assert "out holds another evaluation (flip, scales, soft_nms differ)" in said(capsys)
    evaluate("detector", "--data", index, "--out", "looks", *looks)
    assert Path("looks/submission.json").read_text() != Path("out/submission.json").read_text()


def test_soft_suppression_counts_from_a_thousandth_on_and_nothing_found_is_a_result(here: Path) -> None:
    """Of a detector that is sure of nothing: its scores are 0.03 to 0.04."""
    model: Any = beit3.load_model("detector")
    with torch.no_grad():
        model.roi_heads.stages[0].box_predictor.cls_score.bias[0] += 3  # of the background
    model.save_pretrained("shy", files={"labels.json": Path("detector/labels.json").read_bytes()})
    index = Path("data/coco/coco_detection.val.jsonl")
    evaluate("shy", "--data", index, "--out", "hard")
    assert json.loads(Path("hard/submission.json").read_text()) == []
    assert metrics_of("hard")["box_ap"] == metrics_of("hard")["mask_ap"] == 0
    evaluate("shy", "--data", index, "--out", "soft", "--soft-nms")
    scores = [row["score"] for row in json.loads(Path("soft/submission.json").read_text())]
    assert len(scores) == 300
    assert 0.001 < min(scores) <= max(scores) < 0.05


def test_soft_suppression_keeps_what_overlaps(here: Path) -> None:
    predictor = beit3.load("detector", device="cpu")
    hard, soft = (
        predictor.detect(["pictures/0.png"], score_threshold=0.0, max_detections=100_000, soft_nms=soft)[0]
        for soft in (False, True)
    )
    assert len(soft) > 2 * len(hard) > 0
    assert soft[0].score == hard[0].score
    assert min(item.score for item in soft) < 0.1 * min(item.score for item in hard)


@pytest.mark.parametrize(
    ("model", "index", "batches"),
    [
        ("detector", "data/coco/coco_detection.val.jsonl", [8, 2]),
        ("segmenter", MAPS, [8, 2]),
        ("classifier", "data/groups.test.jsonl", [10]),
    ],
)
def test_large_canvases_are_evaluated_a_few_at_a_time(
    model: str, index: str, batches: list[int], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(**SHAPE, **SMALL, final_norm=False)
    build_model(config, "classification", num_classes=3).save_pretrained("classifier")
    rows = read_rows(index) * 10
    rows = [{**row, "image_id": number} for number, row in enumerate(rows[:10])]
    for row in rows:
        row |= {name: str(Path(index).parent.resolve() / row[name]) for name in row if name.endswith("_path")}
    Path("ten.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes: list[int] = []

    def watched(examples: Any, collate: Any, **settings: Any) -> Any:
        def counted(loaded: Any) -> Any:
            sizes.append(len(loaded))
            return collate(loaded)

        return evaluation_batches(examples, counted, **settings)

    monkeypatch.setattr("beit3.evaluate.evaluation_batches", watched)
    evaluate(model, "--data", "ten.jsonl", "--out", "out")
    assert sizes == batches
    sizes.clear()
    evaluate(model, "--data", "ten.jsonl", "--out", "other", "--batch-size", "5")
    assert sizes == [5, 5]


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (3, 6), (8, 8), (16, 16)])
def test_every_rank_gets_its_share_of_a_batch_that_nobody_asked_for(ranks: int, size: int) -> None:
    asked = Evaluation(checkpoint="detector", data=Path("ten.jsonl"))
    assert batch_size_of(asked, "detection", ranks) == size
    assert batch_size_of(replace(asked, batch_size=5), "detection", ranks) == 5


def test_evaluation_of_a_segmenter_leaves_figures_of_classes_and_pictures(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Path("data/coco/label_maps/coco_detection.val.jsonl")
    evaluate("segmenter", "--data", index, "--out", "out")
    found = metrics_of("out")
    assert {"mean_iou", "pixel_accuracy", "mean_accuracy", "iou/background"} <= found.keys()
    predictor, right, every = beit3.load("segmenter", device="cpu"), 0, 0
    for row in read_rows(index):
        with Image.open(index.parent / row["mask_path"]) as image:
            labels = np.asarray(image)
        regions = predictor.segment([index.parent / row["image_path"]])[0].numpy()
        right, every = right + int((regions == labels).sum()), every + labels.size
    assert found["pixel_accuracy"] == pytest.approx(right / every)
    assert [set(row) for row in read_rows("out/predictions.jsonl")] == [{"image", "mean_iou", "pixel_accuracy"}] * 3
    assert not Path("out/submission.json").exists()
    evaluate("segmenter", "--data", index, "--out", "flipped", "--scales", "1", "1.5", "--flip")
    assert metrics_of("flipped")["examples"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["segmenter", "--task", "detection"], 2, "a segmentation is not evaluated as detection"),
        (["detector", "--data", MAPS], 3, "no usable DetectionRow"),
        (["segmenter", "--data", "data/coco/coco_detection.val.jsonl"], 3, "no usable SegmentationRow"),
        (["detector", "--scales", "9"], 2, "scales must be one or more within 0.1..4"),
        (["detector", "--task", "classification"], 2, "a detection is not evaluated as classification"),
        (["segmenter", "--soft-nms", "--data", MAPS], 2, "--soft-nms tells segmentation nothing: leave it out"),
        (["detector", "--task", "knn"], 2, "name their index file with --train"),
        (["detector", "--task", "knn", "--flip"], 2, "--flip tells knn nothing: leave it out"),
    ],
)
def test_wrong_evaluations_are_one_line(
    arguments: list[str], code: int, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in arguments else ["--data", "data/coco/coco_detection.val.jsonl"]
    evaluate(*arguments, *data, "--out", "out", code=code)
    assert line in said(capsys)


def test_info_names_task_pictures_and_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, parts in (
        ("detector", ("detector: detection, exchange folder", "; pad, ", "9 classes; labels.json names 9", "heads ")),
        ("segmenter", ("segmentation, exchange folder", "; slide, ", "10 classes; labels.json names 10", "heads ")),
    ):
        assert run_command(["info", folder]) == 0
        text = capsys.readouterr().out
        for part in (*parts, "48 x 48 pixels in 6 x 6 patches of 8"):
            assert part in text
        assert "problems" not in text


@pytest.mark.parametrize("folder", ["detector", "segmenter"])
def test_a_folder_is_converted_to_another_size_and_no_further(
    folder: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The released layout knows no such heads, and there is no tokenizer for transformers to read."""
    assert run_command(["convert", folder, "made", "--image-size", "64", "--licence", "mit"]) == 0
    made = beit3.load("made", device="cpu")
    assert made.preprocess.image_size == made.model.model_config.image_size == (64, 64)
    assert made.labels == beit3.load(folder, device="cpu").labels
    assert f"predictor.{'detect' if folder == 'detector' else 'segment'}([" in Path("made/README.md").read_text()
    capsys.readouterr()
    assert run_command(["convert", folder, "made.pth"]) == 2
    said(capsys)
    assert run_command(["convert", folder, "other", "--hugging-face"]) == 2
    assert "has no text tokenizer: it reads no texts" in said(capsys)
    assert not Path("made.pth").exists()
    assert not Path("other").exists()


@pytest.mark.parametrize("folder", ["detector", "segmenter"])
def test_the_tower_of_a_model_is_loaded_alone(folder: str, here: Path) -> None:
    images = torch.rand(2, 3, 48, 48)
    whole: Any = beit3.load_model(folder)
    tower: Any = beit3.load_model(folder, task="backbone")
    assert tower.task is None
    vision = tower(images).vision
    assert vision.shape == (2, 37, 32)
    torch.testing.assert_close(vision, whole.backbone(images).vision)
    model: Any = beit3.load_model(folder, parts="vision")
    with torch.no_grad():
        maps, own = whole.maps(images), model.maps(images)
    assert all(torch.equal(one, other) for one, other in zip(maps, own, strict=True))
    for load in (beit3.load_model, beit3.load):
        with pytest.raises(ConfigError):
            load(folder, parts="text")
    vectors: Tensor = beit3.load(folder, device="cpu").embed_images([Image.new("RGB", (60, 60), "red")])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1])
    with pytest.raises(ConfigError, match="reads no texts"):
        beit3.load(folder, device="cpu").embed_texts(["a cat"])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("kind", ["pretraining", "retrieval", "classification"])
def test_a_tower_starts_from_a_released_file(
    task: str, kind: str, released: Released, caplog: pytest.LogCaptureFixture
) -> None:
    """Larger pictures: positions are interpolated; everything else of the tower is the file's, bit for bit."""
    options = {"pretraining": {"codebook_size": 16}, "classification": {"num_classes": 4}}.get(kind, {})
    path = released(kind, **options)
    config: Any = beit3.load_model(path).model_config
    config = ModelConfig(
        **{name: getattr(config, name) for name in ("width", "num_layers", "num_heads", "ffn_width", "patch_size")},
        image_size=(48, 40),
        vocab_size=config.vocab_size,
        attention="decoupled",
        fusion_layers=0,
    )
    model = build_model(config, task, num_classes=3, pyramid_width=16, head_width=16)
    heads = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    fill_model(model, path)
    theirs = beit3.load_model(path, task="backbone", image_size=(48, 40), parts="vision").state_dict()
    own = model.state_dict()
    taken = {name for name in own if name.startswith("backbone.")}
    assert taken
    for name in taken:
        assert torch.equal(own[name], theirs[name.removeprefix("backbone.")]), name
    assert all(torch.equal(own[name], value) for name, value in heads.items())
    assert any("interpolated" in record.message for record in caplog.records)


RUNS = {
    "finetune/coco_detection_base": "data/coco",
    "finetune/detection_emoji": "data/coco",
    "finetune/segmentation_emoji": "data/coco",
    "finetune/ade20k_base": "data/ade20k",
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_bit_for_bit_the_same(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", f"recipe:{name}:debug", *CPU, "--precision", "fp32", "--data", RUNS[name], "--loop.steps", "4"]
    assert run_command([*command, "--name", "whole"]) == 0
    steps, work = 0, FinetuneTask.work

    def stop_at_2(self: FinetuneTask[Any, Any], batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(self, batch)

    monkeypatch.setattr(FinetuneTask, "work", stop_at_2)
    assert run_command([*command, "--name", "halted"]) == 75
    assert list_checkpoints(place / "runs/halted/checkpoints")[-1].name == "step-00000002"
    assert run_command([*command, "--name", "halted", "--resume"]) == 0
    whole, halted = (place / "runs" / run / "export/model.safetensors" for run in ("whole", "halted"))
    assert whole.read_bytes() == halted.read_bytes()


def test_composed_scenes_are_what_the_emoji_recipes_are_measured_on(
    place: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `examples/compose_scenes.py` prints it; both indexes are of the same pictures and objects."""
    program = runpy.run_path(str(root / "examples/compose_scenes.py"))
    backgrounds = ["--backgrounds", "data/drawings"]
    monkeypatch.setattr(sys, "argv", ["compose_scenes.py", "--out", "scenes", "--count", "3", *backgrounds])
    program["main"]()
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  beit3 train")]
    boxes = read_rows("scenes/coco_detection.val.jsonl")
    maps = read_rows("scenes/label_maps/coco_detection.val.jsonl")
    assert len(boxes) == len(maps) == 3
    for objects, regions in zip(boxes, maps, strict=True):
        assert Path("scenes/label_maps", regions["image_path"]).samefile(Path("scenes", objects["image_path"]))
        with Image.open(Path("scenes/label_maps", regions["mask_path"])) as image:
            shown = set(np.unique(np.asarray(image)).tolist())
        assert shown - {0} == {item["label"] + 1 for item in objects["objects"]}
    for _, *command in printed:
        command[1] = command[1].replace("finetune/", f"{root}/finetune/").replace(":random", ":debug")
        command[-1] = "data/drawings"  # OTHER_PICTURES
        assert run_command([*command, *CPU, "--precision", "fp32"]) == 0
    assert {"box_ap", "mask_ap"} <= metrics_of("runs/detection_emoji_debug").keys()
    assert "iou/background" in metrics_of("runs/segmentation_emoji_debug")


@pytest.mark.parametrize("name", ["segmentation_emoji", "detection_emoji"])
def test_evaluate_gives_the_metrics_of_the_run(name: str, place: Path) -> None:
    train = ["train", f"recipe:finetune/{name}:debug", *CPU, "--precision", "fp32", "--data", "data/coco"]
    if name == "detection_emoji":
        train += ["--task.settings.max-proposals", "1000"]  # as `beit3 evaluate` has it
    assert run_command(train) == 0
    index = "label_maps/coco_detection.val.jsonl" if name == "segmentation_emoji" else "coco_detection.val.jsonl"
    evaluate(f"runs/{name}_debug/export", "--data", f"data/coco/{index}", "--out", "out")
    found = metrics_of("out")
    assert found.pop("examples") == 3
    assert found == pytest.approx(metrics_of(f"runs/{name}_debug"))
