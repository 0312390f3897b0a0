"""The command `beit3 evaluate`: a checkpoint on an index file, one table, all predictions; on any number of ranks.

What is predicted is kept batch by batch, so that the same command goes on after an interruption. Every example is
counted once, whatever the number of ranks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional

from beit3.config import require
from beit3.data.example_loader import evaluation_batches
from beit3.data.labels import labels_file
from beit3.errors import ConfigError
from beit3.evaluation_parts import claim_folder, make_parts, read_parts
from beit3.finetune.captioning import Captioning, CaptioningConfig
from beit3.finetune.classification import Classification, ClassificationConfig
from beit3.finetune.common import FinetuneTask, Predictions
from beit3.finetune.image_tower import TIMM, Pooling
from beit3.finetune.nlvr2 import NLVR2, NLVR2Config
from beit3.finetune.retrieval import Retrieval, RetrievalConfig
from beit3.finetune.vqa import VQA, VQAConfig
from beit3.model.heads import RetrievalModel
from beit3.model.transformer import MultiwayTransformer
from beit3.predict import Predictor, load
from beit3.train.distributed import Ranks, join_ranks
from beit3.yardsticks import YARDSTICKS, Yardstick, measure_tower

TaskName = Literal["classification", "vqa", "nlvr2", "captioning", "retrieval"]
_PARTS = "parts"


def evaluate(
    checkpoint: Positional[str],
    *,
    data: Path,
    task: TaskName | Yardstick | None = None,
    train: Path | None = None,
    out: Path = Path("evaluation"),
    batch_size: int = 64,
    workers: int = 0,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    labels: Path | None = None,
    num_beams: int = 3,
    pooling: Pooling = "auto",
    central_crop: float | None = None,
    shots: int = 10,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    overwrite: bool = False,
) -> None:
    """Evaluate a checkpoint on an index file; under torchrun on all ranks.

    Args:
        checkpoint: exchange folder, hf-hub:organisation/name, or released .pth file; for yardsticks timm:NAME too.
        data: index file (`beit3 prepare`, or a released .jsonl).
        task: left out, the checkpoint's; `retrieval` takes a backbone as well and compares its class tokens. The
            yardsticks `few_shot`, `knn` and `linear` measure frozen features of pictures with classes.
        train: yardsticks: index file that they learn from.
        out: folder for metrics.json and what was predicted; the same command goes on with what an interrupted one left.
        batch_size: examples of one batch of all ranks.
        workers: data processes of each rank.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of the classes or answers, in the order of the model's outputs.
        num_beams: beams of captions.
        pooling: yardsticks: mean of the patches, class token, or what the model's own head reads.
        central_crop: yardsticks: share of the side that is kept, 0.875 as published; left out, the model's own way.
        shots: few_shot: training pictures of each class.
        device: where the model runs.
        overwrite: begin anew.
    """
    _check_options(checkpoint, task, train, any((image_size, tokenizer, labels)))
    with join_ranks(device) as ranks:
        if train is not None and (task == "few_shot" or task == "knn" or task == "linear"):
            places = {"train": train, "test": data}
            metrics = measure_tower(
                checkpoint, task, places, out, ranks, batch_size, workers, pooling, central_crop, shots, overwrite
            )
        else:
            predictor = load(checkpoint, str(ranks.device), image_size=image_size, tokenizer=tokenizer, labels=labels)
            made = build_evaluated(predictor, task, num_beams)
            metrics = evaluate_task(made, checkpoint, data, out, ranks, batch_size, workers, num_beams, overwrite)
        if ranks.is_main:
            _show(metrics, checkpoint, data)


def build_evaluated(predictor: Predictor, task: str | None, num_beams: int = 3) -> FinetuneTask[Any, Any]:
    """Put a loaded model into the Task that measures it.

    Raises:
        ConfigError: the model is of another task, or lacks the tokenizer or the answers that the task needs.
    """
    model: Any = predictor.model
    wanted = task or model.task
    if wanted == "retrieval" and isinstance(model, MultiwayTransformer):
        model = _with_class_tokens(model)
    if wanted != model.task or wanted not in _TASKS:
        held = model.task or "backbone"
        raise ConfigError(f"a {held} is not evaluated as {wanted}: name a --task that it was made for")
    config, kind = _TASKS[wanted]
    fields: dict[str, Any] = {"model": model.model_config, "preprocess": predictor.preprocess}
    if wanted == "classification":
        fields |= {"num_classes": model.head.out_features, "mixup": 0.0, "cutmix": 0.0}
    with tempfile.TemporaryDirectory() as place:  # Tasks read their tokenizer and answers from files
        if wanted != "classification":
            predictor.tokenizer.save(Path(place, "tokenizer.spm"))
            fields |= {"text_tokenizer": Path(place, "tokenizer.spm")}
            fields |= {"max_text_length": predictor.preprocess.max_text_length}
        if wanted == "vqa":
            names = predictor.labels or [f"answer {number}" for number in range(model.head[-1].out_features)]
            Path(place, "labels.json").write_bytes(labels_file(names)["labels.json"])
            fields |= {"labels": Path(place, "labels.json")}
        if wanted == "captioning":
            fields |= {"num_beams": num_beams, "max_text_length": min(32, predictor.preprocess.max_text_length)}
        made: FinetuneTask[Any, Any] = kind(config(**fields), model)
    return made.eval()


def evaluate_task(
    task: FinetuneTask[Any, Any],
    checkpoint: str,
    data: Path,
    out: Path,
    ranks: Ranks,
    batch_size: int,
    workers: int,
    num_beams: int,
    overwrite: bool,
) -> dict[str, float]:
    """Predict every row of an index file and measure the predictions; metrics on rank 0, nothing elsewhere."""
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": str(data),
        "task": task.kind.task,
        "batch_size": batch_size,
        "image_size": list(task.preprocess.image_size),
        "ranks": ranks.world_size,
        "num_beams": num_beams,
    }
    if ranks.is_main:
        claim_folder(out, settings, overwrite)
    ranks.barrier()
    predict_all(task, data, out / _PARTS, batch_size, workers, ranks)
    ranks.barrier()
    return finish(task, out) if ranks.is_main else {}


def predict_all(
    task: FinetuneTask[Any, Any], data: Path, parts: Path, batch_size: int, workers: int, ranks: Ranks
) -> None:
    """Predict this rank's share of an index file, a file a batch; batches that are there already are left alone."""
    examples = task.examples([data], training=False)
    batches = evaluation_batches(
        examples,
        examples.collate,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=workers,
    )
    with torch.inference_mode():
        make_parts(
            batches,
            lambda batch: task.predict(task.move(batch, ranks.device)),
            parts,
            ranks,
            f"evaluating {data.name}",
        )


