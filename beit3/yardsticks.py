"""Yardsticks: what a frozen image tower's features know of classes, by few-shot, nearest-neighbour and linear probes.

The features of every picture are computed once, whatever the number of ranks, and kept: another yardstick in the same
folder starts from them.

Shapes: n training pictures, m test pictures, B pictures of a batch, D features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3.config import require
from beit3.data.example_loader import evaluation_batches
from beit3.data.labelled_pictures import CentralCrop, LabelledBatch, LabelledPictures, View
from beit3.evaluation_parts import claim_folder, make_parts, read_parts
from beit3.finetune.image_tower import ImageTower, Pooling, load_image_tower
from beit3.metrics.probe import few_shot_accuracy, knn_accuracy, linear_accuracy
from beit3.train.distributed import Ranks

Yardstick = Literal["few_shot", "knn", "linear"]
YARDSTICKS: tuple[Yardstick, ...] = get_args(Yardstick)


def measure_tower(
    source: str,
    yardstick: Yardstick,
    indexes: Mapping[str, Path],
    out: Path,
    ranks: Ranks,
    batch_size: int = 64,
    workers: int = 0,
    pooling: Pooling = "auto",
    central_crop: float | None = None,
    shots: int = 10,
    overwrite: bool = False,
) -> dict[str, float]:
    """Measure a tower; all ranks describe pictures, the first one measures.

    Args:
        source: as for `load_image_tower`.
        yardstick: which.
        indexes: classification index files `train` and `test`.
        out: folder for features and metrics.json.
        ranks: this process among others.
        batch_size: pictures of one batch of all ranks.
        workers: data processes of each rank.
        pooling: as for `load_image_tower`.
        central_crop: share of the fitted picture's side that is kept; None: pictures as the tower prepares them.
        shots: few_shot: training pictures of each class.
        overwrite: begin anew.

    Returns:
        Shares in 0..1 by name, those of rows left out among them, on rank 0; nothing elsewhere.

    Raises:
        DataMissingError: the tower or an index does not exist.
        ConfigError: the folder holds something else, or an option is out of range.
    """
    require(shots >= 1, f"shots must be at least 1, not {shots}")
    tower = load_image_tower(source, pooling=pooling)
    view: View = tower.preprocess if central_crop is None else CentralCrop(tower.preprocess, central_crop)
    pictures = {name: LabelledPictures(index, view) for name, index in indexes.items()}
    if ranks.is_main:
        settings = {**tower.describe(), "weights": _fingerprint(tower), "central_crop": central_crop}
        claim_folder(out, settings | {name: str(path) for name, path in indexes.items()}, overwrite)
    ranks.barrier()
    tower.to(ranks.device)
    for name in indexes:
        keep_features(tower, pictures[name], out / f"{name}.safetensors", batch_size, workers, ranks)
    if not ranks.is_main:
        return {}
    train, test = (load_file(out / f"{name}.safetensors") for name in ("train", "test"))
    metrics = _measure(yardstick, train, test, shots, ranks.device) | pictures["test"].left_out()
    metrics |= {f"train_{name}": value for name, value in pictures["train"].left_out().items()}
    counts = {"train_examples": len(train["labels"]), "examples": len(test["labels"])}
    _write(out / "metrics.json", metrics | counts | ({"shots": shots} if yardstick == "few_shot" else {}))
    return metrics


def keep_features(
    tower: ImageTower, pictures: LabelledPictures, place: Path, batch_size: int, workers: int, ranks: Ranks
) -> None:
    """Write the features of all pictures in their order, unless the file is there: `features` (n, D), `labels` (n,).

    Every rank describes its share and keeps it batch by batch; the first one joins the shares, so that the file does
    not depend on the number of ranks.
    """
    if place.is_file():
        return
    parts = place.with_name(f"{place.stem}-{ranks.world_size}-{batch_size}")
    batches = evaluation_batches(
        pictures,
        pictures.collate,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=workers,
    )

    def describe(batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """(B, D) features of a batch, and its labels."""
        images = batch.to(ranks.device).images
        return tower(tower.preprocess.normalize(images)).cpu(), batch.labels

    with torch.inference_mode():
        make_parts(batches, describe, parts, ranks, f"features of {place.stem}")
    ranks.barrier()
    if ranks.is_main:
        features, labels = torch.empty(len(pictures), tower.width), torch.empty(len(pictures), dtype=torch.int64)
        for rank in range(ranks.world_size):
            own = slice(rank, None, ranks.world_size)
            shares = list(read_parts(parts, rank))
            if shares:  # a rank beyond the last picture has none
                features[own] = torch.cat([share[0] for share in shares])
                labels[own] = torch.cat([share[1] for share in shares])
        beside = place.with_suffix(".tmp")
        save_file({"features": features, "labels": labels}, beside)
        beside.replace(place)
        shutil.rmtree(parts)


def _measure(
    yardstick: Yardstick, train: Mapping[str, Tensor], test: Mapping[str, Tensor], shots: int, device: torch.device
) -> dict[str, float]:
    learned, labels = train["features"].to(device), train["labels"].to(device)
    asked, wanted = test["features"].to(device), test["labels"].to(device)
    if yardstick == "knn":
        return {"knn": knn_accuracy(learned, labels, asked, wanted)}
    if yardstick == "linear":
        return {"linear": linear_accuracy(learned, labels, asked, wanted)}
    few_shot = few_shot_accuracy(learned, labels, asked, wanted, shots=shots)
    by_seed = {f"few_shot_seed_{seed}": value for seed, value in enumerate(few_shot.by_seed)}
    return {"few_shot": few_shot.mean, **by_seed}


def _fingerprint(tower: ImageTower) -> str:
    """Tells weights apart: features of others would be taken for those of a model that was trained on."""
    digest = hashlib.sha256()
    for value in tower.state_dict().values():
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _write(place: Path, values: Mapping[str, float]) -> None:
    """Add to what other yardsticks have written."""
    known = json.loads(place.read_text()) if place.is_file() else {}
    place.write_text(json.dumps({**known, **values}, indent=1) + "\n")
