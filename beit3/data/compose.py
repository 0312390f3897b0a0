"""Pictures with known boxes and masks, made in the run: cut-outs laid on backgrounds, some over others.

What is measured on them says how well such composites are read, and nothing about photographs. Random numbers come from
the global generators of python, numpy and torch.

Shapes: H, W height and width of a scene in pixels, n objects, (h, w) of a cut-out.

Source: Dwibedi et al., "Cut, Paste and Learn", arXiv 1708.01642.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import v2

from beit3.config import config, require, to_plain
from beit3.data.dense_rows import DetectedObject
from beit3.data.emoji import TRAIN_VENDORS, load_cells
from beit3.data.images import FORMATS
from beit3.data.index_files import ClassificationRow, read_index, read_picture
from beit3.data.labels import labels_beside, read_labels
from beit3.data.masks import encode_mask
from beit3.data.randomness import seeded
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import BadSampleError, ConfigError, DataMissingError

_TRIES = 10
"""Places that are drawn for an object until it covers little enough of the others."""
_WHITE = 232
"""Darkest channel of what counts as white paper; JPEG and WebP leave it this uneven."""
T = TypeVar("T")
_OPAQUE = 128
_SCENES_OF_AN_EPOCH = 10_000
_BACKGROUND_SHARE = (0.3, 1.0)
"""Smallest and largest share of a background's area that a scene shows."""


@config
class ComposeConfig:
    """What scenes are made of."""

    size: tuple[int, int] = (256, 256)
    """H, W"""
    cutouts: Path | None = None
    """Folder with a folder for each class, or an index of classification (`*.jsonl` with labels.json beside it), of
    pictures on transparent or white ground. None: the embedded emoji."""
    vendors: tuple[str, ...] = TRAIN_VENDORS
    """Whose emoji."""
    held_out: bool = False
    """The emoji that no training set holds, or the others."""
    classes: Literal["group", "subgroup"] = "group"
    """Classes of emoji: 9 groups or 95 subgroups."""
    backgrounds: Path | None = None
    """Folder of pictures, however deep. None: soft random colours."""
    objects: tuple[int, int] = (1, 6)
    """Fewest and most objects that are laid down."""
    object_size: tuple[float, float] = (0.15, 0.5)
    """Smallest and largest longer side of an object, as a share of the scene's shorter side."""
    max_overlap: float = 0.4
    """Largest share of an object that others cover; 1 allows any, and what is wholly hidden is no object."""

    def __post_init__(self) -> None:
        require(min(self.size) >= 16, f"size must be at least 16 x 16, not {self.size}")
        require(1 <= self.objects[0] <= self.objects[1], f"objects must rise from 1 on, not {self.objects}")
        sizes = self.object_size
        require(0 < sizes[0] <= sizes[1] <= 1, f"object_size must rise within 0..1, not {sizes}")
        require(0 <= self.max_overlap <= 1, f"max_overlap must lie in 0..1, not {self.max_overlap}")


@dataclass(frozen=True, slots=True)
class Scene:
    """A composed picture and what can be seen in it."""

    image: Image.Image
    """RGB, W x H"""
    boxes: NDArray[np.float32]
    """(n, 4): x1, y1, x2, y2 around the visible parts"""
    labels: NDArray[np.int64]
    """(n,)"""
    masks: NDArray[np.uint8]
    """(n, H, W): 1 where the object can be seen"""

    @property
    def label_map(self) -> NDArray[np.uint8]:
        """(H, W): 0 for the background, 1 for the first class."""
        labels = np.zeros(self.image.size[::-1], np.uint8)
        for label, mask in zip(self.labels.tolist(), self.masks, strict=True):
            labels[mask > 0] = label + 1
        return labels

    @property
    def objects(self) -> tuple[DetectedObject, ...]:
        """The same as rows of detection have it, for `DetectionView`."""
        found = []
        for (left, top, right, bottom), label, mask in zip(
            self.boxes.tolist(), self.labels.tolist(), self.masks, strict=True
        ):
            box = (left, top, right - left, bottom - top)
            found.append(DetectedObject(box, label, False, float(mask.sum()), encode_mask(mask)))
        return tuple(found)


