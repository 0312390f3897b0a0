"""Contrastive losses over the pairs of all ranks: CLIP's softmax and SigLIP's sigmoid.

Shapes: B pairs of this rank, G pairs of all ranks, R rows of a chunk, D width. I, T (G, D) unit vectors.

    CLIP     (CE(s I T^t, diagonal) + CE(s T I^t, diagonal)) / 2                   s = exp(logit_scale)
    SigLIP   1/G sum_ij -log sigmoid(z_ij (s I T^t + b)_ij)                        z_ij = 1 for i = j, otherwise -1

Each rank answers for its own B rows. The mean of the ranks' losses is the loss of the joined batch, and so are the
gradients that DistributedDataParallel averages. The (B, G) logits are never there as a whole: R rows at a time are
computed, and computed again in the backward pass, so that memory grows with B and not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LARGEST_SCALE = math.log(100)
_LOGITS = 2**22
"""Logits of a chunk: 16 MiB of fp32."""
_RowLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits (R, G), places (R,) of the right ones, and (R, G) bool, True = no negative: the sum of the rows' losses."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Vectors of this rank, and those of all ranks that they are compared with."""

    images: Tensor
    texts: Tensor
    labels: Tensor | None
    all_images: Tensor
    all_texts: Tensor
    all_labels: Tensor | None
    first: int
    """Place of this rank's first pair among all."""


def contrastive_loss(images: Tensor, texts: Tensor, labels: Tensor | None, logit_scale: Tensor) -> dict[str, Tensor]:
    """CLIP's symmetric cross-entropy over the pairs of all ranks; gradients flow through the gathered vectors.

    Args:
        images: (B, D) unit length, equally many on every rank.
        texts: (B, D) unit length, text i belongs to image i.
        labels: (B,) int64; pairs of equal labels are no negatives of each other. None: all others are.
        logit_scale: logarithm of the scale, clamped here to that of 100.

    Returns:
        `loss`, `batch_accuracy` (image to text) and `logit_scale`.

    Source: CLIP (arXiv 2103.00020), figure 3 and section 2.5.
    """
    with torch.no_grad():
        logit_scale.clamp_(max=_LARGEST_SCALE)
    with torch.autocast(images.device.type, enabled=False):
        pairs, scale = _gather(images, texts, labels), logit_scale.exp()
        by_image, right = _sum_rows(_softmax_rows, pairs, scale, None)
        by_text, _ = _sum_rows(_softmax_rows, _turned(pairs), scale, None)
    count = len(images)
    return {"loss": (by_image + by_text) / (2 * count), "batch_accuracy": right / count, "logit_scale": scale}


def sigmoid_loss(
    images: Tensor, texts: Tensor, labels: Tensor | None, logit_scale: Tensor, logit_bias: Tensor
) -> dict[str, Tensor]:
    """SigLIP's loss over the pairs of all ranks: each image with each text is one yes or no.

    Args:
        images: (B, D) unit length, equally many on every rank.
        texts: (B, D) unit length, text i belongs to image i.
        labels: (B,) int64; an image and the text of another pair of its label count neither way. None: all count.
        logit_scale: logarithm of the scale; the paper starts at log 10.
        logit_bias: added to all logits; the paper starts at -10.

    Returns:
        `loss`, `batch_accuracy` (image to text), `logit_scale` and `logit_bias`.

    Source: SigLIP (arXiv 2303.15343), algorithm 1.
    """
    with torch.autocast(images.device.type, enabled=False):
        pairs, scale = _gather(images, texts, labels), logit_scale.exp()
        total, right = _sum_rows(_sigmoid_rows, pairs, scale, logit_bias)
    count = len(images)
    return {
        "loss": total / count,
        "batch_accuracy": right / count,
        "logit_scale": scale,
        "logit_bias": logit_bias,
    }


def _gather(images: Tensor, texts: Tensor, labels: Tensor | None) -> _Pairs:
    """Collect the vectors of all ranks, in fp32 or better, with gradients."""
    images, texts = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (images, texts))
    if not dist.is_initialized():
        return _Pairs(images, texts, labels, images, texts, labels, 0)
    all_labels = None
    if labels is not None:
        gathered = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, labels)
        all_labels = torch.cat(gathered)
    all_images, all_texts = torch.cat(dist_nn.all_gather(images)), torch.cat(dist_nn.all_gather(texts))
    return _Pairs(images, texts, labels, all_images, all_texts, all_labels, dist.get_rank() * len(images))


def _turned(pairs: _Pairs) -> _Pairs:
    """The same pairs, each text looking for its image."""
    return _Pairs(
        pairs.texts, pairs.images, pairs.labels, pairs.all_texts, pairs.all_images, pairs.all_labels, pairs.first
    )


def _sum_rows(loss: _RowLoss, pairs: _Pairs, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the losses of all images, and how many of them are nearest to their own text."""
    candidates, labels = pairs.all_texts, pairs.all_labels

    def chunk(queries: Tensor, first: int, own: Tensor | None, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The two sums of some rows."""
        logits = scale * queries @ candidates.T
        logits = logits if bias is None else logits + bias
        rows = torch.arange(len(queries), device=queries.device)
        places, same = rows + first, None
        if own is not None and labels is not None:
            same = own[:, None] == labels[None]
            same[rows, places] = False
        nearest = (logits if same is None else logits.masked_fill(same, -torch.inf)).detach().argmax(1)
        return torch.stack([loss(logits, places, same), (nearest == places).sum().to(logits.dtype)])

    total, count = pairs.images.new_zeros(2), max(1, _LOGITS // len(candidates))
    for start in range(0, len(pairs.images), count):
        rows = slice(start, start + count)
        own = None if pairs.labels is None else pairs.labels[rows]
        arguments = (pairs.images[rows], pairs.first + start, own, scale, bias)
        total = total + checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total[0], total[1].detach()


def _softmax_rows(logits: Tensor, places: Tensor, same: Tensor | None) -> Tensor:
    if same is not None:
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, places, reduction="sum")


def _sigmoid_rows(logits: Tensor, places: Tensor, same: Tensor | None) -> Tensor:
    signs = torch.full_like(logits, -1.0).scatter_(1, places[:, None], 1.0)
    losses = -F.logsigmoid(signs * logits)
    return (losses if same is None else losses.masked_fill(same, 0.0)).sum()