def finish(task: FinetuneTask[Any, Any], out: Path) -> dict[str, float]:
    """Measure what all ranks predicted, and write metrics.json and predictions.jsonl."""
    rows: Predictions = [row for part in read_parts(out / _PARTS) for row in part]
    metrics = task.measure(rows)
    (out / "metrics.json").write_text(json.dumps({**metrics, "examples": len(rows)}, indent=1) + "\n")
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            plain = {name: value for name, value in row.items() if not isinstance(value, Tensor)}
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
    return metrics


def _check_options(checkpoint: str, task: str | None, train: Path | None, changes_model: bool) -> None:
    """Refuse options that the task would not look at."""
    yardsticks = ", ".join(YARDSTICKS)
    if task in YARDSTICKS:
        require(train is not None, f"{task} learns from pictures of its own: name their index file with --train")
        require(
            not changes_model, f"{task} measures a tower as it is: leave --image-size, --tokenizer and --labels out"
        )
        return
    require(train is None, f"--train is for yardsticks: name one with --task ({yardsticks})")
    if checkpoint.startswith(TIMM):
        raise ConfigError(f"{checkpoint} is an image tower alone: name a yardstick with --task ({yardsticks})")


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


def _show(metrics: dict[str, float], checkpoint: str, data: Path) -> None:
    table = Table("metric", "x 100", title=f"{Path(checkpoint).name} on {data.name}")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f}")
    Console().print(table)


_TASKS: dict[str, tuple[Any, Any]] = {
    "classification": (ClassificationConfig, Classification),
    "vqa": (VQAConfig, VQA),
    "nlvr2": (NLVR2Config, NLVR2),
    "captioning": (CaptioningConfig, Captioning),
    "retrieval": (RetrievalConfig, Retrieval),
}
