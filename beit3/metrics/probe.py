"""How much a frozen model's features know of a class: nearest neighbours and a linear classifier.

Shapes: n training rows, m test rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024
"""Test rows compared with the training rows at once."""
_FOLDS = 5
_MOST_ITERATIONS = 500


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test rows that their k nearest training rows name right.

    Neighbours are found by cosine similarity s and vote with exp(s / temperature).

    Args:
        train: (n, D) float.
        train_labels: (n,) int64.
        test: (m, D) float.
        test_labels: (m,) int64.
        k: neighbours; all training rows where there are fewer.
        temperature: of the votes.

    Source: Wu et al., arXiv 1805.01978, section 3.4; the evaluation of DINO.
    """
    train, classes = F.normalize(train.float(), dim=-1), int(train_labels.max()) + 1
    right = 0
    for rows, labels in zip(F.normalize(test.float(), dim=-1).split(_CHUNK), test_labels.split(_CHUNK), strict=True):
        nearest, places = (rows @ train.T).topk(min(k, len(train)), dim=1)
        votes = (nearest / temperature).softmax(dim=1)  # a constant factor of exp changes no winner
        scores = votes.new_zeros(len(rows), classes).scatter_add_(1, train_labels[places], votes)
        right += int((scores.argmax(dim=1) == labels).sum())
    return right / len(test)


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
) -> float:
    """Share of test rows that logistic regression on standardised features names right.

    Args:
        train: (n, D) float; mean and deviation of every feature are taken from here.
        train_labels: (n,) int64.
        test: (m, D) float.
        test_labels: (m,) int64.
        penalties: weights of the squared norm; the best on a fifth of the training rows is used on all of them.
    """
    mean, deviation = train.float().mean(dim=0), train.float().std(dim=0).clamp_min(1e-6)
    train, test = (train.float() - mean) / deviation, (test.float() - mean) / deviation
    best = penalties[0]
    if len(penalties) > 1:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
        held, kept = order[: len(train) // _FOLDS], order[len(train) // _FOLDS :]
        scores = []
        for penalty in penalties:
            weight, bias = fit_logistic(train[kept], train_labels[kept], penalty)
            scores.append(_accuracy(train[held] @ weight.T + bias, train_labels[held]))
        best = penalties[max(range(len(penalties)), key=scores.__getitem__)]
    weight, bias = fit_logistic(train, train_labels, best)
    return _accuracy(test @ weight.T + bias, test_labels)


def fit_logistic(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus `penalty` / 2 times the squared norm of the weights (L-BFGS).

    Args:
        features: (n, D) float.
        labels: (n,) int64.
        penalty: of the weights; the bias is free.

    Returns:
        weight (C, D), bias (C,).
    """
    classes = int(labels.max()) + 1
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_MOST_ITERATIONS, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())
