"""How much a frozen model's features know of a class: nearest neighbours, a few examples, a linear classifier.

Shapes: n training rows, m test rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024
"""Test rows compared with the training rows at once."""
_BIAS = 100.0
"""Value of the constant feature: so large that its weight is hardly penalised."""
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


class FewShot(NamedTuple):
    """Accuracies of few-shot classifiers, 0..1."""

    mean: float
    by_seed: tuple[float, ...]


def few_shot_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    shots: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
    penalty: float = 2.0**10,
) -> FewShot:
    """Share of test rows that ridge regression on a few rows of each class names right.

    Solved exactly in float64 on the CPU. The features are standardised by mean and deviation of the chosen rows.

    Args:
        train: (n, D) float.
        train_labels: (n,) int64.
        test: (m, D) float.
        test_labels: (m,) int64.
        shots: rows of each class; all of a class that has fewer.
        seeds: each draws rows of its own, by numpy's `default_rng`, so the order of the rows matters.
        penalty: of the squared norm of the weights.

    Source: `fewshot_lsr` of big_vision, the evaluation of CapPa (arXiv 2306.07915) and SuperClass (arXiv 2411.03313).
    """
    train, train_labels, test, test_labels = (part.cpu() for part in (train, train_labels, test, test_labels))
    classes = int(train_labels.max()) + 1
    accuracies = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        of_each = (np.flatnonzero(train_labels.numpy() == number) for number in range(classes))
        chosen = torch.from_numpy(np.concatenate([rng.permutation(rows)[:shots] for rows in of_each]))
        support = train[chosen].double()
        mean, deviation = support.mean(dim=0), support.std(dim=0, correction=0) + 1e-5
        targets = 2 * F.one_hot(train_labels[chosen], classes).double() - 1
        weight = _solve_ridge(F.pad((support - mean) / deviation, (0, 1), value=_BIAS), targets, penalty)
        right = 0
        for rows, labels in zip(test.split(_CHUNK), test_labels.split(_CHUNK), strict=True):
            scores = F.pad((rows.double() - mean) / deviation, (0, 1), value=_BIAS) @ weight
            right += int((scores.argmax(dim=1) == labels).sum())
        accuracies.append(right / len(test))
    return FewShot(sum(accuracies) / len(accuracies), tuple(accuracies))


def _solve_ridge(rows: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Weights (D, C) that minimise the squared error plus `penalty` times their squared norm."""
    by_feature = len(rows) >= rows.shape[1]  # the smaller of the two Gram matrices
    values, vectors = torch.linalg.eigh(rows.T @ rows if by_feature else rows @ rows.T)
    projected = vectors.T @ (rows.T @ targets if by_feature else targets)
    weight: Tensor = vectors @ (projected / (values + penalty)[:, None])
    return weight if by_feature else rows.T @ weight


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
        """Cross-entropy with the penalty on the weight; leaves its gradients behind."""
        solver.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())
