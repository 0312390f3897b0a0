"""Detection data in COCO's form: COCO 2017 itself, and any set of one json file, or of one for each split.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312. The numbers of images and of objects
are those of its files of 2017.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from beit3.config import require
from beit3.data.dense_rows import CATEGORIES
from beit3.data.finetuning.image_folders import draw_held_out
from beit3.data.finetuning.index_writer import IndexReport, IndexWriter, Row
from beit3.data.finetuning.layout import Pictures, progress, take, text_of
from beit3.data.images import FORMATS, MAX_PIXELS, MIN_SIDE
from beit3.data.index_files import is_number
from beit3.data.labels import FILE as LABELS
from beit3.data.masks import check_segmentation
from beit3.errors import BadSampleError, ConfigError, DataMissingError

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "test-dev"),
}
"""Names of each split: of folders, in file names, in the field `split` of an image."""
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
_OFFICIAL = {
    "train": "instances_train2017.json",
    "val": "instances_val2017.json",
    "test": "image_info_test-dev2017.json",
}
_PUBLISHED = {
    "train": {"images": 118_287, "objects": 860_001},
    "val": {"images": 5_000, "objects": 36_781},
    "labels": {"classes": 80},
}
_FOLDERS = ("annotations", *(name for names in _SPLITS.values() for name in names))
_ORIENTATION = 0x0112
_ROUNDING = 0.1
"""Pixels by which a box may leave the picture without being counted as cut: COCO's are rounded."""


