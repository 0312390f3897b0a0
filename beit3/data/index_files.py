"""Index files of downstream data: one JSON object a line, with the field names of the released indexes.

A picture's path is relative to the folder of the index file, or absolute. A text is `text` (a string) or `text_segment`
(token ids without `<s>` and `</s>`, as the released code writes them, or a string). Fields nobody asks for are ignored.

An index holds the bytes of its lines and parses a row when it is asked for. A list of row objects would take several
times the memory, and every data process would end up with a copy of its own: python writes to an object to count who
uses it, and a page that is written to is shared no longer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeGuard, TypeVar, overload

import numpy as np
from PIL import Image

from beit3.data.images import decode_image
from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.metrics.accuracy import nlvr2_parts
from beit3.model.presets import BOS, EOS
from beit3.tokenizer.text import TextTokenizer

Text = str | tuple[int, ...]
"""A cleaned text, or its token ids without `<s>` and `</s>`."""

LEFT_OUT = "left_out"
"""Begins the names of the shares of rows that a figure leaves out."""
_EXAMPLES = 3
"""Places that are named for each reason of leaving rows out."""
_LARGEST = sys.float_info.max
"""Of a float; compared with it, NaN and whole numbers of any length give no error."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row(ABC):
    """One line of an index; each kind of row states what such a line must hold."""

    image_path: str
    """Where the picture lies, as it can be opened."""

    unique: ClassVar[str | None] = None
    """Field that no two rows share; a second row is left out as `duplicate_...`."""

    @classmethod
    @abstractmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row; `BadSampleError` names what is missing or wrong."""


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class ClassificationRow(Row):
    """A picture and its class."""

    label: int

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        return cls(fields.picture("image_path"), fields.label(fields.required("label"), "label"))


@dataclass(frozen=True, slots=True)
class VQARow(Row):
    """A question about a picture, with whatever is known of its answer."""

    qid: int
    text: Text
    labels: tuple[int, ...]
    """Numbers of the right answers; empty where they are unknown or none is in the vocabulary."""
    scores: tuple[float, ...]
    """Soft target of each label, in 0..1."""
    answers: tuple[str, ...]
    """What people answered, as written; empty where unknown."""
    answer_type: str = ""
    """`yes/no`, `number` or `other`, where known."""

    unique: ClassVar[str | None] = "qid"

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        labels = tuple(fields.label(value, "labels") for value in fields.several("labels"))
        scores = tuple(fields.several("scores"))
        if len(scores) != len(labels) or not all(_is_share(score) for score in scores):
            raise BadSampleError("invalid_scores", f"{scores} for labels {labels}")
        qid, answers, kind = fields.integer("qid"), fields.strings("answers"), fields.word("answer_type")
        return cls(fields.picture("image_path"), qid, fields.text("question"), labels, scores, answers, kind)


class VQATrainingRow(VQARow):
    """A question with at least one answer of the vocabulary: nothing else can be learned from."""

    __slots__ = ()

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        row = super().parse(fields)
        if not row.labels:
            raise BadSampleError("no_answer_in_vocabulary", f"question {row.qid}")
        return row


@dataclass(frozen=True, slots=True)
class NLVR2Row(Row):
    """Two pictures and a sentence that is true of them (1) or not (0)."""

    image2_path: str
    text: Text
    label: int
    identifier: str
    """Split, set of pictures, pair and sentence, as published: `test1-0-1-0`."""

    unique: ClassVar[str | None] = "identifier"

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        label, identifier = fields.integer("label"), fields.identifier()
        if label not in (0, 1):
            raise BadSampleError("invalid_label", f"{label} is neither 0 nor 1")
        pictures = fields.picture("image_path"), fields.picture("image2_path")
        return cls(*pictures, fields.text("sentence"), label, identifier)


@dataclass(frozen=True, slots=True)
class CaptioningTrainingRow(Row):
    """A picture and one caption of it."""

    text: Text
    image_id: int

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        return cls(fields.picture("image_path"), fields.text(), fields.integer("image_id"))


@dataclass(frozen=True, slots=True)
class CaptioningRow(Row):
    """A picture to be captioned, with the captions people wrote."""

    image_id: int
    captions: tuple[str, ...]
    """Cleaned, without those of white space alone; empty where they are kept elsewhere or secret."""

    unique: ClassVar[str | None] = "image_id"

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        return cls(fields.picture("image_path"), fields.integer("image_id"), fields.texts("captions"))


@dataclass(frozen=True, slots=True)
class RetrievalRow(Row):
    """A picture and one text of it."""

    text: Text
    image_id: int
    """The same in all rows of a picture, and in no row of another one."""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read a row."""
        picture = fields.picture("image_path")
        return cls(picture, fields.text(), fields.own_id("image_id", picture))


