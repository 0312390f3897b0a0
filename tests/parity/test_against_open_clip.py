"""Contrastive losses, prompts, class vectors and tower sizes against open_clip, if it is installed (see README.md)."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import Run
from beit3.data.prompts import IMAGENET
from beit3.metrics.zero_shot import class_vectors
from beit3.model.heads import ClipModel, RetrievalModel
from beit3.model.presets import ModelConfig
from beit3.pretrain.contrastive import ContrastiveConfig
from beit3.pretrain.contrastive_loss import contrastive_loss, sigmoid_loss
from beit3.recipes import load_recipe

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    width=16, num_layers=1, num_heads=2, ffn_width=24, patch_size=8, image_size=(16, 16), fusion_layers=1
)


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    module: ModuleType = pytest.importorskip("open_clip", reason="pip install --no-deps open_clip_torch ftfy")
    return module


def given(loss: str) -> list[Tensor]:
    """Vectors, logarithm of the scale, and bias as a model starts with them."""
    vectors = [F.normalize(torch.randn(33, 20, dtype=torch.float64), dim=-1) for _ in range(2)]
    model = RetrievalModel(TINY, loss="siglip" if loss == "siglip" else "clip")
    bias = torch.tensor(0.0) if model.logit_bias is None else model.logit_bias.detach()
    return [part.clone().requires_grad_() for part in (*vectors, model.logit_scale.detach().double(), bias.double())]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_losses_and_gradients_are_equal(loss: str, peer: ModuleType) -> None:
    ours = given(loss)
    theirs = [part.detach().clone().requires_grad_() for part in ours]
    if loss == "clip":
        found = contrastive_loss(ours[0], ours[1], None, ours[2])["loss"]
        expected = peer.ClipLoss()(theirs[0], theirs[1], theirs[2].exp())
    else:
        found = sigmoid_loss(ours[0], ours[1], None, ours[2], ours[3])["loss"]
        expected = peer.loss.SigLipLoss()(theirs[0], theirs[1], theirs[2].exp(), theirs[3])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    for own, other in zip(ours[: 3 if loss == "clip" else 4], theirs, strict=False):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_scale_and_bias_start_alike(peer: ModuleType) -> None:
    clip = peer.CLIP(embed_dim=8, vision_cfg=_vision(), text_cfg=_text())
    siglip = peer.CLIP(
        embed_dim=8, vision_cfg=_vision(), text_cfg=_text(), init_logit_scale=math.log(10), init_logit_bias=-10
    )
    for model, other in ((RetrievalModel(TINY), clip), (RetrievalModel(TINY, loss="siglip"), siglip)):
        torch.testing.assert_close(model.logit_scale, other.logit_scale)
        assert (model.logit_bias is None) == (other.logit_bias is None)
        if model.logit_bias is not None:
            torch.testing.assert_close(model.logit_bias, other.logit_bias)
    assert ClipModel(TINY, 16, 1, 2, 8, loss="siglip").logit_bias is not None


def test_the_imagenet_prompts_are_equal(peer: ModuleType) -> None:
    theirs = [template("{}") for template in peer.OPENAI_IMAGENET_TEMPLATES]
    assert list(IMAGENET) == theirs


def test_class_vectors_are_equal(peer: ModuleType) -> None:
    class Model:
        def encode_text(self, texts: Tensor, normalize: bool = False) -> Tensor:
            vectors = torch.stack([texts.sin().sum(1), texts.cos().sum(1), texts.square().sum(1).sqrt()], dim=1)
            return F.normalize(vectors, dim=-1) if normalize else vectors

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[float(ord(letter)) for letter in text.ljust(60)[:60]] for text in texts])

    names = ["tench", "great white shark", "cock", "hen"]
    theirs = peer.build_zero_shot_classifier(Model(), tokenize, names, peer.OPENAI_IMAGENET_TEMPLATES)
    ours = class_vectors(lambda texts: Model().encode_text(tokenize(texts)), names, IMAGENET)
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("variant", "name"), [("small", "S"), ("recipe", "B"), ("large", "L")])
def test_the_recipes_towers_have_the_published_sizes(variant: str, name: str, peer: ModuleType) -> None:
    theirs: dict[str, Any] = peer.get_model_config(f"ViT-{name}-16")
    run = load_recipe(f"{ROOT / 'pretrain/clip_base.py'}:{variant}")
    assert isinstance(run, Run)
    assert isinstance(run.task, ContrastiveConfig)
    model, text = run.task.model, run.task.text_tower
    assert text is not None
    vision, words = theirs["vision_cfg"], theirs["text_cfg"]
    assert text.embed_width == theirs["embed_dim"]
    assert (text.width, text.num_layers, text.num_heads) == (words["width"], words["layers"], words["heads"])
    assert model.max_text_length == run.task.max_text_length == words["context_length"]
    sizes = (model.width, model.num_layers, model.patch_size, model.image_size[0])
    assert sizes == tuple(vision[key] for key in ("width", "layers", "patch_size", "image_size"))


def test_the_towers_have_as_many_weights_as_theirs_where_both_have_them(peer: ModuleType) -> None:
    """Matrices of blocks, patches and heads; sub-LN and the extra positions are ours, `ln_pre` is theirs."""
    config = ModelConfig(
        width=64, num_layers=2, num_heads=1, ffn_width=256, patch_size=8, image_size=(16, 16), fusion_layers=0
    )
    ours = ClipModel(config, text_width=32, text_layers=3, text_heads=2, embed_width=8)
    theirs = peer.CLIP(embed_dim=8, vision_cfg=_vision(width=64, layers=2), text_cfg=_text())

    def matrices(parts: list[Any]) -> int:
        return sum(
            p.numel() for part in parts for n, p in part.named_parameters() if p.ndim > 1 and "positions" not in n
        )

    images = [ours.backbone.blocks, ours.backbone.vision_embedding.patch, ours.vision_head]
    texts = [ours.text_backbone.blocks, ours.language_head]
    assert matrices(images) == matrices([theirs.visual.transformer, theirs.visual.conv1]) + theirs.visual.proj.numel()
    assert matrices(texts) == matrices([theirs.transformer]) + theirs.text_projection.numel()


def _vision(width: int = 16, layers: int = 1) -> dict[str, int]:
    return {"image_size": 16, "layers": layers, "width": width, "patch_size": 8, "head_width": width}


def _text() -> dict[str, int]:
    return {"context_length": 7, "vocab_size": 30, "width": 32, "heads": 2, "layers": 3}
