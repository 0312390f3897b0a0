"""Samples of a prepared folder by number, read in place and checked: what is damaged costs itself, never a neighbour.

A tar lies beside energon's `.tar.idx`, a `text.jsonl` beside its `.jsonl.idx`: 64-bit numbers that say where each
sample begins, and at last where the end is. `.nv-meta/index.sqlite` names the samples.
"""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import struct
import tarfile
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Container, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

from beit3.errors import BadSampleError

INDEX_FOLDER = ".nv-meta"
"""Where energon keeps the index of a folder of tars."""
KEYS_FILE = f"{INDEX_FOLDER}/index.sqlite"
"""The names of all samples."""
UNREADABLE = "unreadable_shard"
"""Reason of a sample whose bytes cannot be read from its shard."""
MAX_SAMPLE_BYTES = 256 * 2**20
"""Largest sample that is read; an index or a header may declare any size."""

_WAITS = (0.05, 0.2, 0.8)
"""Seconds before each new try of a read that failed."""
_MAX_OPEN = 4
_FARTHEST = 2**62
"""Beyond any place in a file."""
_BLOCK = 512
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
ERROR = "__error__"
"""Field of a raw sample that stands for one that could not be read: reason and detail."""


class RawParts(NamedTuple):
    """One sample as stored."""

    key: str
    parts: dict[str, bytes]
    """Files by their endings, which is what follows the first dot of the name."""


class ShardReader(ABC):
    """Samples by number, in the place of energon's readers (which end a run at the first damaged header)."""

    counts: dict[str, int]
    """Samples of each file, in order."""

    def __len__(self) -> int:
        return sum(self.counts.values())

    @abstractmethod
    def key_of(self, index: int) -> str:
        """The name of a sample as far as it is known without reading it."""

    @abstractmethod
    def read(self, index: int) -> RawParts | None:
        """Read one sample; None for one that the index excludes.

        Raises:
            BadSampleError: `unreadable_shard` or `too_large`.
        """

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """One sample in energon's form; one that cannot be read comes as its error, to be counted where it is used."""
        common = {"__restore_key__": ("Webdataset", index), "__sources__": ()}
        try:
            found = self.read(index)
        except BadSampleError as error:
            detail = str(error).removeprefix(f"{error.reason}: ")  # the error itself would hold on to all it has seen
            return {"__key__": self.key_of(index), **common, ERROR: (error.reason, detail)}
        return None if found is None else {"__key__": found.key, **common, **found.parts}


