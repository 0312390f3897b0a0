"""Detection: strides, the cascade stage by stage, and every odd target that data can hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_iou, masks_to_boxes, roi_align

from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.cascade import CascadeHeads, PyramidAlign, PyramidAnchors
from beit3.model.detection import DetectionModel, Detections, DetectionSettings, Target, paste_masks, suppress
from beit3.model.presets import ModelConfig, model_config

CANVAS = (24, 36)
CLASSES = 3
NAMES = ["0", "1", "2", "3"]


def detector(config: ModelConfig, **options: Any) -> DetectionModel:
    """A small one that samples few boxes."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"num_classes": CLASSES, "stages": 3, "pyramid_width": 8, "head_width": 16, **options}
    model = DetectionModel(config, **settings)
    first: Any = model.roi_heads.stages[0]
    first.fg_bg_sampler.batch_size_per_image = 32
    return model


def target(
    boxes: list[list[float]], labels: list[int] | None = None, canvas: tuple[int, int] = CANVAS, fill: int = 1
) -> Target:
    """Objects that fill their boxes."""
    masks = torch.zeros(len(boxes), *canvas, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, torch.tensor(boxes).view(-1, 4).nan_to_num().int(), strict=True):
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = fill
    return Target(torch.tensor(boxes).view(-1, 4), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), masks)


NOTHING = target([])
SOMETHING = target([[2, 3, 20, 20], [10, 8, 34, 22]], [0, 2])


# ---- building


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("window", [{}, {"window_size": 2, "num_global_layers": 1}])
def test_head_options_rebuild_the_model(stages: int, window: dict[str, int], tiny: ModelConfig) -> None:
    model = detector(tiny, stages=stages, **window).eval()
    options = model.head_options
    wanted = {"num_classes": CLASSES, "stages": stages, "pyramid_width": 8, "head_width": 16, **window}
    assert json.loads(json.dumps(options)) == options == wanted
    with torch.device("meta"):
        empty = DetectionModel(tiny, **options)
    empty.load_state_dict(model.state_dict(), assign=True)
    images = torch.randn(1, 3, *CANVAS)
    for one, other in zip(model(images), empty.eval()(images), strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.masks, other.masks)


def test_nothing_is_learned_of_a_mask_that_is_not_known(tiny: ModelConfig) -> None:
    model = detector(tiny).train()
    known, other = target([[2, 3, 20, 20]], fill=1), target([[2, 3, 20, 20]], fill=0)
    unknown = [Target(one.boxes, one.labels, one.masks, torch.tensor([False])) for one in (known, other)]
    losses = [losses_of(model, [one]) for one in (known, other, *unknown)]
    assert losses[0]["mask"] != losses[1]["mask"]
    assert [float(one["mask"]) for one in losses[2:]] == [0, 0]
    assert all(losses[2][name] == losses[0][name] for name in losses[0] if name != "mask")
    sum(losses[2].values()).backward()  # type: ignore[union-attr]
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize(("stages", "millions"), [(1, 111), (3, 141)])
def test_the_base_model_is_as_large_as_vitdets(stages: int, millions: int) -> None:
    with torch.device("meta"):  # ViTDet, table of ViT-B with Mask R-CNN and with Cascade Mask R-CNN
        model = DetectionModel(model_config("beit3_base_patch16_224"), stages=stages, window_size=14)
    assert round(model.num_parameters / 1e6) == millions


@pytest.mark.parametrize("stages", [0, 4])
def test_other_numbers_of_stages_are_refused(stages: int, tiny: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=f"stages must lie in 1..3, not {stages}"):
        DetectionModel(tiny, stages=stages)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold must lie in 0..1, not 1.5"),
        ({"nms_threshold": -0.1}, "nms_threshold must lie in 0..1, not -0.1"),
        ({"max_detections": 0}, "max_detections must be at least 1, not 0"),
        ({"soft_nms": 1}, "soft_nms must be true or false, not 1"),
        ({"score": 0.3}, "has no field 'score'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectionSettings(**wrong)


# ---- strides


@pytest.mark.parametrize("patch", [16, 14])
def test_anchors_lie_at_exact_strides_on_odd_grids(patch: int) -> None:
    strides = [patch / 4, patch / 2, patch, 2 * patch, 4 * patch]
    grids = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]  # 5 x 7 patches
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    found = PyramidAnchors(strides)(ImageList(torch.zeros(1, 3, 5 * patch, 7 * patch), [(1, 1)]), maps)[0]
    place = 0
    for stride, (rows, columns) in zip(strides, grids, strict=True):
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    box = found[place]
                    assert ((box[:2] + box[2:]) / 2).tolist() == [column * stride, row * stride]
                    width, height = (box[2:] - box[:2]).tolist()
                    assert width == pytest.approx(8 * stride / ratio**0.5, abs=1)  # rounded by half a pixel a side
                    assert height == pytest.approx(8 * stride * ratio**0.5, abs=1)
                    place += 1
    assert place == len(found)


