"""Zero-shot metrics by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from beit3.errors import ConfigError
from beit3.metrics import zero_shot
from beit3.metrics.zero_shot import class_vectors, token_zero_shot, zero_shot_accuracy

NAMES = ["cat", "{odd} name", "dog"]
TEMPLATES = ("a photo of a {}.", "{}", "many {} and a {}")


def embed(texts: list[str]) -> Tensor:
    """Letters counted, so that every prompt has a vector of its own length and direction."""
    return torch.tensor([[text.count(letter) + 0.1 * len(text) for letter in "acdgmnopt"] for text in texts])


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def test_a_class_is_the_mean_direction_of_its_prompts() -> None:
    found = class_vectors(embed, NAMES, TEMPLATES)
    for name, vector in zip(NAMES, found, strict=True):
        prompts = [f"a photo of a {name}.", name, f"many {name} and a {name}"]
        units = [unit(embed([prompt])[0].tolist()) for prompt in prompts]
        mean = [sum(column) / 3 for column in zip(*units, strict=True)]
        assert vector.tolist() == pytest.approx(unit(mean), abs=1e-6)


def test_prompts_that_name_no_class_are_refused() -> None:
    for names, templates, message in (
        ([], TEMPLATES, "at least one class name"),
        (NAMES, [], "at least one class name and one prompt"),
        (NAMES, ["{}", "a photo"], "'a photo' has no {}"),
    ):
        with pytest.raises(ConfigError, match=message):
            class_vectors(embed, names, templates)


def test_accuracy_counts_the_classes_that_are_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "_ROWS", 7)
    images, classes = torch.randn(40, 5), torch.nn.functional.normalize(torch.randn(9, 5), dim=-1)
    labels = torch.randint(0, 9, (40,))
    found = zero_shot_accuracy(images, classes, labels)
    right = {1: 0, 5: 0}
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        scores = [sum(x * y for x, y in zip(image, row, strict=True)) for row in classes.tolist()]
        best = sorted(range(9), key=lambda j: -scores[j])
        for k in right:
            right[k] += label in best[:k]
    assert found == {"zero_shot_acc1": right[1] / 40, "zero_shot_acc5": right[5] / 40}
    assert 0 < right[1] < right[5] < 40


def test_words_are_weighted_means_of_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "_ROWS", 2)
    log_probs = torch.randn(5, 12).log_softmax(-1)
    weights = torch.rand(12)
    weights[[3, 4]] = 0.0
    names = [[1, 2, 2, 1], [5], [3, 7, 11], [3, 4], [3, 3, 0, 9]]
    found = token_zero_shot(log_probs, names, weights)
    assert found.shape == (5, 5)
    for row in range(5):
        for column, name in enumerate(names):
            words = set(name)
            shares = {c: weights[c].item() for c in words}
            if not sum(shares.values()):
                shares = dict.fromkeys(words, 1.0)
            expected = sum(w * log_probs[row, c].item() for c, w in shares.items()) / sum(shares.values())
            assert found[row, column].item() == pytest.approx(expected, rel=1e-5)


def test_a_name_without_words_comes_last_and_an_impossible_word_of_no_weight_excludes_nothing() -> None:
    log_probs = torch.tensor([[-1.0, -torch.inf, -2.0]])
    scores = token_zero_shot(log_probs, [[], [0, 1], [2]], torch.tensor([1.0, 0.0, 1.0]))
    assert scores.tolist() == [[-math.inf, -1.0, -2.0]]
