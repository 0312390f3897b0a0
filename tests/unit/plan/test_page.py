"""The page of one plan, and the table of several."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from beit3.cli import run_command


def test_the_page_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "recipe:pretrain/mdm_base:giant", "--gpus", "16", "--fit"]) == 0
    page = capsys.readouterr().out
    for words in ("memory of a GPU", "assumed, not measured", "checkpoint", "pictures needed", "a failure"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120
    assert len(page.splitlines()) < 50


def test_the_tables_of_the_guide_are_what_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"```bash\nbeit3 (plan [^\n]*)\n```\n\n((?:\|[^\n]*\n)+)", guide)
    assert len(found) == 3
    for command, table in found:
        assert run_command(shlex.split(command)) == 0
        assert capsys.readouterr().out == table
