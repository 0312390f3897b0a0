"""Semantic segmentation: the image tower's pyramid under UPerNet or Mask2Former, both of the library transformers.

Shapes: B images, H, W sides in pixels, C channels of the pyramid, K classes, Q queries, (h, w) sides of the finest map.

Sources: UPerNet (arXiv 1807.10221), with BEiT's auxiliary head on the third level; Mask2Former (arXiv 2112.01527).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import require
from beit3.errors import ConfigError
from beit3.model.dense import NUM_LEVELS, DenseModel
from beit3.model.presets import ModelConfig

IGNORED = 255
"""Label of pixels that are neither learned from nor measured."""
SegmentationHead = Literal["upernet", "mask2former"]
_AUXILIARY_WEIGHT = 0.4
_MOST_AUXILIARY = 256
"""Channels of the auxiliary head."""
_MASK2FORMER_UNIT = 32
"""Channels of an attention head, and groups of a group norm, in Mask2Former."""


class SegmentationModel(DenseModel):
    """The image tower with a head that gives every pixel a class.

    Args:
        config: of the transformer.
        num_classes: K, at most 255.
        head: which head reads the pyramid. Training Mask2Former needs scipy.
        pyramid_width: C.
        head_width: channels within the head. UPerNet: 512; Mask2Former: 256 as published, a multiple of 32.
        num_queries: Q, masks that Mask2Former predicts; UPerNet has none.
        num_maps: 4 takes the pyramid from four depths of the tower (BEiT), 1 from the last layer alone (ViTDet).
        window_size: side in patches of the windows that patches see; None: they always see the whole image.
        num_global_layers: layers that see the whole image nevertheless.

    Raises:
        ConfigError: a setting is out of range.
    """

    task = "segmentation"
    head: UPerNet | Mask2Former

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 150,
        head: SegmentationHead = "upernet",
        pyramid_width: int = 256,
        head_width: int = 512,
        num_queries: int = 100,
        num_maps: int = 4,
        window_size: int | None = None,
        num_global_layers: int = 4,
    ) -> None:
        super().__init__(config, pyramid_width, num_maps, window_size, num_global_layers)
        require(1 <= num_classes <= IGNORED, f"num_classes must lie in 1..{IGNORED}, not {num_classes}")
        require(head in get_args(SegmentationHead), f"head must be upernet or mask2former, not '{head}'")
        self._head_options: dict[str, Any] = {"num_classes": num_classes, "head": head, "head_width": head_width}
        if head == "upernet":
            self.head = UPerNet(pyramid_width, num_classes, head_width)
        else:
            self._head_options |= {"num_queries": num_queries}
            self.head = Mask2Former(pyramid_width, num_classes, head_width, num_queries)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return super().head_options | self._head_options

    def forward(self, images: Tensor) -> Tensor:
        """Score the classes of every pixel; the largest score of a pixel names its class.

        Args:
            images: (B, 3, H, W) normalised; H and W divide by P.

        Returns:
            (B, K, H, W) float32. UPerNet: logits. Mask2Former: what its paper adds up, the sum over queries of
            class probability times mask probability; these are no logits. Either may be averaged over overlapping
            windows as it is; over several sizes of a picture average `probabilities`.
        """
        scores: Tensor = self.head(self.maps(images), (images.shape[2], images.shape[3]))
        return scores

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses to train with.

        Every parameter gets a gradient, also where all labels are ignored: several ranks wait for all of them.

        Args:
            images: (B, 3, H, W) normalised; H and W divide by P.
            labels: (B, H, W) int64 in 0..K-1, 255 where ignored.

        Returns:
            `loss`, and its parts as they are added up: `pixel` and `auxiliary` of UPerNet; `class`, `mask` and `dice`
            of Mask2Former, each over all layers of its decoder.

        Raises:
            ConfigError: Mask2Former without scipy.
        """
        parts = self.head.losses(self.maps(images), labels)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def probabilities(self, scores: Tensor) -> Tensor:
        """Turn scores (B, K, H, W) into what may be averaged over sizes of a picture.

        UPerNet: softmax over classes, as mmseg averages. Mask2Former: the scores as they are, as its authors average.
        """
        return self.head.probabilities(scores)


