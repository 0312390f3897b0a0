"""Pictures in folders: found by the ends of their names, read ahead by threads."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from beit3.data.images import MAX_FILE_BYTES, decode_image
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import BadSampleError, DataMissingError

T = TypeVar("T")
_THREADS = min(8, os.cpu_count() or 1)


class Picture(NamedTuple):
    """A file as it was found; a changed one is another picture."""

    path: str
    """Below the embedded folder, with forward slashes."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change in nanoseconds."""


class LeftOut(NamedTuple):
    """A picture that could not be read."""

    path: str
    reason: str


def find_pictures(folder: Path) -> tuple[list[Picture], list[LeftOut]]:
    """List the pictures below a folder by path, and what could not be looked at."""
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder")
    found: list[Picture] = []
    left_out: list[LeftOut] = []

    def note(error: OSError) -> None:
        """Remember a folder that cannot be listed."""
        left_out.append(LeftOut(os.path.relpath(error.filename, folder), "unreadable_folder"))

    for place, _, names in os.walk(folder, onerror=note):
        for name in names:
            if suffix_of(name) not in IMAGE_SUFFIXES:
                continue
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            try:
                status = path.stat()
            except OSError:
                left_out.append(LeftOut(relative, "unreadable_file"))
                continue
            if stat.S_ISREG(status.st_mode):
                found.append(Picture(relative, status.st_size, status.st_mtime_ns))
    if not found:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataMissingError(f"{folder} holds no pictures: their names must end in {endings}")
    return sorted(found), left_out


def read_pictures(
    files: Sequence[Path], prepare: Callable[[Image.Image], T], batch_size: int
) -> Iterator[list[tuple[Path, T | BadSampleError]]]:
    """Read pictures batch by batch in their order, while threads read the next batch.

    Args:
        files: pictures.
        prepare: what is kept of an RGB picture; called from several threads.
        batch_size: pictures of a batch.

    Yields:
        Files with what is kept of them, or with the reason why one cannot be read.
    """
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(_THREADS) as pool:

        def begin(batch: Sequence[Path]) -> list[Future[T | BadSampleError]]:
            """Have a batch read by the threads."""
            return [pool.submit(_read, file, prepare) for file in batch]

        coming = begin(batches[0]) if batches else []
        for batch, following in itertools.pairwise([*batches, []]):
            now, coming = coming, begin(following)
            yield [(file, reading.result()) for file, reading in zip(batch, now, strict=True)]


def _read(file: Path, prepare: Callable[[Image.Image], T]) -> T | BadSampleError:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return BadSampleError("too_large", f"more than {MAX_FILE_BYTES // 2**20} MiB")
        return prepare(decode_image(file.read_bytes()))
    except OSError as error:
        return BadSampleError("unreadable_file", error.strerror or str(error))
    except BadSampleError as error:
        return error


def suffix_of(name: str) -> str:
    """What a name ends in, without the dot, in small letters."""
    return os.path.splitext(name)[1].lower().removeprefix(".")


def printable(path: Path | str) -> str:
    """A path that any terminal prints: bytes that are no UTF-8, and control characters, become marks."""
    text = os.fsencode(path).decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
