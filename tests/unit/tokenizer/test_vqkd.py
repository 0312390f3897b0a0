"""VQ-KD: shapes, targets, files, and that all of it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from beit3.config import replace
from beit3.errors import ConfigError, DataMissingError
from beit3.tokenizer.vqkd import VQKD, VQKDConfig, distillation_loss, vqkd_config

CONFIG = VQKDConfig(
    image_size=(32, 24),
    patch_size=8,
    width=16,
    depth=2,
    decoder_depth=1,
    num_heads=2,
    codebook_size=12,
    code_width=6,
    teacher_width=10,
)
GRID = (4, 3)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, *CONFIG.image_size, generator=torch.Generator().manual_seed(1))


def test_shapes_on_a_grid_that_is_not_square() -> None:
    assert CONFIG.grid == GRID
    decoded, codes, loss = VQKD(CONFIG)(images())
    assert decoded.shape == (3, 12, 10)
    assert codes.shape == (3, 12)
    assert codes.dtype == torch.int64
    assert loss.shape == ()
    assert 0 <= int(codes.min()) <= int(codes.max()) < 12


def test_tokens_are_the_codes_of_the_forward_pass() -> None:
    model = VQKD(CONFIG)
    model(images(20))
    model.eval()
    assert torch.equal(model.tokenize(images()), model(images())[1])
    assert len(model.tokenize(images()).unique()) > 1


def test_tokens_of_a_picture_do_not_depend_on_its_neighbours() -> None:
    model = VQKD(CONFIG).eval()
    together = model.tokenize(images())
    alone = torch.cat([model.tokenize(image[None]) for image in images()])
    assert torch.equal(together, alone)


def test_codes_keep_their_place_on_the_grid() -> None:
    """A change in one corner of the picture reaches its own patch's vector more than any other's."""
    torch.manual_seed(0)
    model = VQKD(replace(CONFIG, depth=1)).eval()
    first = images(1)
    second = first.clone()
    second[..., :8, 16:] = 1 - second[..., :8, 16:]  # row 0, column 2
    change = (model._encode(first) - model._encode(second)).norm(dim=-1)[0]
    assert int(change.argmax()) == 2


def test_a_saved_tokenizer_gives_equal_codes(tmp_path: Path) -> None:
    model = VQKD(CONFIG)
    model(images(20))
    model.eval()
    model.save(tmp_path / "tokenizer")
    loaded = VQKD.load(tmp_path / "tokenizer")
    assert loaded.config == CONFIG
    assert torch.equal(loaded.tokenize(images()), model.tokenize(images()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_pictures_of_another_size_are_refused() -> None:
    model = VQKD(CONFIG)
    with pytest.raises(ValueError, match=r"takes images of \(32, 24\), not \(24, 32\)"):
        model.tokenize(torch.rand(1, 3, 24, 32))


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"config\.json"):
        VQKD.load(tmp_path / "none")
    VQKD(CONFIG).save(tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer/config.json").read_text())
    (tmp_path / "tokenizer/config.json").write_text(json.dumps({**settings, "kind": "model"}))
    with pytest.raises(ConfigError, match="not a visual tokenizer"):
        VQKD.load(tmp_path / "tokenizer")


@pytest.mark.parametrize("changes", [{"image_size": (30, 24)}, {"width": 17}])
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must divide"):
        replace(CONFIG, **changes)


def test_the_distillation_loss_is_one_minus_the_cosine() -> None:
    decoded, features = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    expected = 0.0
    for image in range(2):
        for patch in range(5):
            a, b = decoded[image, patch], features[image, patch]
            expected += 1 - float(a @ b / (a.norm() * b.norm()))
    assert float(distillation_loss(decoded, features)) == pytest.approx(expected / 10, rel=1e-5)
    assert float(distillation_loss(3 * features, features)) == pytest.approx(0, abs=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    model = VQKD(CONFIG)
    decoded, _, commitment = model(images(8))
    (distillation_loss(decoded, torch.randn_like(decoded)) + commitment).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_the_loss_falls_on_a_toy() -> None:
    torch.manual_seed(0)
    model = VQKD(CONFIG)
    pictures = images(16)
    features = F.avg_pool2d(pictures, 8).flatten(2).transpose(1, 2) @ torch.randn(3, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        decoded, _, commitment = model(pictures)
        loss = distillation_loss(decoded, features)
        optimizer.zero_grad()
        (loss + commitment).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_presets_have_the_released_shapes() -> None:
    clip, dino = vqkd_config("vqkd_base_clip", decoder_depth=3), vqkd_config("vqkd_base_dino")
    assert (clip.width, clip.depth, clip.num_heads, clip.decoder_depth, clip.teacher_width) == (768, 12, 12, 3, 512)
    assert (dino.decoder_depth, dino.teacher_width) == (1, 768)
    assert (clip.codebook_size, clip.code_width, clip.grid) == (8192, 32, (14, 14))
    for name in ("vqkd_small", "vqkd_tiny"):
        assert vqkd_config(name).width // vqkd_config(name).num_heads == 64


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vqkd_base_clip'"):
        vqkd_config("vqkd_base_clop")


def test_bytes_and_their_fractions_have_the_same_codes() -> None:
    model = VQKD(CONFIG).eval()
    pixels = (images() * 255).round().to(torch.uint8)
    assert torch.equal(model.tokenize(pixels), model.tokenize(pixels.float() / 255))


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path: Path) -> None:
    VQKD(CONFIG).save(tmp_path / "made")
    path = tmp_path / "made" / "config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer"]["codebook_size"] += 1
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"made do not fit: quantize\.codebook has shape .*, not .*") as caught:
        VQKD.load(tmp_path / "made")
    assert "\n" not in str(caught.value)


def test_the_search_among_codes_stays_in_full_precision() -> None:
    """In bf16 close codes are confused, and recorded codes would differ from those of a training run."""
    model = VQKD(replace(CONFIG, codebook_size=512)).eval()
    seen: list[torch.Tensor] = []
    hook = model.encode_task_layer.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.tokenize(images(100))
        decoded, codes, loss = model(images(100))
    hook.remove()
    z = F.normalize(seen[0], dim=-1).flatten(0, 1)
    assert z.dtype == loss.dtype == torch.float32
    assert decoded.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        confused = model.quantize.nearest(z)
    expected = model.quantize.nearest(z)
    assert not torch.equal(confused, expected)
    assert torch.equal(tokens.flatten(), expected)
    assert torch.equal(codes.flatten(), expected)
