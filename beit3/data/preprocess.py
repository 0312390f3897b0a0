"""How a model wants its pictures: the content of `preprocess.json`, and the transform that follows from it.

Shapes: B batch, H, W height and width in pixels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from beit3.config import check_types, config, replace, require, to_plain
from beit3.data.resize import EvalResize, around, crop, inside, letterbox, to_tensor
from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.model.presets import ModelConfig

FILE = "preprocess.json"
MAX_TEXT_LENGTH = 64
"""Longest text of the released models, in ids."""
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LARGEST_SIDE = 8192
_SMALLEST_STD = 1e-3
"""A quarter of a grey level: what divides by less is no statistic of pictures."""


@config
class Preprocess:
    """From a picture of any size to what the model was trained on."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    resize: Literal["squash", "crop", "pad", "slide"] = "squash"
    """`squash` resizes both sides on their own; `crop` fits the shorter side and cuts the ends of the longer one;
    `pad` fits the longer side and fills what is left, on the right or below, with the mean colour; `slide` is for
    segmentation: `whole` fits the shorter side and leaves the longer one, for a window of `image_size` to slide over;
    whoever wants one size gets pictures squashed."""
    interpolation: Literal["bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of each channel, of pixels in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_text_length: int = 0
    """Most ids of a text, `<s>` and `</s>` counted; 0: the model reads no texts."""

    def __post_init__(self) -> None:
        check_types(self, "preprocess")
        sides, longest = self.image_size, self.max_text_length
        require(min(sides) >= 1 and max(sides) <= _LARGEST_SIDE, f"sides must lie in 1..{_LARGEST_SIDE}, not {sides}")
        require(min(self.mean) >= 0 and max(self.mean) <= 1, f"mean must lie in 0..1, not {self.mean}")
        fits = min(self.std) >= _SMALLEST_STD and max(self.std) <= 1
        require(fits, f"std must lie in {_SMALLEST_STD}..1, not {self.std}")
        require(longest == 0 or longest >= 2, f"max_text_length must be 0 or at least 2, not {longest}")

    @classmethod
    def of_task(cls, model: ModelConfig, task: str | None) -> Preprocess:
        """What the released code does: ImageNet's crop and statistics for classification, squashing for all else.

        Detection pads and segmentation slides (there is no released code for them).
        """
        if task == "classification":
            return cls(image_size=model.image_size, resize="crop", mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        if task in ("detection", "segmentation"):
            return cls(image_size=model.image_size, resize="pad" if task == "detection" else "slide")
        return cls(image_size=model.image_size, max_text_length=min(MAX_TEXT_LENGTH, model.max_text_length))

    @classmethod
    def read(cls, folder: Path) -> Preprocess:
        """Read `preprocess.json` of an exchange folder.

        Raises:
            DataMissingError: there is none.
            ConfigError: it is damaged.
        """
        path = folder / FILE
        if not os.path.isfile(path):
            raise DataMissingError(f"{path} does not exist: use load_model for a model without preprocessing")
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            plain: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            return cls(**plain)
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ConfigError(f"{path} is damaged ({error}): write the folder again") from error

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse sizes that a model cannot take.

        Raises:
            ConfigError: the image does not divide into patches, or the model has no positions for such texts.
        """
        height, width = self.image_size
        require(
            height % model.patch_size == 0 and width % model.patch_size == 0,
            f"image_size ({height}, {width}) does not divide into the model's patches of {model.patch_size}",
        )
        require(
            self.max_text_length <= model.max_text_length,
            f"max_text_length is {self.max_text_length}, but the model reads {model.max_text_length} ids",
        )

    def resized(self, image_size: tuple[int, int]) -> Preprocess:
        """The same for another image size."""
        return replace(self, image_size=image_size)

    def file(self) -> dict[str, bytes]:
        """`preprocess.json` by name, as `save_pretrained` takes it."""
        values = to_plain(self)
        values.pop("type")
        return {FILE: (json.dumps(values, indent=2) + "\n").encode()}

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, 0..255: what `pad` fills with."""
        red, green, blue = (round(255 * mean) for mean in self.mean)
        return red, green, blue

    def placed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a whole picture of this height and width takes when it is resized.

        Raises:
            ValueError: `crop` leaves nothing whole.
        """
        if self.resize == "crop":
            raise ValueError("a cropped picture has no place as a whole")
        if self.resize == "squash":
            return self.image_size
        return (inside if self.resize == "pad" else around)(size, self.image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize an RGB picture of any size to uint8 (3, H, W)."""
        height, width = self.image_size
        if self.resize == "pad":
            return to_tensor(letterbox(image, height, width, self.fill))
        if self.resize in ("squash", "slide") or image.size == (width, height):
            return EvalResize(self.image_size)(image)
        return to_tensor(crop(image, height, width))

    def whole(self, image: Image.Image) -> Tensor:
        """Resize an RGB picture to the size that `placed` gives: uint8 (3, h, w)."""
        return EvalResize(self.placed((image.height, image.width)))(image)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Bring pixels (B, 3, H, W), uint8 or float in 0..255, to the model's range; float32."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.float() / (255 * std) - mean / std


def prepare_text(text: object) -> str:
    """Clean a text as in training; one that holds nothing becomes the empty text.

    Raises:
        ConfigError: it is no `str`.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a text must be a str, not {type(text).__name__}")
    try:
        return clean_text(text)
    except BadSampleError:
        return ""
