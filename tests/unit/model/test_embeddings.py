"""Patches, mask token, positions and their interpolation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import replace
from beit3.model.embeddings import TextEmbedding, VisionEmbedding, resample_positions
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer

Close = Callable[..., None]


@pytest.fixture
def vision(tiny: ModelConfig) -> VisionEmbedding:
    torch.manual_seed(3)
    embedding = VisionEmbedding(tiny)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.normal_()
    return embedding


@torch.no_grad()
def test_patches_are_a_convolution_with_class_token_and_positions(vision: VisionEmbedding, close: Close) -> None:
    images = torch.randn(2, 3, 12, 8)
    kernel = vision.patch.weight.view(-1, 3, 4, 4)
    patches = F.conv2d(images, kernel, vision.patch.bias, stride=4).flatten(2).transpose(1, 2)
    expected = torch.cat([vision.cls_token.expand(2, 1, -1), patches], dim=1) + vision.positions[2:]
    close(vision(images, None).view(2, 7, -1), expected)


@torch.no_grad()
def test_a_masked_patch_shows_only_the_mask_token_and_its_position(vision: VisionEmbedding, close: Close) -> None:
    images = torch.randn(1, 3, 12, 8)
    mask = torch.tensor([[False, True, False, False, True, False]])
    masked, plain = vision(images, mask), vision(images, None)
    for patch in range(6):
        row = patch + 1
        if mask[0, patch]:
            close(masked[row], vision.mask_token + vision.positions[row + 2])
        else:
            assert torch.equal(masked[row], plain[row])
    assert torch.equal(masked[0], plain[0])


def test_the_content_of_masked_patches_reaches_nothing(
    tiny: ModelConfig, make: Callable[..., MultiwayTransformer]
) -> None:
    model = make(tiny)
    images = torch.randn(1, 3, 12, 8, requires_grad=True)
    mask = torch.tensor([[True, False, False, False, False, True]])
    out = model(images, image_mask=mask)
    assert out.vision is not None
    (gradient,) = torch.autograd.grad(out.vision.square().sum(), images)
    assert gradient[:, :, :4, :4].abs().max() == 0
    assert gradient[:, :, 8:, 4:].abs().max() == 0
    assert gradient[:, :, 4:8].abs().min() > 0


@torch.no_grad()
def test_kept_patches_have_the_vectors_they_have_among_all(vision: VisionEmbedding, close: Close) -> None:
    images = torch.randn(2, 3, 12, 8)
    mask = torch.tensor([[False, True, False, False, True, False], [True, False, False, True, False, False]])
    kept = torch.tensor([[4, 0], [3, 5]])
    everything = vision(images, mask).view(2, 7, -1)
    few = vision(images, mask, kept).view(2, 3, -1)
    close(few[:, 0], everything[:, 0])
    for image in range(2):
        close(few[image, 1:], everything[image, kept[image] + 1])


@torch.no_grad()
def test_keeping_every_patch_changes_nothing_and_order_moves_the_rows(
    tiny: ModelConfig, make: Callable[..., MultiwayTransformer], close: Close
) -> None:
    model = make(tiny).eval()
    images, order = torch.randn(2, 3, 12, 8), torch.tensor([[5, 2, 0, 1, 4, 3]] * 2)
    plain = model.forward_packed(PackedBatch(images=images)).image_rows()
    moved = model.forward_packed(PackedBatch(images=images, kept_patches=order)).image_rows()
    close(moved[:, 0], plain[:, 0])
    close(moved[:, 1:], plain[:, 1:][:, order[0]])


def test_positions_are_resampled_as_the_released_code_does(close: Close) -> None:
    table = torch.randn(3 + 4 * 4, 5)
    # The released recipe: first three rows kept, the rest a square grid, bicubic, corners not aligned.
    grid = table[3:].reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:3], resized.permute(0, 2, 3, 1).reshape(36, 5)])
    close(resample_positions(table, (4, 4), (6, 6)), expected)


def test_a_constant_along_columns_stays_constant_in_rectangular_grids(close: Close) -> None:
    rows = torch.arange(3, dtype=torch.float32)
    table = torch.cat([torch.zeros(3, 1), rows.repeat_interleave(2)[:, None]])  # a 3 x 2 grid: value = row
    resampled = resample_positions(table, (3, 2), (3, 5))
    close(resampled[3:], rows.repeat_interleave(5)[:, None])


def test_the_native_size_reads_the_table_itself() -> None:
    table = torch.randn(9, 4)
    assert resample_positions(table, (2, 3), (2, 3)) is table


def test_a_table_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 9 rows, a 2x2 grid needs 3 more rows"):
        resample_positions(torch.randn(9, 4), (2, 2), (3, 3))


def test_an_image_of_another_size_uses_resampled_positions(
    tiny: ModelConfig, make: Callable[..., MultiwayTransformer], close: Close
) -> None:
    images = torch.randn(2, 3, 20, 16)
    model = make(tiny).eval()
    native = make(tiny, image_size=(20, 16)).eval()
    state = model.state_dict()
    name = "vision_embedding.positions"
    state[name] = resample_positions(state[name], (3, 2), (5, 4))
    native.load_state_dict(state)
    with torch.no_grad():
        ours, expected = model(images).vision, native(images).vision
    assert ours is not None
    assert ours.shape == (2, 21, 32)
    close(ours, expected)


def test_an_image_that_no_patches_fill_is_refused(vision: VisionEmbedding) -> None:
    with pytest.raises(ValueError, match="image size 12x9 does not divide by the patch size 4"):
        vision(torch.randn(1, 3, 12, 9), None)


def test_every_text_starts_at_row_two_of_its_table(tiny: ModelConfig, close: Close) -> None:
    embedding = TextEmbedding(replace(tiny, width=4, num_heads=1))
    with torch.no_grad():
        embedding.positions.normal_()
    ids = torch.tensor([5, 6, 7])
    expected: Tensor = embedding.words.weight[ids] + embedding.positions[torch.tensor([2, 3, 2])]
    close(embedding(ids, torch.tensor([0, 1, 0])), expected)