class Fields:
    """Typed access to the fields of one line; whatever does not fit raises `BadSampleError`.

    Args:
        values: the JSON object.
        folder: what relative paths start from.
        checks: what to compare with beyond the row itself; None for lines that have passed.
    """

    def __init__(self, values: dict[str, Any], folder: str, checks: _Checks | None = None) -> None:
        self._values = values
        self._folder = folder
        self._checks = checks

    def required(self, name: str) -> Any:
        """Any value but null (`missing_NAME`)."""
        value = self._values.get(name)
        if value is None:
            raise BadSampleError(f"missing_{name}")
        return value

    def integer(self, name: str) -> int:
        """A whole number (`missing_NAME`, `invalid_NAME`)."""
        value = self.required(name)
        if type(value) is not int:  # a bool is no number here
            raise BadSampleError(f"invalid_{name}", str(value))
        return value

    def label(self, value: Any, name: str) -> int:
        """The number of a class or an answer (`invalid_NAME`, `label_out_of_range`)."""
        if type(value) is not int or value < 0:
            raise BadSampleError(f"invalid_{name}", str(value))
        limit = self._checks.num_labels if self._checks else None
        if limit is not None and value >= limit:
            raise BadSampleError("label_out_of_range", f"{value}, with {limit} labels known")
        return value

    def several(self, name: str) -> list[Any]:
        """A list; absent and null count as empty (`invalid_NAME`)."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, list):
            raise BadSampleError(f"invalid_{name}", "no list")
        return value or []

    def word(self, name: str) -> str:
        """A string; absent and null count as empty (`invalid_NAME`)."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise BadSampleError(f"invalid_{name}", "no string")
        return value or ""

    def flag(self, name: str) -> bool:
        """True or false; absent and null count as false (`invalid_NAME`)."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise BadSampleError(f"invalid_{name}", "neither true nor false")
        return bool(value)

    def has(self, name: str) -> bool:
        """Tell whether a field is there and not null."""
        return self._values.get(name) is not None

    def number(self, name: str) -> float:
        """A finite number (`missing_NAME`, `invalid_NAME`)."""
        value = self.required(name)
        if not is_number(value):
            raise BadSampleError(f"invalid_{name}", str(value))
        return float(value)

    def parts(self, name: str) -> list[Fields]:
        """A list of JSON objects, each with typed access; others are dropped and counted (`invalid_NAME`)."""
        found = []
        for value in self.several(name):
            if isinstance(value, dict):
                found.append(Fields(value, self._folder, self._checks))
            else:
                self.drop(f"invalid_{name}")
        return found

    def drop(self, reason: str) -> None:
        """Count a part that is left out of a row that stays."""
        if self._checks:
            self._checks.dropped.append(reason)

    def identifier(self) -> str:
        """An identifier in NLVR2's form, which tells the sentence (`missing_identifier`, `invalid_identifier`)."""
        value = self.required("identifier")
        try:
            nlvr2_parts(self.word("identifier"))
        except ConfigError as error:
            raise BadSampleError("invalid_identifier", str(error)) from error
        return str(value)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings as they are written (`invalid_NAME`)."""
        values = self.several(name)
        if not all(isinstance(value, str) for value in values):
            raise BadSampleError(f"invalid_{name}", "not all are strings")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, cleaned; empty ones are dropped from the row and counted (`invalid_NAME`)."""
        kept = []
        for value in self.strings(name):
            try:
                kept.append(clean_text(value))
            except BadSampleError as error:
                self.drop(error.reason)
        return tuple(kept)

    def text(self, what: str = "caption") -> Text:
        """The text or its ids (`missing_text`, `empty_WHAT`, `not_text`)."""
        value = self._values.get("text")
        if value is None:
            value = self._values.get("text_segment")
        if value is None:
            raise BadSampleError("missing_text")
        if not isinstance(value, list):
            try:
                return clean_text(value)
            except BadSampleError as error:
                if error.reason != "empty_caption":
                    raise
                raise BadSampleError(f"empty_{what}") from error
        if not value:
            raise BadSampleError(f"empty_{what}")
        if not all(type(index) is int and index >= 0 for index in value):
            raise BadSampleError("not_text", "token ids must be whole numbers from 0 on")
        return tuple(value)

    def picture(self, name: str) -> str:
        """The path of a picture (`missing_NAME`, `invalid_NAME`, `picture_not_found`)."""
        value = self.required(name)
        if not isinstance(value, str) or not value:
            raise BadSampleError(f"invalid_{name}", str(value))
        path = os.path.join(self._folder, value)
        if self._checks and not self._checks.exists(path):
            raise BadSampleError("picture_not_found", path)
        return path

    def own_id(self, name: str, picture: str) -> int:
        """A number that belongs to one picture (`missing_NAME`, `invalid_NAME`, `NAME_of_another_picture`)."""
        value = self.integer(name)
        if self._checks and self._checks.owners.setdefault(value, picture) != picture:
            raise BadSampleError(f"{name}_of_another_picture", f"{value} belongs to {self._checks.owners[value]}")
        return value


