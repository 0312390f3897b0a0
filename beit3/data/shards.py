"""Folders of prepared data, opened with megatron-energon.

A prepared folder holds plain tars `shard-NNNNN.tar` and energon's index `.nv-meta`, or one `text.jsonl` and its index.
Folders that users indexed with energon's own tool open as well.

What makes a sample: neighbouring files of one key, which is the name up to the first dot after its folders, so
`a/b.x.png` has the key `a/b`. The last ending, whatever its case, says what a file is: a picture, `.txt` or `.json`;
others are not looked at. A sample with two pictures is left out (`two_images`): nobody can know which one is meant.
Files of one key that do not lie together are two samples, each without the other's half; samples never reach from one
shard into the next.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron.energon import CrudeSample, CrudeWebdataset, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.jsonl import CrudeJsonlDatasetFactory
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from beit3.data.shard_reader import ERROR, INDEX_FOLDER, CachingReader, ShardReader, TarReader, TextReader
from beit3.errors import BadSampleError, ConfigError, DataMissingError

V = TypeVar("V")

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
"""File name endings under which a sample's picture is looked for."""
TEXT_FILE = "text.jsonl"
"""The one data file of a prepared text folder."""
REPORT_FILE = "prepare.json"
"""What `beit3 prepare` wrote about a folder."""

_SEQUENCE = 100  # samples read in a row before jumping elsewhere; the shuffle buffer mixes several such runs
_CACHE_BYTES = 64 * 2**20  # folders up to this size are kept in the memory of each data process
_PARALLEL = 1  # the buffer mixes already; drawing among open runs would cost more than reading a small sample
_WORD = 8  # bytes of a number in an index of places


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


def to_sample(raw: Mapping[str, Any], *, needs_meta: bool = True) -> Sample:
    """Sort the files of one sample by their endings.

    Args:
        raw: as energon hands it on, from a `ShardReader`.
        needs_meta: whether broken json is an error; else it counts as none.

    Raises:
        BadSampleError: `unreadable_shard`, `too_large`, `unreadable_json`, `two_images`.
    """
    if ERROR in raw:
        raise BadSampleError(*raw[ERROR])
    image: bytes | None = None
    text: str | bytes | None = None
    meta: dict[str, Any] = {}
    for name, part in raw.items():
        if name.startswith("__"):
            continue
        suffix = name.rpartition(".")[2].lower()
        if suffix == "json":
            meta = _load_meta(part, needs_meta)
        elif suffix == "txt":
            text = part
        elif suffix in IMAGE_SUFFIXES:
            if image is not None:
                raise BadSampleError("two_images", raw["__key__"])
            image = part
    if text is None and isinstance(meta.get("text"), str):
        text = meta.pop("text")
    return Sample(raw["__key__"], image, text, meta, (raw.get("__subflavors__") or {}).get("source", ""))


def _load_meta(part: bytes, needed: bool) -> dict[str, Any]:
    """Parse a sample's json."""
    try:
        meta = json.loads(part)
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        if needed:
            raise BadSampleError("unreadable_json", str(error)) from error
        return {}
    return meta


def check_folder(folder: Path) -> None:
    """Make sure that a prepared folder is there and whole, by the sizes of its files.

    Raises:
        DataMissingError: what is missing, where, and what to do.
        ConfigError: what describes the folder is damaged.
    """
    for name, size in expected_sizes(folder).items():
        if not (folder / name).is_file():
            raise DataMissingError(f"{folder / name}: file missing; restore it or run `beit3 prepare` again")
        actual = (folder / name).stat().st_size
        if size is not None and actual != size:
            raise DataMissingError(f"{folder / name}: {actual} bytes instead of {size}; run `beit3 prepare` again")


def expected_sizes(folder: Path) -> dict[str, int | None]:
    """Files that a prepared folder must hold, and their bytes where known.

    Raises:
        DataMissingError: it is no prepared folder.
        ConfigError: what describes the folder is damaged.
    """
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder of such data; write it with `beit3 prepare` or mend the path")
    sizes: dict[str, int | None]
    if (folder / TEXT_FILE).is_file():
        sizes = {TEXT_FILE: None, f"{TEXT_FILE}.idx": None}
    elif (folder / INDEX_FOLDER / ".info.json").is_file():
        counts = read_record(folder / INDEX_FOLDER / ".info.json", "shard_counts", int)
        sizes = dict.fromkeys(counts)
        sizes |= {f"{name}.idx": _WORD * (count + 1) for name, count in counts.items()}
    else:
        raise DataMissingError(f"{folder}: holds no prepared data; write it with `beit3 prepare`")
    if (folder / REPORT_FILE).is_file():
        sizes.update(read_record(folder / REPORT_FILE, "files", int))
    return sizes


