"""Our decoupled backbone against torchscale's BEiT3: the same weights give the same states and gradients.

The stored tensors (see README.md) make this run everywhere; where torchscale is installed it is asked live as well.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import beit3
from beit3.model.build import build_model
from beit3.model.official import to_official, to_ours
from beit3.model.transformer import MultiwayTransformer

HERE = Path(__file__).parent
SCRIPT: dict[str, Any] = runpy.run_path(str(HERE / "make_torchscale_tensors.py"))
KINDS = ("image", "text", "pair", "masked_image", "masked_pair")


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}, "gradients": {}}
    for name, tensor in load_file(HERE / "torchscale.safetensors").items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor.float() if tensor.is_floating_point() else tensor
    return parts


@pytest.fixture(scope="module")
def ours(stored: dict[str, dict[str, Tensor]]) -> MultiwayTransformer:
    return _ours(stored["weights"])


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0 fairscale==0.4.13")
    model: nn.Module = SCRIPT["build"]()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_the_stored_ones(
    kind: str, stored: dict[str, dict[str, Tensor]], ours: MultiwayTransformer
) -> None:
    with torch.no_grad():
        _assert_states_equal(ours, kind, stored["inputs"], stored["outputs"][kind])


def test_gradients_equal_the_stored_ones(stored: dict[str, dict[str, Tensor]], ours: MultiwayTransformer) -> None:
    official = to_official(ours.config, _gradients(ours, stored["inputs"]))
    assert {f"beit3.{name}" for name in stored["gradients"]} == official.keys()
    for name, expected in stored["gradients"].items():
        _assert_equal(SCRIPT["project"](official[f"beit3.{name}"]), expected, name)


@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_torchscale_run_now(kind: str, peer: nn.Module, stored: dict[str, dict[str, Tensor]]) -> None:
    given = SCRIPT["inputs"]()
    with torch.no_grad():
        expected = SCRIPT["outputs"](peer, given)[kind]
        _assert_states_equal(_ours(peer.state_dict()), kind, given, expected)
    _assert_equal(expected, stored["outputs"][kind], "the stored tensors are out of date")


def test_every_gradient_equals_torchscale_run_now(peer: nn.Module) -> None:
    given = SCRIPT["inputs"]()
    # Gradients have the layout of the weights, so that the same translation applies to them.
    expected = to_ours(SCRIPT["gradients"](peer, given)).state
    actual = _gradients(_ours(peer.state_dict()), given)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        _assert_equal(actual[name], gradient, name)


def test_load_model_reads_an_official_file(tmp_path: Path, stored: dict[str, dict[str, Tensor]]) -> None:
    path = tmp_path / "beit3_tiny.pth"
    torch.save({"model": stored["weights"], "args": argparse.Namespace(lr=1e-3)}, path)
    model = beit3.load_model(path).eval()
    assert isinstance(model, MultiwayTransformer)
    with torch.no_grad():
        for kind in KINDS:
            _assert_states_equal(model, kind, stored["inputs"], stored["outputs"][kind])


def _ours(weights: dict[str, Tensor]) -> MultiwayTransformer:
    config, state, task, options = to_ours(weights)
    assert (config.num_heads, config.num_layers, task) == (SCRIPT["NUM_HEADS"], SCRIPT["NUM_LAYERS"], None)
    model = build_model(config, task, **options)
    assert isinstance(model, MultiwayTransformer)
    model.load_state_dict(state)
    return model.eval()


def _run(model: MultiwayTransformer, kind: str, given: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    out = model(
        images=None if kind == "text" else given["images"],
        text_ids=None if "image" in kind else given["text_ids"],
        text_mask=None if "image" in kind else given["text_mask"],
        image_mask=given["image_mask"] if kind.startswith("masked") else None,
    )
    return out.vision, out.text


def _assert_states_equal(model: MultiwayTransformer, kind: str, given: dict[str, Tensor], expected: Tensor) -> None:
    vision, text = _run(model, kind, given)
    num_vision = 0 if vision is None else vision.shape[1]
    if vision is not None:
        _assert_equal(vision, expected[:, :num_vision], f"{kind}: vision")
    if text is not None:
        real = given["text_mask"]
        _assert_equal(text[real], expected[:, num_vision:][real], f"{kind}: text")


def _gradients(model: MultiwayTransformer, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    vision, text = _run(model, "masked_pair", given)
    assert vision is not None
    assert text is not None
    states = torch.cat([vision, text], dim=1)  # padded text rows are zero, as the loss of the script has them
    (states * SCRIPT["loss_weights"](states.shape)).sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def _assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal within 1e-5 of the largest value."""
    assert actual.shape == expected.shape, what
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-5 * largest, f"{what}: error {error:.2e}, largest value {largest:.2e}"