@pytest.mark.parametrize("patch", [16, 14, 4])
def test_boxes_are_pooled_from_the_level_of_their_size_at_its_stride_on_odd_grids(patch: int) -> None:
    strides = [patch / 4, patch / 2, patch, 2 * patch]
    pool = PyramidAlign(strides, 7)
    features = {str(level): torch.randn(1, 2, *grid) for level, grid in enumerate([(20, 28), (10, 14), (5, 7), (3, 4)])}
    # FPN, equation 1: 224 pixels belong to stride 16, half of it to stride 8, and so on.
    for level, side in [(0, 1.7), (0, 6.9), (1, 7.1), (1, 13.9), (2, 14.1), (2, 27.9), (3, 28.1), (3, 60)]:
        box = torch.tensor([[0.4, 0.3, 0.4 + side, 0.3 + side]]) * patch
        wanted = roi_align(features[str(level)], [box], 7, 1 / strides[level], 2)
        assert torch.equal(pool(features, [box], [(5 * patch, 7 * patch)]), wanted)


def test_canvases_of_any_size_are_searched(tiny: ModelConfig) -> None:
    model = detector(tiny)
    for height, width in [(4, 4), (20, 44), (516, 60)]:
        sizes = torch.tensor([[height, width - 3]])
        found = model.eval()(torch.randn(1, 3, height, width), sizes)[0]
        assert len(found)
        assert found.boxes.min() >= 0
        assert (found.boxes[:, 2:].amax(dim=0) <= torch.tensor([width - 3, height])).all()
        losses = model.train()(
            torch.randn(1, 3, height, width), sizes, [target([[0, 0, 1, 4]], canvas=(height, width))]
        )
        assert all(x.isfinite() for x in losses.values())


# ---- training

