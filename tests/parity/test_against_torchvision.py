"""One stage against torchvision's own Mask R-CNN over the same maps: the same losses, boxes, scores and masks.

The reference is built from torchvision alone, with its own anchors, pooling and settings; only weights go over, and
what both share is the map of the tower. Patches of 16 pixels and even grids, as torchvision guesses strides from them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from beit3.model.cascade import CascadeHeads
from beit3.model.dense import ChannelNorm
from beit3.model.detection import DetectionModel, Target
from beit3.model.presets import ModelConfig

CLASSES, WIDTH, HIDDEN = 3, 8, 16
CANVAS = (128, 160)
SIZES = [(128, 160), (96, 131)]
NAMES = ["0", "1", "2", "3"]


class Maps(nn.Module):
    """The tower of a model as the backbone of torchvision's detectors."""

    def __init__(self, model: DetectionModel) -> None:
        super().__init__()
        self.features, self.out_channels = model.features, WIDTH

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.features(images)


def heads(**changes: Any) -> dict[str, Any]:
    """Box and mask heads of torchvision, of the shapes of ours."""
    return {
        "box_roi_pool": MultiScaleRoIAlign(NAMES, 7, 2),
        "box_head": FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [HIDDEN], norm_layer=ChannelNorm),
        "box_predictor": FastRCNNPredictor(HIDDEN, CLASSES + 1),
        "mask_roi_pool": MultiScaleRoIAlign(NAMES, 14, 2),
        "mask_head": MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm_layer=ChannelNorm),
        "mask_predictor": MaskRCNNPredictor(WIDTH, WIDTH, CLASSES + 1),
        **changes,
    }


@pytest.fixture
def pair() -> tuple[DetectionModel, Any]:
    """Our model and torchvision's, of the same weights: random ones that move boxes and tell classes apart."""
    config = ModelConfig(width=16, num_layers=2, num_heads=2, ffn_width=32, fusion_layers=0, image_size=(64, 64))
    ours = DetectionModel(config, CLASSES, stages=1, pyramid_width=WIDTH, head_width=HIDDEN)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("bbox_pred.weight", "cls_score.weight", "cls_logits.weight", "mask_fcn_logits.weight")):
                parameter.normal_(std=0.3)
    theirs = MaskRCNN(
        Maps(ours),
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_head=RPNHead(WIDTH, 3, conv_depth=2),
        rpn_post_nms_top_n_train=1000,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        size_divisible=32,
        **heads(),
    )
    theirs.transform.resize = lambda image, target: (image, target)  # its option to skip this holds in training alone
    state = {name.replace("stages.0.", ""): value for name, value in ours.state_dict().items()}
    kept = {name: value for name, value in state.items() if name.startswith(("rpn.", "roi_heads."))}
    assert kept.keys() == {name for name in theirs.state_dict() if name.startswith(("rpn.", "roi_heads."))}
    theirs.load_state_dict(kept, strict=False)
    return ours, theirs


