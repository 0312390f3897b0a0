"""Probes of frozen features: equal to scikit-learn's on the same rows, and right where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.metrics.probe import few_shot_accuracy, fit_logistic, knn_accuracy, linear_accuracy

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


def test_the_linear_probe_against_sklearn_on_standardised_features() -> None:
    linear, scaling = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.preprocessing")
    (train, labels), (test, wanted) = blobs(300, 0), blobs(2000, 1)
    scaler = scaling.StandardScaler().fit(train.double().numpy())
    model = linear.LogisticRegression(C=1 / (1e-2 * len(train)), tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(train.double().numpy()), labels.numpy())
    expected = model.score(scaler.transform(test.double().numpy()), wanted.numpy())
    assert linear_accuracy(train, labels, test, wanted, penalties=(1e-2,)) == pytest.approx(expected, abs=2e-3)


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


def few_shot_reference(
    train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor, shots: int, seed: int, solver: str
) -> float:
    """big_vision's recipe in numpy, with somebody else's solver in the place of its eigendecomposition."""
    x, y = train.double().numpy(), labels.numpy()
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.where(y == number)[0])[:shots] for number in range(CLASSES)])
    mean, deviation = x[chosen].mean(0), x[chosen].std(0) + 1e-5
    support = np.pad((x[chosen] - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
    query = np.pad((test.double().numpy() - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
    targets = 2.0 * np.eye(CLASSES)[y[chosen]] - 1.0
    if solver == "sklearn":
        linear = pytest.importorskip("sklearn.linear_model")
        predicted = linear.Ridge(alpha=1024.0, fit_intercept=False, solver="cholesky").fit(support, targets)
        scores = predicted.predict(query)
    else:
        normal = support.T @ support + 1024.0 * np.eye(support.shape[1])
        scores = query @ np.linalg.solve(normal, support.T @ targets)
    return float((scores.argmax(1) == wanted.numpy()).mean())


@pytest.mark.parametrize("solver", ["sklearn", "solve"])
@pytest.mark.parametrize("shots", [1, 10])
def test_few_shots_against_other_solvers(shots: int, solver: str) -> None:
    """One row of each class is fewer rows than features, ten are more: both ways of solving are taken."""
    (train, labels), (test, wanted) = blobs(300, 0), blobs(2000, 1)
    found = few_shot_accuracy(train, labels, test, wanted, shots=shots, seeds=(0, 1, 2, 3))
    expected = [few_shot_reference(train, labels, test, wanted, shots, seed, solver) for seed in range(4)]
    assert found.by_seed == pytest.approx(expected, abs=1e-12)
    assert found.mean == pytest.approx(sum(expected) / 4)
    assert len(set(found.by_seed)) > 1, "each seed chooses rows of its own"
    assert 0.3 < found.mean < 0.95


def test_few_shots_take_all_rows_of_a_small_class_and_skip_numbers_without_rows() -> None:
    train, labels = torch.tensor([[0.0, 1.0], [0.1, 1.1], [5.0, -1.0]]), torch.tensor([0, 0, 3])
    test = torch.tensor([[0.0, 1.2], [5.1, -0.9]])
    assert few_shot_accuracy(train, labels, test, torch.tensor([0, 3]), penalty=1.0).by_seed == (1.0, 1.0, 1.0)


def test_few_shots_leave_the_generators_alone() -> None:
    (train, labels), (test, wanted) = blobs(60, 0), blobs(20, 1)
    few_shot_accuracy(train, labels, test, wanted)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(drawn[0], torch.rand(3))
    assert (drawn[1] == np.random.rand(3)).all()