class _Checks:
    """What a row is compared with while an index is read."""

    def __init__(self, num_labels: int | None) -> None:
        self.num_labels = num_labels
        self.owners: dict[int, str] = {}
        """Picture of each id."""
        self.dropped: list[str] = []
        """Why parts of the row at hand were left out."""
        self._keys: set[object] = set()
        self._listed: dict[str, set[str]] = {}

    def exists(self, path: str) -> bool:
        """Tell whether a file exists; each folder is listed once, for network disks answer file by file slowly."""
        folder, name = os.path.split(path)
        if folder not in self._listed:
            try:
                self._listed[folder] = set(os.listdir(folder))
            except (OSError, ValueError):
                self._listed[folder] = set()
        return name in self._listed[folder] or os.path.isfile(path)

    def claim(self, row: Row) -> None:
        """Refuse a row whose key was there before (`duplicate_...`)."""
        if row.unique is not None:
            key = getattr(row, row.unique)
            if key in self._keys:
                raise BadSampleError(f"duplicate_{row.unique}", str(key))
            self._keys.add(key)


class Index(Sequence[R], Generic[R]):
    """The usable rows of one or more index files, in their order.

    Args:
        kind: what the rows are.
        paths: the files.
    """

    def __init__(self, kind: type[R], paths: Sequence[Path]) -> None:
        self.skipped: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.dropped: Counter[str] = Counter()
        """Parts left out of rows that stay, by reason: `empty_caption` among the captions of a picture."""
        self.examples: dict[str, list[str]] = {}
        """Where the first of both stand, by reason."""
        self._kind = kind
        self._names = ", ".join(str(path) for path in paths)
        self._folders = [str(path.parent) for path in paths]
        self._lines = b""
        self._ends = np.zeros(0, np.int64)
        self._files = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> list[R]: ...

    def __getitem__(self, index: int | slice) -> R | list[R]:
        """Parse a row, or several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        start = self._ends[number - 1] if number else 0
        line = self._lines[start : self._ends[number]]
        return self._kind.parse(Fields(json.loads(line), self._folders[self._files[number]]))

    def left_out(self) -> dict[str, float]:
        """Share of all rows that was left out, as `left_out/REASON`: what stands beside a figure over the others."""
        total = len(self) + self.skipped.total()
        return {f"{LEFT_OUT}/{reason}": count / total for reason, count in sorted(self.skipped.items())}

    def report(self) -> str:
        """Say in one line how many rows there are and what was left out."""
        text = f"{self._names}: {len(self):,} of {len(self) + self.skipped.total():,} rows"
        for what, counts in (("left out", self.skipped), ("left out of rows that stay", self.dropped)):
            reasons = [
                f"{count:,} {reason} (such as {', '.join(self.examples[reason])})"
                for reason, count in sorted(counts.items())
            ]
            text += f"; {what}: {'; '.join(reasons)}" if reasons else ""
        return text

    def _read(self, paths: Sequence[Path], checks: _Checks) -> None:
        """Keep the lines that are usable, and count the others."""
        lines, ends, files = bytearray(), [], []
        for file_number, path in enumerate(paths):
            with path.open("rb") as file:
                for line_number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    place = f"{path.name}:{line_number}"
                    checks.dropped.clear()
                    try:
                        row = self._kind.parse(Fields(_json_object(line), self._folders[file_number], checks))
                        checks.claim(row)
                    except BadSampleError as error:
                        self._count(self.skipped, error.reason, place)
                        continue
                    for reason in checks.dropped:
                        self._count(self.dropped, reason, place)
                    lines += line
                    ends.append(len(lines))
                    files.append(file_number)
        self._lines, self._ends, self._files = bytes(lines), np.array(ends, np.int64), np.array(files, np.int32)

    def _count(self, counts: Counter[str], reason: str, place: str) -> None:
        counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES and place not in places:
            places.append(place)


def read_index(paths: Path | Sequence[Path], kind: type[R], *, num_labels: int | None = None) -> Index[R]:
    """Read and check index files; what is left out is counted (`Index.skipped`, `dropped`) and logged as a warning.

    Reasons: `malformed_line`, `missing_FIELD`, `invalid_FIELD`, `duplicate_FIELD` (the first row stays),
    `empty_caption`, `empty_question`, `empty_sentence`, `not_text`, `picture_not_found`, `label_out_of_range`,
    `no_answer_in_vocabulary`, `image_id_of_another_picture`.

    Args:
        paths: one `.jsonl` file, or several that are read as one.
        kind: what each row must be.
        num_labels: classes or answers known; labels from there on are refused. None accepts any.

    Raises:
        DataMissingError: a file does not exist, or no row can be used.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    for path in paths:
        if not path.is_file():
            raise DataMissingError(f"index {path} does not exist: prepare the data, or name another index")
    index = Index(kind, paths)
    index._read(paths, _Checks(num_labels))
    if not len(index):
        raise DataMissingError(f"no usable {kind.__name__} in {index.report()}: prepare the data again")
    if index.skipped or index.dropped:
        logger.warning(index.report())
    return index


