"""COCO and Flickr30k captions in Karpathy's splits, for captioning and for retrieval.

Source: Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", 2015
(`dataset_coco.json`, `dataset_flickr30k.json`); `restval` belongs to the training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from beit3.data.finetuning.index_writer import IndexReport, IndexWriter, Row
from beit3.data.finetuning.layout import Pictures, find_file, missing_file, progress, read_json, take, text_of
from beit3.errors import BadSampleError

_FOLDERS = ("annotations", "karpathy", "caption_datasets")
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_COCO = {
    "train": {"images": 113_287, "captions": 566_747},
    "val": {"images": 5_000, "captions": 25_010},
    "test": {"images": 5_000, "captions": 25_010},
}
_FLICKR30K = {
    "train": {"images": 29_000, "captions": 145_000},
    "val": {"images": 1_014, "captions": 5_070},
    "test": {"images": 1_000, "captions": 5_000},
}


@dataclass(frozen=True)
class _Set:
    kind: str
    file: str
    """Published file of captions and splits."""
    index: str
    """First part of the index files' names."""
    published: Mapping[str, Mapping[str, int]]
    picture_of: Callable[[Pictures, object], str]
    rows_of: Callable[[str, str, int, list[str]], list[Row]]
    """Rows from split, picture, id and captions."""
    id_field: str | None
    """Field of the image's id; None numbers the images of a split."""


def prepare_coco_captions(
    root: Path, /, *, annotations: Path | None = None, out: Path | None = None, overwrite: bool = False
) -> IndexReport:
    """Write the indexes of COCO captioning in Karpathy's splits: coco_captioning.{train,val,test}.jsonl.

    Needs dataset_coco.json and the pictures in train2014 and val2014. Indexes of the released code, of the same
    names, need no preparation: training reads them as they are.

    Args:
        root: folder that holds train2014 and val2014, or images with these.
        annotations: dataset_coco.json or its folder; by default it is looked for in ROOT and its folders annotations,
            karpathy and caption_datasets.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken or not the published one, or an index exists already.
    """
    made = _Set("coco-captions", "dataset_coco.json", "coco_captioning", _COCO, _coco_picture, _captioning, "cocoid")
    return _prepare(made, root, annotations, out, overwrite)


def prepare_coco_retrieval(
    root: Path, /, *, annotations: Path | None = None, out: Path | None = None, overwrite: bool = False
) -> IndexReport:
    """Write the indexes of COCO retrieval in Karpathy's splits: coco_retrieval.{train,val,test}.jsonl.

    Needs dataset_coco.json and the pictures in train2014 and val2014. Indexes of the released code, of the same
    names, need no preparation: training reads them as they are.

    Args:
        root: folder that holds train2014 and val2014, or images with these.
        annotations: dataset_coco.json or its folder; by default it is looked for in ROOT and its folders annotations,
            karpathy and caption_datasets.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken or not the published one, or an index exists already.
    """
    made = _Set("coco-retrieval", "dataset_coco.json", "coco_retrieval", _COCO, _coco_picture, _retrieval, None)
    return _prepare(made, root, annotations, out, overwrite)


def prepare_flickr30k(
    root: Path, /, *, annotations: Path | None = None, out: Path | None = None, overwrite: bool = False
) -> IndexReport:
    """Write the indexes of Flickr30k retrieval in Karpathy's splits: flickr30k.{train,val,test}.jsonl.

    Needs dataset_flickr30k.json and the pictures in flickr30k-images (or flickr30k_images, or images). Indexes of the
    released code, of the same names, need no preparation: training reads them as they are.

    Args:
        root: folder that holds flickr30k-images.
        annotations: dataset_flickr30k.json or its folder; by default it is looked for in ROOT and its folders
            annotations, karpathy and caption_datasets.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken or not the published one, or an index exists already.
    """
    made = _Set("flickr30k", "dataset_flickr30k.json", "flickr30k", _FLICKR30K, _flickr_picture, _retrieval, None)
    return _prepare(made, root, annotations, out, overwrite)


def _prepare(made: _Set, root: Path, annotations: Path | None, out: Path | None, overwrite: bool) -> IndexReport:
    files = {split: f"{made.index}.{split}.jsonl" for split in ("train", "val", "test")}
    opened = IndexWriter(made.kind, root, out, files, published=made.published, overwrite=overwrite)
    source = find_file(made.file, root, annotations, _FOLDERS)
    if source is None:
        raise missing_file(made.file, root, annotations, _FOLDERS)
    items = read_json(source, "images")
    with opened as writer:
        pictures = Pictures(root, writer.out)
        seen: set[object] = set()
        for number, item in enumerate(progress(items, made.kind)):
            split: str | None = None
            try:
                split = _split_of(item)
                _add_image(made, writer, pictures, seen, split, item)
            except BadSampleError as error:
                writer.skip(split, error, _name_of(item, number))
    return writer.report


def _add_image(
    made: _Set, writer: IndexWriter, pictures: Pictures, seen: set[object], split: str, item: object
) -> None:
    """Write the rows of one image."""
    name = take(item, "filename", str)
    image_id = (
        writer.report.parts[split].counts.get("images", 0) if made.id_field is None else take(item, made.id_field, int)
    )
    key = name if made.id_field is None else image_id
    if key in seen:  # in this split or another: the same image must not be trained and tested on
        raise BadSampleError("duplicate_id")
    seen.add(key)
    path = made.picture_of(pictures, item)
    captions = []
    for sentence in take(item, "sentences", list):
        try:
            captions.append(text_of(take(sentence, "raw", str), "caption"))
        except BadSampleError as error:
            writer.skip(split, error, name)
    if not captions:
        raise BadSampleError("no_caption")
    for row in made.rows_of(split, path, image_id, captions):
        writer.add(split, row)
    writer.count(split, "images")
    writer.count(split, "captions", len(captions))


def _split_of(item: object) -> str:
    named = take(item, "split", str)
    if named not in _SPLITS:
        raise BadSampleError("unknown_split")
    return _SPLITS[named]


def _captioning(split: str, path: str, image_id: int, captions: list[str]) -> list[Row]:
    """A row a caption to train on; a row an image, with all references, to evaluate on."""
    if split == "train":
        return [{"image_path": path, "text": caption, "image_id": image_id} for caption in captions]
    return [{"image_path": path, "image_id": image_id, "captions": captions}]


def _retrieval(split: str, path: str, image_id: int, captions: list[str]) -> list[Row]:
    """A row a caption; rows of one image share its number."""
    return [{"image_path": path, "text": caption, "image_id": image_id} for caption in captions]


def _coco_picture(pictures: Pictures, item: object) -> str:
    folder = take(item, "filepath", str)
    if folder not in ("train2014", "val2014"):
        raise BadSampleError("malformed", f"filepath '{folder}'")
    return pictures.folder(folder, f"images/{folder}").find(take(item, "filename", str))


def _flickr_picture(pictures: Pictures, item: object) -> str:
    folder = pictures.folder("flickr30k-images", "flickr30k_images", "images")
    return folder.find(take(item, "filename", str))


def _name_of(item: object, number: int) -> str:
    """What an image is called in the report."""
    name = item.get("filename") if isinstance(item, dict) else None
    return str(name) if name else f"image {number}"
