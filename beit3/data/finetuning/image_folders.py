"""Pictures in folders of their classes: ImageNet as people unpack it, and anybody's own.

Classes are numbered in the order of their folders' names, as the released files of ImageNet have it.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from beit3.config import require
from beit3.data.finetuning.index_writer import IndexReport, IndexWriter
from beit3.data.finetuning.layout import Pictures, progress
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import BadSampleError, ConfigError, DataMissingError

_IMAGENET_BASES = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_SOLUTION = "LOC_val_solution.csv"
_VAL_NAMES = ("val", "valid", "validation")
_PUBLISHED = {"train": {"images": 1_281_167}, "val": {"images": 50_000}, "labels": {"classes": 1_000}}


def prepare_imagenet(root: Path, /, *, out: Path | None = None, overwrite: bool = False) -> IndexReport:
    """Write the indexes of ImageNet-1k, imagenet.{train,val}.index.jsonl, and labels.json with readable names.

    Needs train and val with a folder a class (n01440764, ...). Kaggle's layout is read as well: ILSVRC/Data/CLS-LOC
    with all pictures of val in one folder, and their classes in LOC_val_solution.csv. Indexes of the released code, of
    the same names, need no preparation: training reads them as they are.

    Args:
        root: folder that holds train and val.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder, or no pictures in folders of classes.
        ConfigError: an index exists already.
    """
    files = {split: f"imagenet.{split}.index.jsonl" for split in ("train", "val")}
    opened = IndexWriter("imagenet", root, out, files, labels="classes", published=_PUBLISHED, overwrite=overwrite)
    base = next((base for base in _IMAGENET_BASES if any((root / base / split).is_dir() for split in files)), None)
    classes = _class_names(root / base / "train") or _class_names(root / base / "val") if base else []
    if base is None or not classes:
        raise DataMissingError(f"{root} holds no train or val with a folder a class: unpack ImageNet there")
    with opened as writer:
        folders = _Folders(writer, Pictures(root, writer.out), classes)
        for split in files:
            folder = root / base / split
            solution = next((path for path in (root / _SOLUTION, root / base / _SOLUTION) if path.is_file()), None)
            if not folder.is_dir():
                writer.miss(split, f"there is no folder {split}")
            elif split == "val" and solution is not None and not _class_names(folder):
                folders.write_listed(split, PurePath(base, split).as_posix(), solution)
            else:
                folders.write(split, PurePath(base, split).as_posix(), folder)
    return writer.report


def prepare_image_folder(
    root: Path,
    /,
    *,
    out: Path | None = None,
    val_share: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> IndexReport:
    """Write the indexes of any set with a folder a class, image_folder.{train,val,test}.jsonl, and labels.json.

    ROOT holds train (and val, valid or validation, and test) with a folder a class each, or the folders of the classes
    themselves.

    Args:
        root: folder of the set.
        out: folder of the index files; ROOT by default.
        val_share: part of every class's training pictures to validate on, for a set without a val folder.
        seed: which pictures these are; the same on every machine.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder, or no pictures in folders of classes.
        ConfigError: there is a val folder and a share as well, or an index exists already.
    """
    require(0 <= val_share < 1, f"val_share must be at least 0 and below 1, not {val_share}")
    files = {split: f"image_folder.{split}.jsonl" for split in ("train", "val", "test")}
    options = {"val_share": val_share, "seed": seed}
    opened = IndexWriter("image-folder", root, out, files, labels="classes", options=options, overwrite=overwrite)
    places = {"train": "."}
    if _class_names(root / "train"):
        found = {"train": ("train",), "val": _VAL_NAMES, "test": ("test",)}
        places = {split: name for split, names in found.items() for name in names[::-1] if (root / name).is_dir()}
    if "val" in places and val_share:
        raise ConfigError(f"{root / places['val']} is there to validate on: leave --val-share out")
    classes = _class_names(root / places["train"])
    if not classes:
        raise DataMissingError(f"{root} holds no folders of classes, nor train with such folders")
    with opened as writer:
        folders = _Folders(writer, Pictures(root, writer.out), classes)
        for split in files:
            if split in places:
                folders.write(split, places[split], root / places[split], val_share if split == "train" else 0.0, seed)
            elif split == "test" or not val_share:
                writer.miss(split, f"there is no folder {split}" + (" (see --val-share)" if split == "val" else ""))
    return writer.report


def readable_names(folders: Sequence[str]) -> list[str]:
    """Name classes for people: words for ImageNet's synsets (`n01440764`), the folder's name otherwise."""
    if not any(map(_is_synset, folders)):
        return list(folders)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    return [str(info.label_name_to_description(name)) if name in known else name for name in folders]


class _Folders:
    """Writes the rows of one split after the other."""

    def __init__(self, writer: IndexWriter, pictures: Pictures, classes: Sequence[str]) -> None:
        self._writer = writer
        self._pictures = pictures
        self._classes = {name: label for label, name in enumerate(classes)}
        writer.set_labels(readable_names(classes))

    def write(self, split: str, place: str, folder: Path, val_share: float = 0.0, seed: int = 0) -> None:
        """Write the pictures of a folder of classes; a part of each class goes to `val` if asked for."""
        prefix = self._pictures.prefix_of(place)
        found = _class_names(folder)
        for name in progress(found, f"{self._writer.report.kind} {split}"):
            files = self._pictures_of(split, folder, name)
            held_out = draw_held_out(files, val_share, seed)
            for file in files:
                self._add("val" if file in held_out else split, prefix, file, name)
            if not files:
                self._writer.skip(split, "empty_class", name)
        for name in self._classes.keys() - set(found):
            self._writer.skip(split, "empty_class", name)
        for file in sorted(os.listdir(folder)):
            if _is_picture(file) and (folder / file).is_file():
                self._writer.skip(split, "outside_class_folders", file)

    def write_listed(self, split: str, place: str, solution: Path) -> None:
        """Write the pictures of one folder whose classes a table lists, as `ImageId,n01751748 89 99 428 370`."""
        folder = self._pictures.folder(place)
        unlisted = {name for name in folder.names if _is_picture(name)}
        with solution.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = sorted(csv.reader(file))
        for row in progress(rows, f"{self._writer.report.kind} {split}"):
            if len(row) != 2 or row[0] == "ImageId":
                continue
            name, label = f"{row[0]}.JPEG", row[1].partition(" ")[0]
            self._add(split, folder.prefix, name, label, missing=name not in folder.names)
            unlisted.discard(name)
        for name in sorted(unlisted):
            self._writer.skip(split, "image_without_class", name)

    def _add(self, split: str, prefix: str, file: str, name: str, *, missing: bool = False) -> None:
        """Write one row, or count why not."""
        try:
            if missing:
                raise BadSampleError("missing_image")
            if name not in self._classes:
                raise BadSampleError("unknown_class")
            self._writer.add(split, {"image_path": prefix + file, "label": self._classes[name]})
            self._writer.count(split, "images")
        except BadSampleError as error:
            self._writer.skip(split, error, file)

    def _pictures_of(self, split: str, folder: Path, name: str) -> list[str]:
        """List the pictures below the folder of a class, named from the split's folder on."""
        found = []
        for file in _files_below(folder / name):
            if _is_picture(file):
                found.append(f"{name}/{file}")
            else:
                self._writer.skip(split, "not_a_picture", f"{name}/{file}")
        return found


def draw_held_out(files: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Draw a share of files by a hash of their names, so that neither their order nor the machine matters."""
    if not share:
        return frozenset()
    ranked = sorted(files, key=lambda file: hashlib.sha256(f"{seed}:{file}".encode(errors="replace")).digest())
    return frozenset(ranked[: round(len(files) * share)])


def _class_names(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are no classes."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files_below(folder: Path) -> Iterator[str]:
    """Files below a folder, sorted, named from it on; links are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        inner = PurePath(os.path.relpath(place, folder))
        yield from ((inner / name).as_posix() for name in sorted(names))


def _is_picture(name: str) -> bool:
    return PurePath(name).suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _is_synset(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None
