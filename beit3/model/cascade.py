"""The parts of a detector behind the pyramid: anchors and pooling at exact strides, and a cascade of RoI heads.

Shapes: B images, C channels of the pyramid, K classes, R boxes of all images, m boxes of one image, (H, W) canvas.

Anchors, proposals, matching, sampling, coding and losses are torchvision's. Ours are the cascade and the exact strides.
Labels are torchvision's here: 0 is the background, classes are 1..K. Boxes are x1, y1, x2, y2 in pixels of the canvas,
and fp32 under autocast or with weights of another type too.

Importing this file imports torchvision: do it where a detector is built.

Sources: Mask R-CNN (arXiv 1703.06870); Cascade R-CNN (arXiv 1712.00726, 1906.09756); ViTDet (arXiv 2203.16527) for
the depth of the heads and their LayerNorms; detectron2 where the papers leave something open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image, remove_small_boxes
from torchvision.ops.poolers import initLevelMapper

from beit3.model.dense import ChannelNorm

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
"""Least overlap with an object that makes a box one, stage by stage."""
MIN_SIDE = 1e-2
"""Pixels; a box with a smaller side is empty (torchvision's limit for detections)."""
_CODER_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_ANCHOR_STRIDES = 8
_RATIOS = (0.5, 1.0, 2.0)
_CANONICAL_PATCHES = 14
"""A box of 14 x 14 patches is pooled from the map with a place for each patch: 224 pixels at stride 16 (FPN, eq. 1)."""
_BEFORE_NMS = {"training": 2000, "testing": 1000}
_AFTER_NMS = {"training": 1000, "testing": 1000}
_BOX_SIDE, _MASK_SIDE = 7, 14
Size = tuple[int, int]


class PyramidAnchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Three anchors a place, of 8 strides, at exact strides.

    torchvision's own divides the canvas by the grid in whole numbers: wrong where a grid was rounded up, as that of
    the coarsest map is for an odd number of patches, and where a stride is not whole (patches of 14 pixels).
    """

    def __init__(self, strides: Sequence[float]) -> None:
        super().__init__(tuple((_ANCHOR_STRIDES * stride,) for stride in strides), (_RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """(places x 3, 4) fp32 anchors of all maps, the same for each image."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [x.shape[-2:] for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class PyramidAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """RoIAlign from maps named "0", "1", ... at known strides; torchvision's own guesses them from the first canvas."""

    def __init__(self, strides: Sequence[float], output_size: int) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size, sampling_ratio=2)
        self.scales = [1 / stride for stride in strides]
        # FPN's levels 2, 3, 4 and 5, of which 4 has a place for each patch.
        scale = round(_CANONICAL_PATCHES * strides[2])
        self.map_levels = initLevelMapper(2, 1 + len(strides), canonical_scale=scale, canonical_level=4)

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[Size]) -> Tensor:
        """Pool (R, C, side, side), of the type of the maps; the work is done in fp32, as that of boxes must be."""
        maps = {name: x[name].float() for name in self.featmap_names}
        pooled: Tensor = super().forward(maps, boxes, image_shapes)
        return pooled.to(x["0"].dtype)


class _RPNHead(RPNHead):  # type: ignore[misc]  # torchvision has no types
    """RPN's head with fp32 outputs: boxes are decoded in their type."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class RefiningHeads(RoIHeads):  # type: ignore[misc]  # torchvision has no types
    """A later stage: it trains on all boxes of the stage before, matched anew; nothing is added or sampled.

    Boxes that clipping left empty stay, as background: scores of all stages belong to the same rows.
    """

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        """Add nothing."""
        return list(proposals)

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Take all."""
        return [torch.arange(len(x), device=x.device) for x in labels]


def region_proposals(strides: Sequence[float], channels: int) -> Any:
    """An RPN with two convolutions; thresholds and counts are torchvision's, but for 1,000 proposals in training too.

    Args:
        strides: pixels between neighbours of each map.
        channels: C.
    """
    head = _RPNHead(channels, len(_RATIOS), conv_depth=2)
    return RegionProposalNetwork(PyramidAnchors(strides), head, 0.7, 0.3, 256, 0.5, _BEFORE_NMS, _AFTER_NMS, 0.7)


