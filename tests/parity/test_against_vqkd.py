"""VQ-KD against BEiT v2's official code, written out slowly from its published description.

The reference below is plain Python and NumPy over weights under their official names: patch embedding as a loop over
patches, attention as a softmax over explicit scores, the quantizer one vector at a time. It shares no line with the
package. First codes of the released tokenizers are checked where a user has the files: set `BEIT3_VQKD_FILE` to the
decoder-3 CLIP tokenizer and `BEIT3_VQKD_IMAGE` to the demo picture of the official repository.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3.errors import ConfigError
from beit3.tokenizer import official
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig, distillation_loss

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
CONFIG = VQKDConfig(
    image_size=(32, 32),
    patch_size=8,
    width=128,
    depth=2,
    decoder_depth=1,
    num_heads=2,
    codebook_size=24,
    code_width=8,
    teacher_width=10,
)


def linear(x: Array, weights: Weights, name: str) -> Array:
    out: Array = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return out


def layer_norm(x: Array, weights: Weights, name: str) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    out: Array = (x - mean) / np.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return out


def gelu(x: Array) -> Array:
    out: Array = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return out


def attention(x: Array, weights: Weights, name: str, heads: int) -> Array:
    """Rows of one picture; keys have no bias."""
    width = x.shape[1]
    q_weight, k_weight, v_weight = np.split(weights[f"{name}.qkv.weight"], 3)
    q = x @ q_weight.T + weights[f"{name}.q_bias"]
    k, v = x @ k_weight.T, x @ v_weight.T + weights[f"{name}.v_bias"]
    mixed = np.zeros_like(x)
    size = width // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        mixed[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
    return linear(mixed, weights, f"{name}.proj")


def transformer(picture: Array, weights: Weights, net: str, patch: int, depth: int, heads: int) -> Array:
    """Patch states (N, D) of one map (C, H, W), each normalised by `fc_norm`."""
    kernel, bias = weights[f"{net}.patch_embed.proj.weight"], weights[f"{net}.patch_embed.proj.bias"]
    rows = [weights[f"{net}.cls_token"][0, 0]]
    for top in range(0, picture.shape[1], patch):
        for left in range(0, picture.shape[2], patch):
            window = picture[:, top : top + patch, left : left + patch]
            rows.append((kernel * window).sum((1, 2, 3)) + bias)
    x = np.stack(rows) + weights[f"{net}.pos_embed"][0]
    for block in range(depth):
        name = f"{net}.blocks.{block}"
        x = x + attention(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", heads)
        hidden = gelu(linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
        x = x + linear(hidden, weights, f"{name}.mlp.fc2")
    return layer_norm(x[1:], weights, f"{net}.fc_norm")


def task_layer(x: Array, weights: Weights, name: str) -> Array:
    return linear(np.tanh(linear(x, weights, f"{name}.0")), weights, f"{name}.2")


def unit(x: Array) -> Array:
    out: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return out


class Reference:
    """One training or evaluation step of the official model."""

    def __init__(self, state: Mapping[str, Tensor], config: VQKDConfig) -> None:
        self.weights = {name: value.double().numpy().copy() for name, value in state.items()}
        self.config = config

    def step(self, images: Array, teacher: Array, training: bool) -> tuple[list[int], float]:
        """Codes and loss of pictures (B, 3, H, W) in [0, 1]; teacher features are (B, N, C)."""
        config, weights = self.config, self.weights
        codes: list[int] = []
        vectors: list[Array] = []
        commitment, distances = [], []
        book = weights["quantize.embedding.weight"]
        for picture, target in zip(images, teacher, strict=True):
            scaled = picture * 255 / 127.5 - 1
            states = transformer(scaled, weights, "encoder", config.patch_size, config.depth, config.num_heads)
            z = unit(task_layer(states, weights, "encode_task_layer"))
            mine = [int(np.argmin(((book - vector) ** 2).sum(1))) for vector in z]
            chosen = book[mine]
            commitment.append(((chosen - z) ** 2).mean())
            maps = chosen.T.reshape(config.code_width, *config.grid)
            states = transformer(maps, weights, "decoder", 1, config.decoder_depth, config.num_heads)
            rebuilt = unit(task_layer(states, weights, "decode_task_layer"))
            distances += list(1 - (rebuilt * unit(target)).sum(1))
            codes += mine
            vectors += list(z)
        if training:
            self._move(codes, vectors)
        return codes, float(np.mean(distances) + np.mean(commitment))

    def _move(self, codes: list[int], vectors: list[Array], decay: float = 0.99) -> None:
        book, use = self.weights["quantize.embedding.weight"].copy(), self.weights["quantize.cluster_size"].copy()
        for code in range(len(book)):
            mine = [vector for vector, chosen in zip(vectors, codes, strict=True) if chosen == code]
            use[code] = decay * use[code] + (1 - decay) * len(mine)
            new = unit(np.sum(mine, axis=0) / len(mine)) if mine else book[code]
            book[code] = unit(decay * book[code] + (1 - decay) * new)
        self.weights |= {"quantize.embedding.weight": book, "quantize.cluster_size": use}


@pytest.fixture
def model() -> VQKD:
    """Weights that are random everywhere, biases and norms included."""
    torch.manual_seed(0)
    made = VQKD(CONFIG).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.quantize.ready.fill_(True)
    return made


def inputs(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randn(3, 16, 10, generator=generator, dtype=torch.float64)


def test_codes_loss_and_moving_averages_follow_the_official_arithmetic_over_several_steps(model: VQKD) -> None:
    reference = Reference(official.to_official(model.state_dict()), CONFIG)
    model.train()
    seen: set[int] = set()
    for step in range(4):
        images, teacher = inputs(step)
        decoded, codes, commitment = model(images)
        loss = distillation_loss(decoded, teacher) + commitment
        expected_codes, expected_loss = reference.step(images.numpy(), teacher.numpy(), training=True)
        assert codes.flatten().tolist() == expected_codes
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)  # cosine runs in fp32
        state = official.to_official(model.state_dict())
        for name in ("quantize.embedding.weight", "quantize.cluster_size"):
            np.testing.assert_allclose(state[name].numpy(), reference.weights[name], rtol=1e-9, atol=1e-12)
        seen |= set(expected_codes)
    assert len(seen) > 3, "the case is too easy"


def test_evaluation_follows_the_official_arithmetic_and_moves_nothing(model: VQKD) -> None:
    reference = Reference(official.to_official(model.state_dict()), CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, teacher = inputs(9)
    decoded, codes, commitment = model.eval()(images)
    expected_codes, expected_loss = reference.step(images.numpy(), teacher.numpy(), training=False)
    assert codes.flatten().tolist() == expected_codes == model.tokenize(images).flatten().tolist()
    assert (distillation_loss(decoded, teacher) + commitment).item() == pytest.approx(expected_loss, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def official_file(model: VQKD, folder: Path, **extra: Any) -> Path:
    path = folder / "vqkd.pth"
    torch.save({"model": {**official.to_official(model.float().state_dict()), **extra}}, path)
    return path


def test_a_released_file_loads_with_and_without_its_teacher(model: VQKD, tmp_path: Path) -> None:
    images = inputs(1)[0].float()
    expected = model.float().eval().tokenize(images)
    extra = {"teacher_model.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(3), "loss_scale": torch.ones(1)}
    for path in (official_file(model, tmp_path), official_file(model, tmp_path, **extra)):
        loaded = load_visual_tokenizer(path)
        assert loaded.config == CONFIG
        assert torch.equal(loaded.tokenize(images), expected)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_official_layout_is_complete_and_comes_back_identical(model: VQKD) -> None:
    state = official.to_official(model.state_dict())
    assert {name for name in state if name.startswith("quantize.")} == {
        "quantize.cluster_size",
        "quantize.embedding.weight",
        "quantize.embedding.cluster_size",
        "quantize.embedding.embed_avg",
        "quantize.embedding.initted",
    }
    assert state["quantize.embedding.initted"].shape == (1,)
    config, ours = official.to_ours(state)
    assert config == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.blocks.1.norm1.bias": None}, "encoder.blocks.1.norm1.bias is missing"),
        ({"encoder.stray": torch.zeros(1)}, "encoder.stray is unknown"),
        ({"quantize.stray": torch.zeros(1)}, "quantize.stray is unknown"),
        ({"quantize.cluster_size": torch.zeros(5)}, r"quantize.usage has shape \(5,\), not \(24,\)"),
        ({"quantize.embedding.weight": None}, "it has no quantize.embedding.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    model: VQKD, change: dict[str, Tensor | None], message: str
) -> None:
    state = {**official.to_official(model.state_dict()), **change}
    with pytest.raises(ConfigError, match=message):
        official.to_ours({name: value for name, value in state.items() if value is not None})


@pytest.mark.skipif("BEIT3_VQKD_FILE" not in os.environ, reason="needs the released tokenizer and its demo picture")
def test_first_codes_of_the_released_tokenizer() -> None:
    tokenizer = load_visual_tokenizer(Path(os.environ["BEIT3_VQKD_FILE"]))
    image = Image.open(os.environ["BEIT3_VQKD_IMAGE"]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    assert tokenizer.tokenize(pixels)[0, :5].tolist() == [3812, 7466, 1913, 1913, 1903]
