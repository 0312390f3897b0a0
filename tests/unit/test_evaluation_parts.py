"""Folders of evaluations: what decides a figure is compared by its content, and nothing else is ever removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from beit3.errors import ConfigError, DataMissingError
from beit3.evaluation_parts import claim_folder


@pytest.mark.parametrize("name", ["checkpoint", "data", "train", "test", "labels", "tokenizer"])
def test_another_content_under_the_same_name_is_refused(name: str, tmp_path: Path) -> None:
    place, out = tmp_path / "file", tmp_path / "out"
    place.write_text("one")
    settings: dict[str, Any] = {name: str(place), "batch_size": 4}
    claim_folder(out, settings, overwrite=False)
    claim_folder(out, settings, overwrite=False)
    place.write_text("two")
    with pytest.raises(ConfigError, match=rf"out holds another evaluation \(content of {name} differ\)"):
        claim_folder(out, settings, overwrite=False)
    claim_folder(out, settings, overwrite=True)
    with pytest.raises(ConfigError, match=r"\(batch_size differ\)"):
        claim_folder(out, settings | {"batch_size": 5}, overwrite=False)
    place.unlink()
    with pytest.raises(DataMissingError, match="file does not exist"):
        claim_folder(out, settings, overwrite=False)


def test_a_model_is_told_by_all_its_files_but_its_card(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "model" / "measured"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "labels.json", "README.md"):
        (folder / name).write_text("one")
    settings = {"checkpoint": str(folder)}
    claim_folder(out, settings, overwrite=False)  # an evaluation within the folder is no part of the model
    (folder / "README.md").write_text("two")
    claim_folder(out, settings, overwrite=False)
    for name in ("config.json", "model.safetensors", "labels.json"):
        (folder / name).write_text("two")
        with pytest.raises(ConfigError, match="content of checkpoint differ"):
            claim_folder(out, settings, overwrite=False)
        (folder / name).write_text("one")
        claim_folder(out, settings, overwrite=False)


def test_a_folder_of_deepspeed_is_told_by_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "checkpoint-1" / "mp_rank_00_model_states.pt"
    weights.parent.mkdir(parents=True)
    settings = {"checkpoint": str(tmp_path / "model")}
    weights.write_text("one")
    claim_folder(tmp_path / "out", settings, overwrite=False)
    weights.write_text("two")
    with pytest.raises(ConfigError, match="content of checkpoint differ"):
        claim_folder(tmp_path / "out", settings, overwrite=False)


def test_what_is_no_evaluation_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="photos exists and is no evaluation"):
            claim_folder(tmp_path / "photos", {}, overwrite)
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", {"batch_size": 4}, overwrite=False)
    (tmp_path / "out" / "settings.json").write_text('{"batch')
    with pytest.raises(ConfigError, match=r"settings\.json is damaged: begin anew with --overwrite"):
        claim_folder(tmp_path / "out", {"batch_size": 4}, overwrite=False)
