"""Teacher features of recorded crops, computed once and read from disk.

Shapes: n pictures, K crops of each, S side of a crop, N patches, C features.

`crops.bin` (n K, 3, S, S) uint8 and `features.bin` (n K, N, C) float16 are memory-mapped; `cache.json` says what they
were made from, and the folder's name is a hash of it: another teacher or crop is another folder, never a stale one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from beit3.config import to_plain
from beit3.data.fingerprint import Fingerprint
from beit3.data.images import decode_image
from beit3.data.shards import Sample
from beit3.data.transforms import CropConfig, RandomCrop, Views
from beit3.data.visual_codes import draw_crop
from beit3.errors import BadSampleError, ConfigError
from beit3.tokenizer.teachers import Teacher

_BATCH = {"cpu": 8, "cuda": 256, "mps": 64}
"""Crops the teacher sees at once; on a CPU small batches stay in its caches and are several times faster."""
_CROPS, _FEATURES = "crops.bin", "features.bin"


class FeatureCache:
    """Crops and their teacher features, as examples for a loader.

    Args:
        folder: written by `build_feature_cache`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "cache.json").read_text())
        shapes = self.settings["shapes"]
        self._crops = np.memmap(folder / _CROPS, np.uint8, "r", shape=tuple(shapes["crops"]))
        self._features = np.memmap(folder / _FEATURES, np.float16, "r", shape=tuple(shapes["features"]))

    def __len__(self) -> int:
        return len(self._crops)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """One crop (3, S, S) uint8 and its features (N, C) float16."""
        return torch.from_numpy(self._crops[index].copy()), torch.from_numpy(self._features[index].copy())


def build_feature_cache(
    parent: Path,
    samples: Iterable[Sample],
    *,
    teacher: Teacher,
    teacher_settings: dict[str, Any],
    crop: CropConfig,
    grid: tuple[int, int],
    crops_per_picture: int,
    seed: int,
    source: str,
    data: Fingerprint,
    device: torch.device,
) -> FeatureCache:
    """Open the cache for these settings, or build it.

    Args:
        parent: holds one folder for each combination of settings.
        samples: pictures in a fixed order; unreadable ones are counted and left out.
        teacher: computes the features of each crop; it sees the crop at `crop.tokenizer_size` where that is given.
        teacher_settings: say which teacher it is.
        crop: how crops are drawn; crop k of picture i depends on (seed, i, k) alone.
        grid: rows and columns of features.
        crops_per_picture: K.
        seed: of the crops.
        source: says which pictures these are.
        data: facts about their files; of other files another cache is made.
        device: where the teacher runs.
    """
    settings = {
        "teacher": teacher_settings,
        "crop": to_plain(crop),
        "grid": list(grid),
        "crops_per_picture": crops_per_picture,
        "seed": seed,
        "source": source,
        "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = parent / key
    if folder.is_dir():
        return _open_cache(folder, settings)
    beside = parent / f"{key}.tmp-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    started = time.perf_counter()
    seeds: list[int] = []
    skipped: Counter[str] = Counter()
    crops = _draw_crops(samples, crop, crops_per_picture, seed, seeds, skipped)
    _write(beside, crops, teacher.to(device).to(memory_format=torch.channels_last), grid, device)
    if not seeds:
        raise ConfigError(f"no readable picture in {source}: prepare the data again")
    features = [len(seeds), grid[0] * grid[1], teacher.width]
    shapes = {"crops": [len(seeds), 3, crop.size, crop.size], "features": features}
    seconds = time.perf_counter() - started
    record = {**settings, "shapes": shapes, "crop_seeds": seeds, "skipped": skipped, "seconds": seconds}
    (beside / "cache.json").write_text(json.dumps(record) + "\n")
    _publish(beside, folder)
    return FeatureCache(folder)


def _open_cache(folder: Path, settings: dict[str, Any]) -> FeatureCache:
    """Open what an earlier run made, if it is what its name says."""
    try:
        cache = FeatureCache(folder)
        fits = all(cache.settings[name] == value for name, value in json.loads(json.dumps(settings)).items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is damaged ({error}): delete it") from error
    if not fits:
        raise ConfigError(f"{folder} is damaged: its cache.json tells of another cache; delete it")
    return cache


def _publish(beside: Path, folder: Path) -> None:
    """Give a finished cache its name, unless another process was faster with the same."""
    try:
        os.replace(beside, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(beside)


def _draw_crops(
    samples: Iterable[Sample], crop: CropConfig, per_picture: int, seed: int, seeds: list[int], skipped: Counter[str]
) -> Iterator[Views]:
    """Draw the crops of all pictures; notes the seed of each, from which its box follows, and what was left out."""
    draw = RandomCrop(crop)
    for index, sample in enumerate(samples):
        try:
            image = decode_image(sample.image or b"")
        except BadSampleError as error:
            skipped[error.reason] += 1
            continue
        for number in range(per_picture):
            text = f"{seed}/{index}/{number}".encode()
            seeds.append(int.from_bytes(hashlib.sha256(text).digest()[:6], "big"))
            yield draw_crop(draw, image, seeds[-1])


def _write(folder: Path, crops: Iterator[Views], teacher: Teacher, grid: tuple[int, int], device: torch.device) -> None:
    """Write crops and features as they come: neither has to fit into memory."""
    size = _BATCH[device.type]
    columns = (SpinnerColumn(), TextColumn("teacher features: {task.completed:,} crops"), TimeElapsedColumn())
    with (
        (folder / _CROPS).open("wb") as crop_file,
        (folder / _FEATURES).open("wb") as feature_file,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        line = progress.add_task("", total=None)
        while batch := list(itertools.islice(crops, size)):
            torch.stack([views.image for views in batch]).numpy().tofile(crop_file)
            seen = [views.image if views.tokenizer_image is None else views.tokenizer_image for views in batch]
            images = torch.stack(seen).to(device).float() / 255
            features = teacher.patch_features(images.contiguous(memory_format=torch.channels_last), grid)
            features.half().cpu().numpy().tofile(feature_file)
            progress.advance(line, len(batch))
