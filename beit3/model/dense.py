"""Dense inputs: the image tower with windowed attention, and a pyramid of maps for detection and segmentation heads.

Shapes: B images, H, W sides in pixels, P patch side, (h, w) = (H / P, W / P), D width, C channels of the pyramid.

Source: ViTDet (arXiv 2203.16527): simple feature pyramid, windows with a few global layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from beit3.config import replace, require
from beit3.model.features import feature_maps
from beit3.model.parts import keep_modality
from beit3.model.presets import ModelConfig
from beit3.model.task_model import TaskModel
from beit3.model.transformer import MultiwayTransformer
from beit3.model.windows import Windows

NUM_LEVELS = 4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map (B, C, h, w); statistics in fp32 under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, h, w)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """Maps at four strides, P / 4, P / 2, P and 2 P, of states at stride P (ViTDet's simple feature pyramid).

    Args:
        width: D.
        channels: C.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)

        def up(source: int, target: int) -> nn.Module:
            """Twice the height and width."""
            return nn.ConvTranspose2d(source, target, kernel_size=2, stride=2)

        resizes = [
            nn.Sequential(up(width, half), ChannelNorm(half), nn.GELU(), up(half, quarter)),
            up(width, half),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                resize,
                nn.Conv2d(source, channels, 1, bias=False),
                ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels),
            )
            for resize, source in zip(resizes, (quarter, half, width, width), strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Turn four maps (B, D, h, w), one for each level, into (B, C, 4 h, 4 w) to (B, C, h / 2, w / 2)."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class DenseModel(TaskModel):
    """The image tower with a pyramid: what detection and segmentation models have in common.

    The tower holds no text parameters and no final norm. Images may have any size that divides by P; positions are
    interpolated to it.

    Args:
        config: of the transformer; other settings of texts than the source's do no harm.
        pyramid_width: C.
        num_maps: 1 gives every level of the pyramid the states of the last layer (ViTDet); 4 gives them those after a
            third, half, two thirds and all of the layers (BEiT's segmentation: layers 4, 6, 8, 12 of 12).
        window_size: side in patches of the windows that patches see; None: they always see the whole image.
        num_global_layers: layers that see the whole image nevertheless, at equal distances.
    """

    def __init__(
        self,
        config: ModelConfig,
        pyramid_width: int,
        num_maps: int,
        window_size: int | None,
        num_global_layers: int,
    ) -> None:
        super().__init__()
        layers = config.num_layers
        require(num_maps in (1, NUM_LEVELS), f"num_maps must be 1 or {NUM_LEVELS}, not {num_maps}")
        self.windows = None if window_size is None else Windows.spread(window_size, layers, num_global_layers)
        taken = (1 / 3, 1 / 2, 2 / 3, 1) if num_maps == NUM_LEVELS else (1,) * NUM_LEVELS
        self._layers = [max(1, round(layers * share)) - 1 for share in taken]
        self._options = {"pyramid_width": pyramid_width, "num_maps": num_maps}
        if window_size is not None:
            self._options |= {"window_size": window_size, "num_global_layers": num_global_layers}
        self.backbone = MultiwayTransformer(replace(config, final_norm=False))
        keep_modality(self.backbone, "vision")
        self.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden
        self.pyramid = FeaturePyramid(config.width, pyramid_width)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return dict(self._options)

    @property
    def strides(self) -> tuple[float, ...]:
        """Pixels between neighbours of each level's map."""
        return tuple(self.backbone.config.patch_size * factor for factor in (0.25, 0.5, 1, 2))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images (B, 3, H, W) into the four maps of the pyramid, (B, C, h_i, w_i), finest first.

        Raises:
            ValueError: H or W does not divide by P.
        """
        asked = sorted(set(self._layers))
        found = dict(zip(asked, feature_maps(self.backbone, images, asked, self.windows), strict=True))
        maps: list[Tensor] = self.pyramid([found[index] for index in self._layers])
        return maps