def read_picture(path: str | Path) -> Image.Image:
    """Decode a picture that a row names, to RGB.

    Raises:
        BadSampleError: `picture_not_found`, or a reason of `decode_image`; the detail names the file.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise BadSampleError("picture_not_found", f"{path} ({error})") from error
    try:
        return decode_image(data)
    except BadSampleError as error:
        raise BadSampleError(error.reason, f"{path} ({error})") from error


def encode_text(text: Text, tokenizer: TextTokenizer, max_length: int) -> list[int]:
    """Turn the text of a row into `<s>` ids `</s>`; what does not fit is cut before `</s>`.

    Args:
        text: a string, or ids of the same tokenizer.
        tokenizer: encodes strings.
        max_length: most ids, at least 2.

    Raises:
        BadSampleError: `token_out_of_range`, an id that the tokenizer does not know.
    """
    if isinstance(text, str):
        return tokenizer.encode(text, max_length)
    if max(text) >= len(tokenizer):
        raise BadSampleError("token_out_of_range", f"{max(text)}, with {len(tokenizer)} tokens known")
    return [BOS, *text[: max_length - 2], EOS]


def _json_object(line: bytes) -> dict[str, Any]:
    """Parse one line (`malformed_line`)."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("malformed_line", str(error)) from error
    if not isinstance(values, dict):
        raise BadSampleError("malformed_line", "no JSON object")
    return values


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a finite number that a float holds; a bool is none."""
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _is_share(value: object) -> bool:
    """Tell whether a value is a number in 0..1."""
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]
