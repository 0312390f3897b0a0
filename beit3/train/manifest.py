"""What a checkpoint says of itself: `manifest.json` names every file with its size and SHA-256, and protects itself."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from beit3.errors import ConfigError

T = TypeVar("T")

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of what a checkpoint holds. The names `schema` and `sha256` of a manifest, and its form, never change."""
_FILE = re.compile(r"[A-Za-z0-9_.-]+")
_VERSION: str = sys.modules["beit3"].__version__  # imported already, but this room may not import it
VERSIONS = {"schema": SCHEMA, "torch": str(torch.__version__), "beit3": _VERSION}
"""What makes checkpoints here, as a manifest says it."""


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself: step, world_size, run, data, versions, and size and sha256 of its files.

    Returns:
        None if there is no manifest or it is not, to the bit, as it was written.

    Raises:
        ConfigError: it cannot be read at present, or was written by a newer version of this package, in a form not
            known here.
    """
    try:
        raw = _patiently((path / MANIFEST).read_bytes, path / MANIFEST)
    except OSError:
        return None
    try:
        content: dict[str, Any] = json.loads(raw)
        if raw != serialise({name: value for name, value in content.items() if name != "sha256"}):
            return None
        schema = int(content["schema"])
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    if schema > SCHEMA:
        raise ConfigError(
            f"{path} was written in form {schema} by beit3 {content.get('beit3')}, this version {_VERSION} knows forms "
            f"up to {SCHEMA}: resume with that version"
        )
    return content if _is_complete(content) else None


def damaged_files(path: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Files of a checkpoint that are missing or differ from its manifest (size and SHA-256).

    Args:
        path: a checkpoint.
        rank: only a share of the files is looked at, so that ranks together look at all.
        world_size: number of shares.

    Raises:
        ConfigError: as `read_manifest`.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return [MANIFEST]
    files: dict[str, dict[str, Any]] = manifest["files"]
    names = sorted(files, key=lambda name: (-files[name]["size"], name))[rank::world_size]
    return sorted(name for name in names if not _is_whole(path / name, files[name]))


def serialise(manifest: dict[str, Any]) -> bytes:
    """The one form of a manifest, its own digest included: whatever differs by a bit is damaged."""
    own = {**manifest, "sha256": digest(json.dumps(manifest, sort_keys=True))}
    return (json.dumps(own, indent=1, sort_keys=True) + "\n").encode()


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether a manifest says all it must, of files in its own folder."""
    step, size, files = (manifest.get(name) for name in ("step", "world_size", "files"))
    return (
        isinstance(step, int)
        and isinstance(size, int)
        and size >= 1
        and isinstance(files, dict)
        and all(isinstance(manifest.get(name), str) for name in ("run", "data", "torch", "beit3"))
        and all(_FILE.fullmatch(name) for name in files)
        and all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in files.values())
        and all(f"rank-{rank}.pt" in files for rank in range(size))
    )


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return _patiently(lambda: describe_file(path), path) == entry
    except OSError:
        return False


def _patiently(read: Callable[[], T], path: Path) -> T:
    """Read; storage that fails for a moment is asked again, and is no reason to give up what lies there.

    Raises:
        OSError: nothing of that kind is there.
        ConfigError: it cannot be read.
    """
    for pause in (0.1, 1.0, 3.0, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            if pause is None:
                raise ConfigError(
                    f"{path} cannot be read ({error.strerror or error}): try again, or move {path.parent.name} away to "
                    "go on from the checkpoint before it"
                ) from error
            time.sleep(pause)
    raise AssertionError
