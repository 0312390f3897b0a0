"""Writing the index files of a finetuning set: beside, then renamed; what is left out is counted by reason.

An index is JSON lines. Paths in it are relative to the folder it lies in.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from beit3.data.labels import FILE as LABELS
from beit3.data.labels import labels_file
from beit3.errors import BadSampleError, ConfigError, DataMissingError

_NUM_EXAMPLES = 3
_REPORT = ".prepare.json"

Row = dict[str, Any]
"""One line of an index file; docs/finetuning_data.md has the fields."""


@dataclass
class LeftOut:
    """What could not be used: how much by reason, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one thing."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(example.encode(errors="backslashreplace").decode())

    def phrases(self) -> list[str]:
        """`12 missing_image (such as train/7.jpg)`, a phrase a reason."""
        return [
            f"{count:,} {reason} (such as {', '.join(self.examples[reason])})"
            for reason, count in sorted(self.counts.items())
        ]


@dataclass
class Part:
    """One index file: what it holds and what was left out of it."""

    file: str
    published: dict[str, int] = field(default_factory=dict)
    """What its publishers counted, by unit (`images`, `questions`)."""
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What was found usable, by unit."""
    left_out: LeftOut = field(default_factory=LeftOut)
    note: str = ""
    """Why the file could not be written at all."""

    def lines(self) -> list[str]:
        """Say it for a terminal."""
        units = [
            f"{self.counts.get(unit, 0):,} {unit}" + self._compare(unit) for unit in {**self.counts, **self.published}
        ]
        if self.note:
            units = [f"not written, {self.note}"]
        elif self.file != LABELS:
            units.insert(0, f"{self.rows:,} rows" if self.rows else "not written, nothing is usable")
        head = f"  {self.file}: {'; '.join(units)}"
        return [head, *(f"    left out: {phrase}" for phrase in self.left_out.phrases())]

    def _compare(self, unit: str) -> str:
        if unit not in self.published:
            return ""
        number = self.published[unit]
        return " (as published)" if self.counts.get(unit) == number else f" (published: {number:,})"


@dataclass
class IndexReport:
    """What was written for a finetuning set and what was left out."""

    kind: str
    """Name of the set, as `beit3 prepare` takes it."""
    root: str
    out: str
    options: dict[str, Any]
    parts: dict[str, Part]
    """By split."""
    labels: Part | None = None
    """`labels.json`, where the set has classes or answers."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What belongs to no split."""

    def lines(self) -> list[str]:
        """Say it for a terminal."""
        found = [f"{self.out}: {self.kind}"]
        for part in (*self.parts.values(), *([self.labels] if self.labels else [])):
            found += part.lines()
        return [*found, *(f"  left out: {phrase}" for phrase in self.left_out.phrases())]


