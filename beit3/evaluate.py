"""The command `beit3 evaluate`: a checkpoint on an index file, one table, all predictions; on any number of ranks.

What is predicted is kept batch by batch, so that the same command goes on after an interruption. Every example is
counted once, whatever the number of ranks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tyro.conf import Positional, arg

from beit3.config import require
from beit3.data.example_loader import evaluation_batches
from beit3.data.index_files import LEFT_OUT
from beit3.data.labels import labels_beside, labels_file, read_labels
from beit3.data.prompts import Prompts
from beit3.data.source import find_source, num_outputs
from beit3.errors import ConfigError
from beit3.evaluation_parts import claim_folder, make_parts, read_parts
from beit3.finetune.captioning import Captioning, CaptioningConfig
from beit3.finetune.classification import Classification, ClassificationConfig
from beit3.finetune.common import FinetuneTask, Predictions
from beit3.finetune.detection import Detection, DetectionConfig
from beit3.finetune.image_tower import TIMM, Pooling
from beit3.finetune.index_task import BatchedExamples
from beit3.finetune.nlvr2 import NLVR2, NLVR2Config
from beit3.finetune.retrieval import Retrieval, RetrievalConfig
from beit3.finetune.segmentation import Segmentation, SegmentationConfig
from beit3.finetune.vqa import VQA, VQAConfig
from beit3.model.build import AnyModel
from beit3.model.detection import DetectionSettings
from beit3.model.heads import RetrievalModel, SuperClassModel
from beit3.model.sliding_window import SlidingConfig
from beit3.model.transformer import MultiwayTransformer
from beit3.predict import Predictor, load
from beit3.train.distributed import Ranks, join_ranks
from beit3.yardsticks import YARDSTICKS, Yardstick, measure_tower
from beit3.zero_shot import measure_zero_shot

TaskName = Literal["classification", "vqa", "nlvr2", "captioning", "retrieval", "detection", "segmentation"]
_PARTS = "parts"
_METRICS = "metrics.json"
_PREDICTIONS = "predictions.jsonl"
_SUBMISSION = "submission.json"
_OF_IMAGES = ("classification", "detection", "segmentation")
"""Tasks that read no text."""
_MOST_ROWS = 24
"""Figures of single classes that a terminal shows."""
_BATCH, _DENSE_BATCH = 64, 8
"""Examples of one batch."""
_LEAST_SCORE, _LEAST_SOFT_SCORE = 0.05, 0.001
"""Of detections that count; lowered scores still order what overlaps (detectron2's settings)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on what, and how."""

    checkpoint: Positional[str]
    """exchange folder, hf-hub:organisation/name, or released .pth file; for yardsticks timm:NAME too."""
    data: Path
    """index file (`beit3 prepare`, or a released .jsonl)."""
    task: TaskName | Yardstick | Literal["zero_shot"] | None = None
    """left out, the checkpoint's. `retrieval` takes any other model that reads texts as well, and compares its class
    tokens. `zero_shot` tells classes by their names. The yardsticks `few_shot`, `knn` and `linear` measure frozen
    features of pictures with classes."""
    train: Path | None = None
    """yardsticks: index file that they learn from."""
    out: Path = Path("evaluation")
    """folder for metrics.json and what was predicted; the same command goes on with what an interrupted one left."""
    batch_size: int | None = None
    """examples of one batch of all ranks; left out, 8 for detection and segmentation, 64 for all others."""
    workers: int = 0
    """data processes of each rank."""
    image_size: int | None = None
    """side in pixels; left out, the model's own."""
    tokenizer: Path | None = None
    """`.spm` file of a released model; left out, `beit3.spm` beside it."""
    labels: Path | None = None
    """names of the classes or answers, in the order of the model's outputs; zero_shot: of the index's classes."""
    num_beams: int = 3
    """beams of captions."""
    scales: tuple[float, ...] = (1.0,)
    """detection, segmentation: sizes at which a picture is looked at, relative to the usual one."""
    flip: bool = False
    """detection, segmentation: look at mirror images as well."""
    soft_nms: bool = False
    """detection: lower the scores of overlapping boxes instead of dropping them."""
    prompts: Prompts = "imagenet"
    """zero_shot: texts that names are put into."""
    pooling: Pooling = "auto"
    """yardsticks: mean of the patches, class token, or what the model's own head reads."""
    central_crop: float | None = None
    """yardsticks: share of the side that is kept, 0.875 as published; left out, the model's own way."""
    shots: int = 10
    """few_shot: training pictures of each class."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the model runs."""
    overwrite: bool = False
    """begin anew."""


def evaluate(asked: Annotated[Evaluation, arg(name="")]) -> None:
    """Evaluate a checkpoint on an index file; under torchrun on all ranks."""
    _check_options(asked)
    with join_ranks(asked.device) as ranks:
        if asked.task in YARDSTICKS:
            metrics = _run_yardstick(asked, ranks)
        elif asked.task == "zero_shot":
            metrics = _run_zero_shot(asked, ranks)
        else:
            metrics = _run_task(asked, ranks)
        if ranks.is_main:
            shutil.rmtree(asked.out / _PARTS, ignore_errors=True)
            _show(metrics, asked)


def _run_task(asked: Evaluation, ranks: Ranks) -> dict[str, float]:
    """Predict every row of the index and measure the predictions; metrics on rank 0, nothing elsewhere."""
    found = find_source(asked.checkpoint, tokenizer=asked.tokenizer, labels=asked.labels)
    predictor = load(
        asked.checkpoint,
        str(ranks.device),
        image_size=asked.image_size,
        tokenizer=asked.tokenizer,
        labels=asked.labels,
    )
    task = build_evaluated(predictor, asked.task, asked.num_beams, _looks(asked))
    _check_looks(asked, task.kind.task)
    if isinstance(task, VQA):
        _check_outputs(predictor, asked.data)
    examples = task.examples([asked.data], training=False)
    if isinstance(task, (Detection, Segmentation)):
        _check_outputs(predictor, asked.data)
    settings: dict[str, Any] = {
        "checkpoint": asked.checkpoint,
        "data": str(asked.data),
        "tokenizer": None if found.tokenizer is None else str(found.tokenizer),
        "labels": None if found.labels is None else str(found.labels),
        "task": task.kind.task,
        "batch_size": batch_size_of(asked, task.kind.task, ranks.world_size),
        "image_size": list(task.preprocess.image_size),
        "ranks": ranks.world_size,
        "num_beams": asked.num_beams,
        **(_looks(asked) if isinstance(task, (Detection, Segmentation)) else {}),
    }
    if ranks.is_main:
        claim_folder(asked.out, settings, asked.overwrite)
    ranks.barrier()
    _predict_all(task, examples, asked, ranks)
    ranks.barrier()
    return _finish(task, examples.index.left_out(), asked.out) if ranks.is_main else {}


def batch_size_of(asked: Evaluation, task: str | None, num_ranks: int) -> int:
    """Examples of one batch of all ranks: as asked for, or as many as large canvases leave memory for."""
    if asked.batch_size is not None:
        return asked.batch_size
    usual = _DENSE_BATCH if task in ("detection", "segmentation") else _BATCH
    return max(1, usual // num_ranks) * num_ranks


def _run_yardstick(asked: Evaluation, ranks: Ranks) -> dict[str, float]:
    assert asked.train is not None
    return measure_tower(
        asked.checkpoint,
        next(name for name in YARDSTICKS if name == asked.task),
        {"train": asked.train, "test": asked.data},
        asked.out,
        ranks,
        batch_size_of(asked, asked.task, ranks.world_size),
        asked.workers,
        asked.pooling,
        asked.central_crop,
        asked.shots,
        asked.overwrite,
    )


def _run_zero_shot(asked: Evaluation, ranks: Ranks) -> dict[str, float]:
    assert asked.labels is not None
    return measure_zero_shot(
        asked.checkpoint,
        asked.data,
        asked.labels,
        asked.out,
        ranks,
        asked.prompts,
        batch_size_of(asked, asked.task, ranks.world_size),
        asked.workers,
        asked.overwrite,
    )


def _looks(asked: Evaluation) -> dict[str, Any]:
    """How detection and segmentation look at pictures, as plain data."""
    return {"scales": list(asked.scales), "flip": asked.flip, "soft_nms": asked.soft_nms}


def _check_looks(asked: Evaluation, task: str | None) -> None:
    """Refuse ways of looking that the task does not know."""
    known = {"detection": ("scales", "flip", "soft_nms"), "segmentation": ("scales", "flip")}.get(task or "", ())
    given = [name for name, value in _looks(asked).items() if value not in (False, [1.0]) and name not in known]
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    require(not given, f"{options} tells {task} nothing: leave it out")


def build_evaluated(
    predictor: Predictor, task: str | None, num_beams: int = 3, looks: Mapping[str, Any] | None = None
) -> FinetuneTask[Any, Any]:
    """Put a loaded model into the Task that measures it.

    Args:
        predictor: model, tokenizer and names of its outputs.
        task: which; None: that of the model. `retrieval` takes any model that reads pictures and texts.
        num_beams: of captions.
        looks: how detection and segmentation look at pictures; None: once, as they are.

    Raises:
        ConfigError: the model is of another task, or lacks the tokenizer that the task needs.
    """
    wanted, model = _measured_model(predictor.model, task)
    config, kind = _TASKS[wanted]
    fields: dict[str, Any] = {"model": model.model_config, "preprocess": predictor.preprocess}
    if wanted in _OF_IMAGES:
        fields |= {"num_classes": num_outputs(model)}
    if wanted == "classification":
        fields |= {"mixup": 0.0, "cutmix": 0.0}
    if wanted in ("detection", "segmentation"):
        fields |= _dense_fields(wanted, looks or {})
    with tempfile.TemporaryDirectory() as place:  # Tasks read their tokenizer and answers from files
        if wanted not in _OF_IMAGES:
            predictor.tokenizer.save(Path(place, "tokenizer.spm"))
            fields |= {"text_tokenizer": Path(place, "tokenizer.spm")}
            fields |= {"max_text_length": predictor.preprocess.max_text_length}
        if wanted == "vqa":
            names = predictor.labels or [f"answer {number}" for number in range(num_outputs(model))]
            Path(place, "labels.json").write_bytes(labels_file(names)["labels.json"])
            fields |= {"labels": Path(place, "labels.json")}
        if wanted == "captioning":
            fields |= {"num_beams": num_beams, "max_text_length": min(32, predictor.preprocess.max_text_length)}
        made: FinetuneTask[Any, Any] = kind(config(**fields), model)
    made.labels = predictor.labels
    return made.eval()


def _dense_fields(task: str, looks: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures are looked at, as the configuration of the Task says it."""
    scales, flip = tuple(looks.get("scales", (1.0,))), bool(looks.get("flip", False))
    if task == "segmentation":
        return {"slide": SlidingConfig(scales=scales, flip=flip)}
    soft = bool(looks.get("soft_nms", False))
    least = _LEAST_SOFT_SCORE if soft else _LEAST_SCORE
    return {"settings": DetectionSettings(soft_nms=soft, score_threshold=least, scales=scales, flip=flip)}


def _measured_model(model: AnyModel, task: str | None) -> tuple[str, Any]:
    """Name of the Task that measures a model, and the model as that Task takes it."""
    held = "backbone" if model.task is None else model.task
    wanted = task or ("retrieval" if model.task == "clip" else held)
    if task is None and wanted not in _TASKS:
        named = "zero_shot" if isinstance(model, SuperClassModel) else "retrieval"
        raise ConfigError(f"a {held} model has no figure of its own: name --task {named} or {', '.join(YARDSTICKS)}")
    if wanted == "retrieval":
        return wanted, _dual_encoder(model)
    if wanted != held or wanted not in _TASKS:
        raise ConfigError(f"a {held} is not evaluated as {wanted}: name a --task that it was made for")
    return wanted, model


def _dual_encoder(model: AnyModel) -> RetrievalModel:
    """A model that compares pictures with texts: by its heads, or by the class tokens of its backbone."""
    if isinstance(model, SuperClassModel):
        raise ConfigError("a superclass model reads no texts, so it is not evaluated as retrieval: use zero_shot")
    require(model.part is None, f"a {model.part} tower alone is not evaluated as retrieval: give the whole model")
    if isinstance(model, RetrievalModel):
        return model
    return _with_class_tokens(model if isinstance(model, MultiwayTransformer) else model.backbone)


def _with_class_tokens(backbone: MultiwayTransformer) -> RetrievalModel:
    """A backbone as a dual encoder whose vectors are its class tokens: heads that change nothing."""
    with torch.device("meta"):
        model = RetrievalModel(backbone.config)
    weight = next(backbone.parameters())
    eye = torch.eye(backbone.config.width, dtype=weight.dtype, device=weight.device)
    model.backbone = backbone
    model.vision_head.weight, model.language_head.weight = nn.Parameter(eye), nn.Parameter(eye)
    model.logit_scale = nn.Parameter(weight.new_zeros(()))
    return model


def _check_outputs(predictor: Predictor, data: Path) -> None:
    """Refuse an index whose labels number other classes or answers than the model does."""
    beside, names = labels_beside(data), predictor.labels
    if beside is None:
        return
    known = read_labels(beside)
    outputs = num_outputs(predictor.model)
    fits = len(known) == outputs if names is None else known == names
    require(
        fits,
        f"{data} numbers the {len(known):,} names of {beside}, the model has {outputs:,} others: evaluate on an "
        "index made with the model's, or name these with --labels if they are the model's",
    )


def _predict_all(
    task: FinetuneTask[Any, Any], examples: BatchedExamples[Any, Any], asked: Evaluation, ranks: Ranks
) -> None:
    """Predict this rank's share of the examples, a file a batch; batches that are there already are left alone."""
    batches = evaluation_batches(
        examples,
        examples.collate,
        batch_size=batch_size_of(asked, task.kind.task, ranks.world_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=asked.workers,
    )
    with torch.inference_mode():
        make_parts(
            batches,
            lambda batch: task.predict(task.move(batch, ranks.device)),
            asked.out / _PARTS,
            ranks,
            f"evaluating {asked.data.name}",
        )


def _finish(task: FinetuneTask[Any, Any], left_out: dict[str, float], out: Path) -> dict[str, float]:
    """Measure what all ranks predicted, and write metrics, predictions, and what a test server takes."""
    rows: Predictions = [row for part in read_parts(out / _PARTS) for row in part]
    metrics = task.measure(rows) | left_out
    _write(out / _METRICS, metrics | {"examples": len(rows)})
    with (out / _PREDICTIONS).open("w", encoding="utf-8") as file:
        for row in task.readable(rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    submitted = task.submission(rows)
    if submitted is not None:
        _write(out / _SUBMISSION, submitted)
    return metrics


def _write(place: Path, values: object) -> None:
    place.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _check_options(asked: Evaluation) -> None:
    """Refuse options that the task would not look at."""
    if asked.task in (*YARDSTICKS, "zero_shot"):
        _check_looks(asked, asked.task)
    yardsticks = ", ".join(YARDSTICKS)
    if asked.task in YARDSTICKS:
        require(
            asked.train is not None, f"{asked.task} learns from pictures of its own: name their index file with --train"
        )
        require(
            not any((asked.image_size, asked.tokenizer, asked.labels)),
            f"{asked.task} measures a tower as it is: leave --image-size, --tokenizer and --labels out",
        )
        return
    require(asked.train is None, f"--train is for yardsticks: name one with --task ({yardsticks})")
    if asked.checkpoint.startswith(TIMM):
        raise ConfigError(f"{asked.checkpoint} is an image tower alone: name a yardstick with --task ({yardsticks})")
    if asked.task == "zero_shot":
        require(asked.labels is not None, "zero_shot tells classes by their names: name their file with --labels")
        require(
            not any((asked.image_size, asked.tokenizer)),
            "zero_shot measures a model as it is: leave --image-size and --tokenizer out",
        )


def _show(metrics: Mapping[str, float], asked: Evaluation) -> None:
    """Print the table, or where the answers are if the index does not tell which are right."""
    if metrics:
        table = Table("metric", "x 100", title=f"{Path(asked.checkpoint).name} on {asked.data.name}")
        of_classes = [name for name in metrics if "/" in name]
        hidden = of_classes if len(of_classes) > _MOST_ROWS else []
        for name, value in metrics.items():
            if name not in hidden:
                table.add_row(name, f"{100 * value:.2f}")
        Console().print(table)
        if hidden:
            print(f"{len(hidden)} figures of single classes: {asked.out / _METRICS}")
    if all(name.startswith(LEFT_OUT) for name in metrics):
        place = next(asked.out / name for name in (_SUBMISSION, _PREDICTIONS) if (asked.out / name).is_file())
        print(f"{asked.data.name} does not say what is right: what the model says is in {place}")


_TASKS: dict[str, tuple[Any, Any]] = {
    "classification": (ClassificationConfig, Classification),
    "vqa": (VQAConfig, VQA),
    "nlvr2": (NLVR2Config, NLVR2),
    "captioning": (CaptioningConfig, Captioning),
    "retrieval": (RetrievalConfig, Retrieval),
    "detection": (DetectionConfig, Detection),
    "segmentation": (SegmentationConfig, Segmentation),
}
