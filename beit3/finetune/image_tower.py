"""Frozen image towers of any origin behind one face: what probes, LiT and language bridges stand on.

Shapes: B images, H, W height and width in pixels, N patches, D width of the features.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import timm.data
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit3.config import require
from beit3.data.preprocess import Preprocess
from beit3.data.source import find_source
from beit3.errors import ConfigError, DataMissingError
from beit3.model.parts import keep_part
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer

Pooling = Literal["auto", "mean", "class"]
TIMM = "timm:"
_BY_CLASS_TOKEN = ("retrieval", "clip")
"""Tasks of ours whose heads read the class token."""
_SEED = 0
"""Of random weights."""
_MOST_SAID = 200
"""Characters of a library's complaint."""


class ImageTower(nn.Module, ABC):
    """A frozen network from pictures to features: no gradients, always in eval mode.

    Args:
        width: D.
        preprocess: how its pictures are prepared.
        description: what `describe` gives.
    """

    def __init__(self, width: int, preprocess: Preprocess, description: dict[str, Any]) -> None:
        super().__init__()
        self.width = width
        self.preprocess = preprocess
        self._description = description

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """The pooled feature before any classifier, (B, D) float32, of normalised images (B, 3, H, W)."""

    @abstractmethod
    def patches(self, images: Tensor) -> Tensor:
        """The states of the patches behind the final norm, (B, N, D) float32, without class and register tokens.

        A network that widens the pooled feature once more (MobileNet) has fewer features here than `width`.
        """

    def train(self, mode: bool = True) -> ImageTower:
        """Stay in eval mode, whatever is asked."""
        super().train(False)
        return self

    def describe(self) -> dict[str, Any]:
        """Plain data: `load_image_tower(**tower.describe())` gives the same tower."""
        return dict(self._description)

    @functools.cached_property
    def flops(self) -> float:
        """Operations of the forward pass of one picture, counted on a blank one."""
        device = next(self.parameters()).device
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(torch.zeros(1, 3, *self.preprocess.image_size, device=device))
        return float(counter.get_total_flops())


class _MultiwayTower(ImageTower):
    """The vision half of a model of ours."""

    def __init__(
        self, backbone: MultiwayTransformer, preprocess: Preprocess, pooling: Pooling, description: dict[str, Any]
    ) -> None:
        super().__init__(backbone.config.width, preprocess, description)
        self.backbone = backbone
        self._pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        states = self._states(images)
        return states[:, 0] if self._pooling == "class" else states[:, 1:].mean(1)

    def patches(self, images: Tensor) -> Tensor:
        """States of the patches (B, N, D)."""
        return self._states(images)[:, 1:]

    def _states(self, images: Tensor) -> Tensor:
        states: Tensor | None = self.backbone(images).vision
        assert states is not None
        return states.float()


class _TimmTower(ImageTower):
    """A classification backbone of timm."""

    def __init__(self, net: Any, preprocess: Preprocess, pooling: Pooling, description: dict[str, Any]) -> None:
        width = net.head_hidden_size if pooling == "auto" else net.num_features
        super().__init__(width, preprocess, description)
        self.net = net
        self._pooling = pooling
        self._num_prefix_tokens: int = getattr(net, "num_prefix_tokens", 0)
        self._is_channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        if self._pooling == "mean":
            return self.patches(images).mean(1)
        states = self.net.forward_features(images)
        feature: Tensor = states[:, 0] if self._pooling == "class" else self.net.forward_head(states, pre_logits=True)
        return feature.float()

    def patches(self, images: Tensor) -> Tensor:
        """States of the patches (B, N, D)."""
        states: Tensor = self.net.forward_features(images)
        if states.ndim == 4:
            states = states.flatten(1, 2) if self._is_channels_last else states.flatten(2).transpose(1, 2)
        return states[:, self._num_prefix_tokens :].float()


def load_image_tower(source: str | Path, *, pooling: Pooling = "auto", pretrained: bool = True) -> ImageTower:
    """Load a frozen image tower.

    Args:
        source: exchange folder, released `.pth` file or "hf-hub:organisation/name" of ours; or "timm:NAME", any
            classification backbone of timm ("timm:local-dir:FOLDER" and "timm:hf-hub:..." work as timm means them).
        pooling: "mean" of the patches, the "class" token, or "auto": of ours the class token for retrieval and clip
            models and the mean of the patches for all others; of timm's what their own classifier reads.
        pretrained: False gives a tower of timm random weights, always the same ones.

    Returns:
        The tower on the CPU in fp32. Pictures for it are prepared by its `preprocess`; timm's are cut (bicubic).

    Raises:
        DataMissingError: the source does not exist, or timm cannot load it.
        ConfigError: it is damaged, reads no pictures, or has no class token.
    """
    require(pooling in get_args(Pooling), f"pooling is one of {', '.join(get_args(Pooling))}, not {pooling!r}")
    if str(source).startswith(TIMM):
        tower = _load_timm(str(source), pooling, pretrained)
    else:
        require(pretrained, f"{source}: pretrained=False is for towers of timm: give timm:NAME")
        tower = _load_own(source, pooling)
    return tower.requires_grad_(False).eval()


def _load_own(source: str | Path, pooling: Pooling) -> ImageTower:
    place = find_source(source)
    model = load_model(place.path)
    require(model.part != "text", f"{source} is a text tower alone: it reads no pictures")
    if pooling == "auto":
        pooling = getattr(model, "pooling", "class") if model.task in _BY_CLASS_TOKEN else "mean"
    preprocess = place.read_preprocess(model)
    backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
    keep_part(backbone, "vision")
    return _MultiwayTower(backbone, preprocess, pooling, {"source": str(source), "pooling": pooling})


def _load_timm(source: str, pooling: Pooling, pretrained: bool) -> ImageTower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            net = timm.create_model(source.removeprefix(TIMM), pretrained=pretrained, num_classes=0)
        except Exception as error:  # timm and the hub raise many kinds
            said = " ".join(str(error).split())[:_MOST_SAID]
            raise DataMissingError(f"tower '{source}' could not be loaded: check name or folder ({said})") from error
    if not hasattr(net, "forward_head") or not hasattr(net, "head_hidden_size"):
        raise ConfigError(f"tower '{source}' gives no feature before its classifier: choose another network")
    if pooling == "class" and getattr(net, "cls_token", None) is None:
        raise ConfigError(f"tower '{source}' has no class token: choose pooling mean or auto")
    data = timm.data.resolve_model_data_config(net)
    preprocess = Preprocess(
        image_size=tuple(data["input_size"][1:]), resize="crop", mean=tuple(data["mean"]), std=tuple(data["std"])
    )
    description = {"source": source, "pooling": pooling, "pretrained": pretrained}
    return _TimmTower(net, preprocess, pooling, description)
