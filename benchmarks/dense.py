"""Detection and segmentation from pretrained against random weights, at equal steps, over seeds.

    beit3 prepare coco-detection DET_STAMPS --out DATA/stamps      # pictures composed of clip art, nine classes
    beit3 prepare coco-detection SEG_MAPS --out DATA/maps          # maps whose regions are objects, one class
    python benchmarks/dense.py --data DATA --pretrained RUN0 RUN1 RUN2 --out OUT

DET_STAMPS and SEG_MAPS hold a train and a test split in COCO's format; any such folders will do. The figures are of 500
composed pictures of nine classes of clip art, and of 154 maps with 4,047 regions.

RUN0, ... are exports of pretrained models of the small shape below, one for each seed (such as those of
`objectives.py`). Scenes of the embedded emoji are composed in the run and held out by emoji; `--backgrounds FOLDER`
puts them on photographs. Runs that are finished are kept. OUT/report.html shows predictions of the first seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from beit3.config import LoopConfig, OptimConfig, Run, TaskConfig, replace
from beit3.data.compose import ComposeConfig, write_composites
from beit3.data.dense_rows import DetectedObject, DetectionRow, SegmentationRow
from beit3.data.dense_views import DetectionViewConfig, SegmentationViewConfig
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.index_files import read_index
from beit3.data.label_maps import BACKGROUND, write_label_maps
from beit3.data.labels import read_labels
from beit3.data.masks import decode_mask, read_label_map
from beit3.drawing import draw_objects, draw_regions
from beit3.finetune.detection import DetectionConfig
from beit3.finetune.segmentation import SegmentationConfig
from beit3.model.detection import DetectionSettings
from beit3.model.presets import ModelConfig
from beit3.predict import FoundObject, Predictor, load
from beit3.train.loop import fit
from beit3.train.report import Report

ARMS = ("pretrained", "random")
SIDE = 112
MODEL = ModelConfig(
    width=128,
    num_layers=4,
    num_heads=4,
    ffn_width=512,
    patch_size=8,
    image_size=(SIDE, SIDE),
    vocab_size=4096,
    max_text_positions=66,
    fusion_layers=1,
)
SHOWN = 8
"""Pictures of each experiment in the report."""


@dataclass(frozen=True)
class Experiment:
    """What is learned, and which figures tell how well."""

    title: str
    folder: str
    """Of `--data`, or of what is composed."""
    task: Callable[..., TaskConfig]
    """`detector` or `segmenter`."""
    columns: Collection[str]
    """Names of metrics."""
    steps: int = 800
    composed: bool = False
    """Whether training scenes are composed in the run."""


def detector(data: Path, **changes: Any) -> DetectionConfig:
    """A small cascade."""
    fields: dict[str, Any] = {
        "model": MODEL,
        "train": "coco_detection.train.jsonl",
        "eval": "coco_detection.test.jsonl",
        "labels": data / "labels.json",
        "pyramid_width": 64,
        "head_width": 128,
        "boxes_per_image": 32,
        "batch_size": 8,
        "eval_batch_size": 10,
        "view": DetectionViewConfig(scale=(0.8, 1.25)),
        "settings": DetectionSettings(max_proposals=100),
    }
    return DetectionConfig(**{**fields, **changes})


def segmenter(data: Path, **changes: Any) -> SegmentationConfig:
    """A small UPerNet."""
    fields: dict[str, Any] = {
        "model": MODEL,
        "train": "coco_detection.train.jsonl",
        "eval": "coco_detection.test.jsonl",
        "labels": data / "labels.json",
        "pyramid_width": 64,
        "head_width": 64,
        "batch_size": 8,
        "eval_batch_size": 10,
        "view": SegmentationViewConfig(scale=(0.8, 1.25), max_class_share=1.0, distort=False),
    }
    return SegmentationConfig(**{**fields, **changes})


def scenes(options: argparse.Namespace, **changes: Any) -> ComposeConfig:
    """Scenes of the embedded emoji."""
    return ComposeConfig(
        size=(SIDE, SIDE), objects=(1, 4), object_size=(0.25, 0.6), backgrounds=options.backgrounds, **changes
    )


_BOXES = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}
_REGIONS = {"objects_iou": "mIoU of the classes", "mean_iou": "mIoU with the background"}
EXPERIMENTS = {
    "stamps": Experiment("clip art composed on backgrounds, nine classes: detection", "stamps", detector, _BOXES),
    "maps": Experiment("regions of maps, one class: detection", "maps", detector, ("mask_ap", "mask_ap50"), steps=400),
    "stamps_regions": Experiment(
        "clip art composed on backgrounds: segmentation", "stamps_regions", segmenter, _REGIONS, steps=2000
    ),
    "scenes": Experiment(
        "emoji composed in the run, nine groups: detection", "scenes", detector, _BOXES, steps=400, composed=True
    ),
}


def main() -> None:
    """Train what is missing, then print a table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    parser.add_argument("--backgrounds", type=Path)
    parser.add_argument("--only", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--steps", type=int, help="of every experiment, in place of its own number")
    parser.add_argument("--lr", type=float, default=4e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in range(len(options.pretrained)):
        for name in options.only:
            for arm in ARMS:
                metrics = measure(name, arm, seed, options)
                found.setdefault(name, {}).setdefault(arm, []).append(metrics)
                print(f"seed {seed} {name} {arm}: {metrics}", flush=True)
    show(found, options)
    write_report(options)


def prepare(options: argparse.Namespace) -> None:
    """Scenes that are held out, and label maps of the composed pictures."""
    made: Path = options.out / "data"
    if not (made / "scenes" / "coco_detection.val.jsonl").is_file():
        write_composites(made / "scenes", scenes(options, held_out=True), 100, 0)
        prepare_coco_detection(made / "scenes", annotations=None)
    for index in ("train", "test"):
        source = folder_of("stamps", options) / f"coco_detection.{index}.jsonl"
        if source.is_file() and not (made / "stamps_regions" / source.name).is_file():
            write_label_maps(source, made / "stamps_regions")


def task_of(name: str, options: argparse.Namespace) -> Any:
    """Model and data of an experiment, from random weights."""
    data, experiment = folder_of(EXPERIMENTS[name].folder, options), EXPERIMENTS[name]
    if experiment.composed:
        return experiment.task(data, compose=scenes(options), eval="coco_detection.val.jsonl")
    return experiment.task(data)


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """Where the data of an experiment lie."""
    given: Path = options.data / name
    return given if name in ("stamps", "maps") else options.out / "data" / name


def measure(name: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Metrics of one run; of an earlier one if it is finished."""
    steps = options.steps or EXPERIMENTS[name].steps
    run = Run(
        name=f"{name}-{arm}-{seed}",
        task=replace(task_of(name, options), init_from=options.pretrained[seed] if arm == "pretrained" else None),
        data=folder_of(EXPERIMENTS[name].folder, options),
        out=options.out / f"{steps}-steps",
        seed=seed,
        device="cpu",
        precision="bf16",
        optim=OptimConfig(name="nmuon", lr=options.lr, warmup_steps=steps // 10, weight_decay=0.1, clip_grad=1.0),
        loop=LoopConfig(steps=steps, log_every=20, save_every=steps),
    )
    path = run.folder / "metrics.json"
    if not path.is_file():
        fit(replace(run, overwrite=True))
    metrics: dict[str, float] = json.loads(path.read_text())
    each = [value for key, value in metrics.items() if key.startswith("iou/") and key != f"iou/{BACKGROUND}"]
    if each:
        metrics["objects_iou"] = statistics.mean(each)
    return {key: value for key, value in metrics.items() if key in EXPERIMENTS[name].columns}


def show(found: dict[str, dict[str, list[dict[str, float]]]], options: argparse.Namespace) -> None:
    """A table of detection and one of segmentation: means and ranges over the seeds, in percent."""
    for task, heads in ((detector, _BOXES), (segmenter, _REGIONS)):
        names = [name for name in found if EXPERIMENTS[name].task is task]
        if not names:
            continue
        print(f"\n| data and task | steps | start | {' | '.join(heads.values())} |")
        print("|---" * (3 + len(heads)) + "|")
        for name in names:
            experiment = EXPERIMENTS[name]
            lead = f" {experiment.title} | {options.steps or experiment.steps:,} |"
            for arm, runs in found[name].items():
                cells = [f" {_spread([run[key] for run in runs])}" if key in runs[0] else "" for key in heads]
                print(f"|{lead} {arm} |{' |'.join(cells)} |")
                lead = " | |"


def _spread(values: list[float]) -> str:
    shown = [100 * value for value in values]
    mean = f"{statistics.mean(shown):.1f}"
    return mean if len(shown) == 1 else f"{mean} ({min(shown):.1f}-{max(shown):.1f})"


def write_report(options: argparse.Namespace) -> None:
    """Predictions on held-out pictures: what is there, from pretrained weights, from random ones."""
    lead = "Held-out pictures, first seed. From left: what is there, pretrained, random."
    report = Report("Detection and segmentation of a small model", lead)
    for name in options.only:
        steps = options.steps or EXPERIMENTS[name].steps
        section = report.section(f"{EXPERIMENTS[name].title}, {steps} steps")
        task = task_of(name, options)
        index = folder_of(EXPERIMENTS[name].folder, options) / task.eval
        folders = [options.out / f"{steps}-steps" / f"{name}-{arm}-0" / "export" for arm in ARMS]
        predictors = [load(folder) for folder in folders]
        draw = draw_detections if isinstance(task, DetectionConfig) else draw_segments
        for number in range(SHOWN):
            section.picture(*draw(index, number, predictors))
    report.save(options.out / "report.html")
    print(options.out / "report.html")


def draw_detections(index: Path, number: int, predictors: list[Predictor]) -> tuple[Any, str]:
    """Objects that are there, and those that were found."""
    row = read_index([index], DetectionRow)[number]
    names = read_labels(index.with_name("labels.json"))
    image = Image.open(row.image_path).convert("RGB")
    drawn = [draw_objects(image, [_as_found(item, names, (row.height, row.width)) for item in row.objects])]
    drawn += [draw_objects(image, predictor.detect([image], score_threshold=0.15)[0]) for predictor in predictors]
    return _beside(drawn), Path(row.image_path).name


def _as_found(item: DetectedObject, names: list[str], size: tuple[int, int]) -> FoundObject:
    """An object that is there, as if it were found."""
    x, y, width, height = item.box
    whole = np.ones(size, np.uint8) if item.segmentation is None else decode_mask(item.segmentation, *size)
    cut = torch.from_numpy(
        whole[int(y) : max(int(y) + 1, round(y + height)), int(x) : max(int(x) + 1, round(x + width))]
    )
    shape = F.interpolate(cut[None, None].float(), (28, 28), mode="bilinear")[0, 0]
    return FoundObject(names[item.label], 1.0, (x, y, x + width, y + height), shape, size)


def draw_segments(index: Path, number: int, predictors: list[Predictor]) -> tuple[Any, str]:
    """Regions that are there, and those that were found."""
    row = read_index([index], SegmentationRow)[number]
    names = read_labels(index.with_name("labels.json"))
    image = Image.open(row.image_path).convert("RGB")
    drawn = [draw_regions(image, read_label_map(row.mask_path).astype(np.int64), names)]
    drawn += [draw_regions(image, predictor.segment([image])[0].numpy(), names) for predictor in predictors]
    return _beside(drawn), Path(row.image_path).name


def _beside(pictures: list[Image.Image]) -> Any:
    page = Image.new("RGB", (sum(one.width + 6 for one in pictures), max(one.height for one in pictures)), "white")
    left = 0
    for one in pictures:
        page.paste(one, (left, 0))
        left += one.width + 6
    return np.asarray(page)


if __name__ == "__main__":
    main()
