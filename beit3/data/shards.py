"""Folders of prepared data, opened with megatron-energon.

A prepared folder holds plain tars `shard-NNNNN.tar` and energon's index `.nv-meta`, or one `text.jsonl` and its index.
Folders that users indexed with energon's own tool open as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from megatron.energon import (
    CrudeSample,
    CrudeWebdataset,
    DefaultCrudeJsonlDatasetFactory,
    SavableDataLoader,
    SavableDataset,
    WorkerConfig,
    get_savable_loader,
)
from megatron.energon.epathlib import EPath
from megatron.energon.savable_loader import SavableDatasetWrapper

from beit3.errors import BadSampleError, DataMissingError

T = TypeVar("T")

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
"""File name endings under which a sample's picture is looked for."""
TEXT_FILE = "text.jsonl"
"""The one data file of a prepared text folder."""
REPORT_FILE = "prepare.json"
"""What `beit3 prepare` wrote about a folder."""
INDEX_FOLDER = ".nv-meta"
"""Where energon keeps the index of a folder of tars."""

_SEQUENCE = 100  # samples read in a row before jumping elsewhere; the shuffle buffer mixes several such runs
_CACHE_BYTES = 64 * 2**20  # folders up to this size are kept in the memory of each data process
_PARALLEL = 1  # the buffer mixes already; drawing among open runs would cost more than reading a small sample


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as stored: nothing is decoded but the json."""

    key: str
    """Name of the sample, unique within its folder."""
    image: bytes | None = None
    """Bytes of the picture's file."""
    text: str | bytes | None = None
    """The caption or document, not cleaned yet."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The sample's json, without the text."""
    source: str = ""
    """Path of the source it was drawn from, as the stream names it."""


def to_sample(raw: Mapping[str, Any]) -> Sample:
    """Sort the files of one sample by their endings.

    Raises:
        BadSampleError: `unreadable_json`.
    """
    image: bytes | None = None
    text: str | bytes | None = None
    meta: dict[str, Any] = {}
    for name, part in raw.items():
        if name.startswith("__"):
            continue
        suffix = name.rpartition(".")[2].lower()
        if suffix == "json":
            meta = _load_meta(part)
        elif suffix == "txt":
            text = part
        elif image is None and suffix in IMAGE_SUFFIXES:
            image = part
    if text is None and isinstance(meta.get("text"), str):
        text = meta.pop("text")
    return Sample(raw["__key__"], image, text, meta, raw.get("__subflavors__", {}).get("source", ""))


def _load_meta(part: bytes | dict[str, Any]) -> dict[str, Any]:
    """Parse a sample's json unless energon has done so."""
    if isinstance(part, bytes):
        try:
            part = json.loads(part)
        except ValueError as error:
            raise BadSampleError("unreadable_json", str(error)) from error
    if not isinstance(part, dict):
        raise BadSampleError("unreadable_json", "not an object")
    return part


def check_folder(folder: Path) -> None:
    """Make sure that a prepared folder is there and whole.

    Raises:
        DataMissingError: what is missing, where, and what to do.
    """
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder of such data; write it with `beit3 prepare` or mend the path")
    sizes: dict[str, int | None]
    if (folder / TEXT_FILE).is_file():
        sizes = {TEXT_FILE: None, f"{TEXT_FILE}.idx": None}
    elif (folder / INDEX_FOLDER / ".info.json").is_file():
        info = json.loads((folder / INDEX_FOLDER / ".info.json").read_text("utf-8"))
        sizes = dict.fromkeys(info["shard_counts"])
    else:
        raise DataMissingError(f"{folder}: holds no prepared data; write it with `beit3 prepare`")
    if (folder / REPORT_FILE).is_file():
        sizes.update(json.loads((folder / REPORT_FILE).read_text("utf-8")).get("files", {}))
    for name, size in sizes.items():
        if not (folder / name).is_file():
            raise DataMissingError(f"{folder / name}: file missing; restore it or run `beit3 prepare` again")
        actual = (folder / name).stat().st_size
        if size is not None and actual != size:
            raise DataMissingError(f"{folder / name}: {actual} bytes instead of {size}; run `beit3 prepare` again")