class Scenes(Generic[T]):
    """Scenes that are composed when they are asked for, as the examples of a Task.

    Args:
        config: what they are made of.
        view: what a Task sees of a scene.
        num_classes: of the Task.
        first: names of classes before those of the objects.

    Raises:
        ConfigError: scenes have another number of classes.
    """

    def __init__(
        self, config: ComposeConfig, view: Callable[[Scene], T], num_classes: int, first: Sequence[str] = ()
    ) -> None:
        self._compose, self._view = Composer(config), view
        names = [*first, *self._compose.names]
        require(len(names) == num_classes, f"scenes have {len(names)} classes ({', '.join(names)}), not {num_classes}")

    def __len__(self) -> int:
        """As many as count as an epoch."""
        return _SCENES_OF_AN_EPOCH

    def load(self, index: int) -> T:
        """Compose a scene and look at it."""
        return self._view(self._compose())


class Composer:
    """Makes scenes. A class is drawn first and then one of its cut-outs, so that all classes are equally frequent.

    Raises:
        DataMissingError: a folder or file does not exist or holds no pictures.
        ConfigError: unknown vendor.
    """

    def __init__(self, config: ComposeConfig) -> None:
        self.config = config
        cutouts: dict[str, list[Image.Image | Path]]
        if config.cutouts is None:
            cutouts = _emoji(config)
        elif config.cutouts.is_dir():
            cutouts = _folders(config.cutouts)
        else:
            cutouts = _listed(config.cutouts)
        self.names = list(cutouts)
        """Names of the classes in the order of their labels."""
        self._cutouts = [(label, found) for label, found in enumerate(cutouts.values()) if found]
        self._backgrounds = _pictures_below(config.backgrounds) if config.backgrounds else None
        height, width = config.size
        self._crop = v2.RandomResizedCrop(
            (height, width), _BACKGROUND_SHARE, interpolation=v2.InterpolationMode.BICUBIC
        )

    def __call__(self) -> Scene:
        """Compose one scene.

        Raises:
            BadSampleError: a cut-out or a background cannot be used; the detail names it.
        """
        image = self._background()
        masks: list[NDArray[np.bool_]] = []
        labels: list[int] = []
        areas: list[int] = []
        for _ in range(random.randint(*self.config.objects)):
            label, cutout = self._cutout()
            place = self._place(np.asarray(cutout.getchannel("A")) >= _OPAQUE, masks, areas)
            if place is not None:
                left, top, mask = place
                image.paste(cutout, (left, top), cutout)
                masks = [*(other & ~mask for other in masks), mask]
                labels.append(label)
                areas.append(int(mask.sum()))
        return _scene(image, labels, masks)

    def _background(self) -> Image.Image:
        if self._backgrounds is None:
            return soft_colors(*self.config.size)
        view: Image.Image = self._crop(read_picture(random.choice(self._backgrounds)))
        return view

    def _cutout(self) -> tuple[int, Image.Image]:
        """Draw a cut-out, RGBA of random size, without empty borders."""
        label, found = random.choice(self._cutouts)
        source = random.choice(found)
        whole = read_cutout(source) if isinstance(source, Path) else cut_out(source)
        longest = random.uniform(*self.config.object_size) * min(self.config.size)
        scale = longest / max(whole.size)
        width, height = (max(1, round(side * scale)) for side in whole.size)
        return label, whole.resize((width, height), Image.Resampling.BICUBIC)

    def _place(
        self, shape: NDArray[np.bool_], masks: Sequence[NDArray[np.bool_]], areas: Sequence[int]
    ) -> tuple[int, int, NDArray[np.bool_]] | None:
        """Draw a place where an object (h, w) leaves enough of the others: left, top and its mask (H, W)."""
        height, width = self.config.size
        for _ in range(_TRIES):
            top, left = random.randint(0, height - shape.shape[0]), random.randint(0, width - shape.shape[1])
            mask = np.zeros((height, width), dtype=np.bool_)
            mask[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
            shown = (int((other & ~mask).sum()) for other in masks)
            if all(left_of >= (1 - self.config.max_overlap) * area for left_of, area in zip(shown, areas, strict=True)):
                return (left, top, mask) if mask.any() else None
        return None


def _scene(image: Image.Image, labels: Sequence[int], masks: Sequence[NDArray[np.bool_]]) -> Scene:
    """Leave what cannot be seen out, and draw boxes around the rest."""
    seen = [(label, mask) for label, mask in zip(labels, masks, strict=True) if mask.any()]
    boxes = []
    for _, mask in seen:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Scene(
        image,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([label for label, _ in seen], dtype=np.int64),
        np.array([mask for _, mask in seen], dtype=np.uint8).reshape(-1, image.height, image.width),
    )


def read_cutout(path: Path) -> Image.Image:
    """Read a picture on transparent or white ground as RGBA without empty borders.

    Raises:
        BadSampleError: `picture_not_found`, `empty_cutout`, or a reason of `decode_image`; the detail names the file.
    """
    image = read_picture(path)  # checked, and white where it is transparent
    with Image.open(path, formats=FORMATS) as raw:
        whole = ImageOps.exif_transpose(raw).convert("RGBA") if raw.has_transparency_data else None
    if whole is not None and np.asarray(whole.getchannel("A")).min() < _OPAQUE:
        image = whole
    return cut_out(image, str(path))


def cut_out(image: Image.Image, name: str = "a picture") -> Image.Image:
    """Make the ground of an RGB picture transparent: white that hangs together with the border.

    Args:
        image: RGB, or RGBA whose alpha stands as it is.
        name: for the error.

    Returns:
        RGBA without empty borders.

    Raises:
        BadSampleError: `empty_cutout`, nothing else is left.
    """
    if image.mode != "RGBA":
        pixels = np.asarray(image)
        image = Image.fromarray(_off_white(pixels, hangs_together_with_border(pixels.min(axis=2) >= _WHITE)))
    box = Image.fromarray(np.asarray(image.getchannel("A")) >= _OPAQUE).getbbox()
    if box is None:
        raise BadSampleError("empty_cutout", name)
    return image.crop(box)


def _off_white(pixels: NDArray[np.uint8], ground: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Take an object off white ground: uint8 (h, w, 4).

    A pixel beside the ground shows some white, a halo on any other background. It gets the colour of its darkest
    neighbour, and the share of that colour that explains it as opacity.
    """
    padded = np.pad(255 - pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)))
    height, width = ground.shape
    shifts = [(row, column) for row in range(3) for column in range(3)]
    around = np.stack([padded[row : row + height, column : column + width] for row, column in shifts])
    inner = np.take_along_axis(around, around.sum(axis=3, keepdims=True).argmax(axis=0)[None], axis=0)[0]
    beside = np.pad(ground, 1, constant_values=True)
    edge = ~ground & np.stack([beside[row : row + height, column : column + width] for row, column in shifts]).any(
        axis=0
    )
    own = padded[1:-1, 1:-1]
    share = (own * inner).sum(axis=2) / np.maximum((inner * inner).sum(axis=2), 1)
    opacity = np.where(ground, 0, np.where(edge, np.minimum(share, 1), 1))
    color = np.where(edge[..., None], 255 - inner, pixels)
    return np.dstack([color, 255 * opacity]).round().astype(np.uint8)


def hangs_together_with_border(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the parts of a region (h, w) that a way over neighbours (not diagonal) joins to the border."""
    reached = region.copy()
    reached[1:-1, 1:-1] = False
    before = -1
    while (count := int(reached.sum())) != before:
        before = count
        reached = _along_rows(region, reached)
        reached = _along_rows(region.T, reached.T).T
    return reached


def _along_rows(region: NDArray[np.bool_], reached: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Spread from each pixel that was reached over its run of the region in its row."""
    walled = np.pad(region, ((0, 0), (0, 1)))  # no run goes on in the next row
    runs = np.cumsum(~walled.ravel()).reshape(walled.shape)[:, :-1]
    hit = np.zeros(runs[-1, -1] + 1, dtype=np.bool_)
    hit[runs[reached]] = True
    return hit[runs] & region


def soft_colors(height: int, width: int) -> Image.Image:
    """Draw soft patches of random colours with a little noise, RGB."""
    coarse = np.random.randint(0, 256, (random.randint(2, 5), random.randint(2, 5), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = np.random.normal(0, random.uniform(0, 12), (height, width, 1))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def _emoji(settings: ComposeConfig) -> dict[str, list[Image.Image | Path]]:
    """Embedded emoji by class; the classes are those of all concepts, whichever are held out."""
    found: dict[str, list[Image.Image | Path]] = {
        name: [] for name in sorted({getattr(cell, settings.classes) for cell in load_cells(TRAIN_VENDORS[0])})
    }
    for vendor in settings.vendors:
        for cell in load_cells(vendor, heldout=settings.held_out):
            found[getattr(cell, settings.classes)].append(cell.image)
    return found


def _folders(root: Path) -> dict[str, list[Image.Image | Path]]:
    """Pictures by the folder they lie in, which names their class."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found: dict[str, list[Image.Image | Path]] = {name: [*_pictures_below(root / name)] for name in names}
    if not found:
        raise DataMissingError(f"{root} holds no folder for each class of cut-outs")
    return found


def _listed(index: Path) -> dict[str, list[Image.Image | Path]]:
    """Pictures of an index of classification by the names of its labels."""
    labels = labels_beside(index)
    rows = read_index(index, ClassificationRow)
    names = read_labels(labels) if labels else [str(number) for number in range(max(row.label for row in rows) + 1)]
    found: dict[str, list[Image.Image | Path]] = {name: [] for name in names}
    require(len(found) == len(names), f"{labels} names two classes alike: cut-outs need different names")
    for row in rows:
        require(row.label < len(names), f"{index} has label {row.label}, {labels} names {len(names)}")
        found[names[row.label]].append(Path(row.image_path))
    return found


def _pictures_below(folder: Path) -> list[Path]:
    """Pictures of a folder, however deep, by name."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not found:
        raise DataMissingError(f"{folder} holds no pictures")
    return found


def write_composites(folder: Path, config: ComposeConfig, count: int, seed: int, *, split: str = "val") -> Path:
    """Write a fixed set of scenes as a set in COCO's form, for `beit3 prepare coco-detection`.

    Args:
        folder: gets `images/000000.png`, ... and `coco.json`; must not exist or be empty.
        config: what scenes are made of.
        count: how many.
        seed: decides all of them; scene number i does not depend on the others.
        split: field of every image in the json.

    Returns:
        Path of the json file.

    Raises:
        ConfigError: the folder is not empty.
        DataMissingError: a folder of the configuration holds no pictures.
        BadSampleError: a cut-out or a background cannot be used.
    """
    require(count >= 1, f"count must be at least 1, not {count}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another folder")
    composer = Composer(config)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        with seeded(f"composites/{seed}/{number}"):
            scene = composer()
        name = f"images/{number:06d}.png"
        scene.image.save(folder / name)
        height, width = config.size
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width, "split": split})
        for item in scene.objects:
            of_object = {
                "id": len(annotations) + 1,
                "image_id": number + 1,
                "category_id": item.label + 1,
                "iscrowd": 0,
            }
            shape = {"bbox": list(item.box), "area": item.area, "segmentation": item.segmentation}
            annotations.append(of_object | shape)
    content = {
        "info": {"description": "cut-outs composed on backgrounds", "seed": seed, "config": to_plain(config)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(composer.names)],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content), "utf-8")
    return path
