"""Small index files of every task over emoji pictures, and tiny Tasks on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from beit3.data.augment import ClassificationViewConfig
from beit3.finetune.captioning import CaptioningConfig
from beit3.finetune.classification import ClassificationConfig
from beit3.finetune.nlvr2 import NLVR2Config
from beit3.finetune.retrieval import RetrievalConfig
from beit3.finetune.vqa import VQAConfig
from beit3.model.presets import ModelConfig
from tests.conftest import Workspace

NAMES = {
    "classification": "groups",
    "vqa": "vqa",
    "nlvr2": "nlvr2",
    "captioning": "captions",
    "retrieval": "retrieval",
}
TINY: dict[str, Any] = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_width": 24,
    "patch_size": 8,
    "image_size": (24, 24),
    "vocab_size": 420,
    "max_text_positions": 40,
}


@pytest.fixture
def sets(workspace: Workspace) -> Path:
    """A folder with twelve pictures and index files of each task."""
    return workspace.data


@pytest.fixture
def config(sets: Path, workspace: Workspace) -> Callable[..., Any]:
    """The configuration of a task, in either attention style."""

    def make(task: str, attention: Literal["shared", "decoupled"] = "decoupled", **changes: Any) -> Any:
        plain = task in ("classification", "vqa")
        model = ModelConfig(**TINY, attention=attention, fusion_layers=int(attention == "shared"), final_norm=not plain)
        name = NAMES[task]
        common: dict[str, Any] = {"model": model, "train": f"{name}.train.jsonl", "eval": f"{name}.test.jsonl"}
        common |= {"batch_size": 4, "eval_batch_size": 5}
        texts: dict[str, Any] = {"text_tokenizer": workspace.text_tokenizer, "max_text_length": 16}
        if task == "classification":
            view = ClassificationViewConfig(auto_augment=None)
            own = {"num_classes": 3, "labels": sets / "groups.labels.json", "view": view}
            return ClassificationConfig(**{**common, **own, **changes})
        if task == "vqa":
            return VQAConfig(**{**common, **texts, "labels": sets / "vqa.labels.json", **changes})
        if task == "nlvr2":
            return NLVR2Config(**{**common, **texts, **changes})
        if task == "captioning":
            return CaptioningConfig(**{**common, **texts, **changes})
        return RetrievalConfig(**{**common, **texts, **changes})

    return make


@pytest.fixture
def build(config: Callable[..., Any]) -> Callable[..., Any]:
    """A Task whose every weight is random, norms and biases too."""

    def make(task: str, attention: str = "decoupled", **changes: Any) -> Any:
        made = config(task, attention, **changes).build()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return made

    return make
