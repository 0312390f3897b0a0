"""Windowed attention of images: patches see their window and the class token, the class token sees all (ViTDet).

Shapes: B images, (h, w) patches down and across, N = h w, k side of a window in patches, D width, H heads, W = D / H.

Windows start at the top left. Where the grid does not divide by k the last ones are smaller, so that nothing is padded
and no mask is needed; windows of equal shape are computed together, four kinds at most.

Source: ViTDet (arXiv 2203.16527, section 3, "Backbone adaptation"), which has no class token. Ours is kept, as the
pretrained layers expect it, and it goes on to see everything: with one window this is plain attention, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beit3.config import require

if TYPE_CHECKING:
    from beit3.model.attention import Core


@dataclass(frozen=True, slots=True)
class Windows:
    """Which layers of an image tower see windows alone."""

    side: int
    """k, patches."""
    global_layers: frozenset[int]
    """Layers, from 1, that see the whole image."""

    @classmethod
    def spread(cls, side: int, num_layers: int, num_global: int) -> Windows:
        """Windows with global layers at equal distances, the last layer among them (ViTDet: 3, 6, 9, 12 of 12).

        Raises:
            ConfigError: there are fewer layers than that.
        """
        require(side >= 1, f"window_size must be at least 1 patch, not {side}")
        require(
            1 <= num_global <= num_layers, f"num_global_layers must lie in 1..{num_layers} (layers), not {num_global}"
        )
        return cls(side, frozenset(round(num_layers * (part + 1) / num_global) for part in range(num_global)))

    def pairs(self, grid: tuple[int, int]) -> int:
        """Pairs of tokens of an image that see each other in a layer with windows, class token included."""
        squares = [length // self.side * self.side**2 + (length % self.side) ** 2 for length in grid]
        tokens = 1 + grid[0] * grid[1]
        return squares[0] * squares[1] + 2 * tokens - 1  # patches see window and class token, that one sees all


def windowed_attention(qkv: Tensor, grid: tuple[int, int], side: int, num_heads: int, core: Core) -> Tensor:
    """Let patches attend within their windows.

    Args:
        qkv: (B (1 + N), 3D) projections of images alone, q, k, v side by side.
        grid: (h, w).
        side: k.
        num_heads: H.
        core: dense attention of equally long sequences.

    Returns:
        (B (1 + N), D) mixed values.
    """
    rows = qkv.unflatten(0, (-1, 1 + grid[0] * grid[1]))  # (B, 1 + N, 3D)
    cls, patches = rows[:, :1], rows[:, 1:].unflatten(1, grid)  # (B, 1, 3D), (B, h, w, 3D)
    (query, _, _), (_, keys, values) = _heads(cls, num_heads), _heads(rows, num_heads)
    mixed_cls = core(query, keys, values).transpose(1, 2).flatten(2)  # (B, 1, D)
    bands = [
        [
            _in_windows(patches[:, top:bottom, left:right], cls, side, num_heads, core)
            for left, right in _spans(grid[1], side)
        ]
        for top, bottom in _spans(grid[0], side)
    ]
    mixed = torch.cat([torch.cat(band, dim=2) for band in bands], dim=1)  # (B, h, w, D)
    return torch.cat([mixed_cls, mixed.flatten(1, 2)], dim=1).flatten(0, 1)


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """The part of a side that divides into windows, and what is left over."""
    whole = length // side * side
    return [span for span in ((0, whole), (whole, length)) if span[0] < span[1]]


def _in_windows(part: Tensor, cls: Tensor, side: int, num_heads: int, core: Core) -> Tensor:
    """Attend within the windows of a part (B, a, b, 3D) of the grid, all of one shape: (B, a, b, D)."""
    count, height, width, _ = part.shape
    tall, wide = min(side, height), min(side, width)
    down, across = height // tall, width // wide
    cut = part.unflatten(2, (across, wide)).unflatten(1, (down, tall)).transpose(2, 3)  # (B, down, across, k, k, 3D)
    cut = cut.reshape(count, down * across, tall * wide, -1)
    seen = torch.cat([cls[:, None].expand(-1, down * across, -1, -1), cut], dim=2).flatten(0, 1)
    (_, keys, values), (queries, _, _) = _heads(seen, num_heads), _heads(cut.flatten(0, 1), num_heads)
    mixed = core(queries, keys, values).transpose(1, 2).flatten(2)  # (B windows, k k, D)
    back = mixed.view(count, down, across, tall, wide, -1).transpose(2, 3)
    return back.reshape(count, height, width, -1)


def _heads(rows: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, T, 3D) to q, k, v of (n, H, T, W)."""
    q, k, v = rows.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
