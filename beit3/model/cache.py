"""Attention of decoding: what images and earlier words contributed is kept, layer by layer, and not computed again.

Shapes: B images, n = B x beams texts, T words remembered, t new tokens, Nv rows of one image, D width, H heads, W head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.model.packing import Layout


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer; the image's are held once, however many beams read them."""

    image_keys: Tensor
    """(B, H, Nv, W)"""
    image_values: Tensor
    """(B, H, Nv, W)"""
    keys: Tensor
    """(n, H, T, W) of the words so far"""
    values: Tensor
    """(n, H, T, W)"""

    @classmethod
    def empty(cls, like: Tensor) -> LayerCache:
        """Remember nothing; `like` gives device and type."""
        nothing = like.new_empty(0)
        return cls(nothing, nothing, nothing, nothing)

    @property
    def length(self) -> int:
        """T, words remembered of each text."""
        return self.keys.shape[2] if self.keys.ndim == 4 else 0

    def select(self, parents: Tensor) -> None:
        """Go on from these beams (B, K), numbered within their image."""
        images = torch.arange(parents.shape[0], device=parents.device)
        rows = (images[:, None] * (self.keys.shape[0] // parents.shape[0]) + parents).flatten()
        self.keys, self.values = self.keys[rows], self.values[rows]


def cached_attention(
    vision: Tensor, text: Tensor, layout: Layout, num_heads: int, cache: LayerCache
) -> tuple[Tensor, Tensor]:
    """Attend as with causal text, either images alone (which are remembered) or new tokens of all their texts.

    The last new token of each text stands in the place of the word to predict and is not remembered.

    Args:
        vision: (B Nv, 3D) projections of images, or no rows.
        text: (n t, 3D) projections of the new tokens, or no rows; texts of one image side by side.
        layout: images alone, or n texts of t tokens.
        num_heads: H.
        cache: of this layer; extended.

    Returns:
        (B Nv, D) and (n t, D) mixed values.
    """
    if vision.shape[0]:
        q, k, v = _heads(vision, layout.num_images, num_heads)
        cache.image_keys, cache.image_values = k.contiguous(), v.contiguous()  # every word reads them; frees q
        mixed = F.scaled_dot_product_attention(q, cache.image_keys, cache.image_values)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1), text.new_empty(0, text.shape[1] // 3)
    q, k, v = _heads(text, len(layout.text_lengths), num_heads)
    if cache.length:
        k, v = torch.cat([cache.keys, k], dim=2), torch.cat([cache.values, v], dim=2)
    cache.keys, cache.values = k[:, :, :-1], v[:, :, :-1]
    return vision.new_empty(0, vision.shape[1] // 3), _mix(q, k, v, cache).transpose(1, 2).flatten(2).flatten(0, 1)


def _mix(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    """Softmax over the image's rows and the text's at once; beams of an image share one product with its keys."""
    num_images, beams, new = cache.image_keys.shape[0], q.shape[0] // cache.image_keys.shape[0], q.shape[2]

    def by_image(x: Tensor) -> Tensor:
        """(n, H, t, .) to (B, H, beams t, .)."""
        return x.view(num_images, beams, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

    def by_text(x: Tensor) -> Tensor:
        """(B, H, beams t, .) to (n, H, t, .)."""
        return x.view(num_images, x.shape[1], beams, new, -1).transpose(1, 2).flatten(0, 1)

    scaled = q * q.shape[-1] ** -0.5
    of_image = by_text(by_image(scaled) @ cache.image_keys.transpose(-1, -2))  # (n, H, t, Nv)
    of_text = scaled @ k.transpose(-1, -2)  # (n, H, t, T + t)
    seen = torch.ones(new, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - new)
    of_text = of_text.masked_fill(~seen, -torch.inf)
    weights = torch.cat([of_image, of_text], dim=-1).softmax(dim=-1)
    on_image, on_text = weights.split([of_image.shape[-1], of_text.shape[-1]], dim=-1)
    return by_text(by_image(on_image) @ cache.image_values) + torch.matmul(on_text, v)


def _heads(stream: Tensor, sequences: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (sequences x length, 3D) as q, k, v of (sequences, H, length, W)."""
    q, k, v = stream.view(sequences, -1, 3, num_heads, stream.shape[1] // 3 // num_heads).permute(2, 0, 3, 1, 4)
    return q, k, v
