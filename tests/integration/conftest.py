"""A place to run the command line in, with data and tokenizers; and small models in the released layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from beit3.model.build import build_model
from beit3.model.official import to_official
from beit3.model.presets import ModelConfig
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace

Released = Callable[..., Path]


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test; one thread, as in the processes that tests start."""
    (tmp_path / "data").symlink_to(workspace.data, target_is_directory=True)
    shutil.copytree(workspace.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def released(workspace: Workspace, tmp_path: Path) -> Released:
    """Write small random models as released files, `TASK.pth`, with `beit3.spm` beside them."""

    def write(task: str, **options: int) -> Path:
        tokenizer = TextTokenizer.load(workspace.text_tokenizer)
        tokenizer.save(tmp_path / "beit3.spm")
        config = ModelConfig(
            width=64,
            num_layers=2,
            num_heads=1,
            ffn_width=48,
            patch_size=8,
            image_size=(24, 24),
            vocab_size=len(tokenizer) + 8,
            max_text_positions=40,
            attention="decoupled",
            fusion_layers=0,
        )
        model = build_model(config, task, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        path = tmp_path / f"{task}.pth"
        torch.save({"model": to_official(config, model.state_dict())}, path)
        return path

    return write
