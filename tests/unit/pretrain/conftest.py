"""Tiny Tasks over the emoji workspace, and samples to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from beit3.config import replace
from beit3.data.emoji import load_cells
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.contrastive import Contrastive, ContrastiveConfig
from beit3.pretrain.masked_data_modeling import MaskedDataModeling, MaskedDataModelingConfig
from tests.conftest import Workspace

T = TypeVar("T", bound=torch.nn.Module)

TINY = ModelConfig(
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=(48, 48),
    vocab_size=420,
    max_text_positions=40,
    fusion_layers=1,
)


@pytest.fixture
def tiny_model() -> ModelConfig:
    return TINY


@pytest.fixture
def mdm_config(workspace: Workspace) -> MaskedDataModelingConfig:
    pairs = (Source(path="pairs"),)
    return MaskedDataModelingConfig(
        model=TINY,
        visual_tokenizer=workspace.visual_tokenizer,
        text_tokenizer=workspace.text_tokenizer,
        pairs=Stream(sources=pairs, batch_size=4),
        images=Stream(sources=pairs, batch_size=3),
        texts=Stream(sources=(Source(path="text"),), batch_size=5),
        crop=CropConfig(size=48),
        max_text_length=24,
        eval_pairs="test_vendor",
    )


@pytest.fixture
def contrastive_config(workspace: Workspace) -> ContrastiveConfig:
    return ContrastiveConfig(
        model=TINY,
        text_tokenizer=workspace.text_tokenizer,
        pairs=Stream(sources=(Source(path="pairs"),), batch_size=6),
        crop=CropConfig(size=48),
        max_text_length=24,
        eval_pairs="test_vendor",
    )


@pytest.fixture
def build_mdm(mdm_config: MaskedDataModelingConfig) -> Callable[..., MaskedDataModeling]:
    """Build the Task with weights that are random everywhere, biases included."""

    def build(**changes: object) -> MaskedDataModeling:
        return _shaken(MaskedDataModeling(replace(mdm_config, **changes)))

    return build


@pytest.fixture
def build_contrastive(contrastive_config: ContrastiveConfig) -> Callable[..., Contrastive]:
    def build(**changes: object) -> Contrastive:
        return _shaken(Contrastive(replace(contrastive_config, **changes)))

    return build


@pytest.fixture
def samples(workspace: Workspace) -> list[Sample]:
    """Pairs of the workspace, in order."""
    found = list(load_prepared(workspace.data / "pairs"))
    assert len(found) == 96
    assert found[0].text == load_cells("google", heldout=False)[0].caption.encode()
    return found


def _shaken(task: T) -> T:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task
