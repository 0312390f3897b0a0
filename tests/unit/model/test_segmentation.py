"""Segmentation models: sizes, losses, gradients everywhere, and folders that rebuild them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.presets import ModelConfig
from beit3.model.segmentation import Mask2Former, SegmentationModel, UPerNet

Head = Literal["upernet", "mask2former"]
Close = Callable[..., None]
HEADS: tuple[Head, ...] = ("upernet", "mask2former")
PARTS = {"upernet": {"pixel", "auxiliary"}, "mask2former": {"class", "mask", "dice"}}


def build(config: ModelConfig, head: Head, **changes: Any) -> SegmentationModel:
    options = {"num_classes": 5, "pyramid_width": 8, "head_width": 32, "num_queries": 6, **changes}
    return SegmentationModel(config, head=head, **options)


def targets(size: tuple[int, int]) -> torch.Tensor:
    labels = torch.randint(0, 5, (2, *size))
    labels[0, :3] = 255
    return labels


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("patch", [4, 14, 16])
def test_every_pixel_is_scored_at_any_patch_size(head: Head, patch: int, tiny: ModelConfig) -> None:
    model = build(replace(tiny, patch_size=patch, image_size=(2 * patch, 2 * patch)), head).eval()
    scores = model(torch.randn(2, 3, 3 * patch, 2 * patch))
    assert scores.shape == (2, 5, 3 * patch, 2 * patch)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", ["some", "all of one image", "all"])
def test_every_parameter_gets_a_finite_gradient(
    head: Head, precision: torch.dtype, ignored: str, tiny: ModelConfig
) -> None:
    """Otherwise several ranks would wait for it in vain."""
    model = build(tiny, head, window_size=2, num_global_layers=1).train()
    labels = targets((12, 8))
    if ignored != "some":
        labels[: 1 if ignored == "all of one image" else 2] = 255
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        values = model.loss(torch.randn(2, 3, 12, 8), labels)
    assert set(values) == {"loss", *PARTS[head]}
    assert float(values["loss"].detach()) == pytest.approx(sum(float(values[part].detach()) for part in PARTS[head]))
    values["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    if ignored == "all":
        assert all(float(values[part].detach()) == 0 for part in PARTS[head] - {"class"})


@torch.no_grad()
def test_upernet_is_cross_entropy_over_labelled_pixels(tiny: ModelConfig, close: Close) -> None:
    model = build(tiny, "upernet").eval()
    images, labels = torch.randn(2, 3, 12, 8), targets((12, 8))
    kept = labels != 255
    chances = model(images).log_softmax(1).permute(0, 2, 3, 1)[kept]
    values = model.loss(images, labels)
    close(values["pixel"], -chances[torch.arange(len(chances)), labels[kept]].mean())
    third: Any = model.head.get_submodule("auxiliary_head")
    logits = F.interpolate(third(model.maps(images)), (12, 8), mode="bilinear", align_corners=False)
    close(values["auxiliary"], 0.4 * F.cross_entropy(logits, labels, ignore_index=255))


@torch.no_grad()
def test_mask2former_adds_up_masks_by_the_probability_of_their_class(tiny: ModelConfig) -> None:
    model = build(tiny, "mask2former").eval()
    images = torch.randn(2, 3, 12, 8)
    assert isinstance(model.head, Mask2Former)
    masks, classes = model.head._answers(model.maps(images))[-1]
    masks = F.interpolate(masks, (12, 8), mode="bilinear", align_corners=False)
    wanted = torch.zeros(2, 5, 12, 8)
    for query in range(6):
        for number in range(5):  # the sixth class is none
            share = classes[:, query].softmax(-1)[:, number, None, None]
            wanted[:, number] += share * masks[:, query].sigmoid()
    torch.testing.assert_close(model(images), wanted)


@torch.no_grad()
def test_what_is_averaged_over_sizes_keeps_the_order_of_classes(tiny: ModelConfig) -> None:
    scores = torch.rand(2, 5, 3, 3)
    for head in HEADS:
        shares = build(tiny, head).probabilities(scores)
        assert torch.equal(shares.argsort(1), scores.argsort(1))
        if head == "upernet":
            torch.testing.assert_close(shares.sum(1), torch.ones(2, 3, 3))


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_a_model_of_narrow_weights_scores_alike(head: Head, tiny: ModelConfig) -> None:
    model = build(tiny, head).eval()
    images = torch.randn(1, 3, 12, 8)
    wanted = model(images)
    found = model.to(torch.bfloat16)(images.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("head", HEADS)
def test_a_few_steps_on_one_batch_lower_the_loss(head: Head, tiny: ModelConfig) -> None:
    model = build(tiny, head).train()
    images, labels = torch.randn(2, 3, 12, 8), torch.zeros(2, 12, 8, dtype=torch.int64)
    labels[:, :, 4:] = 3
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(images, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("windows", [{}, {"window_size": 2, "num_global_layers": 2, "num_maps": 1}])
def test_options_rebuild_the_model(head: Head, windows: dict[str, int], tiny: ModelConfig) -> None:
    model = build(tiny, head, **windows).eval()
    options = model.head_options
    assert windows.items() <= options.items()
    assert None not in options.values()
    assert ("num_queries" in options) == (head == "mask2former")
    with torch.device("meta"):
        again = SegmentationModel(tiny, **options).eval()
    state = model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}  # as model files demand
    again.load_state_dict(state, assign=True)
    images = torch.randn(1, 3, 12, 8)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("width", "auxiliary"), [(1, 1), (64, 32), (512, 256), (768, 256), (1024, 256)])
def test_the_auxiliary_head_is_as_wide_as_in_beits_recipes(width: int, auxiliary: int) -> None:
    """UPerNet of 512: 256; BEiT v2's of 768 and 1,024: 256 still."""
    with torch.device("meta"):
        head: Any = UPerNet(8, 5, width)
    assert head.auxiliary_head.classifier.in_channels == auxiliary
    assert head.decode_head.classifier.in_channels == width


def test_heads_learn_nothing_from_evaluation(tiny: ModelConfig) -> None:
    model = build(tiny, "upernet").eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        model(torch.randn(2, 3, 12, 8))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_batch_norms_can_be_synchronised(tiny: ModelConfig) -> None:
    """Parameters stay the same objects, which an optimizer may hold already."""
    model = build(tiny, "upernet")
    before = dict(model.named_parameters())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_settings_out_of_range_are_refused(tiny: ModelConfig) -> None:
    for head, changes, said in (
        ("upernet", {"num_classes": 0}, "num_classes must lie in 1..255, not 0"),
        ("upernet", {"num_classes": 256}, "num_classes must lie in 1..255, not 256"),
        ("linear", {}, "head must be upernet or mask2former, not 'linear'"),
        ("mask2former", {"head_width": 48}, "head_width must be a multiple of 32 for mask2former, not 48"),
        ("upernet", {"num_maps": 2}, "num_maps must be 1 or 4, not 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(tiny, head, **changes)  # type: ignore[arg-type]


def test_mask2former_says_what_it_needs_to_be_trained(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny, "mask2former")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"needs scipy: pip install 'beit3\[dense\]'"):
        model.loss(torch.randn(1, 3, 12, 8), targets((12, 8))[:1])
    model.eval()(torch.randn(1, 3, 12, 8))  # using it needs none
