"""`beit3 caption` and `beit3 answer` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.data.emoji import load_cells
from beit3.errors import ConfigError
from beit3.predict import Predictor
from beit3.tokenizer.text import train_text_tokenizer
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

    def counted(self: Predictor, image: list[Tensor], question: list[str], top: int) -> object:
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
    content = torch.load("vqa.pth", weights_only=True)
    del content["model"]["pooler.norm.bias"]
    torch.save(content, "broken.pth")
    assert run_command(["info", "broken.pth"]) == 2
    said = capsys.readouterr()
    assert "tensors as float32" in said.out
    assert "broken.pth: the official weights do not fit: missing pooler.norm.bias" in said.err


ASK = ["answer", "pictures", "--out", "rows.jsonl", *MODELS, "vqa.pth", "--question"]
CAPTION = ["caption", "pictures", "--max-length", "6", "--out", "captions.jsonl", *MODELS, "captioning.pth"]


def rows(file: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_a_second_question_is_asked_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for question in ("is it?", "who is it?", "is it?"):
        assert run_command([*ASK, question]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "rows.jsonl: 5 pictures written",
        "rows.jsonl: 5 pictures written",
        "rows.jsonl: 0 pictures written, 5 were there",
    ]
    assert [row["question"] for row in rows("rows.jsonl")] == ["is it?"] * 5 + ["who is it?"] * 5
    assert run_command([*ASK, "is it?", "--top", "2"]) == 0
    assert "rows.jsonl: 5 pictures written" in capsys.readouterr().out


def test_rows_say_with_what_they_were_made_and_other_settings_are_not_mixed_up(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(CAPTION) == 0
    first = rows("captions.jsonl")[0]
    expected = {"model": "captioning.pth", "num_beams": 3, "max_length": 6, "length_penalty": 0.6, "official": False}
    assert {name: first[name] for name in expected} == expected
    scores = beit3.load("captioning.pth", device="cpu").caption_scores(["pictures/0.png"], max_length=6)
    assert (first["caption"], first["score"]) == (scores[0][0], pytest.approx(scores[0][1], rel=1e-4))
    for option in (["--num-beams", "2"], ["--official"], ["--image-size", "32"]):
        assert run_command([*CAPTION, *option]) == 0
    assert len(rows("captions.jsonl")) == 20
    capsys.readouterr()
    assert run_command(["answer", "pictures", "--out", "captions.jsonl", *MODELS, "vqa.pth", "--question", "who?"]) == 2
    assert "captions.jsonl holds other lines" in capsys.readouterr().err


def test_names_that_are_no_text_are_written_and_gone_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"pictures/raw\xff.png")
    Path("pictures/0.png").rename(name)
    assert run_command(CAPTION) == 0
    assert name in [row["picture"] for row in rows("captions.jsonl")]
    capsys.readouterr()
    assert run_command(CAPTION) == 0
    assert capsys.readouterr().out == "captions.jsonl: 0 pictures written, 5 were there\n"


def test_pictures_and_the_file_are_looked_at_before_the_model(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(CAPTION) == 0

    def never(*_: object, **__: object) -> Predictor:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("beit3.search.asking.load", never)
    capsys.readouterr()
    assert run_command(CAPTION) == 0
    for arguments, code, line in (
        (["caption", "none.png", *MODELS, "captioning.pth"], 3, "none.png does not exist"),
        (["caption", "x" * 300, *MODELS, "captioning.pth"], 3, "does not exist"),
        (["caption", "pictures", "--out", "pictures", *MODELS, "captioning.pth"], 2, "pictures is no file"),
        (["caption", "pictures", "--out", "pictures/0.png/x", *MODELS, "captioning.pth"], 2, "cannot be written"),
    ):
        capsys.readouterr()
        assert run_command(arguments) == code
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said


def test_large_pictures_are_shrunk_as_they_are_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    original = Predictor.caption_scores

    def watched(self: Predictor, images: list[Tensor], **settings: object) -> object:
        seen.extend(tuple(image.shape) for image in images)
        return original(self, images, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "caption_scores", watched)
    Image.new("RGB", (900, 700), "red").save("pictures/large.png")
    assert run_command(CAPTION) == 0
    assert seen == [(3, 24, 24)] * 6
    assert [row["picture"] for row in rows("captions.jsonl")] == [
        f"pictures/{name}.png" for name in ("0", "1", "2", "large", "more/3", "more/4")
    ]


def test_a_reader_that_has_seen_enough_ends_it_quietly(here: Path) -> None:
    command = [sys.executable, "-m", "beit3", "caption", "pictures", "--max-length", "5", *MODELS, "captioning.pth"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == ""
    running.stderr.close()
    assert running.wait() == 1


def test_what_the_system_refuses_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    assert run_command(["convert", "vqa.pth", "file/new"]) != 0
    assert len(capsys.readouterr().err.splitlines()) == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(Path, "open", full)
    assert run_command([*ASK, "who?"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "beit3: rows.jsonl: No space left on device"


def test_the_help_needs_no_pytorch_and_a_predictor_no_torchvision() -> None:
    code = (
        "import sys, beit3.cli; beit3.cli.run_command(['--help']); assert 'torch' not in sys.modules; "
        "import beit3; beit3.load; assert 'torch' in sys.modules and 'torchvision' not in sys.modules; "
        "assert set(beit3.__all__) <= set(dir(beit3)); from beit3 import *; print(load_model.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("load_model\n")


def test_a_released_file_is_not_converted_to_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["convert", "vqa.pth", "new.pth"]) == 2
    assert "vqa.pth is of the released layout already: name a new folder" in capsys.readouterr().err
    assert not Path("new.pth").exists()


def test_a_model_without_its_tokenizer_is_converted_and_embedded(
    here: Path, released: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    released("retrieval")
    Path("beit3.spm").rename("mine.spm")
    assert run_command(["convert", "retrieval.pth", "made", "--hugging-face"]) == 2
    assert "has no text tokenizer" in capsys.readouterr().err
    assert not Path("made").exists()
    assert run_command(["convert", "retrieval.pth", "made"]) == 0
    expected = beit3.load("retrieval.pth", device="cpu").embed_images(["pictures/0.png"])
    torch.testing.assert_close(beit3.load("made", device="cpu").embed_images(["pictures/0.png"]), expected)
    assert run_command(["embed", "pictures", "--model", "made", "--out", "index"]) == 0
    with pytest.raises(ConfigError, match="has no text tokenizer"):
        beit3.load("made").embed_texts(["a cat"])


def test_info_names_what_does_not_fit_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["convert", "vqa.pth", "made"]) == 0
    Path("made/labels.json").write_text('["yes"]')
    preprocess = json.loads(Path("made/preprocess.json").read_text())
    Path("made/preprocess.json").write_text(json.dumps({**preprocess, "image_size": [30, 30]}))
    train_text_tokenizer(iter(["a red cat", "a blue dog"] * 9), 20, character_coverage=1.0).save("beit3.spm")
    capsys.readouterr()
    assert run_command(["info", "made"]) == 0
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  problems ")]
    assert len(problems) == 2
    assert "made/preprocess.json does not fit its model: image_size (30, 30)" in problems[0]
    assert "made/labels.json names 1 outputs, the model has 3" in problems[1]
    assert run_command(["info", "vqa.pth"]) == 0
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  problems ")]
    assert len(problems) == 1
    assert "beit3.spm has" in problems[0]
    assert "this tokenizer belongs to another model" in problems[0]
    assert run_command(["info", "made/model.safetensors"]) == 2
    assert "give the folder, made" in capsys.readouterr().err
