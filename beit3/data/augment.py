"""Training views of finetuning; pictures for evaluation go through `beit3.data.preprocess.Preprocess`.

Shapes: B batch, H, W height and width in pixels. A view is uint8 (3, H, W); the batch is normalised where it lies.

RandAugment of the released multimodal code is timm's under other settings: operations are drawn with replacement, each
is carried out with probability 0.5; magnitude 7 of 10 means a rotation by 21 degrees, a shear by 0.21 and a shift by 7
pixels (whatever the resolution), each either way, and brightness and sharpness times 1.36 (never less than 1); what is
left empty is grey. Both give the same pixels, but for three operations. Rotation and shear turn about points half a
pixel apart (Pillow counts from the edges of pixels, OpenCV from their centres). AutoContrast of the released code
negates an unsigned number: a channel whose darkest value is not 0 turns white; that fault is left out. Random numbers
are other ones, so runs are alike in distribution only.
"""

from __future__ import annotations

from math import inf

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, rand_augment_ops
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from beit3.config import config, require
from beit3.data.preprocess import Preprocess
from beit3.data.transforms import to_tensor
from beit3.errors import ConfigError

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
"""Of the released multimodal RandAugment, by timm's names; the tenth leaves the picture as it is."""
_PROBABILITY = 0.5
_SHIFT = 10
"""Pixels of a shift at magnitude 10."""


@config
class MultimodalViewConfig:
    """Training views of pictures that come with text: VQA, NLVR2, captioning, retrieval."""

    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of a crop before it is resized."""
    flip: float = 0.0
    """Probability of mirroring left and right. The released code takes 0.5, which makes "left" and "right" wrong."""
    rand_augment: int = 0
    """Operations of RandAugment on a view, 0 for none. Released: 2 for VQA and captioning, none otherwise."""
    magnitude: float = 7.0
    """Strength of those operations, 0..10."""

    def __post_init__(self) -> None:
        _check_crop(self.scale, self.ratio, self.flip)
        require(self.rand_augment >= 0, f"rand_augment must not be negative, but is {self.rand_augment}")
        require(0 <= self.magnitude <= 10, f"magnitude must lie in 0..10, not {self.magnitude}")


class MultimodalView:
    """Crop at random and resize (bicubic), perhaps mirror, perhaps RandAugment (beit3, `datasets.py`, `randaug.py`).

    Draws from the generators of torch, numpy and python.
    """

    def __init__(self, config: MultimodalViewConfig, preprocess: Preprocess) -> None:
        """Build the transform.

        Args:
            config: how views vary.
            preprocess: gives size and mean colour.
        """
        crop = v2.RandomResizedCrop(
            preprocess.image_size, config.scale, config.ratio, interpolation=v2.InterpolationMode.BICUBIC
        )
        steps = [crop, v2.RandomHorizontalFlip(config.flip)]
        if config.rand_augment:
            settings = {
                "translate_const": _SHIFT,
                "img_mean": tuple(round(255 * mean) for mean in preprocess.mean),
                "interpolation": Image.Resampling.BILINEAR,
            }
            operations = rand_augment_ops(config.magnitude, _PROBABILITY, settings, list(OPERATIONS))
            steps.append(RandAugment([*operations, _identity], config.rand_augment))
        self._steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        """Draw one view of an RGB picture of any size, uint8 (3, H, W)."""
        for step in self._steps:
            image = step(image)
        return to_tensor(image)


def _identity(image: Image.Image) -> Image.Image:
    return image


@config
class ClassificationViewConfig:
    """Training views of classification; the released settings for ImageNet."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of a crop before it is resized."""
    flip: float = 0.5
    """Probability of mirroring left and right; 0 for writing and digits."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """A policy by timm's name, or None."""
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter. As in timm it acts only where `auto_augment` is None."""
    erase: float = 0.25
    """Probability of erasing a rectangle of the normalised picture (`erase_at_random`)."""

    def __post_init__(self) -> None:
        _check_crop(self.scale, self.ratio, self.flip)
        require(0 <= self.color_jitter <= 1, f"color_jitter must lie in 0..1, not {self.color_jitter}")
        require(0 <= self.erase <= 1, f"erase is a probability, not {self.erase}")
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment)
        except (AssertionError, ValueError) as error:
            raise ConfigError(
                f"auto_augment '{self.auto_augment}' is no policy of timm: write one such as 'rand-m9-mstd0.5-inc1'"
            ) from error


class ClassificationView:
    """timm's training transform for ImageNet up to normalisation, bicubic.

    Draws from the generators of torch, numpy and python.
    """

    def __init__(self, config: ClassificationViewConfig, preprocess: Preprocess) -> None:
        """Build the transform.

        Args:
            config: how views vary.
            preprocess: gives size and mean colour.
        """
        self._transform = create_transform(
            preprocess.image_size,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.flip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            normalize=False,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Draw one view of an RGB picture of any size, uint8 (3, H, W)."""
        view: Tensor = self._transform(image)
        return view.contiguous()


def erase_at_random(images: Tensor, probability: float) -> Tensor:
    """Fill a random rectangle of each picture with noise from a standard normal distribution, in place.

    Belongs between normalisation and mixup. Draws rectangles from python's generator and noise from that of the device.

    Args:
        images: normalised pictures, float (B, 3, H, W) or (3, H, W).
        probability: of erasing, for each picture on its own.

    Returns:
        The same tensor.

    Source: Random Erasing Data Augmentation (1708.04896), timm's mode `pixel`: 2 to 33 % of the area, sides 0.3 to 3.3.
    """
    erased: Tensor = RandomErasing(probability, mode="pixel", device=images.device)(images)
    return erased


def _check_crop(scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
    require(0 < scale[0] <= scale[1] <= 1, f"scale must rise within 0..1, not {scale}")
    require(0 < ratio[0] <= ratio[1] < inf, f"ratio must rise from above 0, not {ratio}")
    require(0 <= flip <= 1, f"flip is a probability, not {flip}")
