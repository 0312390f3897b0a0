"""Zero-shot classification: by vectors of class names (CLIP), and by the words of class names (SuperClass).

Shapes: n pictures, C classes, D features, V vocabulary, K subwords of all class names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.errors import ConfigError
from beit3.metrics.accuracy import class_ranks, topk_accuracy

_ROWS = 1024
"""Pictures compared with all classes at once."""


def class_vectors(embed: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Turn class names into vectors: the mean of the unit vectors of their prompts, brought to unit length again.

    Args:
        embed: texts to (texts, D) of any length, such as `Predictor.embed_texts`.
        names: of the classes.
        templates: texts with `{}` in the place of the name (`beit3.data.prompts`).

    Returns:
        (C, D) float32.

    Raises:
        ConfigError: there is no name or no template, or a template lacks `{}`.

    Source: CLIP (arXiv 2103.00020), section 3.1.4, "prompt engineering and ensembling".
    """
    if not names or not templates:
        raise ConfigError("zero-shot: give at least one class name and one prompt template")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"zero-shot: the template '{template}' has no {{}} where the name belongs")
    total = torch.zeros(())
    for template in templates:
        vectors = embed([template.replace("{}", name) for name in names])
        total = total.to(vectors.device) + F.normalize(vectors.float(), dim=-1)
    return F.normalize(total, dim=-1)


def zero_shot_accuracy(images: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of pictures with the right class among the k whose vectors are nearest.

    Args:
        images: (n, D) vectors of pictures.
        classes: (C, D) unit vectors of `class_vectors`.
        labels: (n,) int64, the right class.
        ks: the k.

    Returns:
        `zero_shot_acc1`, `zero_shot_acc5`, ... in 0..1.
    """
    shares = zip(images.split(_ROWS), labels.split(_ROWS), strict=True)
    ranks = [class_ranks(rows.float() @ classes.float().T, right) for rows, right in shares]
    return {f"zero_shot_{name}": value for name, value in topk_accuracy(torch.cat(ranks), ks).items()}


def token_zero_shot(log_probs: Tensor, class_ids: Sequence[Sequence[int]], weights: Tensor) -> Tensor:
    """Score classes by the subwords of their names: the weighted mean of the subwords' log-probabilities.

        score_j = sum_k w_k log p(c_k | picture) / sum_k w_k         over the distinct subwords c_k of name j

    Where all subwords of a name weigh nothing, they count alike. A name without subwords scores minus infinity.

    Args:
        log_probs: (n, V) float, of the SuperClass head.
        class_ids: subwords of each name.
        weights: (V,) float, not negative, such as the inverse document frequencies of the training captions.

    Returns:
        (n, C) float32, higher is better.
    """
    device = log_probs.device
    words = [sorted(set(ids)) for ids in class_ids]
    lengths = torch.tensor([len(ids) for ids in words], device=device)
    owners = torch.arange(len(words), device=device).repeat_interleave(lengths)  # (K,)
    ids = torch.tensor([i for row in words for i in row], dtype=torch.int64, device=device)
    shares = weights.to(device).float()[ids]
    totals = torch.zeros(len(words), device=device).index_add(0, owners, shares)
    shares = torch.where(totals[owners] > 0, shares / totals[owners], 1 / lengths[owners])
    kept = shares > 0  # an impossible word of no weight is no reason against a class
    ids, owners, shares = ids[kept], owners[kept], shares[kept]
    scores = [
        torch.zeros(len(rows), len(words), device=device).index_add(1, owners, rows[:, ids].float() * shares)
        for rows in log_probs.split(_ROWS)
    ]
    return torch.cat(scores).masked_fill(lengths == 0, -torch.inf)
