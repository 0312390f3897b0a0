"""The probe of pretraining: accuracies of the mean patch feature, over pictures that are read once."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.index_files import read_picture
from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.metrics.probe import few_shot_accuracy, knn_accuracy
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer
from beit3.pretrain.probe import Probe, ProbeConfig
from tests.conftest import Workspace

CONFIG = ProbeConfig(train="groups.train.jsonl", test="groups.test.jsonl", shots=2)


def make_backbone(**options: Any) -> MultiwayTransformer:
    config = ModelConfig(
        width=16,
        num_layers=2,
        num_heads=2,
        ffn_width=24,
        patch_size=8,
        image_size=(24, 16),
        vocab_size=20,
        fusion_layers=0,
        **options,
    )
    return MultiwayTransformer(config)


@pytest.fixture
def probe(workspace: Workspace) -> Probe:
    made = Probe(CONFIG, (24, 16))
    made.read(workspace.data)
    return made


@torch.no_grad()
def test_the_probe_measures_the_mean_patch_feature(probe: Probe, workspace: Workspace) -> None:
    """Twelve pictures of three classes; training and test pictures are the same ones."""
    backbone = make_backbone()
    pixels = []
    for number in range(12):
        picture = Image.open(workspace.data / f"drawings/{number:02d}.png").convert("RGB")
        resized = picture.resize((16, 24), Image.Resampling.BICUBIC)
        pixels.append(torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 127.5 - 1)
    states = backbone(torch.stack(pixels)).vision
    assert states is not None
    features, labels = states[:, 1:].mean(1), torch.arange(12) % 3
    few_shot = few_shot_accuracy(features, labels, features, labels, shots=2)
    expected = {"probe/few_shot": few_shot.mean, "probe/knn": knn_accuracy(features, labels, features, labels)}
    assert probe.measure(backbone) == pytest.approx(expected)


def test_the_backbone_is_measured_as_it_is_now(probe: Probe) -> None:
    backbone = make_backbone()
    before = probe.measure(backbone)
    assert probe.measure(backbone) == before
    measured = set()
    for _ in range(5):
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(torch.randn_like(parameter))
        measured.add(tuple(probe.measure(backbone).values()))
    assert len(measured) > 1


def test_measuring_leaves_mode_gradients_and_random_numbers_alone(probe: Probe) -> None:
    backbone = make_backbone(drop_path=0.5).train()
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = probe.measure(backbone)
    assert first == probe.measure(backbone), "no drop path"
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert random.getstate() == state[0]
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), state[1], strict=True))
    assert torch.equal(torch.get_rng_state(), state[2])
    probe.measure(backbone.eval())
    assert not backbone.training


def test_pictures_are_read_once_for_all_copies_of_a_task(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(path: str) -> Image.Image:
        read.append(path)
        return read_picture(path)

    monkeypatch.setattr("beit3.data.labelled_pictures.read_picture", note)
    probe = Probe(CONFIG, (24, 16))
    averaged = copy.deepcopy(probe)
    assert not read
    probe.read(workspace.data)
    probe.read(workspace.data)
    assert len(read) == 24
    assert averaged.measure(make_backbone()).keys() == {"probe/few_shot", "probe/knn"}
    assert len(read) == 24


def test_what_cannot_be_read_is_one_line(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shots must be at least 1, not 0"):
        ProbeConfig(train="a", test="b", shots=0)
    probe = Probe(ProbeConfig(train="groups.train.jsonl", test="none.jsonl"), (24, 16))
    for _ in range(2):
        with pytest.raises(DataMissingError, match=r"none\.jsonl does not exist"):
            probe.read(workspace.data)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "bad.jsonl").write_text('{"image_path": "text.png", "label": 1}\n')
    with pytest.raises(BeitError, match=r"example 0 cannot be evaluated .*text\.png"):
        Probe(ProbeConfig(train="bad.jsonl", test="bad.jsonl"), (24, 16)).read(tmp_path)
