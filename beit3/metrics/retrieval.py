"""Recall at k of image-text retrieval.

Shapes: n queries, m candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at_k(
    scores: Tensor, query_labels: Tensor, candidate_labels: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Share of queries with a matching candidate among their k best.

    Args:
        scores: (n, m), higher is nearer.
        query_labels: (n,) int64.
        candidate_labels: (m,) int64; a candidate matches a query of the same label.
        ks: the k.

    Returns:
        `r1`, `r5`, ... in 0..1.
    """
    matches = query_labels[:, None] == candidate_labels[None]
    best = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
    # A wrong candidate with an equal score counts as nearer: ties never help.
    ahead = ((scores >= best) & ~matches).sum(dim=1)
    found = matches.any(dim=1)
    return {f"r{k}": float(((ahead < k) & found).float().mean()) for k in ks}
