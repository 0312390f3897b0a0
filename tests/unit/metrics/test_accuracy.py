"""Accuracies against plain rankings and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from beit3.errors import ConfigError
from beit3.metrics.accuracy import class_ranks, nlvr2_accuracy, topk_accuracy


@pytest.mark.parametrize("ties", [False, True])
def test_topk_equals_a_plain_ranking(ties: bool) -> None:
    scores = torch.randint(0, 4, (200, 12)).float() if ties else torch.randn(200, 12)
    labels = torch.randint(0, 12, (200,))
    found = topk_accuracy(class_ranks(scores, labels))
    assert list(found) == ["acc1", "acc5"]
    for k in (1, 5):
        hits = 0
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            order = sorted(range(12), key=lambda place: (-row[place], place))  # stable: the lower class first
            hits += label in order[:k]
        assert found[f"acc{k}"] == hits / 200
    if not ties:
        assert found["acc1"] == int((scores.argmax(dim=1) == labels).sum()) / 200


def test_ranks_of_batches_may_be_joined() -> None:
    scores, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    parts = [class_ranks(*part) for part in zip(scores.split(8), labels.split(8), strict=True)]
    assert torch.equal(torch.cat(parts), class_ranks(scores, labels))


def test_scores_that_are_no_numbers_are_never_right() -> None:
    broken = torch.full((3, 4), math.nan)
    assert topk_accuracy(class_ranks(broken, torch.tensor([0, 1, 3])), ks=(1, 4)) == {"acc1": 0.0, "acc4": 0.0}
    partly = torch.tensor([[0.5, math.nan, 0.1]])
    assert class_ranks(partly, torch.tensor([0])).tolist() == [1]


def test_more_guesses_than_classes_are_always_right() -> None:
    assert topk_accuracy(class_ranks(torch.randn(9, 3), torch.randint(0, 3, (9,))))["acc5"] == 1


def test_nlvr2_consistency_is_over_sentences() -> None:
    """Sentence 0 of set 0 has pairs 0, 1, 2 (one wrong); its sentence 1 has pair 0 (right); set 1 has one (right).

    4 of 5 examples are right; of the 3 sentences 2 are right with all their pairs.
    """
    identifiers = ["test1-0-0-0", "test1-0-1-0", "test1-0-2-0", "test1-0-0-1", "test1-1-3-0"]
    found = nlvr2_accuracy([True, False, True, True, True], identifiers)
    assert found == {"accuracy": 4 / 5, "consistency": 2 / 3}


def test_nlvr2_sentences_of_different_splits_are_different() -> None:
    assert nlvr2_accuracy([True, False], ["dev-0-0-0", "test1-0-1-0"])["consistency"] == 1 / 2
    assert nlvr2_accuracy([True, False], ["my-dev-0-0-0", "my-test-0-0-0"])["consistency"] == 1 / 2


def test_nlvr2_in_any_order() -> None:
    identifiers = [f"dev-{i % 5}-{i % 4}-{i % 2}" for i in range(20)]  # all different
    right = [i % 3 > 0 for i in range(20)]
    order = torch.randperm(20).tolist()
    assert nlvr2_accuracy([right[i] for i in order], [identifiers[i] for i in order]) == nlvr2_accuracy(
        right, identifiers
    )


def test_nlvr2_refuses_what_it_cannot_count() -> None:
    for wrong in ("dev-0-0", "dev-0-0-", "-0-0-0"):
        with pytest.raises(ConfigError, match=f'"{wrong}": write split-set-pair-sentence'):
            nlvr2_accuracy([True], [wrong])
    with pytest.raises(ConfigError, match='"dev-0-0-0" comes 2 times'):
        nlvr2_accuracy([True, True], ["dev-0-0-0", "dev-0-0-0"])
    with pytest.raises(ConfigError, match="at least one"):
        nlvr2_accuracy([], [])
    with pytest.raises(ConfigError, match="at least one"):
        topk_accuracy(torch.empty(0, dtype=torch.int64))
