"""Zero-shot classification of an index file by whatever a checkpoint has: vectors of class names, or words.

Dual encoders compare a picture with the prompts of every class (CLIP, arXiv 2103.00020), exports of LiT with a tower
of timm included. A SuperClass model judges the subwords of every class name by its own head.

Shapes: B pictures of a batch, C classes, H, W height and width in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from beit3.config import require
from beit3.data.example_loader import evaluation_batches
from beit3.data.labelled_pictures import LabelledBatch, LabelledPictures
from beit3.data.labels import read_labels
from beit3.data.preprocess import Preprocess
from beit3.data.prompts import PROMPTS, Prompts
from beit3.errors import ConfigError
from beit3.evaluation_parts import claim_folder, make_parts, read_parts
from beit3.finetune.lit import PROJECTION, load_locked_images
from beit3.metrics.accuracy import class_ranks, topk_accuracy
from beit3.metrics.zero_shot import class_vectors, token_zero_shot
from beit3.model.heads import RetrievalModel, SuperClassModel
from beit3.model.hub import local_path
from beit3.predict import Predictor, load
from beit3.train.distributed import Ranks

_PARTS = "parts"


class Judge(NamedTuple):
    """What tells classes apart."""

    preprocess: Preprocess
    """How pictures are prepared."""
    score: Callable[[Tensor], Tensor]
    """Normalised images (B, 3, H, W) to (B, C) float32, higher is better."""


def measure_zero_shot(
    checkpoint: str,
    index: Path,
    labels: Path,
    out: Path,
    ranks: Ranks,
    prompts: Prompts = "imagenet",
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
) -> dict[str, float]:
    """Measure a checkpoint on pictures with classes; the first rank measures what all predict.

    Args:
        checkpoint: as for `beit3.load`: a retrieval, clip or superclass model.
        index: classification index file.
        labels: `labels.json` with the names of the classes.
        out: folder for metrics.json; the same call goes on with what an interrupted one left.
        ranks: this process among others.
        prompts: texts that names are put into; a SuperClass model reads the names alone.
        batch_size: pictures of one batch of all ranks.
        workers: data processes of each rank.
        overwrite: begin anew.

    Returns:
        `zero_shot_acc1` and `zero_shot_acc5` in 0..1 on rank 0; nothing elsewhere.

    Raises:
        DataMissingError: the checkpoint, the index or the labels do not exist.
        ConfigError: the model tells no classes apart by their names, names are missing, or the folder holds something
            else.
    """
    names = read_labels(labels)
    judge = zero_shot_judge(checkpoint, names, prompts, ranks.device)
    pictures = LabelledPictures(index, judge.preprocess, num_classes=len(names))
    require(
        "left_out/label_out_of_range" not in pictures.left_out(),
        f"{index} has labels from {len(names)} on, {labels} names {len(names)} classes: it belongs to another index",
    )
    if ranks.is_main:
        places = {"checkpoint": checkpoint, "data": str(index), "labels": str(labels)}
        claim_folder(
            out, {**places, "prompts": prompts, "batch_size": batch_size, "ranks": ranks.world_size}, overwrite
        )
    ranks.barrier()
    _keep_ranks(judge, pictures, out / _PARTS, f"zero-shot on {index.name}", ranks, batch_size, workers)
    ranks.barrier()
    if not ranks.is_main:
        return {}
    metrics = topk_accuracy(torch.cat(list(read_parts(out / _PARTS))))
    metrics = {f"zero_shot_{name}": value for name, value in metrics.items()} | pictures.left_out()
    (out / "metrics.json").write_text(json.dumps({**metrics, "examples": len(pictures)}, indent=1) + "\n")
    return metrics


def _keep_ranks(
    judge: Judge, pictures: LabelledPictures, parts: Path, title: str, ranks: Ranks, batch_size: int, workers: int
) -> None:
    """Write how many classes go before the right one, (B,) int64 for each batch of this rank."""
    batches = evaluation_batches(
        pictures,
        pictures.collate,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=workers,
    )

    def places(batch: LabelledBatch) -> Tensor:
        """(B,) the rank of each picture's own class."""
        batch = batch.to(ranks.device)
        return class_ranks(judge.score(judge.preprocess.normalize(batch.images)), batch.labels).cpu()

    with torch.inference_mode():
        make_parts(batches, places, parts, ranks, title)


@torch.inference_mode()
def zero_shot_judge(source: str, names: Sequence[str], prompts: Prompts, device: torch.device) -> Judge:
    """Load a checkpoint and teach it the names of the classes.

    Args:
        source: as for `beit3.load`.
        names: of the classes.
        prompts: texts that names are put into.
        device: where it runs.

    Raises:
        DataMissingError: the checkpoint does not exist.
        ConfigError: it tells no classes apart by their names.
    """
    predictor = load(source, str(device))
    model = predictor.model
    if isinstance(model, SuperClassModel):
        return Judge(predictor.preprocess, _judge_by_words(predictor, model, names))
    require(
        isinstance(model, RetrievalModel) and model.part != "vision",
        f"{source} does not compare pictures with texts: zero_shot takes a retrieval, clip or superclass model",
    )
    assert isinstance(model, RetrievalModel)
    classes = class_vectors(predictor.embed_texts, names, PROMPTS[prompts]).to(device)
    if model.part is None:
        return Judge(predictor.preprocess, lambda images: model.encode_image(images).float() @ classes.T)
    folder = local_path(source)
    if not (folder / PROJECTION).is_dir():
        raise ConfigError(f"{source} is a text tower alone, and no {PROJECTION} lies with it: it sees no pictures")
    locked = load_locked_images(folder).to(device)
    return Judge(locked.tower.preprocess, lambda images: locked(images) @ classes.T)


def _judge_by_words(predictor: Predictor, model: SuperClassModel, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    words = predictor.words
    require(words is not None, "this SuperClass model has no vocabulary: words.json does not lie with it")
    assert words is not None
    ids, weights = [words.subwords.encode(name) for name in names], words.weights()
    return lambda images: token_zero_shot(model(images).float().log_softmax(-1), ids, weights)