class UPerNet(nn.Module):
    """Pyramid pooling, a feature pyramid, and an auxiliary head on the third level (BEiT's recipe).

    Its batch norms take statistics from the batch: training needs two images at least. They are each rank's own
    unless `torch.nn.SyncBatchNorm` takes their place.

    Args:
        channels: C.
        num_classes: K.
        width: channels within; the auxiliary head has half of them, at most 256 (as in BEiT's and BEiT v2's recipes).
    """

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        library = _library("upernet")
        settings = library.UperNetConfig(
            hidden_size=width,
            auxiliary_channels=max(1, min(_MOST_AUXILIARY, width // 2)),
            num_labels=num_classes,
        )
        self.decode_head: nn.Module = library.UperNetHead(settings, [channels] * NUM_LEVELS)
        self.auxiliary_head: nn.Module = library.UperNetFCNHead(settings, [channels] * NUM_LEVELS)
        _start(library.UperNetPreTrainedModel(settings), self)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):  # model files hold floating point alone; nothing reads this count
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked = norm.num_batches_tracked.float()

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W) of four maps (B, C, h_i, w_i)."""
        return _resize(self.decode_head(maps), size)

    def losses(self, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of both heads, the auxiliary one times 0.4."""
        size = (labels.shape[1], labels.shape[2])
        return {
            "pixel": _cross_entropy(self(maps, size), labels),
            "auxiliary": _AUXILIARY_WEIGHT * _cross_entropy(_resize(self.auxiliary_head(maps), size), labels),
        }

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax over the classes of (B, K, H, W)."""
        return scores.softmax(1)


class Mask2Former(nn.Module):
    """Queries that each predict a mask and its class: deformable pixel decoder, masked attention.

    The widths inside follow from `width` as 1024 and 2048 follow from the published 256. Runs in fp32 under autocast,
    as its authors' pixel decoder does. Ignored pixels lie outside every mask, as in its authors' code. The losses are
    divided by the masks of this rank's images.

    Args:
        channels: C.
        num_classes: K.
        width: channels within.
        num_queries: Q.
    """

    def __init__(self, channels: int, num_classes: int, width: int, num_queries: int) -> None:
        super().__init__()
        require(
            width >= 1 and width % _MASK2FORMER_UNIT == 0,
            f"head_width must be a multiple of {_MASK2FORMER_UNIT} for mask2former, not {width}",
        )
        library = _library("mask2former")
        # The strides that it takes for granted, 4 to 32, are not ours, but stand to each other as ours do: no more
        # is read from them.
        self._settings = library.Mask2FormerConfig(
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            num_attention_heads=width // _MASK2FORMER_UNIT,
            num_queries=num_queries,
            num_labels=num_classes,
        )
        self.pixel_decoder: nn.Module = library.Mask2FormerPixelDecoder(self._settings, [channels] * NUM_LEVELS)
        self.transformer_module: nn.Module = library.Mask2FormerTransformerModule(width, self._settings)
        self.class_predictor = nn.Linear(width, num_classes + 1)
        _start(library.Mask2FormerPreTrainedModel(self._settings), self)

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that weight decay leaves alone, as its authors do: embeddings of queries and levels."""
        queries = {f"transformer_module.{name}.weight" for name in ("queries_embedder", "queries_features")}
        return queries | {"transformer_module.level_embed.weight", "pixel_decoder.level_embed"}

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Semantic inference (section 3.3 of MaskFormer, arXiv 2107.06278): (B, K, H, W) in 0..Q."""
        masks, classes = self._answers(maps)[-1]
        with torch.autocast(masks.device.type, enabled=False):
            return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], _resize(masks, size).sigmoid())

    def losses(self, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Losses of the masks matched to classes, weighted as published and summed over the decoder's layers."""
        try:
            import_module("scipy.optimize")
        except ImportError as error:
            raise ConfigError("training mask2former needs scipy: pip install 'beit3[dense]'") from error
        *inner, (masks, classes) = self._answers(maps)
        shown = [[label for label in image.unique().tolist() if label != IGNORED] for image in labels]
        class_labels = [torch.tensor(label, dtype=torch.int64, device=labels.device) for label in shown]
        mask_labels = [
            (image == label[:, None, None]).float() for image, label in zip(labels, class_labels, strict=True)
        ]
        auxiliary = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in inner]
        settings = self._settings
        criterion = _library("mask2former").Mask2FormerLoss(settings, {}).to(labels.device)
        with torch.autocast(labels.device.type, enabled=False):
            values: dict[str, Tensor] = criterion(masks, classes, mask_labels, class_labels, auxiliary)
        weights = {
            "class": ("loss_cross_entropy", settings.class_weight),
            "mask": ("loss_mask", settings.mask_weight),
            "dice": ("loss_dice", settings.dice_weight),
        }
        return {
            part: weight * torch.stack([value for key, value in values.items() if key.startswith(name)]).sum()
            for part, (name, weight) in weights.items()
        }

    def probabilities(self, scores: Tensor) -> Tensor:
        """The scores (B, K, H, W) themselves."""
        return scores

    def _answers(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits of masks (B, Q, h, w) and of classes, the last of which is none, (B, Q, K + 1), after every layer."""
        dtype = self.class_predictor.weight.dtype
        with torch.autocast(maps[0].device.type, enabled=False):
            pixels = self.pixel_decoder([x.to(dtype) for x in maps])
            out = self.transformer_module(pixels.multi_scale_features, pixels.mask_features, output_hidden_states=True)
            classes = [self.class_predictor(state.transpose(0, 1)) for state in out.intermediate_hidden_states]
        return [(m.float(), c.float()) for m, c in zip(out.masks_queries_logits, classes, strict=True)]


def _library(name: str) -> Any:
    """The module of transformers with the parts of a model: large, and not typed."""
    return import_module(f"transformers.models.{name}.modeling_{name}")


def _start(owner: Any, head: nn.Module) -> None:
    """Give a head random weights as the library draws them for the model class of `owner`."""
    for name, child in head.named_children():
        setattr(owner, name, child)
    owner.post_init()


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate maps (B, K, h, w) to (B, K, H, W), fp32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not ignored; 0 where all are."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
