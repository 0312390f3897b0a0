"""A place to run the command line in: the workspace's data and tokenizers, and an empty `runs/` beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.conftest import Workspace


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test; one thread, as in the processes that tests start."""
    (tmp_path / "data").symlink_to(workspace.data, target_is_directory=True)
    shutil.copytree(workspace.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path
