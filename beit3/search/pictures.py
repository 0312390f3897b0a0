"""Pictures in folders, found by the ends of their names."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import DataMissingError


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


def suffix_of(name: str) -> str:
    """What a name ends in, without the dot, in small letters."""
    return os.path.splitext(name)[1].lower().removeprefix(".")


def printable(path: Path | str) -> str:
    """A path that any terminal prints: bytes that are no UTF-8, and control characters, become marks."""
    text = os.fsencode(path).decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