def prepare_coco_detection(
    root: Path,
    /,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    val_share: float = 0.0,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> IndexReport:
    """Write the indexes of boxes and masks, coco_detection.{train,val,test}.jsonl, labels.json and categories.json.

    Needs instances_train2017.json and instances_val2017.json in annotations, and the pictures in train2017 and val2017
    (and, to test on, image_info_test-dev2017.json with test2017). Any set in the same json form works: one file for
    each split, whose names or folders hold train, val (valid) or test, or one file with all images, of which a field
    `split` may tell the split. Pictures are looked for in a folder of the split's name, in images and beside the json
    file. Their headers are opened: a picture whose size is not that of the json is left out.

    Args:
        root: folder of the set.
        annotations: the json file, or the folder of the json files; by default they are looked for in ROOT, in
            ROOT/annotations and in folders of the splits.
        images: folder of the pictures, if not ROOT.
        val_share: part of the training images to validate on, for a set without others.
        seed: which images these are; the same on every machine.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken, several could be meant, or an index exists already.
    """
    require(0 <= val_share < 1, f"val_share must be at least 0 and below 1, not {val_share}")
    files = _find_files(root, annotations)
    if images is not None and not images.is_dir():
        raise DataMissingError(f"{images}: no such folder of pictures")
    opened = IndexWriter(
        "coco-detection",
        root,
        out,
        {split: f"coco_detection.{split}.jsonl" for split in _SPLITS},
        labels="classes",
        beside=[CATEGORIES],
        published=_PUBLISHED if any(path.name == _OFFICIAL.get(split) for split, path in files.items()) else {},
        options={"val_share": val_share, "seed": seed},
        overwrite=overwrite,
    )
    if not files:
        hint = "nor another json file: name its place with --annotations"
        raise DataMissingError(f"{annotations or root} holds no {_OFFICIAL['train']} {hint}")
    with opened as writer:
        sources = [_Source.read(split, path) for split, path in files.items()]
        _write(writer, sources, images or root, _held_out(sources, val_share, seed))
    return writer.report


def _write(writer: IndexWriter, sources: Sequence[_Source], root: Path, held_out: frozenset[str]) -> None:
    """Write the classes, and the rows of one json file after the other."""
    labels = _write_categories(writer, sources)
    used: set[str] = set()
    for source in sources:
        _Writing(writer, source, _Finder(Pictures(root, writer.out), source, root), labels, held_out, used).write()
    for split, part in writer.report.parts.items():
        if not part.rows and not part.left_out.counts:
            writer.miss(split, f"there are no images of {split}" + (" (see --val-share)" if split == "val" else ""))


def _find_files(root: Path, annotations: Path | None) -> dict[str, Path]:
    """Find the json file of every split; under "" one for all of them."""
    base = root if annotations is None else annotations
    if annotations is not None and not annotations.exists():
        raise DataMissingError(f"{annotations}: no such file or folder of annotations")
    if base.is_file():
        return {_split_of_name(base.stem): base}
    found: dict[str, list[Path]] = {}
    for folder in (".", *_FOLDERS):
        paths = [path for path in sorted((base / folder).glob("*.json")) if _may_be_annotations(path.name)]
        if folder in _SPLIT_OF and len(paths) > 1:
            continue  # a file for each picture: another format
        for path in paths:
            split = _split_of_name(path.stem) or _SPLIT_OF.get(folder, "")
            found.setdefault(split, []).append(path)
    chosen = {split: _only(base, split, found[split]) for split in _SPLITS if split in found}
    return chosen or {split: _only(base, split, paths) for split, paths in found.items()}


def _may_be_annotations(name: str) -> bool:
    """Tell whether a json file may be the set's, and not one that was written here."""
    return not name.startswith(".") and not name.endswith(".prepare.json") and name not in (LABELS, CATEGORIES)


def _split_of_name(stem: str) -> str:
    """The split that the name of a file tells: `instances_train2017`; "" if none."""
    words = re.findall(r"test-dev|[a-z]+", stem.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "")


def _only(base: Path, split: str, paths: Sequence[Path]) -> Path:
    """Choose among files that could be meant: COCO's own, then those of objects; there must be one."""
    official = [path for path in paths if path.name == _OFFICIAL.get(split)]
    chosen = official or [path for path in paths if path.name.startswith("instances_")] or list(paths)
    if len(chosen) > 1:
        names = ", ".join(str(path.relative_to(base)) for path in chosen[:5])
        raise ConfigError(
            f"{base} holds several json files of {split or 'images'} ({names}): put those of one set into a folder of "
            "their own, or name one file, with --annotations"
        )
    return chosen[0]


@dataclass(frozen=True, slots=True)
class _Source:
    """What one json file holds."""

    path: Path
    split: str
    """Of all its images; "" where each tells its own."""
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]

    @classmethod
    def read(cls, split: str, path: Path) -> _Source:
        """Read a file; one of a test may go without annotations."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON ({error}): unpack it again") from error
        content = content if isinstance(content, dict) else {}
        if split == "test":
            content.setdefault("annotations", [])
        for name in ("images", "annotations", "categories"):
            if not isinstance(content.get(name), list):
                raise ConfigError(f"{path} holds no list '{name}': it is not in COCO's form")
        return cls(path, split, content["images"], content["annotations"], content["categories"])

    def split_of(self, image: object) -> str:
        """Split of an image, `train` where nothing tells it (`unknown_split`)."""
        named = image.get("split") if isinstance(image, dict) and not self.split else None
        if named is None:
            return self.split or "train"
        if named not in list(_SPLIT_OF):
            raise BadSampleError("unknown_split", str(named))
        return _SPLIT_OF[named]


def _write_categories(writer: IndexWriter, sources: Sequence[_Source]) -> dict[int, int]:
    """Number the classes in the order of their ids, and write their names; two of one name are told apart by their ids.

    Returns:
        Label of each category id.
    """
    names: dict[int, str] = {}
    for source in sources:
        for number, item in enumerate(source.categories):
            try:
                category, name = take(item, "id", int), text_of(take(item, "name", str), "name")
            except BadSampleError as error:
                writer.skip(None, error, f"category number {number}")
                continue
            known = names.setdefault(category, name)
            require(
                known == name,
                f"{source.path} calls category {category} '{name}', elsewhere it is '{known}': the files do not "
                "belong together, or hold one number twice",
            )
    require(bool(names), f"{sources[0].path} names no categories: without them boxes have no classes")
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    ordered = [(key, f"{name} ({key})" if name in twice else name) for key, name in sorted(names.items())]
    writer.set_labels([name for _, name in ordered])
    if twice and writer.report.labels:
        writer.report.labels.counts["names that two classes have"] = len(twice)
    rows = [{"id": key, "name": name} for key, name in ordered]
    writer.set_beside(CATEGORIES, (json.dumps(rows, ensure_ascii=False, indent=0) + "\n").encode())
    return {key: label for label, (key, _) in enumerate(ordered)}


def _held_out(sources: Sequence[_Source], share: float, seed: int) -> frozenset[str]:
    """Draw the training images to validate on, by their names."""
    if not share:
        return frozenset()
    names: list[str] = []
    for source in sources:
        for image in source.images:
            try:
                split = source.split_of(image)
                names += [take(image, "file_name", str)] if split == "train" else []
            except BadSampleError:
                continue  # counted when it is written
            require(split != "val", f"{source.path} has images to validate on: leave --val-share out")
    return draw_held_out(names, share, seed)


class _Finder:
    """Pictures of a json file, wherever people keep them."""

    def __init__(self, pictures: Pictures, source: _Source, root: Path) -> None:
        year = re.search(r"(train|val|test)(?:-dev)?(\d{4})", source.path.stem)
        named = [*([year[1] + year[2]] if year else []), *_SPLITS.get(source.split, ())]
        folders = [*named, *(f"images/{name}" for name in named), "images", "."]
        if source.path.parent.resolve().is_relative_to(root.resolve()):
            folders.insert(0, source.path.parent.resolve().relative_to(root.resolve()).as_posix())
        self._pictures, self._root, self._folders = pictures, root, folders

    def find(self, file_name: str) -> tuple[str, Path]:
        """Path of a picture as the index names it, and as it can be opened.

        The json's own path counts first, then its last folder and name (Objects365), then the name alone.
        """
        parts = PurePosixPath(file_name.replace("\\", "/")).parts
        if not parts or ".." in parts:
            raise BadSampleError("missing_image", "no path of a picture")
        for tail in dict.fromkeys((parts, parts[-2:], parts[-1:])):
            for base in self._folders if tail[0] != "/" else ():
                folder = self._pictures.folder(PurePosixPath(base, *tail[:-1]).as_posix())
                if tail[-1] in folder.names:
                    return folder.prefix + tail[-1], folder.path / tail[-1]
        raise BadSampleError("missing_image", f"neither in {self._root} nor in its {', '.join(self._folders[:-1])}")


class _Writing:
    """Writes the rows of one json file."""

    def __init__(
        self,
        writer: IndexWriter,
        source: _Source,
        finder: _Finder,
        labels: Mapping[int, int],
        held_out: frozenset[str],
        used: set[str],
    ) -> None:
        self._writer, self._source, self._finder = writer, source, finder
        self._labels, self._held_out, self._used = labels, held_out, used

    def write(self) -> None:
        """Write a row for every usable image; count the others, and objects of images that are not listed."""
        waiting = self._by_image()
        seen: set[int] = set()
        for number, image in enumerate(progress(self._source.images, f"coco-detection {self._source.split}")):
            split, name = self._source.split or None, f"image number {number}"
            try:
                split = self._source.split_of(image)
                name = take(image, "file_name", str)
                split = "val" if split == "train" and name in self._held_out else split
                image_id = take(image, "id", int)
                if image_id in seen:
                    raise BadSampleError("duplicate_id", f"image {image_id}")
                seen.add(image_id)
                self._add(split, image, image_id, name, waiting.get(image_id, []))
            except BadSampleError as error:
                self._writer.skip(split, error, name)
        for image_id in waiting.keys() - seen:
            for _ in waiting[image_id]:
                self._writer.skip(self._source.split or None, "annotation_of_unknown_image", f"image {image_id}")

    def _by_image(self) -> dict[int, list[Any]]:
        """Annotations of each image; of several with one id the first."""
        found: dict[int, list[Any]] = {}
        seen: set[int] = set()
        for number, item in enumerate(self._source.annotations):
            try:
                image_id = take(item, "image_id", int)
                if "id" in item:
                    own = take(item, "id", int)
                    if own in seen:
                        raise BadSampleError("duplicate_annotation", f"annotation {own}")
                    seen.add(own)
                found.setdefault(image_id, []).append(item)
            except BadSampleError as error:
                self._writer.skip(self._source.split or None, error, f"annotation number {number}")
        return found

    def _add(self, split: str, image: Any, image_id: int, name: str, annotations: Sequence[Any]) -> None:
        """Write the row of one image."""
        index_path, place = self._finder.find(name)
        if index_path in self._used:
            raise BadSampleError("duplicate_image", f"image {image_id} is {place} as well")
        height, width = _shown_size(place)
        known = (image.get("height"), image.get("width"))  # some tools write neither
        stated = tuple(own if side is None else side for side, own in zip(known, (height, width), strict=True))
        if stated != (height, width):
            raise BadSampleError("other_size", f"{stated} in the json, {(height, width)} in {place} (height, width)")
        counts: Counter[str] = Counter(images=1, objects=0)
        objects = []
        for item in annotations:
            try:
                objects.append(self._object(split, item, height, width, counts))
            except BadSampleError as error:
                self._writer.skip(split, error, f"annotation {item.get('id')} of {name}")
        row = {"image_path": index_path, "image_id": image_id, "height": height, "width": width, "objects": objects}
        self._writer.add(split, row)
        self._used.add(index_path)
        counts["images without an object"] += not objects
        for unit, number in counts.items():
            if number or unit == "objects":
                self._writer.count(split, unit, number)

    def _object(self, split: str, item: Any, height: int, width: int, counts: Counter[str]) -> Row:
        """One object as it stands in a row."""
        label = self._labels.get(take(item, "category_id", int))
        if label is None:
            raise BadSampleError("unknown_category", f"category {item['category_id']}")
        box = _cut(take(item, "bbox", list), height, width, counts)
        crowd = item.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise BadSampleError("malformed", f"iscrowd is {crowd}")
        area = item.get("area")
        area = area if is_number(area) and area > 0 else box[2] * box[3]
        made: Row = {"bbox": box, "label": label, "iscrowd": int(crowd), "area": area}
        if item.get("segmentation"):
            try:
                made["segmentation"] = check_segmentation(item["segmentation"], height, width)
            except BadSampleError as error:
                self._writer.skip(split, error, f"annotation {item.get('id')}, whose box stays")
        counts["objects"] += 1
        counts["crowd regions"] += int(crowd)
        counts["objects without a mask"] += "segmentation" not in made
        return made


def _cut(box: Sequence[object], height: int, width: int, counts: Counter[str]) -> list[float]:
    """Cut a box x, y, width, height to the picture (`malformed`, `empty_box`); one within it stays as it is."""
    if len(box) != 4 or not all(map(is_number, box)):
        raise BadSampleError("malformed", f"no box: {box}")
    x, y, wide, high = (float(value) for value in box)  # type: ignore[arg-type]
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + wide, width), min(y + high, height)
    if min(wide, high, right - left, bottom - top) <= 0:
        raise BadSampleError("empty_box", f"{list(box)} in a picture of {width} x {height}")
    outside = max(left - x, top - y, x + wide - right, y + high - bottom)
    if outside <= 0:
        return list(box)  # type: ignore[arg-type]
    counts["boxes cut to the picture"] += outside > _ROUNDING
    return [left, top, right - left, bottom - top]


def _shown_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as `decode_image` shows it, EXIF orientation applied, off its header alone.

    Raises:
        BadSampleError: what `decode_image` refuses by the header, under the same names.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            # Without such a chunk Pillow would decode a PNG to look for one at its end.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION, 1) >= 5
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's parsers answer broken bytes with many exception types
        raise BadSampleError("unreadable_image", str(error)) from error
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_many_pixels", f"{width} x {height}")
    if min(width, height) < MIN_SIDE:
        raise BadSampleError("too_small", f"{width} x {height}")
    return (width, height) if turned else (height, width)
