"""What data a position belongs to: facts about every file, and how they differ from those of another day.

A fingerprint is an ordered mapping from a name to facts: `pairs/emoji/shard-00000.tar` to its samples, bytes and
SHA-256. It says what an order depends on; a fact that is not known (None) is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.data.shards import REPORT_FILE, open_reader, read_record

Fingerprint = dict[str, dict[str, Any]]


def fingerprint_folder(folder: Path) -> Fingerprint:
    """Samples and bytes of every shard of a prepared folder that is read, in order, and the SHA-256 where recorded.

    Shards are not read: a change that leaves an old record standing is found by `verify_folder`.
    """
    report = folder / REPORT_FILE
    digests = read_record(report, "sha256", str) if report.is_file() else {}
    return {
        name: {"samples": count, "bytes": (folder / name).stat().st_size, "sha256": digests.get(name)}
        for name, count in open_reader(folder).counts.items()
    }


def fingerprint_files(paths: Sequence[Path]) -> Fingerprint:
    """SHA-256 of files by their names; of equal names the later ones are numbered."""
    found: Fingerprint = {}
    for path in paths:
        name = path.name if path.name not in found else f"{path.name} ({len(found) + 1})"
        found[name] = {"sha256": file_digest(path)}
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_changes(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say how data differ, a phrase for each file: added, removed, edited, or all in another order."""
    removed = [f"{name} removed" for name in old if name not in new]
    added = [f"{name} added" for name in new if name not in old]
    edited = [f"{name} edited ({facts})" for name in old if name in new and (facts := _edits(old[name], new[name]))]
    common, now = [name for name in old if name in new], [name for name in new if name in old]
    moved = [f"{left} stands where {right} did" for left, right in zip(now, common, strict=True) if left != right]
    return removed + added + edited + moved[:1]


def _edits(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The facts that differ, such as `samples 20 -> 21`."""
    known = [name for name in old if old[name] is not None and new.get(name) is not None]
    return ", ".join(
        "other contents" if name == "sha256" else f"{name} {old[name]} -> {new[name]}"
        for name in known
        if old[name] != new[name]
    )


def fingerprint_digest(data: Fingerprint) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
