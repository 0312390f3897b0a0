"""All attention backends are one function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beit3.model.attention import Backend, choose_backend, multiway_attention, plan_attention
from beit3.model.packing import Layout

Close = Callable[..., None]
LAYOUT = Layout.build(4, 7, (2, 5, 5, 0, 3, 3), 3)
NUM_HEADS, WIDTH = 4, 24


def run(backend: Backend, vision: Tensor, text: Tensor, layout: Layout = LAYOUT) -> tuple[Tensor, Tensor]:
    return multiway_attention(vision, text, plan_attention(layout, vision, backend), NUM_HEADS)


def streams(layout: Layout = LAYOUT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    rows = (layout.num_images * layout.vision_length, sum(layout.text_lengths))
    vision, text = (torch.randn(n, 3 * WIDTH, device=device).to(dtype).requires_grad_() for n in rows)
    return vision, text


def attend_alone(qkv: Tensor) -> Tensor:
    """Attention of one sequence (T, 3D), head by head, in float64."""
    q, k, v = qkv.double().chunk(3, dim=1)
    heads = []
    for columns in torch.arange(WIDTH).chunk(NUM_HEADS):
        scores = q[:, columns] @ k[:, columns].T / (WIDTH // NUM_HEADS) ** 0.5
        heads.append(scores.softmax(dim=1) @ v[:, columns])
    return torch.cat(heads, dim=1).to(qkv.dtype)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_every_backend_attends_within_each_sequence_alone(backend: Backend, close: Close) -> None:
    vision, text = streams()
    mixed_vision, mixed_text = run(backend, vision, text)
    images, texts = torch.split(vision, 7), torch.split(text, list(LAYOUT.text_lengths))
    expected_vision, expected_text = [], []
    for image, words in zip(images[:3], texts[:3], strict=True):
        pair = attend_alone(torch.cat([image, words]))
        expected_vision.append(pair[:7])
        expected_text.append(pair[7:])
    expected_vision.append(attend_alone(images[3]))
    expected_text += [attend_alone(words) for words in texts[3:]]
    close(mixed_vision, torch.cat(expected_vision))
    close(mixed_text, torch.cat(expected_text))


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_every_backend_has_the_gradients_of_the_reference(backend: Backend, close: Close) -> None:
    vision, text = streams()

    def gradients(name: Backend) -> tuple[Tensor, ...]:
        mixed = torch.cat(run(name, vision, text))
        weights = torch.arange(mixed.numel()).sin().view_as(mixed)
        return torch.autograd.grad((mixed * weights).sum(), (vision, text))

    for actual, expected in zip(gradients(backend), gradients("reference"), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_a_stream_without_rows_stays_empty(backend: Backend) -> None:
    only_text = Layout.build(0, 0, (3, 2), 0)
    vision, text = run(backend, *streams(only_text), only_text)
    assert vision.shape == (0, WIDTH)
    assert text.shape == (5, WIDTH)
    only_images = Layout.build(2, 7, (), 0)
    vision, text = run(backend, *streams(only_images), only_images)
    assert vision.shape == (14, WIDTH)
    assert text.shape == (0, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_runs_here_is_chosen(dtype: torch.dtype) -> None:
    for layout in (LAYOUT, Layout.build(2, 197, (64,), 1), Layout.build(0, 0, (3,), 0), Layout.build(0, 0, (), 0)):
        assert choose_backend(layout, torch.device("cpu"), dtype) in ("sdpa", "matmul")


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ("AVX512", torch.bfloat16, "matmul"),
        ("AVX512", torch.float32, "sdpa"),
        ("AVX2", torch.bfloat16, "sdpa"),
        ("AVX2", torch.float32, "sdpa"),
    ],
)
def test_the_measured_rule_of_cpus(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: torch.dtype, expected: Backend
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert choose_backend(LAYOUT, torch.device("cpu"), dtype) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_kernel_for_all_sequences_equals_the_reference() -> None:
    vision, text = streams(device="cuda", dtype=torch.bfloat16)
    actual = torch.cat(run("varlen", vision, text))
    expected = torch.cat(run("reference", vision, text))
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()
    weights = torch.randn_like(actual)
    ours = torch.autograd.grad((actual * weights).sum(), (vision, text))
    theirs = torch.autograd.grad((expected * weights).sum(), (vision, text))
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient - reference).abs().max() <= 3e-2 * reference.abs().max()
