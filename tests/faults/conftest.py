"""What tests of whole runs share: a folder to train in, and the recipe that writes its samples down."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Workspace


@pytest.fixture
def place(workspace: Workspace, tmp_path: Path) -> Path:
    """A folder with data and tokenizers."""
    for name in ("data", "runs"):
        (tmp_path / name).symlink_to(workspace.folder / name, target_is_directory=True)
    return tmp_path


@pytest.fixture(scope="session")
def ledger() -> ModuleType:
    """`ledger.py`, which reads what it wrote."""
    spec = importlib.util.spec_from_file_location("_ledger", Path(__file__).with_name("ledger.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
