"""ADE20K's scene parsing benchmark (SceneParse150): pictures with a class of 150 for each pixel.

Source: Zhou et al., "Semantic Understanding of Scenes through the ADE20K Dataset", arXiv 1608.05442.
"""

from __future__ import annotations

from pathlib import Path, PurePath

from beit3.data.finetuning.index_writer import IndexReport, IndexWriter
from beit3.data.finetuning.layout import PictureFolder, Pictures, progress
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import BadSampleError, ConfigError, DataMissingError

_BASES = (".", "ADEChallengeData2016")
_FOLDERS = {"train": "training", "val": "validation"}
_NAMES = "objectInfo150.txt"
_NUM_CLASSES = 150
_PUBLISHED = {"train": {"images": 20_210}, "val": {"images": 2_000}, "labels": {"classes": _NUM_CLASSES}}


def prepare_ade20k(root: Path, /, *, out: Path | None = None, overwrite: bool = False) -> IndexReport:
    """Write the indexes of ADE20K (150 classes), ade20k.{train,val}.jsonl, and labels.json.

    Needs ADEChallengeData2016 as unpacked: images and annotations with training and validation, and objectInfo150.txt
    with the names. Masks stay as published: 0 is everything else and 1 the first class, which the rows say.

    Args:
        root: ADEChallengeData2016, or the folder that holds it.
        out: folder of the index files; ROOT by default.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder, or no picture is there.
        ConfigError: objectInfo150.txt is not the published one, or an index exists already.
    """
    files = {split: f"ade20k.{split}.jsonl" for split in _FOLDERS}
    opened = IndexWriter("ade20k", root, out, files, labels="classes", published=_PUBLISHED, overwrite=overwrite)
    base = next((base for base in _BASES if (root / base / "images").is_dir()), None)
    if base is None:
        raise DataMissingError(f"{root} holds no images with training and validation: unpack ADE20K there")
    with opened as writer:
        pictures = Pictures(root, writer.out)
        for split, folder in _FOLDERS.items():
            images = pictures.folder(PurePath(base, "images", folder).as_posix())
            masks = pictures.folder(PurePath(base, "annotations", folder).as_posix())
            if images.names:
                _write_split(writer, split, images, masks)
            else:
                writer.miss(split, f"there are no pictures in {images.path}")
        writer.set_labels(_read_names(writer, root / base / _NAMES))
    return writer.report


def _write_split(writer: IndexWriter, split: str, images: PictureFolder, masks: PictureFolder) -> None:
    """Pair each picture with the mask of its name."""
    unused = {name for name in masks.names if name.endswith(".png")}
    for name in progress(sorted(images.names), f"ade20k {split}"):
        try:
            if PurePath(name).suffix.lower().lstrip(".") not in IMAGE_SUFFIXES:
                raise BadSampleError("not_a_picture")
            mask = PurePath(name).stem + ".png"
            if mask not in unused:
                raise BadSampleError("missing_mask", str(masks.path / mask))
            unused.discard(mask)
            row = {"image_path": images.prefix + name, "mask_path": masks.prefix + mask, "reduce_zero_label": True}
            writer.add(split, row)
            writer.count(split, "images")
        except BadSampleError as error:
            writer.skip(split, error, name)
    for mask in sorted(unused):
        writer.skip(split, "mask_without_image", mask)


def _read_names(writer: IndexWriter, path: Path) -> list[str]:
    """Names of the classes, as published (`building, edifice`); numbers where the file is absent."""
    if not path.is_file():
        writer.skip(None, "missing_names", f"{path}: labels.json numbers the classes")
        return [f"class {number}" for number in range(1, _NUM_CLASSES + 1)]
    try:
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:] if line.strip()]
        names = {int(row[0]): row[-1].strip() for row in rows}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not the published one ({error}): unpack it again") from error
    if sorted(names) != list(range(1, _NUM_CLASSES + 1)):
        raise ConfigError(f"{path} does not name classes 1 to {_NUM_CLASSES}: unpack it again")
    return [names[number] for number in range(1, _NUM_CLASSES + 1)]
