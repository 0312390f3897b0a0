"""Writing an exchange folder: whole or not at all, and nothing of anyone else's is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3.errors import ConfigError
from beit3.model import exchange
from beit3.model.exchange import is_weights, read_settings, read_tensors, write_folder

Tree = dict[str, bytes]


def write(folder: Path | str, number: float = 0.0, **options: Any) -> None:
    write_folder(Path(folder), {"kind": "number"}, {"a": torch.full((3,), number), "b": torch.zeros(4)}, **options)


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Somebody's work."""
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (tmp_path / "work" / "sub" / "photo.jpg").write_bytes(b"light")
    return tmp_path / "work"


def test_a_folder_of_other_files_is_never_replaced(foreign: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="work holds other files, which are left alone: choose a new folder"):
        write(foreign)
    assert tree(tmp_path) == before
    (foreign / "config.json").write_text('{"model_type": "bert"}')  # of another program
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="holds other files"):
        write(foreign)
    assert tree(tmp_path) == before


def test_a_file_as_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    for target in ("notes", "notes/model", "notes/a/b"):
        with pytest.raises(ConfigError, match="is a file"):
            write(tmp_path / target)
    assert tree(tmp_path) == {"notes": b"kept"}


def test_the_current_folder_is_refused_and_kept(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (foreign / "empty").mkdir()
    write(foreign / "model", 1)
    before = tree(foreign)
    for folder, targets in (
        (foreign, [".", "sub/..", ""]),
        (foreign / "empty", [".", "../empty"]),
        (foreign / "model", ["."]),
    ):
        monkeypatch.chdir(folder)
        for target in targets:
            with pytest.raises(ConfigError, match=r"choose (a new|another)"):
                write(target)
        assert Path.cwd().exists()
    assert tree(foreign) == before


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk/model")
    for number in (1.0, 2.0):
        write(tmp_path / "model", number)
        assert (tmp_path / "model").is_symlink()
        assert read_tensors(tmp_path / "disk/model")["a"].tolist() == [number] * 3
    (tmp_path / "note").write_text("kept")
    (tmp_path / "to_file").symlink_to("note")
    with pytest.raises(ConfigError, match="to_file is a file"):
        write(tmp_path / "to_file")
    assert (tmp_path / "to_file").is_symlink()
    assert (tmp_path / "note").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "model", "note", "to_file"}


def test_what_others_put_into_an_exchange_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, 1, files={"labels.json": b"old", "kept.json": b"old"}, max_shard_size=12)
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("long")
    (folder / "tokenizer.json").write_text("of the older model")
    (folder / "model.onnx").write_text("graph")
    (folder / "model_ema.safetensors").write_text("other")
    assert (folder / "model.safetensors.index.json").is_file()
    write(folder, 2, files={"labels.json": b"new"})
    found = tree(folder)
    assert found.pop("model.safetensors")
    assert found.pop("config.json")
    assert found == {
        "labels.json": b"new",
        "kept.json": b"old",
        "runs": b"",
        "runs/events": b"long",
        "model.onnx": b"graph",
        "model_ema.safetensors": b"other",
    }
    assert read_tensors(folder)["a"].tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(mode=0o750)
    write(tmp_path / "model")
    assert read_settings(tmp_path / "model")["kind"] == "number"
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("at", ["save_file", "os.replace", "size"])
def test_a_failed_save_leaves_everything_as_it_was(
    at: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        write(tmp_path / "model", 1)
        (tmp_path / "model" / "own.txt").write_text("kept")
    before = tree(tmp_path)
    error: type[Exception] = OSError
    options = {}
    if at == "size":
        error, options = ConfigError, {"max_shard_size": "big"}
    elif at == "save_file":
        monkeypatch.setattr(exchange, "save_file", full_disk)
    else:
        monkeypatch.setattr("beit3.model.exchange.os.replace", failing_replace())
    with pytest.raises(error, match=r"max_shard_size 'big' is no size|No space left"):
        write(tmp_path / "model", 2, **options)
    assert tree(tmp_path) == before


def failing_replace() -> Callable[[Path, Path], None]:
    """`os.replace` that cannot put a new folder into its place."""
    true_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "model" and not source.name.endswith("-old"):
            full_disk()
        true_replace(source, target)

    return replace


@pytest.mark.parametrize(
    "name",
    ["a/b", "../evil", "..", ".", "", "/etc/x", "config.json", "model.safetensors", "model-00001-of-00002.safetensors"],
)
def test_files_beside_the_weights_have_plain_names_that_are_free(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written beside the weights"):
        write(tmp_path / "model", files={name: b""})
    assert not tree(tmp_path)


def test_weights_are_known_by_name() -> None:
    for name in ("model.safetensors", "model-00001-of-00012.safetensors", "model.safetensors.index.json"):
        assert is_weights(name)
    for name in ("model_ema.safetensors", "model.onnx", "my-model.safetensors", "model.safetensors.bak"):
        assert not is_weights(name)
