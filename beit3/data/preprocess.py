"""How a model wants its pictures: the content of `preprocess.json`, and the transform that follows from it.

Shapes: B batch, H, W height and width in pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from beit3.config import config, replace, require, to_plain
from beit3.data.transforms import EvalResize, to_tensor
from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import ModelConfig

FILE = "preprocess.json"
MAX_TEXT_LENGTH = 64
"""Longest text of the released models, in ids."""
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BICUBIC = Image.Resampling.BICUBIC


@config
class Preprocess:
    """From a picture of any size to what the model was trained on."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """`squash` resizes both sides on their own; `crop` fits the shorter side and cuts the ends of the longer one."""
    interpolation: Literal["bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of each channel, of pixels in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_text_length: int = 0
    """Most ids of a text, `<s>` and `</s>` counted; 0: the model reads no texts."""

    def __post_init__(self) -> None:
        require(min(self.image_size) >= 1, f"image_size must be positive, not {self.image_size}")
        require(self.resize in ("squash", "crop"), f"resize is squash or crop, not '{self.resize}'")
        require(self.interpolation == "bicubic", f"interpolation is bicubic, not '{self.interpolation}'")
        require(len(self.mean) == len(self.std) == 3, "mean and std have three channels")
        require(min(self.std) > 0, f"std must be positive, not {self.std}")
        require(self.max_text_length >= 0, f"max_text_length must not be negative, but is {self.max_text_length}")

    @classmethod
    def of_task(cls, model: ModelConfig, task: str | None) -> Preprocess:
        """What the released code does: ImageNet's crop and statistics for classification, squashing for all else."""
        if task == "classification":
            return cls(image_size=model.image_size, resize="crop", mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        return cls(image_size=model.image_size, max_text_length=min(MAX_TEXT_LENGTH, model.max_text_length))

    @classmethod
    def read(cls, folder: Path) -> Preprocess:
        """Read `preprocess.json` of an exchange folder.

        Raises:
            DataMissingError: there is none.
            ConfigError: it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise DataMissingError(f"{path} does not exist: use load_model for a model without preprocessing")
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            plain: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            return cls(**plain)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}): write the folder again") from error

    def resized(self, image_size: tuple[int, int]) -> Preprocess:
        """The same for another image size."""
        return replace(self, image_size=image_size)

    def file(self) -> dict[str, bytes]:
        """`preprocess.json` by name, as `save_pretrained` takes it."""
        values = to_plain(self)
        values.pop("type")
        return {FILE: (json.dumps(values, indent=2) + "\n").encode()}

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize an RGB picture of any size to uint8 (3, H, W)."""
        height, width = self.image_size
        if self.resize == "squash" or image.size == (width, height):
            return EvalResize(self.image_size)(image)
        # As torchvision's Resize and CenterCrop round.
        if height * image.width >= width * image.height:
            fitted = image.resize((int(height * image.width / image.height), height), _BICUBIC)
        else:
            fitted = image.resize((width, int(width * image.height / image.width)), _BICUBIC)
        left, top = round((fitted.width - width) / 2), round((fitted.height - height) / 2)
        return to_tensor(fitted.crop((left, top, left + width, top + height)))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Bring pixels (B, 3, H, W), uint8 or float in 0..255, to the model's range; float32."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.float() / (255 * std) - mean / std
