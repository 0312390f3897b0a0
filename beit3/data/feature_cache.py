"""Teacher features of recorded crops, computed once and read from disk.

Shapes: n pictures, K crops of each, S side of a crop, N patches, C features.

`crops.npy` (n K, 3, S, S) uint8 and `features.npy` (n K, N, C) float16 are memory-mapped; `cache.json` says what they
were made from, and the folder's name is a hash of it: another teacher or crop is another folder, never a stale one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from beit3.config import to_plain
from beit3.data.images import decode_image
from beit3.data.shards import Sample
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.errors import BadSampleError, ConfigError
from beit3.tokenizer.teachers import Teacher, TeacherConfig, build_teacher

_BATCH = {"cpu": 8, "cuda": 256, "mps": 64}
"""Crops the teacher sees at once; on a CPU small batches stay in its caches and are several times faster."""


class FeatureCache:
    """Crops and their teacher features, as a table.

    Args:
        folder: written by `build_feature_cache`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "cache.json").read_text())
        self._crops = np.load(folder / "crops.npy", mmap_mode="r")
        self._features = np.load(folder / "features.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One crop (3, S, S) uint8 and its features (N, C) float16."""
        return torch.from_numpy(self._crops[index].copy()), torch.from_numpy(self._features[index].copy())


def build_feature_cache(
    parent: Path,
    samples: Iterable[Sample],
    *,
    teacher: TeacherConfig,
    crop: CropConfig,
    grid: tuple[int, int],
    crops_per_picture: int,
    seed: int,
    source: str,
    device: torch.device,
) -> FeatureCache:
    """Open the cache for these settings, or build it.

    Args:
        parent: holds one folder for each combination of settings.
        samples: pictures in a fixed order; unreadable ones are counted and left out.
        teacher: computes the features of each crop.
        crop: how crops are drawn; crop k of picture i depends on (seed, i, k) alone.
        grid: rows and columns of features.
        crops_per_picture: K.
        seed: of the crops.
        source: says which pictures these are.
        device: where the teacher runs.
    """
    settings = {
        "teacher": to_plain(teacher),
        "crop": to_plain(crop),
        "grid": list(grid),
        "crops_per_picture": crops_per_picture,
        "seed": seed,
        "source": source,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = parent / key
    if folder.is_dir():
        return FeatureCache(folder)
    beside = parent / f"{key}.tmp-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    crops, seeds, skipped = _draw_crops(samples, crop, crops_per_picture, seed)
    if not crops:
        raise ConfigError(f"no readable picture in {source}: prepare the data again")
    np.save(beside / "crops.npy", np.stack(crops))
    started = time.perf_counter()
    _compute_features(beside, build_teacher(teacher).to(device), grid, device)
    record = {**settings, "crop_seeds": seeds, "skipped": skipped, "seconds": time.perf_counter() - started}
    (beside / "cache.json").write_text(json.dumps(record) + "\n")
    try:
        os.replace(beside, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(beside)  # another rank was faster with the same
    return FeatureCache(folder)


def _draw_crops(
    samples: Iterable[Sample], crop: CropConfig, crops_per_picture: int, seed: int
) -> tuple[list[Any], list[int], dict[str, int]]:
    """Draw the crops of all pictures, with the seed of each, from which its box follows."""
    draw = RandomCrop(crop)
    crops: list[Any] = []
    seeds: list[int] = []
    skipped: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        for index, sample in enumerate(samples):
            try:
                image = decode_image(sample.image or b"")
            except BadSampleError as error:
                skipped[error.reason] = skipped.get(error.reason, 0) + 1
                continue
            for number in range(crops_per_picture):
                text = f"{seed}/{index}/{number}".encode()
                crop_seed = int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
                torch.manual_seed(crop_seed)
                crops.append(draw(image).image.numpy())
                seeds.append(crop_seed)
    return crops, seeds, skipped


def _compute_features(folder: Path, teacher: Teacher, grid: tuple[int, int], device: torch.device) -> None:
    crops = np.load(folder / "crops.npy", mmap_mode="r")
    shape = (len(crops), grid[0] * grid[1], teacher.width)
    features = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
    teacher = teacher.to(memory_format=torch.channels_last)
    size = _BATCH[device.type]
    with Progress() as progress:
        line = progress.add_task("teacher features", total=len(crops))
        for start in range(0, len(crops), size):
            images = torch.from_numpy(crops[start : start + size].copy()).to(device).float() / 255
            images = images.contiguous(memory_format=torch.channels_last)
            features[start : start + size] = teacher.patch_features(images, grid).half().cpu().numpy()
            progress.advance(line, len(images))
    features.flush()
