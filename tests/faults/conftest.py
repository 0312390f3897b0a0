"""What tests of whole runs share: a folder to train in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Workspace


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path) -> Path:
    """A folder with data and tokenizers."""
    workspace.link(tmp_path)
    return tmp_path
