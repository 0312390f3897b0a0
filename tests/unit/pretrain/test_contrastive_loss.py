"""Contrastive losses against their definitions in float64 numpy, and what they keep in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from beit3.pretrain import contrastive_loss as losses
from beit3.pretrain.contrastive_loss import contrastive_loss, sigmoid_loss

LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 1, 4, 7]
COUNT = len(LABELS)


def vectors(count: int = COUNT, width: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images, texts = (F.normalize(torch.randn(count, width, dtype=dtype), dim=-1) for _ in range(2))
    return images.requires_grad_(), texts.requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def softmax_by_definition(images: Any, texts: Any, labels: list[int], scale: float) -> float:
    """CLIP, pair by pair."""
    total, count = 0.0, len(images)
    for queries, candidates in ((images, texts), (texts, images)):
        for i in range(count):
            rivals = [j for j in range(count) if j == i or labels[j] != labels[i]]
            total -= math.log(
                math.exp(scale * queries[i] @ candidates[i])
                / sum(math.exp(scale * queries[i] @ candidates[j]) for j in rivals)
            )
    return total / (2 * count)


def sigmoid_by_definition(images: Any, texts: Any, labels: list[int], scale: float, bias: float) -> float:
    """SigLIP, algorithm 1, pair by pair."""
    total, count = 0.0, len(images)
    for i in range(count):
        for j in range(count):
            if j == i or labels[j] != labels[i]:
                z = 1 if i == j else -1
                total -= math.log(1 / (1 + math.exp(-z * (scale * images[i] @ texts[j] + bias))))
    return total / count


def definition(kind: str, labels: list[int] | None) -> Callable[[Any, Any, float, float], float]:
    given = list(range(COUNT)) if labels is None else labels
    if kind == "clip":
        return lambda images, texts, scale, _: softmax_by_definition(images, texts, given, scale)
    return lambda images, texts, scale, bias: sigmoid_by_definition(images, texts, given, scale, bias)


def of(kind: str, images: Tensor, texts: Tensor, labels: Tensor | None, scale: Tensor, bias: Tensor) -> dict[str, Any]:
    if kind == "clip":
        return contrastive_loss(images, texts, labels, scale)
    return sigmoid_loss(images, texts, labels, scale, bias)


@pytest.mark.parametrize("rows", [1, 3, COUNT])
@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_its_definition_whatever_the_chunks(
    kind: str, labels: list[int] | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_LOGITS", rows * COUNT)
    images, texts = vectors()
    scale, bias = scalar(1.3), scalar(-2.0)
    given = None if labels is None else torch.tensor(labels)
    values = of(kind, images, texts, given, scale, bias)
    expected = definition(kind, labels)(images.detach().numpy(), texts.detach().numpy(), math.exp(1.3), -2.0)
    assert values["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert values["logit_scale"].item() == pytest.approx(math.exp(1.3))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_gradients_are_those_of_the_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By central differences of the definition: of vectors, scale and bias, in chunks of two rows."""
    monkeypatch.setattr(losses, "_LOGITS", 2 * COUNT)
    images, texts = vectors(width=3)
    scale, bias = scalar(1.1), scalar(-0.7)
    of(kind, images, texts, torch.tensor(LABELS), scale, bias)["loss"].backward()
    loss = definition(kind, LABELS)
    arrays = [images.detach().numpy(), texts.detach().numpy(), np.array([1.1]), np.array([-0.7])]
    given = [images, texts, scale, bias] if kind == "siglip" else [images, texts, scale]
    for which, tensor in enumerate(given):
        assert tensor.grad is not None
        found = tensor.grad.numpy().reshape(-1)
        for place in range(found.size):
            values = []
            for step in (1e-6, -1e-6):
                moved = [array.copy() for array in arrays]
                moved[which].reshape(-1)[place] += step
                values.append(loss(moved[0], moved[1], math.exp(moved[2][0]), float(moved[3][0])))
            assert found[place] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7), (which, place)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_accuracy_is_that_of_the_nearest_text(kind: str) -> None:
    images, texts = vectors(width=3)
    values = of(kind, images, texts, torch.tensor(LABELS), scalar(1.0), scalar(-1.0))
    scores, right = (images @ texts.T).detach().numpy(), 0
    for i in range(COUNT):
        rivals = [j for j in range(COUNT) if j == i or LABELS[j] != LABELS[i]]
        right += max(rivals, key=lambda j: scores[i, j]) == i
    assert 0 < right < COUNT
    assert float(values["batch_accuracy"]) == pytest.approx(right / COUNT)


def test_the_scale_of_clip_stops_at_a_hundred_and_that_of_siglip_does_not() -> None:
    images, texts = vectors()
    for kind, largest in (("clip", 100), ("siglip", math.exp(6))):
        scale = torch.tensor(6.0, dtype=torch.float64)
        assert float(of(kind, images, texts, None, scale, scalar(0))["logit_scale"]) == pytest.approx(largest)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_fp32_under_autocast(kind: str) -> None:
    images, texts = (part.detach().bfloat16() for part in vectors(width=32))
    scale, bias = torch.tensor(4.0), torch.tensor(-3.0)
    exact = of(kind, images.double(), texts.double(), None, scale.double(), bias.double())["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = of(kind, images, texts, None, scale, bias)["loss"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-5)


def kept_bytes(loss: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]], count: int) -> int:
    """Bytes of the distinct storages that the backward pass of a loss holds, its vectors and labels included."""
    images, texts = vectors(count, 8, torch.float32)
    labels, held = torch.arange(count), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(images, texts, labels)["loss"]
    value.backward()
    return sum(held.values())


def test_memory_grows_with_the_batch_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    kinds: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]] = {
        "clip": lambda images, texts, labels: contrastive_loss(images, texts, labels, scale),
        "siglip": lambda images, texts, labels: sigmoid_loss(images, texts, labels, scale, bias),
    }
    for rows in (16, 10**6):
        for name, loss in kinds.items():
            monkeypatch.setattr(losses, "_LOGITS", rows * 512)
            small, large = kept_bytes(loss, 256), kept_bytes(loss, 1024)
            assert large <= 4.2 * small, (name, rows)
            assert large < 1024 * 1024, "a quarter of one matrix of logits"

    def whole(images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(scale.exp() * images @ texts.T, labels)}

    assert kept_bytes(whole, 1024) > 4 * 1024 * 1024, "the measure sees a matrix that is kept"
