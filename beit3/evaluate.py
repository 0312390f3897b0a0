"""The command `beit3 evaluate`: a checkpoint on an index file, one table, all predictions; on any number of ranks.

What is predicted is kept batch by batch, so that the same command goes on after an interruption. Every example is
counted once, whatever the number of ranks.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional

from beit3.config import differences, require
from beit3.data.example_loader import evaluation_batches
from beit3.data.labels import labels_file
from beit3.errors import ConfigError
from beit3.finetune.captioning import Captioning, CaptioningConfig
from beit3.finetune.classification import Classification, ClassificationConfig
from beit3.finetune.common import FinetuneTask, Predictions
from beit3.finetune.nlvr2 import NLVR2, NLVR2Config
from beit3.finetune.retrieval import Retrieval, RetrievalConfig
from beit3.finetune.vqa import VQA, VQAConfig
from beit3.model.heads import RetrievalModel
from beit3.model.transformer import MultiwayTransformer
from beit3.predict import Predictor, load
from beit3.train.distributed import Ranks, join_ranks

TaskName = Literal["classification", "vqa", "nlvr2", "captioning", "retrieval"]
_PARTS, _SETTINGS = "parts", "settings.json"


def evaluate(
    checkpoint: Positional[str],
    *,
    data: Path,
    task: TaskName | None = None,
    out: Path = Path("evaluation"),
    batch_size: int = 64,
    workers: int = 0,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    labels: Path | None = None,
    num_beams: int = 3,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    overwrite: bool = False,
) -> None:
    """Evaluate a checkpoint on an index file; under torchrun on all ranks.

    Args:
        checkpoint: exchange folder, hf-hub:organisation/name, or released .pth file.
        data: index file (`beit3 prepare`, or a released .jsonl).
        task: left out, the checkpoint's; `retrieval` takes a backbone as well and compares its class tokens.
        out: folder for metrics.json and predictions.jsonl; the same command goes on with what an interrupted one left.
        batch_size: examples of one batch of all ranks.
        workers: data processes of each rank.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of the classes or answers, in the order of the model's outputs.
        num_beams: beams of captions.
        device: where the model runs.
        overwrite: begin anew.
    """
    with join_ranks(device) as ranks:
        predictor = load(checkpoint, str(ranks.device), image_size=image_size, tokenizer=tokenizer, labels=labels)
        made = build_evaluated(predictor, task, num_beams)
        settings: dict[str, Any] = {
            "checkpoint": checkpoint,
            "data": str(data),
            "task": made.kind.task,
            "batch_size": batch_size,
        }
        settings |= {"image_size": list(predictor.preprocess.image_size), "ranks": ranks.world_size}
        if ranks.is_main:
            _claim(out, {**settings, "num_beams": num_beams}, overwrite)
        ranks.barrier()
        predict_all(made, data, out / _PARTS, batch_size, workers, ranks)
        ranks.barrier()
        if ranks.is_main:
            metrics = finish(made, out)
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


@torch.inference_mode()
def predict_all(
    task: FinetuneTask[Any, Any], data: Path, parts: Path, batch_size: int, workers: int, ranks: Ranks
) -> None:
    """Predict this rank's share of an index file, a file a batch; batches that are there already are left alone."""
    parts.mkdir(parents=True, exist_ok=True)
    examples = task.examples([data], training=False)
    batches = evaluation_batches(
        examples,
        examples.collate,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=workers,
    )
    own = range(len(batches))
    todo = [number for number in own if not (parts / _part(ranks.rank, number)).is_file()]
    quiet = not (ranks.is_main and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        line = progress.add_task(f"evaluating {data.name}", total=len(own), completed=len(own) - len(todo))
        for number, batch in zip(todo, batches.only(todo), strict=True):
            rows = task.predict(task.move(batch, ranks.device))
            place = parts / _part(ranks.rank, number)
            torch.save(rows, place.with_suffix(".tmp"))
            place.with_suffix(".tmp").replace(place)
            progress.advance(line)


def finish(task: FinetuneTask[Any, Any], out: Path) -> dict[str, float]:
    """Measure what all ranks predicted, and write metrics.json and predictions.jsonl."""
    rows: Predictions = []
    for path in sorted((out / _PARTS).glob("*.pt")):
        rows += torch.load(path, weights_only=True)
    metrics = task.measure(rows)
    (out / "metrics.json").write_text(json.dumps({**metrics, "examples": len(rows)}, indent=1) + "\n")
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            plain = {name: value for name, value in row.items() if not isinstance(value, Tensor)}
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
    return metrics


def _claim(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Take a folder, or go on with what the same evaluation left in it."""
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    record = out / _SETTINGS
    if record.is_file():
        changed = differences(json.loads(record.read_text()), settings)
        require(not changed, f"{out} holds another evaluation ({', '.join(changed)} differ): --out or --overwrite")
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is no evaluation: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")


def _part(rank: int, number: int) -> str:
    return f"{rank:04d}-{number:06d}.pt"


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
