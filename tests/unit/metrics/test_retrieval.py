"""Recall at k against a plain ranking."""

from __future__ import annotations

import pytest
import torch

from beit3.metrics.retrieval import recall_at_k


def plain_recall(scores: list[list[float]], queries: list[int], candidates: list[int], k: int) -> float:
    """Share of queries with a match among the k first; a wrong candidate of equal score goes before a right one."""
    hits = 0
    for row, query in zip(scores, queries, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], candidates[j] == query))
        hits += any(candidates[j] == query for j in order[:k])
    return hits / len(scores)


@pytest.mark.parametrize("ties", [False, True])
def test_recall_equals_a_plain_ranking(ties: bool) -> None:
    scores = torch.randint(0, 4, (40, 25)).float() if ties else torch.randn(40, 25)
    queries, candidates = torch.randint(0, 12, (40,)), torch.randint(0, 12, (25,))
    found = recall_at_k(scores, queries, candidates)
    assert list(found) == ["r1", "r5", "r10"]
    for k in (1, 5, 10):
        expected = plain_recall(scores.tolist(), queries.tolist(), candidates.tolist(), k)
        assert found[f"r{k}"] == pytest.approx(expected)
    assert ties or 0 < found["r1"] < found["r5"] < found["r10"]


def test_a_perfect_ranking_scores_one() -> None:
    labels = torch.arange(6)
    assert recall_at_k(torch.eye(6), labels, labels, (1,)) == {"r1": 1.0}


def test_equal_scores_never_help() -> None:
    labels = torch.arange(6)
    assert recall_at_k(torch.zeros(6, 6), labels, labels, (1, 5, 6)) == {"r1": 0.0, "r5": 0.0, "r6": 1.0}


def test_a_query_without_a_match_is_a_miss() -> None:
    assert recall_at_k(torch.randn(2, 3), torch.tensor([0, 9]), torch.arange(3), (3,)) == {"r3": 0.5}
