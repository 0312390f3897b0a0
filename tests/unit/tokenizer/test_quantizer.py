"""The vector quantizer against BEiT v2's equations, written out one vector at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer import quantizer as module
from beit3.tokenizer.quantizer import VectorQuantizer

K, C = 6, 4


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


class SlowQuantizer:
    """z <- z / |z|;  code = argmax_k z . e_k;  loss = mean (e_code - z)^2;
    e_k <- unit(decay e_k + (1 - decay) unit(sum of its z)), for codes that were chosen."""

    def __init__(self, codebook: Tensor, decay: float) -> None:
        self.codes: list[list[float]] = codebook.tolist()
        self.decay = decay
        self.usage = [0.0] * len(self.codes)

    def step(self, z: Tensor) -> tuple[list[int], float]:
        vectors = [unit(row) for row in z.tolist()]
        chosen: list[int] = []
        loss = 0.0
        for vector in vectors:
            scores = [sum(a * b for a, b in zip(vector, code, strict=True)) for code in self.codes]
            best = scores.index(max(scores))
            chosen.append(best)
            loss += sum((a - b) ** 2 for a, b in zip(vector, self.codes[best], strict=True)) / len(vector)
        for k in range(len(self.codes)):
            mine = [vector for vector, code in zip(vectors, chosen, strict=True) if code == k]
            self.usage[k] = self.decay * self.usage[k] + (1 - self.decay) * len(mine)
            if mine:
                mean = unit([sum(column) for column in zip(*mine, strict=True)])
                old = self.codes[k]
                self.codes[k] = unit([self.decay * a + (1 - self.decay) * b for a, b in zip(old, mean, strict=True)])
        return chosen, loss / len(vectors)


def statistics(quantizer: VectorQuantizer) -> dict[str, float]:
    return {name: float(value) for name, value in quantizer.statistics().items()}


def ready(decay: float = 0.8, revive_after: int = 0) -> VectorQuantizer:
    """A quantizer past its k-means."""
    torch.manual_seed(3)
    quantizer = VectorQuantizer(K, C, decay, revive_after).double()
    quantizer.ready.fill_(True)
    quantizer.codebook.copy_(F.normalize(torch.randn(K, C, dtype=torch.float64), dim=-1))
    return quantizer


def test_codes_loss_codebook_and_use_follow_the_equations_over_many_steps() -> None:
    quantizer = ready()
    slow = SlowQuantizer(quantizer.codebook.clone(), quantizer.decay)
    torch.manual_seed(5)
    for _ in range(6):
        z = torch.randn(11, C)
        _, codes, loss = quantizer(z)
        expected_codes, expected_loss = slow.step(z)
        assert codes.tolist() == expected_codes
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(quantizer.codebook, torch.tensor(slow.codes).double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.usage, torch.tensor(slow.usage).double(), rtol=1e-5, atol=1e-6)
    assert len(set(codes.tolist())) > 2, "the case is too easy"


def test_codes_stay_of_unit_length() -> None:
    quantizer = ready()
    for _ in range(20):
        quantizer(torch.randn(9, C))
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(K, dtype=torch.float64))


def test_a_code_that_is_not_chosen_stays_where_it_is() -> None:
    quantizer = ready()
    before = quantizer.codebook.clone()
    _, codes, _ = quantizer(before[:1].repeat(5, 1) + 0.01)
    unused = [k for k in range(K) if k not in codes.tolist()]
    assert unused
    torch.testing.assert_close(quantizer.codebook[unused], before[unused])


def test_evaluation_moves_nothing() -> None:
    quantizer = ready(revive_after=1).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    first = quantizer(torch.ones(5, C))
    again = quantizer(torch.ones(5, C))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(first[1], again[1])


def test_an_untrained_quantizer_does_not_start_in_evaluation() -> None:
    quantizer = VectorQuantizer(K, C).eval()
    quantizer(torch.randn(30, C))
    assert not bool(quantizer.ready)


def test_the_gradient_goes_straight_through_and_the_loss_pulls_towards_the_code() -> None:
    quantizer = ready().eval()
    z = torch.randn(7, C, requires_grad=True)
    quantized, codes, loss = quantizer(z)
    torch.testing.assert_close(quantized.detach().double(), quantizer.codebook[codes], rtol=1e-5, atol=1e-6)
    weight = torch.randn(7, C)
    (through,) = torch.autograd.grad((quantized * weight).sum(), z, retain_graph=True)
    (direct,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
    torch.testing.assert_close(through, direct)
    (pull,) = torch.autograd.grad(loss, z)
    target = quantizer.codebook[codes].to(z.dtype)
    (expected,) = torch.autograd.grad(((F.normalize(z, dim=-1) - target) ** 2).mean(), z)
    torch.testing.assert_close(pull, expected)


def test_no_gradient_reaches_the_codebook() -> None:
    quantizer = ready()
    assert not list(quantizer.parameters())
    quantized, _, loss = quantizer(torch.randn(7, C, requires_grad=True))
    (quantized.sum() + loss).backward()
    assert not quantizer.codebook.requires_grad


def test_the_first_training_batch_starts_the_codebook_on_its_clusters() -> None:
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(K, C), dim=-1)
    z = (centres.repeat(40, 1) + 0.01 * torch.randn(40 * K, C)) * 3
    quantizer = VectorQuantizer(K, C)
    quantizer(z)
    assert bool(quantizer.ready)
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(K))
    data = F.normalize(z, dim=-1)
    nearest = (quantizer.codebook @ data.T).amax(dim=1)
    assert nearest.min() > 0.9, "every code lies among the data"
    before = quantizer.codebook.clone()
    quantizer(z)
    assert (quantizer.codebook - before).norm(dim=-1).max() < 0.02, "the second batch does not start again"


def test_fewer_vectors_than_codes_still_start() -> None:
    quantizer = VectorQuantizer(32, C)
    quantizer(torch.randn(5, C))
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(32))


def test_revival_moves_idle_codes_only() -> None:
    patience = 3
    quantizer, still = ready(revive_after=patience), ready(revive_after=0)
    z = torch.randn(2, C).repeat(5, 1)
    for step in range(1, patience + 1):
        _, codes, _ = quantizer(z)
        still(z)
        used = sorted(set(codes.tolist()))
        unused = [k for k in range(K) if k not in used]
        torch.testing.assert_close(quantizer.codebook[used], still.codebook[used])
        moved = (quantizer.codebook - still.codebook).norm(dim=-1) > 1e-6
        assert moved.tolist() == [step == patience and k in unused for k in range(K)]
    live = F.normalize(z.double(), dim=-1)
    assert (quantizer.codebook[unused] @ live.T).amax(dim=1).min() > 1 - 1e-6, "they restart at live vectors"
    assert quantizer.idle[unused].tolist() == [0] * len(unused)


def test_a_chunked_search_equals_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = ready()
    z = F.normalize(torch.randn(50, C, dtype=torch.float64), dim=-1)
    whole = (z @ quantizer.codebook.T).argmax(dim=1)
    assert torch.equal(quantizer.nearest(z), whole)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert torch.equal(quantizer.nearest(z), whole)


def test_statistics_of_known_use() -> None:
    quantizer = VectorQuantizer(4, C)
    quantizer.usage.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert statistics(quantizer) == pytest.approx({"codebook_use": 0.5, "dead_codes": 2, "perplexity": 2.0}, rel=1e-5)
    quantizer.usage.fill_(3.0)
    assert statistics(quantizer) == pytest.approx({"codebook_use": 1.0, "dead_codes": 0, "perplexity": 4.0}, rel=1e-5)


def test_half_precision_input_is_quantized_in_full() -> None:
    quantizer = VectorQuantizer(K, C)
    quantized, _, loss = quantizer(torch.randn(20, C).bfloat16())
    assert quantized.dtype == loss.dtype == torch.float32