def read_record(path: Path, name: str, kind: type[V]) -> dict[str, V]:
    """Read what a JSON file that describes a folder says of each of its files; nothing if it does not say it.

    Args:
        path: the JSON file.
        name: of the field.
        kind: what it says of a file.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        found = json.loads(path.read_text("utf-8")).get(name, {})
        if not all(type(value) is kind for value in found.values()):
            raise TypeError(f"{name} of another kind")
        for file in found:
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"'{file}' lies outside the folder")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): run `beit3 prepare` again") from error
    return cast(dict[str, V], found)


class _Texts(CrudeJsonlDatasetFactory):  # type: ignore[misc]  # energon has no types
    """Lines of a jsonl file as they are: one that is no JSON is counted where it is used."""

    def __init__(self, path: EPath, *, subflavors: dict[str, Any], **options: Any) -> None:
        super().__init__(path, **options)
        self._subflavors = subflavors

    def _load_sample(self, sample: dict[str, Any]) -> CrudeSample:
        return CrudeSample(sample, __subflavors__=self._subflavors)


def open_folder(folder: Path, worker: WorkerConfig, *, source: str = "") -> Any:
    """Open a checked folder as an energon factory of crude samples (raw bytes; `len()` counts its samples)."""
    options: dict[str, Any] = {
        "training": True,
        "worker_config": worker,
        "subflavors": {"source": source},
        "parallel_shard_iters": _PARALLEL,
        "max_samples_per_sequence": _SEQUENCE,
    }
    try:
        if (folder / TEXT_FILE).is_file():
            return _Texts(EPath(folder / TEXT_FILE), **options)
        return CrudeWebdataset(EPath(folder), split_part="train", decoder=None, **options)
    except Exception as error:  # energon answers a damaged index with many exception types
        raise ConfigError(f"{folder}: the index is damaged ({error}); run `beit3 prepare` again") from error


def open_reader(folder: Path) -> ShardReader:
    """Open a checked folder for reading by number; the order is energon's.

    Raises:
        ConfigError: its index is damaged.
    """
    if (folder / TEXT_FILE).is_file():
        return TextReader(folder / TEXT_FILE)
    try:
        meta = WebdatasetMeta.from_config(path=EPath(folder), split_part="train")
    except Exception as error:  # energon answers a damaged index with many exception types
        raise ConfigError(f"{folder}: the index is damaged ({error}); run `beit3 prepare` again") from error
    counts = {shard.name: shard.count for shard in meta.shards}
    numbers = {name: number for number, name in enumerate(meta.info_shard_files)}
    return TarReader(folder, counts, numbers, meta.sample_excludes)


def load_prepared(folder: Path | str) -> Iterator[Sample]:
    """Read a prepared folder once, in the order it was written.

    For evaluation sets, tokenizer corpora and feature caches: they must be whole, or their figures mean something
    else. A sample whose json is broken comes with empty `meta`.

    Raises:
        DataMissingError: the folder or a shard is missing or cut.
        BadSampleError: a sample cannot be read, or has two pictures.
    """
    folder = Path(folder)
    check_folder(folder)
    reader = open_reader(folder)
    for index in range(len(reader)):
        raw = reader[index]
        if raw is not None:
            yield to_sample(raw, needs_meta=False)


def build_quietly(factory: Any, folder: Path, rotation: int = 0) -> SavableDataset[CrudeSample]:
    """Build the share of this rank of an opened folder; energon would print its slice tables.

    Args:
        factory: result of `open_folder`.
        folder: the same.
        rotation: worker that gets the first left-over sample, so that several folders do not all favour the same one.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        dataset: Any = factory.build(worker_rotation_offset=rotation)
    reader = open_reader(folder)
    size = sum((folder / name).stat().st_size for name in reader.counts)
    dataset.dataset.join_readers = [CachingReader(reader) if size <= _CACHE_BYTES else reader]
    return cast(SavableDataset[CrudeSample], dataset)
