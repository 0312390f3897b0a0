"""SuperClass's losses against their dense definitions, and its document counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.errors import ConfigError
from beit3.pretrain.subword_loss import LossKind, SubwordLoss, Words, join_words

V = 11
CAPTIONS = [[1, 4, 4, 9], [2], [], [4, 2, 7, 1], [0, 10]]


def dense_targets(words: Words) -> Tensor:
    """K-hot rows (B, V) in float64."""
    targets = torch.zeros(words.num_images, V, dtype=torch.float64)
    for row, word in zip(words.rows.tolist(), words.ids.tolist(), strict=True):
        targets[row, word] = 1
    return targets


def dense_loss(kind: LossKind, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The published definitions, over all words, in float64; images without words are left out."""
    kept = targets.sum(1) > 0
    x, y = logits[kept], targets[kept]
    if kind == "softmax":
        weighted = y * weights
        weighted = weighted / weighted.sum(1, keepdim=True).clamp_min(1e-12)
        return -(weighted * x.log_softmax(1)).sum(1).mean()
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(x, y, reduction="none").sum(1).mean()
    if kind == "soft_margin":
        return F.multilabel_soft_margin_loss(x, y)
    if kind == "asymmetric":
        p = x.sigmoid()
        shifted = (p - 0.05).clamp_min(0)
        present, absent = y * (1 - p) * p.log(), (1 - y) * shifted**4 * (1 - shifted).log()
        return -(present + absent).sum(1).mean()
    terms = []
    for scores, labels in ((x, y), (x.T, y.T)):
        rows = []
        for row, label in zip(scores, labels, strict=True):
            positive, negative = row[label > 0], row[label == 0]
            if positive.numel() and negative.numel():
                rows.append(F.softplus(negative.logsumexp(0) + 4 * (-positive / 4).logsumexp(0)))
            elif positive.numel():
                rows.append(row.sum() * 0)
        terms.append(torch.stack(rows).mean())
    return terms[0] + terms[1]


@pytest.mark.parametrize(
    ("kind", "idf"),
    [
        ("softmax", True),
        ("softmax", False),
        ("bce", False),
        ("soft_margin", False),
        ("asymmetric", False),
        ("two_way", False),
    ],
)
def test_sparse_losses_equal_the_dense_definition_in_value_and_gradient(kind: LossKind, idf: bool) -> None:
    criterion = SubwordLoss(V, kind, idf)
    words = join_words(CAPTIONS)
    criterion.count([words])
    logits = torch.randn(len(CAPTIONS), V, requires_grad=True)
    loss = criterion(logits, words)["loss"]
    (gradient,) = torch.autograd.grad(loss, logits)
    targets = dense_targets(words)
    seen = targets.sum(0)
    weights = ((4 + 1) / (seen + 1)).log() if idf else torch.ones(V, dtype=torch.float64)
    exact = logits.detach().double().requires_grad_()
    expected = dense_loss(kind, exact, targets, weights)
    (wanted,) = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_a_word_said_twice_counts_once_and_empty_captions_are_no_documents() -> None:
    criterion = SubwordLoss(V)
    criterion.count([join_words(CAPTIONS)])
    assert criterion.num_documents.item() == 4
    assert criterion.document_frequency.tolist() == [1, 2, 2, 0, 2, 0, 0, 1, 0, 1, 1]


def test_accumulation_equals_the_large_batch() -> None:
    whole, parts = SubwordLoss(V), SubwordLoss(V)
    logits = torch.randn(len(CAPTIONS), V, requires_grad=True)
    whole.count([join_words(CAPTIONS)])
    (expected,) = torch.autograd.grad(whole(logits, join_words(CAPTIONS))["loss"], logits)
    slices = [slice(0, 2), slice(2, 3), slice(3, 5)]  # the second holds an empty caption only
    parts.count([join_words(CAPTIONS[part]) for part in slices])
    losses = [parts(logits[part], join_words(CAPTIONS[part]))["loss"] / len(slices) for part in slices]
    (found,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(parts.document_frequency, whole.document_frequency)


def test_a_changed_batch_size_does_not_skew_the_counts() -> None:
    many, few = SubwordLoss(V), SubwordLoss(V)
    many.count([join_words(CAPTIONS)])
    many.count([join_words(CAPTIONS)])
    for caption in CAPTIONS * 2:
        few.count([join_words([caption])])
    torch.testing.assert_close(many.weights(), few.weights())


def test_counts_are_exact_after_a_cast_to_bf16_and_beyond_what_floats_can_count() -> None:
    criterion = SubwordLoss(V).to(torch.bfloat16)
    criterion.num_documents += 2**53
    criterion.count([join_words([[3]])])
    assert criterion.document_frequency.dtype == criterion.num_documents.dtype == torch.int64
    assert criterion.num_documents.item() == 2**53 + 1


def test_counts_are_frozen_in_evaluation_and_part_of_the_state() -> None:
    criterion = SubwordLoss(V)
    criterion.count([join_words(CAPTIONS)])
    state = criterion.state_dict()
    criterion.eval()
    criterion.count([join_words(CAPTIONS)])
    assert criterion.num_documents.item() == 4
    resumed = SubwordLoss(V)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.weights(), criterion.weights())


def test_idf_is_the_published_formula_and_never_negative() -> None:
    criterion = SubwordLoss(3)
    criterion.count([join_words([[0, 1], [0], [0]])])
    assert criterion.weights().tolist() == pytest.approx([0.0, math.log(4 / 2), math.log(4 / 1)])


def test_a_batch_without_words_has_a_loss_of_zero_and_a_finite_gradient() -> None:
    kinds: tuple[LossKind, ...] = ("softmax", "bce", "soft_margin", "asymmetric", "two_way")
    for kind in kinds:
        criterion = SubwordLoss(V, kind, kind == "softmax")
        words = join_words([[], []])
        criterion.count([words])
        logits = torch.randn(2, V, requires_grad=True)
        values = criterion(logits, words)
        (gradient,) = torch.autograd.grad(values["loss"], logits)
        assert values["loss"].item() == 0, kind
        assert not gradient.any(), kind


def test_the_first_caption_of_all_weighs_its_words_without_nan() -> None:
    """With one caption counted every weight is zero: the loss is zero, as in the dense definition."""
    criterion = SubwordLoss(V)
    words = join_words([[3, 4]])
    criterion.count([words])
    logits = torch.randn(1, V, requires_grad=True)
    loss = criterion(logits, words)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_large_logits_of_half_precision_stay_finite() -> None:
    for kind in ("softmax", "bce", "asymmetric", "two_way"):
        criterion = SubwordLoss(V, kind, False)
        words = join_words(CAPTIONS)
        logits = (300 * torch.randn(len(CAPTIONS), V)).bfloat16().requires_grad_()
        loss = criterion(logits, words)["loss"]
        loss.backward()
        assert logits.grad is not None
        assert loss.isfinite(), kind
        assert logits.grad.isfinite().all(), kind


def test_word_accuracy_is_the_share_of_images_whose_best_word_is_theirs() -> None:
    logits = torch.zeros(3, V)
    logits[0, 4] = logits[1, 3] = logits[2, 5] = 9
    values = SubwordLoss(V)(logits, join_words([[4, 1], [2], []]))
    assert values["word_accuracy"].item() == pytest.approx(1 / 2)


def test_idf_with_another_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="idf"):
        SubwordLoss(V, "bce", True)
    with pytest.raises(ConfigError, match="two_way"):
        SubwordLoss(V, "hinge", False)  # type: ignore[arg-type]
