"""NoCaps: captioning pictures with objects that COCO's captions do not name. For evaluation only.

Source: Agrawal et al., "nocaps: novel object captioning at scale", 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from beit3.data.finetuning.index_writer import IndexReport, IndexWriter
from beit3.data.finetuning.layout import Pictures, find_file, missing_file, progress, read_json, take, text_of
from beit3.errors import BadSampleError, DataMissingError

_FOLDERS = ("annotations",)


class _Part(NamedTuple):
    file: str
    list_of_captions: str | None
    folders: tuple[str, ...]
    published: Mapping[str, int]


_PARTS = {
    "val": _Part(
        "nocaps_val_4500_captions.json",
        "annotations",
        ("val", "images/val", "validation", "images/validation", "images"),
        {"images": 4_500, "captions": 45_000},
    ),
    "test": _Part("nocaps_test_image_info.json", None, ("test", "images/test", "images"), {"images": 10_600}),
}


def prepare_nocaps(
    root: Path, /, *, annotations: Path | None = None, out: Path | None = None, overwrite: bool = False
) -> IndexReport:
    """Write the indexes of NoCaps: nocaps.{val,test}.jsonl; captioning models train on COCO (coco-captions).

    Needs nocaps_val_4500_captions.json, nocaps_test_image_info.json and the pictures in val (or validation, as Open
    Images names it) and test. Indexes of the released code, of the same names, need no preparation: they are read as
    they are.

    Args:
        root: folder that holds val and test, or images with these.
        annotations: folder of the json files; by default they are looked for in ROOT and its folder annotations.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken or not the published one, or an index exists already.
    """
    opened = IndexWriter(
        "nocaps",
        root,
        out,
        {split: f"nocaps.{split}.jsonl" for split in _PARTS},
        published={split: part.published for split, part in _PARTS.items()},
        overwrite=overwrite,
    )
    if annotations is not None and not annotations.is_dir():
        raise DataMissingError(f"{annotations}: no such folder of nocaps_*.json files")
    sources = {split: find_file(part.file, root, annotations, _FOLDERS) for split, part in _PARTS.items()}
    if not any(sources.values()):
        raise missing_file(_PARTS["val"].file, root, annotations, _FOLDERS)
    with opened as writer:
        pictures = Pictures(root, writer.out)
        for split, source in sources.items():
            if source is None:
                writer.miss(split, f"{_PARTS[split].file} was not found")
            else:
                _write_split(writer, pictures, split, source)
    return writer.report


def _write_split(writer: IndexWriter, pictures: Pictures, split: str, source: Path) -> None:
    part = _PARTS[split]
    folder = pictures.folder(*part.folders)
    captions = _captions(writer, split, read_json(source, part.list_of_captions)) if part.list_of_captions else None
    seen: set[int] = set()
    for number, item in enumerate(progress(read_json(source, "images"), f"nocaps {split}")):
        name = f"image number {number}"
        try:
            name = take(item, "file_name", str)
            image_id = take(item, "id", int)
            if image_id in seen:
                raise BadSampleError("duplicate_id")
            seen.add(image_id)
            path = folder.find(name)
            references = captions.get(image_id, []) if captions is not None else []
            if captions is not None and not references:
                raise BadSampleError("no_caption")
            writer.add(split, {"image_path": path, "image_id": image_id, "captions": references})
            writer.count(split, "images")
            if captions is not None:
                writer.count(split, "captions", len(references))
        except BadSampleError as error:
            writer.skip(split, error, name)
    for image_id in (captions or {}).keys() - seen:
        writer.skip(split, "caption_without_image", f"image {image_id}")


def _captions(writer: IndexWriter, split: str, items: list[object]) -> dict[int, list[str]]:
    """Reference captions by image."""
    found: dict[int, list[str]] = {}
    for number, item in enumerate(items):
        try:
            text = text_of(take(item, "caption", str), "caption")
            found.setdefault(take(item, "image_id", int), []).append(text)
        except BadSampleError as error:
            writer.skip(split, error, f"caption number {number}")
    return found