def open_folder(folder: Path, worker: WorkerConfig, *, training: bool, source: str = "") -> Any:
    """Open a checked folder as an energon factory of crude samples (raw bytes; `len()` counts its samples)."""
    options: dict[str, Any] = {
        "training": training,
        "worker_config": worker,
        "subflavors": {"source": source},
        "parallel_shard_iters": _PARALLEL,
        "max_samples_per_sequence": _SEQUENCE if training else None,
    }
    if (folder / TEXT_FILE).is_file():
        return DefaultCrudeJsonlDatasetFactory(EPath(folder / TEXT_FILE), **options)
    return CrudeWebdataset(EPath(folder), split_part="train", decoder=None, **options)


def load_prepared(folder: Path | str) -> Iterator[Sample]:
    """Read a prepared folder once, in the order it was written.

    For evaluation sets, tokenizer corpora and feature caches. A sample whose json is broken comes with empty `meta`.

    Raises:
        DataMissingError: the folder or a shard is missing or cut.
    """
    folder = Path(folder)
    check_folder(folder)
    factory = open_folder(folder, WorkerConfig(rank=0, world_size=1, num_workers=0), training=False)
    for raw in make_loader(build_quietly(factory)):
        try:
            yield to_sample(raw)
        except BadSampleError:
            yield to_sample({name: part for name, part in raw.items() if not name.lower().endswith("json")})


def build_quietly(factory: Any, rotation: int = 0) -> SavableDataset[CrudeSample]:
    """Build the share of this rank of an opened folder; energon would print its slice tables.

    Args:
        factory: result of `open_folder`.
        rotation: worker that gets the first left-over sample, so that several folders do not all favour the same one.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        dataset: Any = factory.build(worker_rotation_offset=rotation)
    # Energon opens files through its storage client, which measures every read of every tar header: for small samples
    # that costs more than the reading. Files of this machine are opened by python.
    loader = dataset.dataset
    for reader in loader.join_readers:
        if hasattr(reader, "tar_filepaths"):
            paths = reader.tar_filepaths = [_local(path) for path in reader.tar_filepaths]
        else:
            paths = [_local(reader.jsonl_path)]
            reader.jsonl_path = paths[0]
        local = all(isinstance(path, Path) for path in paths)
        if factory.training and local and sum(path.stat().st_size for path in paths) <= _CACHE_BYTES:
            loader.join_readers = [_CachingReader(reader)]
    return cast(SavableDataset[CrudeSample], dataset)


class _CachingReader:
    """Keeps the samples of a small folder in memory: parsing tar headers again each epoch costs more than decoding."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._samples: dict[int, dict[str, Any]] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a copy, for energon writes its restore key into what it gets."""
        sample = self._samples.get(index)
        if sample is None:
            sample = self._samples[index] = self._reader[index]
        return dict(sample)


def _local(path: Any) -> Any:
    """Turn energon's path into python's where the file lies on this machine."""
    return path.local_path() if path.is_local() else path


_answer_commands = SavableDatasetWrapper._command_thread


def _answer_when_begun(dataset: SavableDatasetWrapper[Any]) -> None:
    """Let a worker answer for its position only once it has gone to its starting place.

    Energon starts the answering thread first; asked in between, it would give the place of a loader that never began.
    """
    with contextlib.suppress(ReferenceError):  # the dataset is gone: so is the question
        while dataset._running and dataset._last_checkpoints[-1].sample_index < 0:
            time.sleep(0.01)
        _answer_commands(dataset)


SavableDatasetWrapper._command_thread = staticmethod(_answer_when_begun)


def make_loader(dataset: SavableDataset[T]) -> SavableDataLoader[T]:
    """Make energon's savable loader, with its habits fitted to a training process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pinned memory, set right below
        loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=10,
            # Collecting garbage every few batches would cost more than the data; python does it in its own time.
            gc_collect_every_n_steps=0,
            watchdog_timeout_seconds=None,
        )
    loader.pin_memory = torch.cuda.is_available()
    return loader
