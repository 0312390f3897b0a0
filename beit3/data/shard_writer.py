"""Writing a folder of prepared data: plain tars with energon's index, a report, and nothing half finished.

Everything goes to a hidden sibling folder that is renamed at the end; a killed run leaves no folder that looks whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.energon import CrudeWebdataset, DefaultCrudeJsonlDatasetFactory
from megatron.energon.epathlib import EPath

from beit3.data.fingerprint import file_digest
from beit3.data.shard_reader import INDEX_FOLDER, KEYS_FILE
from beit3.data.shards import REPORT_FILE, TEXT_FILE
from beit3.errors import BeitError, ConfigError

INDEX_FILES = (KEYS_FILE, f"{INDEX_FOLDER}/.info.json")
"""Beside tars: the names of all samples, and how many each tar has."""
_NUM_EXAMPLES = 3


@dataclass
class PrepareReport:
    """What was written to a folder and what was left out."""

    kind: str
    """`pairs`, `images` or `text`."""
    out: str
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Keys of the first samples left out, by reason."""
    damaged: list[str] = field(default_factory=list)
    """Sources that could be read only in part, with the reason."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every data file, checked before training."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of every data file, its index of places and the `INDEX_FILES`; a saved position holds for these contents alone.
    Folders written by earlier versions have none, or not all."""

    def lines(self) -> list[str]:
        """Say it in a few lines for a terminal."""
        found = [f"{self.out}: {self.samples:,} {self.kind} in {self.shards} shards, {self.bytes / 1e6:.1f} MB"]
        for reason, count in sorted(self.skipped.items()):
            found.append(f"  left out: {count:,} {reason} (such as {', '.join(self.examples[reason])})")
        found += [f"  damaged: {name}" for name in self.damaged]
        return found


class FolderWriter:
    """Writes one prepared folder; use it in a `with` block, then read `report`."""

    def __init__(self, out: Path, kind: str, *, max_per_shard: int = 5000, overwrite: bool = False) -> None:
        """Claim the folder.

        Raises:
            ConfigError: the folder exists and is not empty, and `overwrite` is not set.
        """
        if max_per_shard < 1:
            raise ConfigError(f"max_per_shard must be at least 1, not {max_per_shard}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
            raise ConfigError(f"{out} is not empty: choose another folder or allow overwriting it")
        self.report = PrepareReport(kind, str(out))
        self._out = out
        self._folder = out.parent / f".{out.name}.partial"
        self._max_per_shard = max_per_shard
        self._skipped: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._text: io.BufferedWriter | None = None

    def __enter__(self) -> FolderWriter:
        """Start an empty hidden folder, removing what a killed run left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Index, write the report and rename; or remove everything after an error."""
        try:
            self._close_files()
            if error is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def skip(self, reason: str, key: str) -> None:
        """Count a sample that is left out."""
        self._skipped[reason] += 1
        examples = self.report.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(key)

    def free_key(self, key: str, source: str) -> str | None:
        """Find the key a sample is written under, or None for a second sample of the same name from the same source.

        Energon wants unique keys without dots; a name that another source has used is prefixed with this source's.
        """
        for candidate in (_plain(key), f"{_plain(source)}-{_plain(key)}"):
            owner = f"{candidate}\0{source}"
            if owner in self._keys:
                return None
            if candidate not in self._keys:
                self._keys.update((candidate, owner))
                return candidate
        return None

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """Write one sample as neighbouring files `KEY.ENDING` of the current tar."""
        if self._tar is None or self.report.samples % self._max_per_shard == 0:
            self._close_files()
            name = self._folder / f"shard-{self.report.shards:05d}.tar"
            self._tar = tarfile.open(name, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
            self.report.shards += 1
        for ending, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self.report.samples += 1

    def add_text(self, text: str) -> None:
        """Write one document as a line of the text file."""
        if self._text is None:
            self._text = (self._folder / TEXT_FILE).open("wb")
            self.report.shards = 1
        self._text.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        self.report.samples += 1

    def _close_files(self) -> None:
        for file in (self._tar, self._text):
            if file is not None:
                file.close()
        self._tar = self._text = None

    def _finish(self) -> None:
        """Index the data, write the report, and put the folder in its place."""
        report = self.report
        report.skipped = dict(sorted(self._skipped.items()))
        if report.samples == 0:
            raise BeitError("; ".join(["nothing to write to " + report.lines()[0], *report.lines()[1:]]))
        names = sorted(path.name for path in self._folder.iterdir())
        files = [file for name in names for file in (name, f"{name}.idx")]
        if report.kind == "text":
            DefaultCrudeJsonlDatasetFactory.prepare_dataset(EPath(self._folder / TEXT_FILE))
        else:
            _index_tars(self._folder, names)
            files += INDEX_FILES
        report.files = {name: (self._folder / name).stat().st_size for name in names}
        report.sha256 = {file: file_digest(self._folder / file) for file in files}
        report.bytes = sum(report.files.values())
        (self._folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1), "utf-8")
        old = self._out.parent / f".{self._out.name}.old"
        if self._out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self._out.rename(old)
        self._folder.rename(self._out)
        shutil.rmtree(old, ignore_errors=True)


def _plain(name: str) -> str:
    """Make a name that is one path component without dots."""
    return name.strip("/").replace("/", "-").replace(".", "_")


def _index_tars(folder: Path, names: list[str]) -> None:
    """Write energon's index of the tars, all in one split, and the type under which energon's own tools open them."""
    options: dict[str, Any] = {"split_parts_ratio": [("train", 1.0)], "shuffle_seed": None}
    logging.getLogger("megatron.energon").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        CrudeWebdataset.prepare_dataset(EPath(folder), names, workers=min(8, len(names)), **options)
    kind = "sample_type:\n  __module__: megatron.energon\n  __class__: CrudeWebdataset\n"
    (folder / INDEX_FOLDER / "dataset.yaml").write_text(kind, "utf-8")
