"""Finding the files of a published set where people unpack them, and reading them without trust."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError

T = TypeVar("T")


def find_file(name: str, root: Path, annotations: Path | None, folders: Sequence[str]) -> Path | None:
    """Look for an annotation file below `annotations`, or below `root` if that is not given.

    Args:
        name: the published file name.
        root: folder of the set.
        annotations: what the user named: the file itself or a folder.
        folders: sub-folders where people keep such files; the first hit counts.

    Returns:
        Its path, or None.

    Raises:
        DataMissingError: `annotations` does not exist.
    """
    base = root if annotations is None else annotations
    if annotations is not None and not annotations.exists():
        raise DataMissingError(f"{annotations}: no such file or folder of annotations")
    if base.is_file():
        return base
    paths = (base / folder / name for folder in (".", *folders))
    return next((path for path in paths if path.is_file()), None)


def missing_file(name: str, root: Path, annotations: Path | None, folders: Sequence[str]) -> DataMissingError:
    """The error for an annotation file that was not found."""
    base = root if annotations is None else annotations
    places = f"{base} nor in its {', '.join(f'{folder}/' for folder in folders)}"
    return DataMissingError(f"{name} is neither in {places}: unpack it there or name its place with --annotations")


def read_json(path: Path, name: str) -> list[Any]:
    """Read the list `name` of a JSON object.

    Raises:
        ConfigError: no JSON, or no such list in it.
        DataMissingError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error}): unpack it again") from error
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ConfigError(f"{path} holds no list '{name}': it is not the published file")
    return found


def take(row: object, name: str, kind: type[T]) -> T:
    """Take a field of a JSON object.

    Raises:
        BadSampleError: `malformed`, the row is no object, or the field is absent or of another type.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadSampleError("malformed", f"no {kind.__name__} '{name}'")
    return value


def text_of(value: object, what: str) -> str:
    """Clean a text; what is left empty is counted as `empty_{what}`.

    Raises:
        BadSampleError: `empty_{what}` or `malformed`.
    """
    try:
        return clean_text(value)
    except BadSampleError as error:
        raise BadSampleError(f"empty_{what}" if error.reason == "empty_caption" else "malformed") from error


class PictureFolder:
    """One folder of pictures, listed once."""

    def __init__(self, path: Path, prefix: str) -> None:
        """List the folder; one that does not exist holds nothing.

        Args:
            path: the folder.
            prefix: how an index file names it.
        """
        self.path = path
        self.prefix = prefix
        try:
            self.names = frozenset(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            self.names = frozenset()
        except OSError as error:
            raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error

    def find(self, name: str) -> str:
        """Path of a picture as the index names it.

        Raises:
            BadSampleError: `missing_image`.
        """
        if name not in self.names:
            raise BadSampleError("missing_image", str(self.path / name))
        return self.prefix + name


class Pictures:
    """The pictures of a set, where they lie."""

    def __init__(self, root: Path, out: Path) -> None:
        """Prepare to look.

        Args:
            root: folder of the set.
            out: folder of the index files, which paths are relative to.
        """
        self._root = root
        self._out = out.resolve()
        self._listed: dict[str, PictureFolder] = {}

    def folder(self, *candidates: str) -> PictureFolder:
        """Open the first of these folders that exists below the root; the first one, empty, if none does."""
        key = candidates[0]
        if key not in self._listed:
            chosen = next((name for name in candidates if (self._root / name).is_dir()), key)
            self._listed[key] = PictureFolder(self._root / chosen, self.prefix_of(chosen))
        return self._listed[key]

    def prefix_of(self, folder: str) -> str:
        """How an index file names a folder below the root: relative to the index, with a slash at the end."""
        # Links are resolved above the pictures only: the kernel resolves them before it takes a step up.
        relative = os.path.relpath(self._root.resolve() / folder, self._out)
        return "" if relative == "." else f"{Path(relative).as_posix()}/"


def progress(items: Sequence[T] | Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Go through items behind a progress bar on a terminal; elsewhere in silence."""
    silent = not sys.stderr.isatty()
    yield from track(items, what, total=total, console=Console(stderr=True), disable=silent, transient=True)