class IndexWriter:
    """Writes all index files of a set; use it in a `with` block, then read `report`."""

    def __init__(
        self,
        kind: str,
        root: Path,
        out: Path | None,
        files: Mapping[str, str],
        *,
        labels: str = "",
        beside: Sequence[str] = (),
        published: Mapping[str, Mapping[str, int]] | None = None,
        options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Check what can be checked before the work starts.

        Args:
            kind: name of the set.
            root: where its files lie.
            out: folder to write; None is `root`, as in the released code.
            files: file name of each split's index.
            labels: what `labels.json` lists (`answers`); none is written if empty.
            beside: names of further small files of the set; each is given to `set_beside`.
            published: published counts by split (or `labels`) and unit.
            options: what else decides the outcome; kept in the report.
            overwrite: replace the set's files.

        Raises:
            DataMissingError: `root` is no folder.
            ConfigError: a file exists and `overwrite` is not set.
        """
        if not root.is_dir():
            raise DataMissingError(f"{root}: no such folder; give the one that {kind} was unpacked into")
        self.out = root if out is None else out
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is no folder: choose another --out")
        known = published or {}
        parts = {split: Part(name, dict(known.get(split, {}))) for split, name in files.items()}
        self.report = IndexReport(kind, str(root), str(self.out), dict(options or {}), parts)
        if labels:
            self.report.labels = Part(LABELS, dict(known.get("labels", {})), note=f"no {labels}")
        self._beside = dict.fromkeys(beside, b"")
        owner = self._owner_of_labels()
        if labels and owner:
            raise ConfigError(f"{self.out / LABELS} belongs to the indexes of {owner} beside it: choose another --out")
        for name in self._names():
            if (self.out / name).exists() and not overwrite:
                raise ConfigError(
                    f"{self.out / name} exists: use it as it is, choose another --out, or replace it with --overwrite"
                )
        self._unit = labels
        self._names_of_labels: Sequence[str] = ()
        self._open: dict[str, io.BufferedWriter] = {}
        self._made_folder = False

    def __enter__(self) -> IndexWriter:
        """Open a hidden file for each index.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        self._made_folder = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._open = {split: self._partial(part.file).open("wb") for split, part in self.report.parts.items()}
        except OSError as error:
            raise ConfigError(f"{self.out} cannot be written to ({error.strerror}): choose another --out") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the files in their places; or remove all of them after an error."""
        for file in self._open.values():
            file.close()
        try:
            if error is None:
                self._finish()
        finally:
            for name in self._names():
                self._partial(name).unlink(missing_ok=True)
            if self._made_folder and not any(self.out.iterdir()):
                self.out.rmdir()

    def add(self, split: str, row: Row) -> None:
        """Write one row.

        Raises:
            BadSampleError: `not_utf8`, a file name that no text can hold.
        """
        try:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError as error:
            raise BadSampleError("not_utf8") from error
        self._open[split].write(line)
        self.report.parts[split].rows += 1

    def count(self, split: str, unit: str, number: int = 1) -> None:
        """Count what is compared with the published numbers."""
        counts = self.report.parts[split].counts
        counts[unit] = counts.get(unit, 0) + number

    def skip(self, split: str | None, reason: BadSampleError | str, name: str) -> None:
        """Count something left out of a split, or of the set if no split is known, under the reason's name."""
        place = self.report.left_out if split is None else self.report.parts[split].left_out
        if isinstance(reason, str):
            place.add(reason, name)
        else:
            detail = str(reason).removeprefix(reason.reason)
            place.add(reason.reason, name + detail)

    def miss(self, split: str, note: str) -> None:
        """Say why a split's index cannot be written."""
        self.report.parts[split].note = note

    def set_labels(self, names: Sequence[str]) -> None:
        """Give the names for `labels.json`."""
        part = self.report.labels
        assert part is not None
        self._names_of_labels = names
        part.note, part.rows = "", len(names)
        part.counts[self._unit] = len(names)

    def set_beside(self, name: str, content: bytes) -> None:
        """Give the content of a file that lies beside the indexes."""
        assert name in self._beside
        self._beside[name] = content

    def _owner_of_labels(self) -> str:
        """Name of another set in the folder whose indexes need its `labels.json`; empty if there is none."""
        for path in sorted(self.out.glob(f"*{_REPORT}")):
            kind = path.name.removesuffix(_REPORT)
            try:
                if kind != self.report.kind and json.loads(path.read_bytes())["labels"]:
                    return kind
            except (OSError, ValueError, LookupError, TypeError):
                continue  # no report of ours
        return ""

    def _names(self) -> list[str]:
        """Data files of the set."""
        parts = [*self.report.parts.values(), *([self.report.labels] if self.report.labels else [])]
        return [*(part.file for part in parts), *self._beside]

    def _partial(self, name: str) -> Path:
        return self.out / f".{name}.partial"

    def _finish(self) -> None:
        """Rename the files; the report is written last and stands for a whole set."""
        parts = self.report.parts.values()
        if not any(part.rows for part in parts):
            raise self._nothing_usable()
        if self.report.labels is not None:
            try:
                self._partial(LABELS).write_bytes(labels_file(self._names_of_labels)[LABELS])
            except UnicodeEncodeError as error:
                raise ConfigError(f"a name in {LABELS} is not UTF-8 ({error}): rename its folder") from error
        for name, content in self._beside.items():
            self._partial(name).write_bytes(content)
        report = self.out / f"{self.report.kind}{_REPORT}"
        made = self._partial(report.name)
        made.write_text(json.dumps(asdict(self.report), indent=1), "utf-8")
        report.unlink(missing_ok=True)
        for part in (*([self.report.labels] if self.report.labels else []), *parts):
            if part.rows:
                os.replace(self._partial(part.file), self.out / part.file)
            else:  # of an earlier preparation; it would not fit the other files any more
                (self.out / part.file).unlink(missing_ok=True)
        for name in self._beside:
            os.replace(self._partial(name), self.out / name)
        os.replace(made, report)

    def _nothing_usable(self) -> ConfigError | DataMissingError:
        """Say in one line what was wrong with everything."""
        reasons = LeftOut()
        for place in (*(part.left_out for part in self.report.parts.values()), self.report.left_out):
            for reason, count in place.counts.items():
                reasons.examples.setdefault(reason, place.examples[reason][:1])
                reasons.counts[reason] = reasons.counts.get(reason, 0) + count
        why = ", ".join(reasons.phrases()) or "its files are empty"
        kind = DataMissingError if "missing_image" in reasons.counts else ConfigError
        return kind(f"{self.report.kind}: nothing in {self.report.root} is usable: {why}")
