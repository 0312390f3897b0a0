"""NLVR2: two pictures, one sentence, true or false.

Source: Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs", 2019.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from beit3.data.finetuning.index_writer import IndexReport, IndexWriter, Row
from beit3.data.finetuning.layout import Pictures, find_file, missing_file, progress, take, text_of
from beit3.errors import BadSampleError, DataMissingError

_FOLDERS = ("nlvr2/data", "nlvr/nlvr2/data", "data", "annotations")


class _Part(NamedTuple):
    name: str
    """First part of the identifiers, and the name of the published file."""
    folders: tuple[str, ...]
    published: int


_PARTS = {
    "train": _Part("train", ("images/train", "train"), 86_373),
    "dev": _Part("dev", ("dev", "images/dev"), 6_982),
    "test-P": _Part("test1", ("test1", "images/test1"), 6_967),
}
_LABELS = {"True": 1, "False": 0}


def prepare_nlvr2(
    root: Path, /, *, annotations: Path | None = None, out: Path | None = None, overwrite: bool = False
) -> IndexReport:
    """Write the indexes of NLVR2: nlvr2.{train,dev,test-P}.index.jsonl.

    Needs train.json, dev.json, test1.json of the nlvr repository and the pictures in images/train, dev and test1.
    Indexes of the released code, of the same names, need no preparation: training reads them as they are.

    Args:
        root: folder that holds images/train, dev and test1.
        annotations: folder of the json files, or the clone of the nlvr repository; by default they are looked for in
            ROOT and its folders nlvr2/data, nlvr/nlvr2/data, data and annotations.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is not the published one, or an index exists already.
    """
    opened = IndexWriter(
        "nlvr2",
        root,
        out,
        {split: f"nlvr2.{split}.index.jsonl" for split in _PARTS},
        published={split: {"sentences": part.published} for split, part in _PARTS.items()},
        overwrite=overwrite,
    )
    if annotations is not None and not annotations.is_dir():
        raise DataMissingError(f"{annotations}: no such folder; it must hold train.json, dev.json or test1.json")
    sources = {split: find_file(f"{part.name}.json", root, annotations, _FOLDERS) for split, part in _PARTS.items()}
    if not any(sources.values()):
        raise missing_file("train.json", root, annotations, _FOLDERS)
    with opened as writer:
        pictures = Pictures(root, writer.out)
        seen: set[str] = set()
        for split, source in sources.items():
            if source is None:
                writer.miss(split, f"{_PARTS[split].name}.json was not found")
            else:
                _write_split(writer, pictures, seen, split, source)
    return writer.report


def _write_split(writer: IndexWriter, pictures: Pictures, seen: set[str], split: str, source: Path) -> None:
    lines = source.read_bytes().splitlines()
    for number, line in enumerate(progress(lines, f"nlvr2 {split}"), start=1):
        name = f"line {number}"
        try:
            item = _parse(line)
            name = take(item, "identifier", str)
            row = _row(pictures, _PARTS[split], item, name)
            if name in seen:
                raise BadSampleError("duplicate_id")
            seen.add(name)
            writer.add(split, row)
            writer.count(split, "sentences")
        except BadSampleError as error:
            writer.skip(split, error, name)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("malformed", str(error)) from error


def _row(pictures: Pictures, part: _Part, item: object, identifier: str) -> Row:
    """Build the row of a sentence; `train-10171-0-0` is about `train-10171-0-img0.png` and `-img1.png`."""
    first = identifier.partition("-")[0]
    if first != part.name and first in {other.name for other in _PARTS.values()}:
        raise BadSampleError("wrong_split")
    text = text_of(take(item, "sentence", str), "sentence")
    label = _LABELS.get(str(take(item, "label", object)))
    if label is None:
        raise BadSampleError("unknown_label")
    folders = part.folders
    if isinstance(item, dict) and "directory" in item:
        folders = tuple(f"{folder}/{take(item, 'directory', int)}" for folder in folders)
    folder = pictures.folder(*folders)
    stem = identifier.rpartition("-")[0]
    left, right = folder.find(f"{stem}-img0.png"), folder.find(f"{stem}-img1.png")
    return {"image_path": left, "image2_path": right, "text": text, "label": label, "identifier": identifier}
