"""Accuracy: of classes (top k), and of sentences about two images (NLVR2).

Shapes: n samples, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from beit3.errors import ConfigError


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes go before the right one; 0 where it comes first.

    Of equal scores the lower class goes first, as in argmax. A score that is not a number goes before all others, so
    that a broken model never looks right. Ranks of many batches, or of many processes, may be joined.

    Args:
        scores: (n, C), higher is better.
        labels: (n,) int64, the right class.

    Returns:
        (n,) int64 in 0..C.
    """
    right = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = ~(scores <= right) | ((scores == right) & (classes < labels[:, None]))
    return before.sum(dim=1)


def topk_accuracy(ranks: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of samples with the right class among the k best.

    Args:
        ranks: (n,) int64 from `class_ranks`.
        ks: the k.

    Returns:
        `acc1`, `acc5`, ... in 0..1.
    """
    if not len(ranks):
        raise ConfigError("accuracy: no samples; give at least one")
    return {f"acc{k}": int((ranks < k).sum()) / len(ranks) for k in ks}


def nlvr2_parts(identifier: str) -> tuple[str, str, str, str]:
    """Split, set of pictures, pair and sentence of an identifier as published ("test1-0-1-0").

    Raises:
        ConfigError: it has another form.
    """
    parts = identifier.rsplit("-", 3)
    if len(parts) != 4 or not all(parts):
        raise ConfigError(f'NLVR2 identifier "{identifier}": write split-set-pair-sentence (test1-0-1-0)')
    split, pictures, pair, sentence = parts
    return split, pictures, pair, sentence


def nlvr2_accuracy(correct: Sequence[bool], identifiers: Sequence[str]) -> dict[str, float]:
    """Accuracy and consistency of NLVR2: sentences for which every pair of images is judged right.

    Args:
        correct: whether the judgement of each example is right.
        identifiers: of each example, `split-set-pair-sentence` as published ("test1-0-1-0"); examples whose
            identifiers differ only in the pair share their sentence.

    Returns:
        `accuracy` over examples and `consistency` over sentences, in 0..1.

    Raises:
        ConfigError: no examples, an identifier in another form, or one that comes twice.

    Source: Suhr et al., ACL 2019, arXiv 1811.00491, and its evaluation script (`nlvr2/eval/metrics.py`).
    """
    if not identifiers:
        raise ConfigError("NLVR2 accuracy: no examples; give at least one")
    name, times = Counter(identifiers).most_common(1)[0]
    if times > 1:
        raise ConfigError(f'NLVR2 accuracy: identifier "{name}" comes {times} times; count each example once')
    consistent: dict[tuple[str, str, str], bool] = {}
    for right, identifier in zip(correct, identifiers, strict=True):
        split, pictures, _, sentence = nlvr2_parts(identifier)
        consistent[split, pictures, sentence] = consistent.get((split, pictures, sentence), True) and bool(right)
    return {
        "accuracy": sum(map(bool, correct)) / len(identifiers),
        "consistency": sum(consistent.values()) / len(consistent),
    }
