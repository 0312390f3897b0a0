"""Probes of frozen features: equal to scikit-learn's on the same rows, and right where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.metrics.probe import fit_logistic, knn_accuracy, linear_accuracy

CLASSES = 5


def blobs(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overlapping classes in eight features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    rows = centers[labels] + spread * torch.randn(count, 8, generator=generator)
    return rows * torch.logspace(-1, 1, 8), labels


@pytest.mark.parametrize("k", [1, 7, 20])
def test_neighbours_against_sklearn(k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, labels), (test, wanted) = blobs(300, 0), blobs(200, 1)

    def weigh(distance: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.exp((1 - distance) / 0.07)
        return weights

    model = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh)
    model.fit(train.double().numpy(), labels.numpy())
    expected = model.score(test.double().numpy(), wanted.numpy())
    assert 0.3 < expected < 0.95
    assert knn_accuracy(train, labels, test, wanted, k=k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_against_sklearn(penalty: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    train, labels = blobs(300, 0)
    train = F.normalize(train, dim=0) * math.sqrt(len(train))
    model = linear.LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=5000)
    model.fit(train.double().numpy(), labels.numpy())
    weight, bias = fit_logistic(train, labels, penalty)
    torch.testing.assert_close(weight, torch.from_numpy(model.coef_).float(), rtol=2e-2, atol=5e-3)
    shift = bias - bias.mean()
    torch.testing.assert_close(shift, torch.from_numpy(model.intercept_).float(), rtol=2e-2, atol=5e-3)


def test_neighbours_are_found_by_direction_not_length() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    test = torch.tensor([[100.0, 1.0], [0.01, 0.1]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1]), k=1) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([1, 0]), k=1) == 0.0


def test_near_neighbours_outvote_more_distant_ones() -> None:
    angles = torch.tensor([0.05, 0.9, 1.0, 1.1])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=4) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=4, temperature=100.0) == 1.0


def test_many_test_rows_are_compared_in_parts() -> None:
    train, labels = blobs(50, 0, spread=0.01)
    test, wanted = blobs(2500, 1, spread=0.01)
    assert knn_accuracy(train, labels, test, wanted, k=3) == 1.0


def test_a_linear_probe_is_blind_to_scale_and_shift_of_features() -> None:
    (train, labels), (test, wanted) = blobs(300, 0), blobs(200, 1)
    scale, shift = torch.logspace(-3, 3, 8), torch.arange(8.0)
    first = linear_accuracy(train, labels, test, wanted)
    second = linear_accuracy(train * scale + shift * scale, labels, test * scale + shift * scale, wanted)
    assert first == pytest.approx(second, abs=0.011)
    assert first > 0.5


def test_labels_at_random_are_not_learned() -> None:
    train, test = torch.randn(400, 4), torch.randn(2000, 4)
    labels, wanted = torch.randint(4, (400,)), torch.randint(4, (2000,))
    for accuracy in (linear_accuracy(train, labels, test, wanted), knn_accuracy(train, labels, test, wanted)):
        assert 0.18 < accuracy < 0.32


def test_a_constant_feature_does_no_harm() -> None:
    train, labels = blobs(200, 0, spread=0.3)
    padded = torch.cat([train, torch.ones(200, 1)], dim=1)
    assert linear_accuracy(padded, labels, padded, labels) > 0.9
