"""Tokens into vectors: patches, words, and positions in the official layout.

Shapes: Bi images, P patch side, (h, w) patches down and across, N = h w, D width, Nt packed text tokens.

Position tables keep the two dead rows of the official files (offset 2): the image class token reads row 2, patches
read rows 3 to N + 2, and the tokens of every text start again at row 2 of the text table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.presets import POSITION_OFFSET, ModelConfig

_FIRST_PATCH = POSITION_OFFSET + 1


def resample_positions(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize a vision position table to another grid, as the official code does: bicubic, first three rows kept.

    Args:
        table: (3 + source h w, D).
        source: rows and columns of patches the table was made for.
        target: rows and columns wanted.

    Returns:
        (3 + target h w, D), of the table's type; the work is done in fp32.
    """
    if source == target:
        return table
    if table.shape[0] != _FIRST_PATCH + source[0] * source[1]:
        raise ValueError(f"position table has {table.shape[0]} rows, a {source[0]}x{source[1]} grid needs 3 more rows")
    grid = table[_FIRST_PATCH:].float().T.reshape(1, -1, *source)
    resized = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return torch.cat([table[:_FIRST_PATCH], resized.flatten(2)[0].T.to(table.dtype)])


def cut_patches(images: Tensor, side: int) -> Tensor:
    """Cut images (Bi, 3, H, W) into patches (Bi, N, 3 P P), row by row, channels first as in a convolution."""
    count, channels, height, width = images.shape
    grid = (height // side, width // side)
    # (Bi, 3, h, P, w, P) -> (Bi, h, w, 3, P, P)
    cut = images.view(count, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(count, grid[0] * grid[1], channels * side * side)


class VisionEmbedding(nn.Module):
    """Patches as one linear map, mask token, class token, positions: (Bi, 3, H, W) -> (Bi (1 + N), D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.grid
        self.patch = nn.Linear(3 * config.patch_size**2, config.width)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(_FIRST_PATCH + config.num_patches, config.width))

    def forward(self, images: Tensor, image_mask: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Embed images.

        Args:
            images: (Bi, 3, H, W) float; H and W divide by the patch side.
            image_mask: (Bi, N) bool, True = replace the patch by the mask token.
            kept: (Bi, n) int64, patches that enter, in this order; None: all N.

        Returns:
            (Bi (1 + N), D), or (Bi (1 + n), D): class token, then patches row by row.
        """
        side = self.patch_size
        count, _, height, width = images.shape
        if height % side or width % side:
            raise ValueError(f"image size {height}x{width} does not divide by the patch size {side}: resize the images")
        grid = (height // side, width // side)
        wanted = (count, grid[0] * grid[1])
        if image_mask is not None and (image_mask.dtype != torch.bool or image_mask.shape != wanted):
            raise ValueError(f"image_mask must be bool {wanted}, not {image_mask.dtype} {tuple(image_mask.shape)}")
        pixels = cut_patches(images, side)
        if kept is not None:
            pixels = pixels.gather(1, kept[..., None].expand(-1, -1, pixels.shape[2]))
            image_mask = None if image_mask is None else image_mask.gather(1, kept)
        patches: Tensor = self.patch(pixels)
        positions = resample_positions(self.positions, self.grid, grid).to(patches.dtype)
        if image_mask is not None:
            patches = torch.where(image_mask[..., None], self.mask_token.to(patches.dtype), patches)
        cls = (self.cls_token + positions[POSITION_OFFSET]).to(patches.dtype).expand(count, 1, -1)
        places = positions[_FIRST_PATCH:] if kept is None else F.embedding(kept + _FIRST_PATCH, positions)
        return torch.cat([cls, patches + places], dim=1).flatten(0, 1)


class TextEmbedding(nn.Module):
    """Word vectors plus positions: (Nt,) -> (Nt, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.max_text_positions, config.width))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed packed tokens.

        Args:
            ids: (Nt,) int64.
            positions: (Nt,) int64, place of the token in its text, from 0.
        """
        out: Tensor = self.words(ids) + F.embedding(positions + POSITION_OFFSET, self.positions)
        return out
