"""Mean IoU against counts class by class, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as scikit  # type: ignore[import-untyped]

from beit3.errors import ConfigError
from beit3.metrics.mean_iou import class_iou, confusion, mean_iou


def draw(num_classes: int, labelled: int, predicted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (5, 9, 11) with ignored pixels, and predictions, each of the first so many classes."""
    labels = torch.randint(0, labelled, (5, 9, 11))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return torch.randint(0, predicted, labels.shape), labels


@pytest.mark.parametrize(("labelled", "predicted"), [(6, 6), (4, 6), (6, 3), (2, 2)])
def test_against_a_count_of_each_class(labelled: int, predicted: int) -> None:
    """Classes that neither occur nor are predicted are left out of the means."""
    guesses, labels = draw(6, labelled, predicted)
    ious, accuracies = [], []
    for number in range(6):
        both = either = own = 0
        for guess, label in zip(guesses.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if label != 255:
                both += guess == number and label == number
                either += guess == number or label == number
                own += label == number
        ious += [both / either] if either else []
        accuracies += [both / own] if own else []
    found = mean_iou(confusion(guesses, labels, 6))
    assert found["mean_iou"] == pytest.approx(sum(ious) / len(ious))
    assert found["mean_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert len(ious) == max(labelled, predicted)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_against_scikit_learn() -> None:
    guesses, labels = draw(7, 5, 7)
    kept = labels != 255
    true, guessed = labels[kept].numpy(), guesses[kept].numpy()
    counts = confusion(guesses, labels, 7)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), scikit.confusion_matrix(true, guessed, labels=range(7)))
    np.testing.assert_allclose(
        class_iou(counts).numpy(), scikit.jaccard_score(true, guessed, labels=list(range(7)), average=None)
    )
    found = mean_iou(counts)
    assert found["mean_iou"] == pytest.approx(scikit.jaccard_score(true, guessed, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(scikit.accuracy_score(true, guessed))
    assert found["mean_accuracy"] == pytest.approx(scikit.balanced_accuracy_score(true, guessed))


def test_counts_of_pictures_add_up_to_those_of_all() -> None:
    guesses, labels = draw(4, 4, 4)
    parts = [confusion(guess, label, 4) for guess, label in zip(guesses, labels, strict=True)]
    assert torch.equal(torch.stack(parts).sum(0), confusion(guesses, labels, 4))


def test_a_class_that_never_occurs_has_no_iou() -> None:
    found = class_iou(confusion(torch.tensor([0, 2]), torch.tensor([0, 0]), 4)).tolist()
    assert found[:1] + found[2:3] == [0.5, 0.0]
    assert math.isnan(found[1])
    assert math.isnan(found[3])


def test_narrow_integers_do_not_overflow() -> None:
    labels = torch.full((3,), 200, dtype=torch.uint8)
    assert int(confusion(labels, labels, 201)[200, 200]) == 3


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(ConfigError, match=r"label 7 with 5 classes: give 0\.\.4"):
        confusion(torch.tensor([0, 0]), torch.tensor([7, 255]), 5)
    with pytest.raises(ConfigError, match="label -1 with 5 classes"):
        confusion(torch.tensor([0]), torch.tensor([-1]), 5)
    with pytest.raises(ConfigError, match="prediction 5 with 5 classes"):
        confusion(torch.tensor([5]), torch.tensor([0]), 5)
    with pytest.raises(ConfigError, match="no labelled pixels"):
        mean_iou(confusion(torch.tensor([0]), torch.tensor([255]), 5))
