"""What data a position belongs to, and how differences are said."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3.data.fingerprint import data_changes, fingerprint_files, fingerprint_folder
from beit3.data.loaders import belongs_here, share_of_counts
from beit3.errors import ConfigError


def test_a_prepared_folder_is_known_by_samples_bytes_and_hashes(corpus: Path) -> None:
    found = fingerprint_folder(corpus / "pairs")
    assert list(found) == [f"shard-{number:05d}.tar" for number in range(5)]
    for name, facts in found.items():
        data = (corpus / "pairs" / name).read_bytes()
        assert facts == {"samples": 20, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert fingerprint_folder(corpus / "text")["text.jsonl"]["samples"] == 50


def test_folders_of_earlier_versions_are_known_without_hashes(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "pairs", tmp_path / "pairs")
    report = tmp_path / "pairs" / "prepare.json"
    old = json.loads(report.read_text())
    del old["sha256"]
    report.write_text(json.dumps(old))
    found = fingerprint_folder(tmp_path / "pairs")
    assert {facts["sha256"] for facts in found.values()} == {None}
    assert data_changes(found, fingerprint_folder(corpus / "pairs")) == [], "what is unknown is not compared"


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / place / "train.jsonl" for place in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    assert list(fingerprint_files(paths)) == ["train.jsonl", "train.jsonl (2)"]


OLD: dict[str, dict[str, Any]] = {name: {"bytes": 1, "sha256": name} for name in "abcd"}


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, []),
        ({name: OLD[name] for name in "abd"}, ["c removed"]),
        ({**OLD, "e": {}}, ["e added"]),
        ({**OLD, "b": {"bytes": 2, "sha256": "b"}}, ["b edited (bytes 1 -> 2)"]),
        ({**OLD, "b": {"bytes": 1, "sha256": "x"}}, ["b edited (other contents)"]),
        ({name: OLD[name] for name in "abdc"}, ["d stands where c did"]),
        ({name: OLD[name] for name in "ebca"} if "e" in OLD else {name: OLD[name] for name in "bca"},
         ["d removed", "b stands where a did"]),
    ],
)  # fmt: skip
def test_differences_are_said_file_by_file(new: dict[str, dict[str, Any]], expected: list[str]) -> None:
    assert data_changes(OLD, new) == expected


def test_many_differences_are_counted_after_the_first_ones(capsys: pytest.CaptureFixture[str]) -> None:
    state: dict[str, Any] = {"data": OLD, "settings": {"seed": 1}}
    with pytest.raises(ConfigError, match=r": a removed; b removed; c removed and 1 more\. Restore them"):
        belongs_here(state, {}, {}, allow_change=False, rank=1)
    assert not belongs_here(state, {}, {}, allow_change=True, rank=1)
    assert capsys.readouterr().err == "", "one rank says it"
    assert not belongs_here(state, {}, {}, allow_change=True, rank=0)
    assert capsys.readouterr().err.count("\n") == 1
    assert belongs_here(state, {"seed": 1}, OLD, allow_change=False, rank=0)
    with pytest.raises(ConfigError, match="the data state was saved with seed 1, this run has 2"):
        belongs_here(state, {"seed": 2}, OLD, allow_change=True, rank=0)


def test_counts_stay_with_equal_ranks_and_are_summed_for_others() -> None:
    states = [{"skipped": {"a": 1}}, {"skipped": {"a": 2, "b": 3}}]
    assert share_of_counts(states, 1, 2) == {"a": 2, "b": 3}
    assert share_of_counts(states, 0, 4) == {"a": 3, "b": 3}
    assert share_of_counts(states, 3, 4) == {}
