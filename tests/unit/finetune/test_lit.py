"""LiT: the image tower stays as it is, the rest learns, and what is saved sees and reads as it did in training."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import beit3
from beit3.config import Run, replace
from beit3.data.labelled_pictures import LabelledBatch
from beit3.data.preprocess import Preprocess
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.errors import ConfigError, DataMissingError
from beit3.finetune.lit import PROJECTION, Lit, LitConfig, load_locked_images
from beit3.model.build import build_model
from beit3.model.exchange import read_settings
from beit3.model.heads import ClipModel
from beit3.model.presets import ModelConfig, TextTowerConfig
from beit3.predict import Predictor
from beit3.pretrain.pairs import PairBatch, PairEncoder, ZeroShotConfig
from beit3.train.optim import build_optimizer
from tests.conftest import Workspace

SHAPE = ModelConfig(
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=(24, 24),
    vocab_size=50,
    max_text_positions=9,
    drop_path=0.2,
    fusion_layers=1,
)
TEXT = TextTowerConfig(width=12, num_layers=2, num_heads=2, embed_width=10)
Build = Callable[..., Lit]
Kind = Literal["superclass", "decoupled", "retrieval", "timm:test_vit"]
KINDS: tuple[Kind, ...] = ("superclass", "decoupled", "retrieval", "timm:test_vit")


@pytest.fixture
def build(workspace: Workspace, tmp_path: Path) -> Build:
    """A Task around a tower of ours or of timm; every weight is random, those of the tower too."""

    def make(kind: Kind = "superclass", **changes: Any) -> Lit:
        side, tower = 160, str(kind)
        if not kind.startswith("timm"):
            side, tower = 24, str(tmp_path / "tower")
            apart = replace(SHAPE, attention="decoupled", fusion_layers=0)
            model = build_model(apart if kind == "decoupled" else SHAPE, None if kind == "decoupled" else kind)
            _shake(model)
            prepared = Preprocess(image_size=(24, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resize="crop")
            model.save_pretrained(tower, files=prepared.file())
        config = LitConfig(
            tower=tower,
            tower_pretrained=side == 24,
            text_tower=TEXT,
            text_tokenizer=workspace.text_tokenizer,
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=6),
            crop=CropConfig(size=side),
            max_text_length=20,
            eval_pairs="test_vendor",
        )
        task = Lit(replace(config, **changes))
        _shake(task)
        return task

    return make


def _shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def batch_of(task: Lit, workspace: Workspace, count: int = 6) -> PairBatch:
    encoder = PairEncoder(task.config, task.text_tokenizer, task.preprocess, training=False)
    samples: list[Sample] = list(load_prepared(workspace.data / "pairs"))[:count]
    return encoder.collate([encoder.encode(sample) for sample in samples])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_everything_but_the_tower(kind: Kind, build: Build, workspace: Workspace) -> None:
    task = build(kind).train()
    tower = {name: value.clone() for name, value in task.tower.state_dict().items()}
    before = {name: value.clone() for name, value in task.state_dict().items()}
    assert not [name for name in before if name.startswith("model.backbone")], "the tower is in no checkpoint"
    optimizer = build_optimizer(task, Run(name="x", task=task.config).optim)
    task(batch_of(task, workspace))["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    for name, value in task.tower.state_dict().items():
        assert torch.equal(value, tower[name]), name
    still = {name for name, value in task.state_dict().items() if torch.equal(value, before[name])}
    assert not still
    assert not task.tower.training


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_towers_feature_and_the_state_of_the_first_token(
    kind: Kind, build: Build, workspace: Workspace
) -> None:
    task = build(kind).eval()
    batch = batch_of(task, workspace)
    assert batch.packed.images is not None
    assert batch.packed.text_ids is not None
    pixels = (batch.packed.images / 255 - torch.tensor(task.tower.preprocess.mean)[:, None, None]) / torch.tensor(
        task.tower.preprocess.std
    )[:, None, None]
    images = F.normalize(task.tower(pixels) @ task.model.vision_head.weight.T, dim=-1)
    texts = torch.cat(
        [task.model.encode_text(ids[None]) for ids in batch.packed.text_ids.split(batch.packed.text_lengths)]
    )
    scale = task.model.logit_scale.exp()
    rows = torch.arange(6)
    same = (batch.captions[:, None] == batch.captions) & ~torch.eye(6, dtype=torch.bool)
    scores = (scale * images @ texts.T).masked_fill(same, -torch.inf)
    expected = (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2
    torch.testing.assert_close(task(batch)["loss"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_tower_of_ours_is_exported_with_its_texts(
    kind: Kind, loss: str, build: Build, workspace: Workspace, tmp_path: Path
) -> None:
    """SuperClass and bare backbones are read by the mean of their patches, retrieval models by the class token."""
    task = build(kind, loss=loss).eval()
    task.save(tmp_path / "export")
    loaded = beit3.load_model(tmp_path / "export")
    assert isinstance(loaded, ClipModel)
    assert loaded.part is None
    assert loaded.pooling == ("class" if kind == "retrieval" else "mean")
    assert (loaded.logit_bias is None) == (loss == "clip")
    predictor = beit3.load(tmp_path / "export", device="cpu")
    assert predictor.preprocess == replace(task.tower.preprocess, max_text_length=20)
    _assert_equal_vectors(task, predictor, workspace)


def _assert_equal_vectors(task: Lit, predictor: Predictor, workspace: Workspace, images: bool = True) -> None:
    pictures = sorted((workspace.data / "drawings").glob("*.png"))[:3]
    pixels = torch.stack([task.preprocess(_open(path)) for path in pictures])
    expected = task.embed_images(task.preprocess.normalize(pixels))
    if images:
        torch.testing.assert_close(predictor.embed_images(pictures), expected, atol=1e-5, rtol=0)
    names = ["a red cat", "tooth"]
    torch.testing.assert_close(predictor.embed_texts(names), task.embed_texts(names), atol=1e-5, rtol=0)


def _open(path: Path) -> Any:
    from beit3.data.images import open_image

    return open_image(path)


@torch.no_grad()
def test_a_tower_of_timm_is_named_beside_its_text_half(
    build: Build, workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = build("timm:test_vit").eval()
    with caplog.at_level(logging.WARNING, "beit3"):
        task.save(tmp_path / "export")
    assert "holds the text tower alone: the image tower is timm:test_vit" in caplog.text
    predictor = beit3.load(tmp_path / "export", device="cpu")
    assert (predictor.model.task, predictor.model.part) == ("clip", "text")
    _assert_equal_vectors(task, predictor, workspace, images=False)
    with pytest.raises(ConfigError, match="without its vision tower"):
        predictor.embed_images([workspace.data / "drawings" / "00.png"])
    locked = load_locked_images(tmp_path / "export")
    assert read_settings(tmp_path / "export" / PROJECTION)["tower"] == task.tower.describe()
    pixels = task.preprocess.normalize(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8))
    torch.testing.assert_close(locked(pixels), task.embed_images(pixels), atol=1e-6, rtol=0)


def test_a_folder_without_a_map_of_features_is_refused(build: Build, tmp_path: Path) -> None:
    build("superclass").save(tmp_path / "export")
    with pytest.raises(DataMissingError, match="image_projection"):
        load_locked_images(tmp_path / "export")


def test_the_text_tower_takes_nothing_from_the_towers_training(build: Build) -> None:
    """Nor its drop path, nor its words and positions."""
    task = build("superclass", activation_checkpointing=True)
    text = task.model.text_backbone.config
    assert (text.drop_path, text.activation_checkpointing) == (0.0, True)
    assert (text.vocab_size, text.max_text_positions) == (len(task.text_tokenizer), 22)
    assert (text.width, text.num_layers, text.num_heads) == (12, 2, 2)


def test_crops_of_another_size_are_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"crop.size \(32\) must be the image_size of the tower"):
        build("superclass", crop=CropConfig(size=32))


def test_work_counts_the_tower_once_and_the_texts_three_times(build: Build, workspace: Workspace) -> None:
    task = build("timm:test_vit")
    batch = batch_of(task, workspace)
    work, lengths = task.work(batch), batch.packed.text_lengths
    texts = sum(2 * (8 * t * 12**2 + 4 * t * 12 * 48 + 4 * t * t * 12) for t in lengths)
    assert (work.images, work.tokens) == (6, sum(lengths))
    assert work.flops == pytest.approx(6 * task.tower.flops + 3 * texts)


@torch.no_grad()
def test_evaluation_ranks_pairs_and_names_classes(build: Build, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["ant", "bee", "cat"]))
    given = ZeroShotConfig(index="groups.test.jsonl", labels=tmp_path / "names.json", prompts="drawings")
    task = build("superclass", zero_shot=given, eval_batch_size=5).eval()
    loader = task.eval_loader(Run(name="x", task=task.config, data=workspace.data))
    assert loader is not None
    metrics = copy.deepcopy(task).evaluate(task.move(batch, torch.device("cpu")) for batch in loader)
    recalls = {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert metrics.keys() == recalls | {"zero_shot_acc1", "zero_shot_acc5"}
    prompts = [F.normalize(task.embed_texts([f"a drawing of {name}."])[0], dim=0) for name in ("ant", "bee", "cat")]
    right = total = 0
    for batch in loader:
        if isinstance(batch, LabelledBatch):
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
                vector: Tensor = task.embed_images(task.preprocess.normalize(image[None]))[0]
                right += max(range(3), key=lambda j, vector=vector: float(vector @ prompts[j])) == label  # type: ignore[misc]
                total += 1
    assert total == 12
    assert metrics["zero_shot_acc1"] == pytest.approx(right / 12)
    assert metrics["zero_shot_acc5"] == 1.0


def test_a_task_that_evaluates_nothing_says_so(build: Build, workspace: Workspace) -> None:
    task = build("superclass", eval_pairs=None)
    assert task.eval_loader(Run(name="x", task=task.config, data=workspace.data)) is None
