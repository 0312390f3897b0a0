"""Making the visual tokens of recorded crops: every picture of a prepared folder, shard by shard.

Shapes: n pictures of a shard, K crops of each, N patches.

What is written is described in `visual_codes.py`. A shard's file appears whole or not at all.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from beit3.config import config, differences, require
from beit3.data.images import decode_image
from beit3.data.raw_sources import Damage, read_source
from beit3.data.shards import IMAGE_SUFFIXES, check_folder
from beit3.data.transforms import CropConfig, RandomCrop, Views
from beit3.data.visual_codes import (
    SETTINGS_FILE,
    describe_codes,
    draw_crop,
    hash_key,
    list_shards,
    number_of,
    read_settings,
    tokenizer_hash,
)
from beit3.errors import BadSampleError
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.vqkd import VQKD

_BATCH = 64
_LARGEST_CODEBOOK = 2**16


@config
class CodesConfig:
    """What codes are made of."""

    tokenizer: Path
    """Exchange folder or released file of a VQ-KD tokenizer."""
    crop: CropConfig
    """How crops are drawn: the same as in the training run that reads the codes."""
    crops: int = 1
    """Crops of each picture."""
    seed: int = 0
    """Of the crops."""

    def __post_init__(self) -> None:
        require(self.crops >= 1, f"crops must be at least 1, not {self.crops}")


@dataclass
class CodesReport:
    """What was written."""

    pictures: int
    shards: int
    kept: int
    """Shards that an earlier call had finished."""
    skipped: Counter[str]
    """Pictures left out, by reason; also broken archives."""


def write_codes(
    pictures: Path, out: Path, settings: CodesConfig, *, device: torch.device, num_workers: int = 1
) -> CodesReport:
    """Tokenize K crops of every picture of a prepared folder.

    Finished shards of an earlier call with the same settings are kept. Several machines may share the work: under
    `RANK` and `WORLD_SIZE` each takes its part of the shards.

    Args:
        pictures: folder written by `beit3 prepare pairs` or `images`.
        out: folder of the codes.
        settings: tokenizer and crops.
        device: where the tokenizer runs.
        num_workers: processes; of several, each takes one CPU thread.

    Raises:
        ConfigError: `out` holds codes made from something else; the message says what differs.
        DataMissingError: pictures or tokenizer do not exist.
    """
    check_folder(pictures)
    require(
        bool(list_shards(pictures)), f"{pictures} holds no pictures: give a folder of `beit3 prepare pairs` or `images`"
    )
    tokenizer = load_visual_tokenizer(settings.tokenizer)
    size = settings.crop.tokenizer_size or settings.crop.size
    require(
        tokenizer.config.image_size == (size, size),
        f"the tokenizer takes images of {tokenizer.config.image_size}, the crop gives ({size}, {size})",
    )
    require(tokenizer.config.codebook_size <= _LARGEST_CODEBOOK, "codes are stored as uint16: 65,536 at most")
    record = {
        **describe_codes(tokenizer_hash(settings.tokenizer), settings.crop, pictures),
        "crops": settings.crops,
        "seed": settings.seed,
        "grid": list(tokenizer.config.grid),
        "codebook_size": tokenizer.config.codebook_size,
    }
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, record)
    shards = list_shards(pictures)[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    places = {shard: out / shard.relative_to(pictures).with_suffix(".npy") for shard in shards}
    todo = [(shard, place) for shard, place in places.items() if not place.exists()]
    report = CodesReport(0, len(todo), len(shards) - len(todo), Counter())
    work = functools.partial(_write_shard, settings=settings, device=str(device))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        line = progress.add_task(f"tokenizing {pictures}", total=len(todo))
        for count, skipped in _run(work, todo, num_workers):
            report.pictures += count
            report.skipped.update(skipped)
            progress.advance(line)
    return report


def _run(
    work: Callable[[tuple[Path, Path]], tuple[int, Counter[str]]], shards: list[tuple[Path, Path]], num_workers: int
) -> Iterator[tuple[int, Counter[str]]]:
    """Results of all shards as they are finished, in this process or in several."""
    if min(num_workers, len(shards)) <= 1:
        yield from map(work, shards)
        return
    # A forked child of a process whose threads have run may hang, and CUDA refuses it: workers start afresh.
    workers = min(num_workers, len(shards))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(work, shard) for shard in shards]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else an error or Ctrl-C would wait for all shards
            raise


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    """Write the settings of an empty folder, or check those of a started one."""
    path = out / SETTINGS_FILE
    if path.exists():
        changed = differences(read_settings(path), json.loads(json.dumps(record)))
        require(not changed, f"{out} holds codes of another {', '.join(changed)}: choose another folder")
        return
    beside = path.with_name(f"{SETTINGS_FILE}.tmp-{os.getpid()}")
    beside.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    os.replace(beside, path)


def _row_type(crops: int, patches: int) -> np.dtype[Any]:
    crop = [("seed", "<i8"), ("box", "<u4", (4,)), ("codes", "<u2", (patches,))]
    return np.dtype([("key", "<u8"), ("crops", crop, (crops,))])


def _write_shard(places: tuple[Path, Path], settings: CodesConfig, device: str) -> tuple[int, Counter[str]]:
    """Tokenize one shard (first place) and put its codes (second place) there at once."""
    shard, out = places
    tokenizer = load_visual_tokenizer(settings.tokenizer).to(device)
    draw = RandomCrop(settings.crop)
    patches = tokenizer.config.grid[0] * tokenizer.config.grid[1]
    skipped: Counter[str] = Counter()
    kind = _row_type(settings.crops, patches)
    parts: list[Any] = [np.zeros(0, kind)]
    for pictures in _batches(shard, _BATCH // settings.crops or 1, skipped):
        part: Any = np.zeros(len(pictures), kind)
        views: list[Views] = []
        for row, (key, image) in zip(part, pictures, strict=True):
            row["key"] = hash_key(key)
            for number in range(settings.crops):
                seed = number_of(f"{settings.seed}/{key}/{number}") >> 2  # fits a signed integer
                view = draw_crop(draw, image, seed)
                views.append(view)
                row["crops"][number]["seed"], row["crops"][number]["box"] = seed, view.box
        part["crops"]["codes"] = _tokenize(tokenizer, views, device).reshape(len(pictures), settings.crops, patches)
        parts.append(part)
    rows = np.concatenate(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.stem}.tmp-{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, rows)
    os.replace(beside, out)
    return len(rows), skipped


def _batches(shard: Path, size: int, skipped: Counter[str]) -> Iterator[list[tuple[str, Image.Image]]]:
    """Decoded pictures of a shard with their keys, several at a time; what cannot be decoded is counted."""
    batch: list[tuple[str, Image.Image]] = []
    for sample in read_source(shard):
        if isinstance(sample, Damage):
            skipped["damaged_shard"] += 1
            continue
        data = next((part for ending, part in sample.parts.items() if ending in IMAGE_SUFFIXES), None)
        try:
            batch.append((sample.key, decode_image(data or b"")))
        except BadSampleError as error:
            skipped[error.reason] += 1
            continue
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenize(tokenizer: VQKD, views: list[Views], device: str) -> Any:
    images = torch.stack([view.image if view.tokenizer_image is None else view.tokenizer_image for view in views])
    return tokenizer.tokenize(images.to(device)).cpu().numpy().astype(np.uint16)