def pictures() -> tuple[Tensor, list[Tensor]]:
    """Two pictures on a canvas with zeros beside them, and bare."""
    canvas = torch.zeros(2, 3, *CANVAS)
    bare = [torch.randn(3, *size) for size in SIZES]
    for place, picture in zip(canvas, bare, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return canvas, bare


def objects() -> list[Target]:
    boxes: list[list[list[float]]] = [[[4.0, 8, 60, 90], [70, 20, 150, 100], [10, 10, 20, 24]], [[30.0, 30, 120, 80]]]
    labels = [[0, 2, 1], [2]]
    made = []
    for rows, classes in zip(boxes, labels, strict=True):
        masks = torch.zeros(len(rows), *CANVAS, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, rows, strict=True):
            mask[int(top) : int(bottom), int(left) : int(right)] = 1
        masks *= torch.rand(masks.shape) > 0.3
        made.append(Target(torch.tensor(rows), torch.tensor(classes), masks))
    return made


def as_torchvision(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [
        {"boxes": x.boxes, "labels": x.labels + 1, "masks": x.masks, "has_mask": torch.ones(len(x.labels)).bool()}
        for x in targets
    ]


def test_one_stage_has_the_losses_and_gradients_of_torchvision(pair: tuple[DetectionModel, Any]) -> None:
    ours, theirs = pair
    canvas, bare = pictures()
    targets = objects()
    torch.manual_seed(3)
    found = ours.train()(canvas, torch.tensor(SIZES), targets)
    sum(found.values()).backward()
    cut = [
        {**row, "masks": row["masks"][:, : size[0], : size[1]]}
        for row, size in zip(as_torchvision(targets), SIZES, strict=True)
    ]
    torch.manual_seed(3)
    wanted = theirs.train()(bare, cut)
    sum(value for value in wanted.values()).backward()
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "class_1": "loss_classifier",
        "box_1": "loss_box_reg",
        "mask": "loss_mask",
    }
    assert found.keys() == names.keys()
    assert set(names.values()) == wanted.keys()
    for name, other in names.items():
        assert wanted[other] > 0
        torch.testing.assert_close(found[name], wanted[other], rtol=1e-5, atol=1e-7)
    own = {name.replace("stages.0.", ""): value.grad for name, value in ours.named_parameters()}
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(own[name], value.grad, rtol=1e-4, atol=1e-6)


def test_one_stage_has_the_detections_of_torchvision(pair: tuple[DetectionModel, Any]) -> None:
    ours, theirs = pair
    canvas, bare = pictures()
    found = ours.eval()(canvas, torch.tensor(SIZES))
    with torch.no_grad():
        wanted = theirs.eval()(bare)
    for mine, other, size in zip(found, wanted, SIZES, strict=True):
        assert len(mine) == len(other["boxes"]) > 20
        assert mine.labels.tolist() == (other["labels"] - 1).tolist()
        assert len(mine.labels.unique()) > 1
        torch.testing.assert_close(mine.scores, other["scores"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine.boxes, other["boxes"], rtol=1e-5, atol=1e-3)
        pasted = paste_masks_in_image(mine.masks[:, None], mine.boxes, size)
        torch.testing.assert_close(pasted, other["masks"], rtol=1e-5, atol=1e-5)


def test_a_cascade_of_one_stage_is_torchvisions_roi_heads() -> None:
    theirs = RoIHeads(
        **heads(),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=64,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    with torch.no_grad():
        theirs.box_predictor.bbox_pred.weight.normal_(std=0.3)
    ours = CascadeHeads([theirs])
    grids = [(32, 40), (16, 20), (8, 10), (4, 5)]
    features = {name: torch.randn(2, WIDTH, *grid) for name, grid in zip(NAMES, grids, strict=True)}
    corner = torch.rand(2, 80, 2) * 90
    proposals = list(torch.cat([corner, corner + 5 + torch.rand(2, 80, 2) * 60], dim=2).clamp(max=128))
    targets = as_torchvision(objects())
    torch.manual_seed(4)
    found = ours.losses(features, proposals, [CANVAS] * 2, targets)
    torch.manual_seed(4)
    _, wanted = theirs.train()(features, proposals, [CANVAS] * 2, targets)
    for mine, other in (("class_1", "loss_classifier"), ("box_1", "loss_box_reg"), ("mask", "loss_mask")):
        torch.testing.assert_close(found[mine], wanted[other], rtol=0, atol=0)
    detections, _ = theirs.eval()(features, proposals, [CANVAS] * 2)
    candidates = ours.candidates(features, proposals, [CANVAS] * 2, 0.05)
    for (boxes, scores, labels), detection in zip(candidates, detections, strict=True):
        rows = zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
        known = {(*box, label): score for box, label, score in rows}
        wanted_rows = zip(detection["boxes"].tolist(), detection["labels"].tolist(), strict=True)
        assert [known[(*box, label)] for box, label in wanted_rows] == detection["scores"].tolist()
    masks = ours.masks(features, [x["boxes"] for x in detections], [x["labels"] for x in detections], [CANVAS] * 2)
    for mask, detection in zip(masks, detections, strict=True):
        torch.testing.assert_close(mask, detection["masks"][:, 0], rtol=0, atol=0)
