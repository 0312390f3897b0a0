"""What users and public data do wrong: one line and the right exit code, or a counter and training goes on."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from beit3.cli import run_command
from beit3.data.shard_writer import FolderWriter
from beit3.train.log import read_log

DEBUG = "recipe:pretrain/mdm_emoji:debug"
CPU = ["--device", "cpu", "--precision", "fp32", "--loop.log-every", "1"]


def complaint(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with this code and say why in one line."""
    capsys.readouterr()
    assert run_command(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("beit3: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["tarin", DEBUG], "did you mean 'train'"),
        (["train", "recipe:pretrain/mdm_emojii"], "did you mean 'pretrain/mdm_emoji'"),
        (["train", "pretrain/none.py"], "unknown recipe"),
        (["train", "recipe:pretrain/mdm_emoji:debugg"], "did you mean 'debug'"),
        (["train", "--loop.steps", "3"], "needs a recipe"),
        (["train", DEBUG, "--optim.lrr", "1"], "--optim.lrr"),
        (["train", DEBUG, "--optim.lr", "fast"], "fast"),
        (["train", DEBUG, "--optim.lr", "-1"], "optim.lr must be above 0"),
        (["train", DEBUG, "--loop.steps", "0"], "loop.steps must be at least 1"),
        (["train", DEBUG, "--device", "gpu"], "device 'gpu' is unknown"),
        (["train", DEBUG, "--task.model.width", "33"], "must divide by model.num_heads"),
        (["train", DEBUG, "--task.model.patch-size", "16"], "grid of (6, 6) codes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_code_2_and_one_line(
    arguments: list[str], hint: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in complaint(arguments, 2, capsys)


def test_a_missing_data_folder_is_code_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["train", DEBUG, *CPU, "--data", "elsewhere"], 3, capsys)
    assert "elsewhere" in line
    assert "beit3 prepare" in line


def test_a_missing_shard_is_code_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "broken" / "pairs", 12)
    (place / "broken" / "text").symlink_to(place / "data" / "text", target_is_directory=True)
    (place / "broken" / "pairs" / "shard-00000.tar").unlink()
    assert "shard-00000.tar" in complaint(["train", DEBUG, *CPU, "--data", "broken"], 3, capsys)


def test_a_cut_shard_is_code_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "broken" / "pairs", 12)
    (place / "broken" / "text").symlink_to(place / "data" / "text", target_is_directory=True)
    shard = place / "broken" / "pairs" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "shard-00000.tar" in complaint(["train", DEBUG, *CPU, "--data", "broken"], 3, capsys)


@pytest.mark.parametrize(
    ("file", "code"), [("text_emoji/tokenizer.spm", 2), ("vqkd_emoji/export/model.safetensors", 2)]
)
def test_a_damaged_tokenizer_is_code_2_and_a_missing_one_3(
    file: str, code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "runs" / file
    path.write_bytes(path.read_bytes()[:500])
    assert Path(file).name in complaint(["train", DEBUG, *CPU], code, capsys)
    path.unlink()
    assert Path(file).name in complaint(["train", DEBUG, *CPU], 3, capsys)


def test_a_run_that_could_not_start_can_be_started_once_its_data_is_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complaint(["train", DEBUG, *CPU, "--data", "later"], 3, capsys)
    (place / "later").symlink_to(place / "data", target_is_directory=True)
    assert run_command(["train", DEBUG, *CPU, "--data", "later"]) == 0


def test_an_existing_run_is_code_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", DEBUG, *CPU]) == 0
    assert "--resume" in complaint(["train", DEBUG, *CPU], 2, capsys)
    line = complaint(["train", DEBUG, *CPU, "--resume", "--optim.lr", "0.1"], 2, capsys)
    assert "optim.lr" in line


def test_debug_adds_the_traceback(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", DEBUG, *CPU, "--data", "elsewhere", "--debug"]) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("beit3: ")


def test_help_is_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["train"], ["train", "--help"], ["train", DEBUG, "--help"]):
        assert run_command(arguments) == 0
        assert "train" in capsys.readouterr().out


@pytest.mark.distributed
def test_the_process_ends_with_the_code_and_one_line(place: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(["-m", "beit3", "train", DEBUG, *CPU, "--data", "elsewhere"], place)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert out == ""
    assert len(error.splitlines()) == 1
    assert error.startswith("beit3: elsewhere")


def test_unusable_samples_are_counted_and_training_goes_on(place: Path) -> None:
    write(place / "dirty" / "pairs", 24, spoil=True)
    write_texts(place / "dirty" / "text", ["a red cat", "", "   ", "a blue dog"] * 6)
    command = ["train", DEBUG, *CPU, "--data", "dirty", "--loop.steps", "6"]
    assert run_command(command) == 0
    record = read_log(place / "runs" / "mdm_emoji_debug")[-1]
    assert record["step"] == 6
    counts = {name: value for name, value in record.items() if name.startswith("skipped/")}
    for reason in ("pairs/unreadable_image", "pairs/empty_caption", "pairs/missing_image", "images/unreadable_image"):
        assert counts.get(f"skipped/{reason}", 0) > 0, counts
    assert all(value == int(value) for value in counts.values())


def test_captions_of_a_hundred_thousand_characters_train(place: Path) -> None:
    write(place / "long" / "pairs", 12, caption="a red cat and a blue dog " * 4000)
    write_texts(place / "long" / "text", ["ab " * 33_334, "\x00\ud7ff\ufffe odd", "word" * 25_000] * 3)
    assert run_command(["train", DEBUG, *CPU, "--data", "long"]) == 0
    assert read_log(place / "runs" / "mdm_emoji_debug")[-1]["step"] == 2


def write(folder: Path, count: int, *, spoil: bool = False, caption: str = "a red cat") -> None:
    """Write pairs; spoilt are every fourth picture (HTML), every fifth caption (blank) and every seventh (none)."""
    with FolderWriter(folder, "pairs") as writer:
        for number in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (48, 48), (10 * number % 256, 0, 0)).save(picture, "PNG")
            parts = {"png": picture.getvalue(), "txt": f"{caption} {number}".encode()}
            if spoil and number % 4 == 1:
                parts["png"] = b"<html>not found</html>"
            if spoil and number % 5 == 2:
                parts["txt"] = b" \n"
            if spoil and number % 7 == 3:
                del parts["png"]
            writer.add(f"{number:04d}", parts)


def write_texts(folder: Path, texts: list[str]) -> None:
    with FolderWriter(folder, "text") as writer:
        for text in texts:
            writer.add_text(text)
