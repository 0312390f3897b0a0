"""Recall at k of image-text retrieval.

Shapes: n queries, m candidates, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3.errors import ConfigError

_ROWS = 1024
"""Queries compared with all candidates at once."""
_NO_MATCH = torch.iinfo(torch.int64).max


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
    return recall_of_ranks(match_ranks(scores, query_labels, candidate_labels), ks)


def match_ranks(scores: Tensor, query_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """How many wrong candidates go before the nearest matching one; 0 where a match comes first.

    A query may have several matches, as an image has several captions: the nearest counts. A wrong candidate with an
    equal score, or with one that is not a number, goes before: ties never help. Ranks of shares of the queries may be
    joined, so that the whole of `scores` need not exist at once.

    Args:
        scores: (n, m), higher is nearer.
        query_labels: (n,) int64.
        candidate_labels: (m,) int64; a candidate matches a query of the same label.

    Returns:
        (n,) int64; the largest number there is for a query without a match.
    """
    matches = query_labels[:, None] == candidate_labels[None]
    best = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~(scores < best) & ~matches).sum(dim=1)
    # A match whose score is not a number is none.
    return ahead.masked_fill(~matches.any(dim=1) | best[:, 0].isnan(), _NO_MATCH)


def feature_ranks(queries: Tensor, query_labels: Tensor, candidates: Tensor, candidate_labels: Tensor) -> Tensor:
    """`match_ranks` by the dot product of features, a share of the queries at a time.

    Args:
        queries: (n, D).
        query_labels: (n,) int64, for COCO and Flickr30k the image's number.
        candidates: (m, D).
        candidate_labels: (m,) int64.

    Returns:
        (n,) int64.
    """
    wanted = candidates.float().T
    shares = zip(queries.split(_ROWS), query_labels.split(_ROWS), strict=True)
    return torch.cat([match_ranks(rows.float() @ wanted, labels, candidate_labels) for rows, labels in shares])


def recall_of_ranks(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with fewer than k wrong candidates before the nearest match.

    Args:
        ranks: (n,) int64 from `match_ranks` or `feature_ranks`.
        ks: the k.

    Returns:
        `r1`, `r5`, ... in 0..1.
    """
    if not len(ranks):
        raise ConfigError("recall: no queries; give at least one")
    return {f"r{k}": int((ranks < k).sum()) / len(ranks) for k in ks}


def dual_recall(images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall both ways among pairs; equal captions are one candidate, and any of their pictures is right.

    Args:
        images: (n, D) unit vectors.
        texts: (n, D) unit vectors, row i belongs to image i.
        labels: (n,) int64, equal for equal captions.

    Returns:
        `image_to_text_r1`, `_r5`, `_r10`, and the same of `text_to_image`.
    """
    unique, inverse = labels.unique(return_inverse=True)
    places = torch.arange(len(labels), device=labels.device)
    first = torch.full_like(unique, len(labels)).scatter_reduce(0, inverse, places, "amin")
    with torch.autocast(images.device.type, enabled=False):  # half precision makes ties, and ties never help
        scores = images.float() @ texts[first].float().T
    to_text, to_image = recall_at_k(scores, labels, unique), recall_at_k(scores.T, unique, labels)
    return {f"image_to_text_{name}": value for name, value in to_text.items()} | {
        f"text_to_image_{name}": value for name, value in to_image.items()
    }