class CascadeHeads(nn.Module):
    """Box heads one behind the other, each on the boxes of the one before, and a mask head. One stage: Mask R-CNN.

    Training: the first stage samples proposals and objects as torchvision does. The later ones (`RefiningHeads`) take
    all of its boxes, refined and matched at a higher overlap. The gradient of each stage with respect to the maps is
    divided by the number of stages, that of its own weights is not (detectron2's `_ScaleGradient`: the authors average
    the losses and scale the heads' gradients up, which is the same). The mask head learns once, from the first
    sampling, and its gradient is not divided (detectron2's `CascadeROIHeads`; the first of the three places that
    1906.09756 tries for it).

    Inference: class probabilities are the mean over all stages, each on its own boxes; boxes are those of the last
    stage; masks are predicted for the detections.

    Args:
        stages: torchvision's `RoIHeads`, of which the first has the mask head. With more than one stage, all predict
            one box for all classes, (R, 4), and the later ones are `RefiningHeads`.
    """

    def __init__(self, stages: Sequence[Any]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    @classmethod
    def build(
        cls, strides: Sequence[float], channels: int, num_classes: int, num_stages: int, head_width: int
    ) -> CascadeHeads:
        """ViTDet's heads: four convolutions and one hidden layer for boxes, four convolutions for masks.

        Args:
            strides: of the maps that boxes are pooled from.
            channels: C, of the maps and of the convolutions.
            num_classes: K.
            num_stages: 1 to 3.
            head_width: features of the hidden layer.
        """

        def box_parts() -> tuple[nn.Module, ...]:
            """Alignment, hidden layers and output of one stage for boxes."""
            shape = (channels, _BOX_SIDE, _BOX_SIDE)
            head = FastRCNNConvFCHead(shape, [channels] * 4, [head_width], norm_layer=ChannelNorm)
            predictor = FastRCNNPredictor(head_width, num_classes + 1)
            if num_stages > 1:
                predictor.bbox_pred = nn.Linear(head_width, 4)
            for part, spread in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # as Fast R-CNN
                nn.init.normal_(part.weight, std=spread)
                nn.init.zeros_(part.bias)
            return PyramidAlign(strides, _BOX_SIDE), head, predictor

        stages = []
        for number, threshold in enumerate(IOU_THRESHOLDS[:num_stages]):
            kind = RefiningHeads if number else RoIHeads
            # The last three limit detections, which `DetectionSettings` does here; RoIHeads wants them all the same.
            stages.append(kind(*box_parts(), threshold, threshold, 512, 0.25, _CODER_WEIGHTS[number], 0.05, 0.5, 100))
        stages[0].mask_roi_pool = PyramidAlign(strides, _MASK_SIDE)
        stages[0].mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=ChannelNorm)
        stages[0].mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)
        return cls(stages)

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        sizes: list[Size],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Losses of each stage, `class_1`, `box_1`, ..., and `mask`; zero and differentiable where there is nothing.

        Args:
            features: maps (B, C, h, w) by name.
            proposals: (m, 4) for each image.
            sizes: height and width of the valid part of each image.
            targets: `boxes` (n, 4), `labels` (n,) int64, `masks` (n, H, W) and `has_mask` (n,) bool of each image.
        """
        found: dict[str, Tensor] = {}
        mask = None
        for number, stage in enumerate(self.stages, start=1):
            proposals, matched, labels, wanted = stage.select_training_samples(proposals, targets)  # type: ignore[operator]
            if mask is None:
                mask = self._mask_loss(features, proposals, matched, labels, sizes, targets)
            logits, deltas = self._predict(stage, features, proposals, sizes)
            found[f"class_{number}"], found[f"box_{number}"] = _box_losses(logits, deltas, labels, wanted)
            if number < len(self.stages):
                proposals = _refined(stage, deltas, proposals, sizes)
        assert mask is not None
        return {**found, "mask": mask}

    def candidates(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: list[Size], score_threshold: float
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes of each image before suppression: (m, 4), scores (m,) above the threshold and labels (m,)."""
        probabilities = []
        for number, stage in enumerate(self.stages, start=1):
            logits, deltas = self._predict(stage, features, proposals, sizes)
            probabilities.append(logits.softmax(dim=-1))
            if number < len(self.stages):
                proposals = _refined(stage, deltas, proposals, sizes)
        boxes = _decoded(self.stages[-1], deltas, proposals, sizes)
        scores = torch.stack(probabilities).mean(dim=0).split([len(x) for x in proposals])
        return [_above(*pair, score_threshold) for pair in zip(boxes, scores, strict=True)]

    def masks(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: list[Tensor], sizes: list[Size]
    ) -> list[Tensor]:
        """Probabilities (m, 28, 28) that places of each box (m, 4) belong to an object of its label (m,)."""
        logits = self._mask_logits(features, boxes, sizes)
        return [x[:, 0] for x in maskrcnn_inference(logits, labels)]

    def _predict(
        self, stage: Any, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: list[Size]
    ) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and box deltas, (R, 4) or (R, 4 K + 4), in fp32."""
        pooled = stage.box_roi_pool(features, boxes, sizes)
        if pooled.requires_grad and len(self.stages) > 1:
            pooled.register_hook(lambda grad: grad / len(self.stages))
        logits, deltas = stage.box_predictor(stage.box_head(pooled))
        return logits.float(), deltas.float()

    def _mask_logits(self, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: list[Size]) -> Tensor:
        first: Any = self.stages[0]
        logits: Tensor = first.mask_predictor(first.mask_head(first.mask_roi_pool(features, boxes, sizes)))
        return logits.float()

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        sizes: list[Size],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """On the boxes that have an object whose mask is known, against that mask cut out by the box."""
        positive = [torch.where(x > 0)[0] for x in labels]
        known = [x["has_mask"] for x in targets]
        positive = [rows[has[x[rows]]] for rows, has, x in zip(positive, known, matched, strict=True)]
        boxes = [x[rows] for x, rows in zip(proposals, positive, strict=True)]
        objects = [x[rows] for x, rows in zip(matched, positive, strict=True)]
        logits = self._mask_logits(features, boxes, sizes)
        masks, classes = [x["masks"] for x in targets], [x["labels"] for x in targets]
        loss: Tensor = maskrcnn_loss(logits, boxes, masks, classes, objects)
        return loss


def _box_losses(
    logits: Tensor, deltas: Tensor, labels: list[Tensor], wanted: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """torchvision's losses of classes and boxes; one box for all classes stands for that of each."""
    if not len(logits):  # no proposal in the whole batch: the mean over nothing is NaN
        return logits.sum(), deltas.sum()
    if deltas.shape[1] == 4:
        deltas = deltas.repeat(1, logits.shape[1])
    losses: tuple[Tensor, Tensor] = fastrcnn_loss(logits, deltas, labels, wanted)
    return losses


def _decoded(stage: Any, deltas: Tensor, proposals: list[Tensor], sizes: list[Size]) -> list[Tensor]:
    """Boxes (m, 1 or K + 1, 4) of each image, clipped to its valid part."""
    boxes = stage.box_coder.decode(deltas, proposals).view(len(deltas), deltas.shape[1] // 4, 4)
    parts = boxes.split([len(x) for x in proposals])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


def _refined(stage: Any, deltas: Tensor, proposals: list[Tensor], sizes: list[Size]) -> list[Tensor]:
    """Boxes (m, 4) for the next stage; like proposals, they carry no gradient."""
    return [boxes[:, 0] for boxes in _decoded(stage, deltas.detach(), proposals, sizes)]


def _above(boxes: Tensor, scores: Tensor, score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a box and a class, of boxes (m, 1 or K + 1, 4) and scores (m, K + 1); without empty boxes."""
    rows, labels = torch.where(scores[:, 1:] > score_threshold)
    labels = labels + 1
    found = boxes[rows, labels] if boxes.shape[1] > 1 else boxes[rows, 0]
    kept = remove_small_boxes(found, MIN_SIDE)
    return found[kept], scores[rows, labels][kept], labels[kept]
