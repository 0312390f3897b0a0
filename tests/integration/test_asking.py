"""`beit3 caption` and `beit3 answer` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import beit3
from beit3.cli import run_command
from beit3.data.emoji import load_cells
from beit3.predict import Predictor

if TYPE_CHECKING:
    from tests.integration.conftest import Released

MODELS = ["--device", "cpu", "--model"]


@pytest.fixture
def here(released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with released captioning and VQA files, five pictures and one that is none."""
    monkeypatch.chdir(tmp_path)
    released("captioning")
    released("vqa", num_answers=3)
    Path("answers.json").write_text('["yes", "no", "blue"]')
    Path("pictures/more").mkdir(parents=True)
    for index, cell in enumerate(load_cells("google")[:5]):
        cell.image.save(f"pictures/{'more/' if index > 2 else ''}{index}.png")
    return tmp_path


def test_one_picture_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["caption", "pictures/0.png", "--max-length", "9", *MODELS, "captioning.pth"]) == 0
    expected = beit3.load("captioning.pth", device="cpu").caption(["pictures/0.png"], max_length=9)
    assert capsys.readouterr().out.strip() == expected[0].strip()
    assert (
        run_command(
            [
                "answer",
                "pictures/0.png",
                "--question",
                "is it?",
                "--top",
                "2",
                "--labels",
                "answers.json",
                *MODELS,
                "vqa.pth",
            ]
        )
        == 0
    )
    ranking = beit3.load("vqa.pth", device="cpu", labels="answers.json").answer("pictures/0.png", "is it?", top=2)
    assert capsys.readouterr().out.strip() == ", ".join(f"{name} ({score:.2f})" for name, score in ranking)


def test_a_folder_is_a_line_for_each_picture_and_broken_ones_are_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pictures/broken.png").write_bytes(b"<html>")
    assert run_command(["caption", "pictures", "--max-length", "6", *MODELS, "captioning.pth"]) == 0
    said = capsys.readouterr()
    names = [line.split(":")[0] for line in said.out.splitlines()]
    assert names == [f"pictures/{name}.png" for name in ("0", "1", "2", "more/3", "more/4")]
    assert "left out: picture pictures/broken.png cannot be read" in said.err


def test_a_file_of_rows_is_gone_on_with(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two pictures, and in the middle of writing a third row."""
    command = ["answer", "pictures", "--question", "is it?", "--out", "rows.jsonl", "--labels", "answers.json"]
    command += [*MODELS, "vqa.pth"]
    assert run_command(command) == 0
    assert "rows.jsonl: 5 pictures written" in capsys.readouterr().out
    whole = Path("rows.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    asked: list[int] = []
    original = Predictor.answer

    def counted(self: Predictor, image: list[Path], question: list[str], top: int) -> object:
        asked.append(len(image))
        return original(self, image, question, top)

    monkeypatch.setattr(Predictor, "answer", counted)
    assert run_command(command) == 0
    assert sum(asked) == 3
    assert "rows.jsonl: 3 pictures written, 2 were there" in capsys.readouterr().out
    again = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for row, expected in zip(again, map(json.loads, lines), strict=True):
        assert (row["picture"], row["question"]) == (expected["picture"], "is it?")
        assert [name for name, _ in row["answers"]] == [name for name, _ in expected["answers"]]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["caption", *MODELS, "captioning.pth"], 2, "at least one picture"),
        (["caption", "none.png", *MODELS, "captioning.pth"], 3, "none.png does not exist"),
        (["caption", "pictures/0.png", *MODELS, "vqa.pth"], 2, "caption needs a captioning model; this is a vqa model"),
        (["caption", "answers.json", *MODELS, "captioning.pth"], 2, "picture answers.json cannot be read"),
        (["answer", "pictures/0.png", *MODELS, "vqa.pth"], 2, "question"),
        (
            ["answer", "pictures/0.png", "--question", "a", "--top", "0", *MODELS, "vqa.pth"],
            2,
            "--top must be at least 1",
        ),
        (["caption", "pictures", "--out", "answers.json", *MODELS, "captioning.pth"], 2, "holds other lines"),
        (
            ["caption", "pictures/more", "--num-beams", "0", *MODELS, "captioning.pth"],
            2,
            "num_beams must be at least 1",
        ),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], code: int, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == code
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("beit3")]
    assert len(said) == 1
    assert line in said[0]


def test_a_whole_folder_is_converted_with_its_names_and_read_by_transformers(
    here: Path, released: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    command = ["convert", "vqa.pth", "made", "--labels", "answers.json", "--licence", "mit", "--hugging-face"]
    assert run_command([*command, "--image-size", "32"]) == 0
    made = beit3.load("made", device="cpu")
    assert made.labels == ["yes", "no", "blue"]
    assert made.preprocess.image_size == made.model.model_config.image_size == (32, 32)
    assert "Weights: mit." in Path("made/README.md").read_text()
    text = "grinning cat face"
    assert AutoTokenizer.from_pretrained("made")(text)["input_ids"] == made.tokenizer.encode(text)
    capsys.readouterr()
    assert run_command(["info", "made"]) == 0
    said = capsys.readouterr().out
    for part in ("vqa, exchange folder", "32 x 32 pixels in 4 x 4 patches", "3 answers; labels.json names 3", "heads "):
        assert part in said, part


def test_one_tower_is_converted(here: Path, released: Callable[..., Path]) -> None:
    released("retrieval")
    assert run_command(["convert", "retrieval.pth", "tower", "--parts", "vision"]) == 0
    whole, tower = beit3.load("retrieval.pth", device="cpu"), beit3.load("tower", device="cpu")
    pictures = sorted(Path("pictures").glob("*.png"))
    assert (tower.embed_images(pictures) - whole.embed_images(pictures)).abs().max() < 1e-6
    assert Path("tower/model.safetensors").stat().st_size < 0.6 * Path("retrieval.pth").stat().st_size


def test_info_says_what_is_wrong_with_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    content = torch.load("vqa.pth", weights_only=True)
    del content["model"]["pooler.norm.bias"]
    torch.save(content, "broken.pth")
    assert run_command(["info", "broken.pth"]) == 2
    said = capsys.readouterr()
    assert "tensors as float32" in said.out
    assert "broken.pth: unknown keys besides the backbone" in said.err