class TarReader(ShardReader):
    """Samples of a folder of indexed tars.

    Args:
        folder: holds the tars.
        counts: samples of each tar that is read, in order.
        numbers: what the index calls each tar.
        excluded: samples (`TAR/KEY`) that are left out.
    """

    def __init__(
        self, folder: Path, counts: dict[str, int], numbers: dict[str, int], excluded: Container[str] = frozenset()
    ) -> None:
        self.counts = counts
        self._paths = [folder / name for name in counts]
        self._names = list(counts)
        self._numbers = [numbers[name] for name in counts]
        self._starts = [0, *accumulate(counts.values())]
        self._excluded = excluded
        self._keys = _Keys(folder / KEYS_FILE)
        self._files = _Files()

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the tar, and of the sample in it."""
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def key_of(self, index: int) -> str:
        """What the index calls a sample."""
        shard, number = self._place(index)
        return self._keys.find(self._numbers[shard], number) or f"{self._names[shard]}#{number}"

    def read(self, index: int) -> RawParts | None:
        """Read one sample."""
        shard, number = self._place(index)
        path, name = self._paths[shard], self._names[shard]
        data = self._files.read_between(path, Path(f"{path}.idx"), number)
        try:
            found = group_members(split_members(data))
        except ValueError as error:
            raise BadSampleError(UNREADABLE, f"{path}, sample {number}: {error}") from error
        expected = self._keys.find(self._numbers[shard], number)
        if expected not in (None, found.key):
            raise BadSampleError(UNREADABLE, f"{path}: '{found.key}' lies where the index has '{expected}'")
        return None if f"{name}/{found.key}" in self._excluded else found


class TextReader(ShardReader):
    """Lines of an indexed `.jsonl`; a line's number is its key.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = path.with_suffix(".jsonl.idx")
        self.counts = {path.name: max(0, self._index.stat().st_size // 8 - 1)}
        self._files = _Files()

    def key_of(self, index: int) -> str:
        """The number."""
        return str(index)

    def read(self, index: int) -> RawParts:
        """Read one line."""
        return RawParts(str(index), {"json": self._files.read_between(self._path, self._index, index)})


class CachingReader:
    """Keeps the samples of a small folder in memory, as it found them: reading them again each epoch costs more.

    Args:
        reader: what is kept.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._samples: dict[int, dict[str, Any]] = {}

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """A copy, for energon writes into what it gets; what cannot be read is tried again each time."""
        sample = self._samples.get(index)
        if sample is None:
            sample = self._reader[index]
            if sample is None or ERROR in sample:
                return sample
            self._samples[index] = sample
        return dict(sample)


def split_members(data: bytes) -> list[tuple[str, bytes]]:
    """Take the regular files out of a piece of a tar that must be nothing but whole members.

    Links, devices, folders and sparse files are passed over: names and targets are never followed.

    Raises:
        ValueError: a header is broken, or a member does not end where the piece does.
    """
    found = []
    start = 0
    while start < len(data):
        header = data[start : start + _BLOCK]
        size = _plain_size(header)
        if size is None:
            return _split_any(data)
        end = start + _BLOCK + size
        found.append((header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"), data[start + _BLOCK : end]))
        start = end + -size % _BLOCK
    if start != len(data):
        raise ValueError(f"a member ends {start - len(data)} bytes behind its place")
    return found


def _plain_size(header: bytes) -> int | None:
    """Size of the regular file with a short name whose header this is; None for any other or a broken header."""
    if header[156:157] not in _PLAIN or header[345:346] != b"\0":
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    return size if size >= 0 and sum(header) - sum(header[148:156]) + 8 * ord(" ") == checksum else None


def _split_any(data: bytes) -> list[tuple[str, bytes]]:
    """As `split_members`, for members of every kind that python's reader knows."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    body = tar.extractfile(member)
                    found.append((member.name, body.read() if body else b""))
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if end != len(data):  # python's reader ends there without a word
        raise ValueError("a header is broken" if end < len(data) else "a member is cut")
    return found


def group_members(members: Sequence[tuple[str, bytes]]) -> RawParts:
    """Join the files of one sample; names without an ending, and energon's own, are none.

    Raises:
        ValueError: they belong to several samples, or to none.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    for name, body in members:
        split = split_name(name)
        if split is None:
            continue
        if key not in (None, split[0]):
            raise ValueError(f"files of '{key}' and of '{split[0]}' in one place")
        key = split[0]
        parts[split[1]] = body
    if key is None:
        raise ValueError("no file of a sample")
    return RawParts(key, parts)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and ending of a file of a sample, as energon divides them; None for any other file."""
    match = split_name_re.match(name)
    return None if match is None or skip_meta_re.match(name) else (match[1], match[2])


class _Keys:
    """Names of samples from energon's index; an index that is not there, or broken, knows none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._broken = not path.is_file()

    def find(self, shard: int, number: int) -> str | None:
        """Name of a sample by the number of its shard and its number there."""
        if self._broken:
            return None
        try:
            if self._database is None:  # opened where it is read: a forked process has its own
                address = f"{self._path.resolve().as_uri()}?mode=ro&immutable=1"
                self._database = sqlite3.connect(address, uri=True, check_same_thread=False)
            query = "SELECT sample_key FROM samples WHERE tar_file_id = ? AND sample_index = ?"
            row = self._database.execute(query, (shard, number)).fetchone()
        except sqlite3.Error:
            self._broken = True
            return None
        return str(row[0]) if row else None


class _Files:
    """Pieces of files, of which a few stay open; what the disk refuses is tried again, then given up."""

    def __init__(self) -> None:
        self._open: dict[Path, BinaryIO] = {}
        self._failing: set[Path] = set()
        """Files whose last read failed: waiting for each of their samples would take hours."""

    def read_between(self, path: Path, index: Path, number: int) -> bytes:
        """Read sample `number` of a shard by its index of places.

        Raises:
            BadSampleError: `unreadable_shard` or `too_large`.
        """
        start, end = struct.unpack("<QQ", self.read(index, 8 * number, 16))
        if not start <= end < _FARTHEST:
            raise BadSampleError(UNREADABLE, f"{index}: sample {number} ends before it begins, or nowhere")
        if end - start > MAX_SAMPLE_BYTES:
            raise BadSampleError("too_large", f"{path}: sample {number} has {end - start:,} bytes")
        return self.read(path, start, end - start)

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Read a piece of a file (`unreadable_shard`)."""
        waits = () if path in self._failing else _WAITS
        for wait in (*waits, None):
            try:
                data = self._read_once(path, start, size)
                self._failing.discard(path)
                break
            except OSError as error:
                self._close(path)
                if wait is None:
                    self._failing.add(path)
                    raise BadSampleError(UNREADABLE, f"{path} ({error.strerror or error})") from error
                time.sleep(wait)
        if len(data) < size:
            raise BadSampleError(UNREADABLE, f"{path} ends {size - len(data):,} bytes too early")
        return data

    def _read_once(self, path: Path, start: int, size: int) -> bytes:
        file = self._open.pop(path, None) or path.open("rb", buffering=0)
        self._open[path] = file  # the last one used comes last
        while len(self._open) > _MAX_OPEN:
            self._close(next(iter(self._open)))
        return os.pread(file.fileno(), size, start)

    def _close(self, path: Path) -> None:
        file = self._open.pop(path, None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