ODD_TARGETS = {
    "objects": [SOMETHING, SOMETHING],
    "no object anywhere": [NOTHING, NOTHING],
    "no object in one image": [NOTHING, SOMETHING],
    "one image": [SOMETHING],
    "one image without objects": [NOTHING],
    "partly outside": [target([[-9, -5, 8, 9], [30, 18, 99, 99]]), SOMETHING],
    "wholly outside": [target([[-9, -9, -1, -1], [40, 2, 50, 9]]), target([[2, 30, 9, 40]])],
    "one pixel": [target([[7, 7, 8, 8], [0, 0, 1, 1], [35, 23, 36, 24]]), SOMETHING],
    "no width, turned round, not a number": [
        target([[5, 5, 5, 20], [5, 9, 20, 9], [20, 20, 5, 5], [float("nan")] * 4, [3, 3, 9, 9]]),
        target([[5, 5, 5, 5]]),
    ],
    "no mask": [target([[2, 3, 20, 20]], fill=0), SOMETHING],
}


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("targets", ODD_TARGETS.values(), ids=ODD_TARGETS.keys())
def test_every_parameter_gets_a_finite_gradient_whatever_the_targets(
    targets: list[Target], stages: int, tiny: ModelConfig
) -> None:
    model = detector(tiny, stages=stages).train()
    sizes = torch.tensor([[24, 36], [18, 30]])[: len(targets)]
    losses = model(torch.randn(len(targets), 3, *CANVAS), sizes, targets)
    parts = [f"{name}_{stage}" for stage in range(1, stages + 1) for name in ("class", "box")]
    assert list(losses) == ["rpn_objectness", "rpn_box", *parts, "mask"]
    assert all(x.isfinite() and x.ndim == 0 for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("stages", [1, 3])
def test_a_batch_without_any_box_to_look_at_trains_and_detects_nothing(stages: int, tiny: ModelConfig) -> None:
    model = detector(tiny, stages=stages).train()
    model.rpn.score_thresh = 2.0  # no proposal is as sure
    images = torch.randn(2, 3, *CANVAS)
    losses = model(images, None, [NOTHING, NOTHING])
    assert all(losses[name] == 0 for name in losses if not name.startswith("rpn"))
    sum(losses.values()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)
    for found in model.eval()(images):
        assert (len(found), found.boxes.shape, found.masks.shape) == (0, (0, 4), (0, 28, 28))
        assert paste_masks(found.masks, found.boxes, CANVAS).shape == (0, *CANVAS)


def losses_of(model: DetectionModel, targets: list[Target], size: tuple[int, int] = CANVAS) -> dict[str, Tensor]:
    torch.manual_seed(7)
    losses: dict[str, Tensor] = model(torch.randn(1, 3, *CANVAS), torch.tensor([size]), targets)
    return losses


def test_targets_are_clipped_to_the_picture_and_the_empty_ones_dropped(tiny: ModelConfig) -> None:
    model = detector(tiny).train()
    clean = target([[0, 3, 20, 18]], [2])
    odd = target([[-4, 3, 20, 25], [31, 0, 36, 24], [5, 5, 5, 9], [1, 20, 9, 23]], [2, 0, 1, 1])
    odd.masks[0] = clean.masks[0]
    found, wanted = losses_of(model, [odd], (18, 30)), losses_of(model, [clean], (18, 30))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert wanted["box_1"] > 0


@pytest.mark.parametrize(
    ("images", "sizes", "targets", "message"),
    [
        (2, None, [SOMETHING], "2 images need as many targets, not 1"),
        (1, None, [target([[1, 1, 5, 5]], canvas=(24, 24))], r"masks must be as large as the canvas, \(24, 36\), not"),
        (1, None, [target([[1, 1, 5, 5]], [3])], r"labels must lie in 0..2, not \[3\]"),
        (1, None, [target([[1, 1, 5, 5]], [-1])], r"labels must lie in 0..2, not \[-1\]"),
        (1, [[24, 37]], [SOMETHING], "a picture of 24x37 does not lie on a canvas of 24x36"),
        (1, [[0, 36]], None, "a picture of 0x36 does not lie"),
        (2, [[24, 36]], None, r"sizes must be \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    images: int, sizes: list[list[int]] | None, targets: list[Target] | None, message: str, tiny: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        detector(tiny)(torch.randn(images, 3, *CANVAS), None if sizes is None else torch.tensor(sizes), targets)


def test_targets_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must be \(n, 4\), \(n,\) and \(n, H, W\), not \(2, 4\), \(2,\), \(1, 24, 36\)"
    ):
        Target(SOMETHING.boxes, SOMETHING.labels, SOMETHING.masks[:1])


def test_losses_and_detections_can_be_had_in_either_mode(tiny: ModelConfig) -> None:
    model = detector(tiny)
    learning, still = losses_of(model.train(), [SOMETHING]), losses_of(model.eval(), [SOMETHING])
    assert all(torch.equal(learning[name], still[name]) for name in learning)
    images = torch.randn(1, 3, *CANVAS)
    assert torch.equal(model.train()(images)[0].boxes, model.eval()(images)[0].boxes)


def learn(model: DetectionModel, images: Tensor, shown: Target, steps: int) -> list[dict[str, float]]:
    """Train on one picture and return the losses of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    seen = []
    for _ in range(steps):
        losses = model.train()(images, None, [shown])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        seen.append({name: value.item() for name, value in losses.items()})
    return seen


def two_objects() -> tuple[Tensor, Target]:
    """A bright and a dark rectangle on grey, with noise."""
    shown = target([[3, 2, 17, 14], [20, 6, 33, 23]], [0, 1])
    images = torch.randn(1, 3, *CANVAS) * 0.1
    for mask, value in zip(shown.masks, (1.0, -1.0), strict=True):
        images[:, :, mask.bool()] += value
    return images, shown


def test_it_learns(tiny: ModelConfig) -> None:
    model = detector(replace(tiny, image_size=CANVAS), num_classes=2, stages=2, pyramid_width=16)
    seen = learn(model, *two_objects(), 30)
    for name in ("rpn_objectness", "class_1", "class_2", "mask"):
        assert seen[-1][name] < 0.8 * seen[0][name], name


@pytest.mark.slow
def test_it_finds_what_it_was_shown(tiny: ModelConfig) -> None:
    model = detector(replace(tiny, image_size=CANVAS), num_classes=2, pyramid_width=16, head_width=32)
    images, shown = two_objects()
    learn(model, images, shown, 400)
    found = model.eval().detect(images, settings=DetectionSettings(score_threshold=0.9))[0]
    assert sorted(found.labels.tolist()) == [0, 1]
    order = found.labels.argsort()
    assert box_iou(found.boxes[order], shown.boxes).diagonal().min() > 0.9
    masks = paste_masks(found.masks, found.boxes, CANVAS)[order]
    both, either = (masks & shown.masks.bool()).sum((1, 2)), (masks | shown.masks.bool()).sum((1, 2))
    assert (both / either).min() > 0.9


# ---- number types


def test_autocast_trains_and_detects_with_boxes_in_full_precision(tiny: ModelConfig) -> None:
    model = detector(replace(tiny, image_size=(8, 520))).train()
    with torch.no_grad():  # boxes stay the anchors, which bfloat16 could not hold so far to the right
        for name, parameter in model.named_parameters():
            if "bbox_pred" in name:
                parameter.zero_()
    images = torch.randn(1, 3, 8, 520)
    shown = [target([[1, 1, 5, 7], [509, 0, 517, 8]], [0, 1], canvas=(8, 520))]
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, None, shown)
        found = model.eval()(images)[0]
    sum(losses.values()).backward()
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)
    assert {x.dtype for x in (found.boxes, found.scores, found.masks)} == {torch.float32}
    anchors = model.rpn.anchor_generator(ImageList(images, [(8, 520)]), list(model.features(images).values()))[0]
    anchors = anchors.clamp(min=0).minimum(torch.tensor([520, 8, 520, 8]))
    assert found.boxes.max() > 256
    assert (torch.cdist(found.boxes, anchors).amin(dim=1) < 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_detect_with_boxes_in_fp32(dtype: torch.dtype, tiny: ModelConfig) -> None:
    model = detector(tiny).eval().to(dtype)
    found = model(torch.randn(1, 3, *CANVAS, dtype=dtype))[0]
    assert len(found)
    assert {x.dtype for x in (found.boxes, found.scores, found.masks)} == {torch.float32}


# ---- detections


def test_detections_come_best_first_inside_their_picture(tiny: ModelConfig) -> None:
    model = detector(tiny).eval()
    sizes = torch.tensor([[24, 36], [11, 17]])
    settings = DetectionSettings(score_threshold=0.2, max_detections=30)
    for found, (height, width) in zip(model.detect(torch.randn(2, 3, *CANVAS), sizes, settings), sizes, strict=True):
        assert 0 < len(found) <= 30
        assert found.masks.shape == (len(found), 28, 28)
        assert 0 <= found.masks.min() <= found.masks.max() <= 1
        assert set(found.labels.tolist()) <= set(range(CLASSES))
        assert found.scores.min() > 0.2
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert found.boxes.min() >= 0
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert not found.boxes.requires_grad


def test_heads_look_at_as_many_proposals_as_the_settings_say(tiny: ModelConfig) -> None:
    model = detector(tiny).eval()
    images = torch.randn(2, 3, *CANVAS)
    everything = DetectionSettings(score_threshold=0.0, nms_threshold=1.0, max_detections=10_000)
    for count in (1, 7, 40):
        for found in model.detect(images, settings=replace(everything, max_proposals=count)):
            assert len(found) == count * CLASSES


def test_suppression_is_hard_or_soft_as_the_settings_say() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 8], [30, 0, 40, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 0])
    _, hard, of = suppress(boxes, scores, labels, DetectionSettings())
    assert hard.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert of.tolist() == [0, 1, 0]
    kept, soft, of = suppress(boxes, scores, labels, DetectionSettings(soft_nms=True))
    assert soft.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.8 * 0.2])
    assert of.tolist() == [0, 1, 0, 0]
    assert kept[3].tolist() == [0, 0, 10, 8]
    _, soft, _ = suppress(boxes, scores, labels, DetectionSettings(soft_nms=True, score_threshold=0.2))
    assert len(soft) == 3
    assert len(suppress(boxes, scores, labels, DetectionSettings(max_detections=2))[0]) == 2
    assert len(suppress(boxes, scores, labels, DetectionSettings(max_detections=2, soft_nms=True))[0]) == 2


def test_pasted_masks_fill_their_boxes_and_nothing_else() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 30], [10, 5, 20, 25], [39, 29, 40, 30], [7.1, 7, 7.4, 9], [-5, -5, 3.4, 50]])
    pasted = paste_masks(torch.ones(5, 28, 28), boxes, (30, 40))
    wanted = torch.zeros(5, 30, 40, dtype=torch.bool)
    wanted[0], wanted[1, 5:25, 10:20], wanted[2, 29, 39], wanted[4, :, :3] = True, True, True, True
    assert torch.equal(pasted, wanted)  # the fourth lies between the middles of two pixels
    assert not paste_masks(torch.zeros(5, 28, 28), boxes, (30, 40)).any()


@pytest.mark.parametrize("radius", [3, 6, 12, 25])
def test_pasting_gives_back_what_the_mask_head_is_taught(radius: int) -> None:
    rows, columns = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    shown = (rows - 33) ** 2 + (columns - 41) ** 2 < radius**2
    box = masks_to_boxes(shown[None]) + torch.tensor([[-0.2, 0.1, 1.2, 0.9]])
    taught = project_masks_on_boxes(shown[None].float(), box, torch.zeros(1), 28)
    found = paste_masks(taught, box, (80, 80))[0]
    assert (found & shown).sum() / (found | shown).sum() > 0.98


def test_targets_and_detections_move_to_a_device() -> None:
    found = Detections(torch.ones(1, 4), torch.ones(1), torch.ones(1).long(), torch.ones(1, 28, 28)).to("meta")
    assert {x.device.type for x in (found.boxes, found.scores, found.labels, found.masks)} == {"meta"}
    moved = SOMETHING.to("meta")
    assert {x.device.type for x in (moved.boxes, moved.labels, moved.masks)} == {"meta"}


# ---- the cascade

SIDE = 128
STRIDES = [4.0, 8.0, 16.0, 32.0]
HEIGHTS = (49, 51, 59, 61, 69, 71)
"""Of boxes that overlap an object of height 100 by as many hundredths: at each threshold one below and one above."""


def cascade(num_stages: int = 3) -> CascadeHeads:
    torch.manual_seed(2)
    heads = CascadeHeads.build(STRIDES, 4, 2, num_stages, 8)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if "predictor" in name:
                parameter.normal_(std=0.2)
    return heads


def scene(requires_grad: bool = False) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """Maps, one image's proposals, of those heights, and its object."""
    torch.manual_seed(3)
    features = {
        name: torch.randn(1, 4, int(SIDE / stride), int(SIDE / stride), requires_grad=requires_grad)
        for name, stride in zip(NAMES, STRIDES, strict=True)
    }
    proposals = torch.tensor([[0.0, 0, 100, height] for height in HEIGHTS])
    masks = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 10:90, 20:70] = 1
    shown = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([2]), "masks": masks}
    shown["has_mask"] = torch.tensor([True])
    return features, [proposals], [shown]


def test_each_stage_asks_for_more_overlap_and_weighs_boxes_higher() -> None:
    heads, (features, proposals, targets) = cascade(), scene()
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if "cls_score" in name or "bbox_pred" in name:
                parameter.zero_()  # boxes stay where they are
            if "cls_score.bias" in name:
                parameter.copy_(torch.tensor([0.0, 5.0, 1.0]))
    for later in list(heads.stages)[1:]:
        part: Any = later
        part.fg_bg_sampler.batch_size_per_image = 1  # they take all boxes nevertheless
    losses = heads.losses(features, proposals, [(SIDE, SIDE)], targets)
    scale = torch.tensor([0.0, 5.0, 1.0]).logsumexp(0)
    rows = {51: 1, 59: 1, 61: 2, 69: 2, 71: 3, 100: 3}  # height of the box: the last stage for which it is the object
    weights = {1: (10, 5), 2: (20, 10), 3: (30, 15)}  # of centres and sides
    for stage in (1, 2, 3):
        positive = [height for height, last in rows.items() if last >= stage]
        shares = scale - losses[f"class_{stage}"]  # mean of the true class's logit: 1 for the object, 0 for background
        assert shares.item() == pytest.approx(len(positive) / 7, abs=1e-6)
        of_centres, of_sides = weights[stage]
        wanted = torch.zeros(())
        for height in positive:
            shift = torch.tensor([of_centres * (50 - height / 2) / height, of_sides * torch.tensor(100 / height).log()])
            wanted += F.smooth_l1_loss(torch.zeros(2), shift, beta=1 / 9, reduction="sum")
        torch.testing.assert_close(losses[f"box_{stage}"], wanted / 7)


def test_later_stages_train_on_the_boxes_of_the_stage_before() -> None:
    heads, (features, proposals, targets) = cascade(2), scene()
    first: Any = heads.stages[0]
    with torch.no_grad():
        for parameter in first.box_predictor.bbox_pred.parameters():
            parameter.zero_()
        # Twice the height about the same centre, then clipped: 49 becomes 73.5, and the object itself 128.
        first.box_predictor.bbox_pred.bias[3] = 5 * torch.tensor(2.0).log()
        second: Any = heads.stages[1]
        second.box_predictor.cls_score.weight.zero_()
        second.box_predictor.cls_score.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    losses = heads.losses(features, proposals, [(SIDE, SIDE)], targets)
    share = torch.tensor([0.0, 5.0, 1.0]).logsumexp(0) - losses["class_2"]
    assert share.item() == pytest.approx(1, abs=1e-6)  # all overlap by .6 now; as they were, three of seven did not


def gradients(heads: CascadeHeads, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of one loss, with respect to the maps and the first stage's weights."""
    features, proposals, targets = scene(requires_grad=True)
    losses = heads.losses(features, proposals, [(SIDE, SIDE)], targets)
    inputs = [*features.values(), *heads.stages[0].parameters()]
    found = torch.autograd.grad(losses[name], inputs, allow_unused=True)
    given = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]
    return given[: len(features)], given[len(features) :]


def test_stages_share_the_gradient_of_the_maps_and_the_mask_head_has_its_own() -> None:
    three = cascade()
    one = CascadeHeads(list(three.stages)[:1])
    for name, share in (("class_1", 3), ("box_1", 3), ("mask", 1)):
        (maps, weights), (alone, weights_alone) = gradients(three, name), gradients(one, name)
        assert max(grad.abs().max() for grad in alone) > 0
        for grad, wanted in zip(maps, alone, strict=True):
            torch.testing.assert_close(grad * share, wanted)
        for grad, wanted in zip(weights, weights_alone, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_detections_average_the_stages_on_the_boxes_of_the_last() -> None:
    heads, (features, proposals, _) = cascade(2), scene()
    boxes, size, probabilities = proposals[0], (SIDE, SIDE - 40), []
    for stage, weights in zip(list(heads.stages), ((10, 5), (20, 10)), strict=True):
        part: Any = stage
        logits, deltas = part.box_predictor(part.box_head(part.box_roi_pool(features, [boxes], [size])))
        probabilities.append(logits.softmax(1))
        sides = boxes[:, 2:] - boxes[:, :2]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] / weights[0] * sides
        half = (deltas[:, 2:] / weights[1]).exp() * sides / 2
        boxes = torch.cat([centres - half, centres + half], dim=1).clamp(min=0)
        boxes = boxes.minimum(torch.tensor([size[1], size[0], size[1], size[0]]))
    wanted = (probabilities[0] + probabilities[1]) / 2
    found, scores, labels = heads.candidates(features, proposals, [size], 0.0)[0]
    assert labels.tolist() == [1, 2] * 6
    torch.testing.assert_close(scores, wanted[:, 1:].flatten())
    torch.testing.assert_close(found, boxes.repeat_interleave(2, dim=0))
    assert len(heads.candidates(features, proposals, [size], scores.median().item())[0][0]) == 6
