"""Recall at k against a plain ranking."""

from __future__ import annotations

import pytest
import torch

from beit3.errors import ConfigError
from beit3.metrics import retrieval
from beit3.metrics.retrieval import feature_ranks, match_ranks, recall_at_k, recall_of_ranks


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


IMAGES, CAPTIONS = 30, 5


def embedded_set() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of images and of five captions each, shuffled, near enough that some are found; then their labels."""
    images = torch.nn.functional.normalize(torch.randn(IMAGES, 8), dim=-1)
    labels = torch.arange(IMAGES).repeat_interleave(CAPTIONS)[torch.randperm(IMAGES * CAPTIONS)]
    captions = torch.nn.functional.normalize(images[labels] + 0.6 * torch.randn(len(labels), 8), dim=-1)
    return images, captions, torch.arange(IMAGES), labels


@pytest.mark.parametrize("way", ["image_to_text", "text_to_image"])
def test_recall_with_five_captions_an_image_equals_a_plain_ranking(way: str) -> None:
    images, captions, numbers, labels = embedded_set()
    given = (images, numbers, captions, labels) if way == "image_to_text" else (captions, labels, images, numbers)
    found = recall_of_ranks(feature_ranks(*given))
    queries, wanted, candidates, known = given
    scores = (queries @ candidates.T).tolist()
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(plain_recall(scores, wanted.tolist(), known.tolist(), k))
    assert 0.1 < found["r1"] < found["r5"] < found["r10"]


def test_shares_of_the_queries_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, captions, numbers, labels = embedded_set()
    whole = feature_ranks(captions, labels, images, numbers)
    shapes: list[torch.Size] = []

    def recorded(scores: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        shapes.append(scores.shape)
        return match_ranks(scores, *rest)

    monkeypatch.setattr(retrieval, "_ROWS", 7)
    monkeypatch.setattr(retrieval, "match_ranks", recorded)
    assert torch.equal(feature_ranks(captions, labels, images, numbers), whole)
    assert {shape[0] for shape in shapes} == {7, IMAGES * CAPTIONS % 7}  # never all queries at once


def test_a_rank_counts_only_wrong_candidates_before_the_nearest_match() -> None:
    """Best first: wrong, right, right, wrong. The second right one does not push the first back."""
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([1, 5, 5, 2])
    assert match_ranks(scores, torch.tensor([5]), labels).tolist() == [1]
    assert match_ranks(scores, torch.tensor([2]), labels).tolist() == [3]


def test_scores_that_are_no_numbers_never_help() -> None:
    labels = torch.arange(3)
    assert recall_at_k(torch.full((3, 3), torch.nan), labels, labels, (1, 3)) == {"r1": 0.0, "r3": 0.0}
    scores = torch.tensor([[0.5, torch.nan, 0.1]])
    assert recall_at_k(scores, torch.tensor([0]), labels, (1, 2)) == {"r1": 0.0, "r2": 1.0}


def test_no_queries_are_refused() -> None:
    with pytest.raises(ConfigError, match="no queries"):
        recall_of_ranks(torch.empty(0, dtype=torch.int64))
