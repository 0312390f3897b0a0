"""Corpora as people keep them: img2dataset-style tars, folders of pictures, text files. Read once, in order.

In a tar, neighbouring files are one sample if their names agree up to the first dot (with their folders); a sample
whose files are apart is two halves. In a folder of loose files it is the name without its last ending that counts.
Endings are compared in lower case. Links, devices and sparse files are passed over.

Nothing is extracted to disk and names are used as keys only, so a hostile archive has nothing to attack.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import ConfigError, DataMissingError

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest file of an archive that is read; a header may declare any size."""

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_BLOCK = 512
_KEPT = IMAGE_SUFFIXES | {"txt", "json"}


@dataclass
class RawSample:
    """The files of one sample, by ending."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    too_large: bool = False
    num_images: int = 0


@dataclass(frozen=True)
class Damage:
    """An archive that could be read only in part."""

    reason: str
    lost_key: str | None = None
    """A sample that was cut in the middle."""


def find_sources(sources: list[Path]) -> list[Path]:
    """List the archives and the folders of loose files that `sources` name; a folder of tars stands for its tars.

    Raises:
        DataMissingError: a source does not exist, or none is given.
        ConfigError: a file is no tar.
    """
    if not sources:
        raise DataMissingError("no source given: name tars or folders")
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if is_tar(path)) or [source]
        elif not source.exists():
            raise DataMissingError(f"{source}: no such file or folder")
        elif is_tar(source):
            found.append(source)
        else:
            raise ConfigError(f"{source} is neither a folder nor a tar ({', '.join(_TAR_ENDINGS)})")
    return found


def is_tar(path: Path) -> bool:
    """Tell archives by their names."""
    return path.name.endswith(_TAR_ENDINGS) and path.is_file()


def read_source(source: Path) -> Iterator[RawSample | Damage]:
    """Read an archive or a folder of loose files, sample by sample; damage comes last."""
    return _read_tar(source) if source.is_file() else _read_folder(source)


def _read_folder(folder: Path) -> Iterator[RawSample]:
    """Group loose files of one stem; a text without a picture is a sample too, for the count of what is missing."""
    groups: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(folder.rglob("*")):
        ending = path.suffix.lower().lstrip(".")
        if ending in _KEPT and path.is_file():
            groups.setdefault(str(path.relative_to(folder).with_suffix("")), []).append((ending, path))
    for key, files in groups.items():
        too_large = any(path.stat().st_size > MAX_MEMBER_BYTES for _, path in files)
        parts = {} if too_large else {ending: path.read_bytes() for ending, path in files}
        yield RawSample(key, parts, too_large, sum(ending in IMAGE_SUFFIXES for ending, _ in files))


def _read_tar(path: Path) -> Iterator[RawSample | Damage]:
    """Group neighbouring members of one key; keep what lies before a damaged place."""
    current: RawSample | None = None
    endings: set[str] = set()  # of the sample before: tells whether a cut one is whole
    damage: str | None = None
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if packed else raw
            for key, ending, data in _members(file):
                if current is None or current.key != key:
                    if current is not None:
                        endings = set(current.parts)
                        yield current
                    current = RawSample(key)
                current.num_images += ending in IMAGE_SUFFIXES
                if data is None:
                    current.too_large = True
                else:
                    current.parts[ending] = data
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        damage = str(error) or type(error).__name__
    if current is not None and (damage is None or set(current.parts) >= endings):
        yield current
        current = None
    if damage is not None:
        yield Damage(damage, current.key if current else None)


def _members(file: IO[bytes]) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield key, ending and bytes of every file of an archive that belongs to a sample (None: too large).

    Raises:
        tarfile.ReadError: the archive does not end as it should; python's reader would stop without a word.
    """
    with tarfile.open(fileobj=cast("IO[bytes]", _Bounded(file)), mode="r:") as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # else an archive of a million members fills the memory
            folder, _, name = member.name.rpartition("/")
            stem, _, endings = name.partition(".")
            ending = endings.rpartition(".")[2].lower()
            if not member.isreg() or member.issparse() or ending not in _KEPT or not stem:
                continue
            data = None
            if member.size <= MAX_MEMBER_BYTES:
                opened = tar.extractfile(member)
                data = opened.read() if opened else b""
            yield f"{folder}/{stem}" if folder else stem, ending, data
        file.seek(tar.offset)
        end = file.read(_BLOCK)
        if len(end) < _BLOCK or any(end):
            raise tarfile.ReadError("cut short or a broken header" if end else "cut short")
        while rest := file.read(2**20):
            if any(rest):
                raise tarfile.ReadError("an empty header in the middle")


class _Bounded:
    """A file that hands out no more at once than a member may hold: headers for long names may declare any size too."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read a piece."""
        if not 0 <= size <= MAX_MEMBER_BYTES + _BLOCK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def read_documents(source: Path) -> Iterator[tuple[str, object]]:
    """Read a text file line by line, or the field `text` of a jsonl file; yields where each document lies, and it.

    Raises:
        ConfigError: the file is neither.
    """
    if source.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{source} is neither .txt nor .jsonl")
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{source.name}:{number}"
            if source.suffix == ".txt":
                yield where, line
                continue
            try:
                row = json.loads(line) if line.strip() else {"text": ""}
            except (ValueError, RecursionError):
                row = None
            yield where, row.get("text") if isinstance(row, dict) else None
