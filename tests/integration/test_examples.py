"""Every program in examples/ does what its first line says, on small models."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import beit3
from beit3.cli import run_command
from beit3.data.emoji import load_cells
from beit3.tokenizer.vqkd import VQKD, VQKDConfig
from tests.integration.conftest import Released

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture
def pictures(place: Path) -> Path:
    folder = place / "pictures"
    folder.mkdir()
    for index, cell in enumerate(load_cells("google")[:7]):
        cell.image.save(folder / f"{index}.png")
    return folder


def test_find_pictures_prints_the_nearest_first(
    pictures: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    path = released("retrieval")
    main("find_pictures")(str(path), str(pictures), "grinning cat")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    predictor = beit3.load(path)
    scores = predictor.embed_images(sorted(pictures.iterdir())) @ predictor.embed_texts(["grinning cat"])[0]
    assert [row[1] for row in rows] == [str(pictures / f"{index}.png") for index in scores.topk(5).indices.tolist()]
    assert float(rows[0][0]) == pytest.approx(float(scores.max()), abs=6e-4)


def test_ask_prints_answers_to_each_question(
    pictures: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    main("ask")(str(released("vqa", num_answers=4)), str(pictures / "0.png"), "is it?", "what?")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" answer")[0] for line in lines] == ["is it?", "what?"]
    assert all(line.count("%") == 3 for line in lines)


def test_caption_prints_a_sentence_for_each_picture(
    pictures: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(pictures / "0.png"), str(pictures / "1.png")]
    path = released("captioning")
    main("caption")(str(path), *names)
    expected = beit3.load(path).caption(names)
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: {text}" for name, text in zip(names, expected, strict=True)
    ]


def test_use_as_backbone_draws_a_colour_for_each_patch(
    pictures: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    main("use_as_backbone")(str(released("retrieval")), str(pictures / "0.png"), "features.png")
    assert "64 channels, one place for 8 pixels" in capsys.readouterr().out
    drawn = np.asarray(Image.open("features.png"))
    assert drawn.shape == (48, 48, 3)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 9


def test_groups_of_open_tasks_are_nine_and_fit_the_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody draws the tenth, parts of other emoji; every picture of the last one is used."""
    program = runpy.run_path(str(EXAMPLES / "open_tasks.py"))
    groups = [
        "flags",
        "components",
        "travel",
        "animals",
        "objects",
        "symbols",
        "people",
        "smileys",
        "food",
        "sport",
        "",
    ]
    pictures = [
        program["Picture"](
            f"drawings/{number % 12:02d}.png",
            "",
            {"hexcode": "1F600", "category": group, "split": "train", "vendor": vendor},
        )
        for vendor in ("google", "twitter")
        for number, group in enumerate(groups)
    ]
    (place / "tasks").mkdir()
    (place / "tasks/drawings").symlink_to(place / "data/drawings")
    program["write_groups"](pictures, place / "tasks")
    names = json.loads((place / "tasks/groups.labels.json").read_text())
    assert names == sorted(set(groups) - {"components", ""})
    for part in ("train", "test"):
        rows = [json.loads(line) for line in (place / f"tasks/groups.{part}.jsonl").read_text().splitlines()]
        assert sorted(row["label"] for row in rows) == list(range(9))
    train = ["train", "recipe:finetune/classification_emoji:debug", "--device", "cpu", "--precision", "fp32"]
    assert run_command([*train, "--data", "tasks"]) == 0
    assert json.loads((place / "runs/classification_emoji_debug/export/labels.json").read_text()) == names
    assert "left out" not in capsys.readouterr().err


def test_continue_pretraining_moves_every_weight_of_a_released_model(place: Path, released: Released) -> None:
    path = released("pretraining", codebook_size=16)
    codes = VQKDConfig(image_size=(24, 24), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=16)
    VQKD(codes).save(place / "codes")
    main("continue_pretraining")(str(path), str(place / "beit3.spm"), str(place / "codes"), "data", "20")
    before, after = beit3.load_model(path).state_dict(), beit3.load("runs/continued/export").model.state_dict()
    assert before.keys() == after.keys()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(moved) > 0.95 * len(before)
    assert sum(float((before[name] - after[name]).abs().max()) for name in moved) / len(moved) < 0.1, (
        "it went on from it"
    )


def test_name_words_writes_a_page_with_words_beside_captions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "recipe:pretrain/superclass_emoji:debug", "--device", "cpu", "--precision", "fp32"]
    assert run_command(train) == 0
    main("name_words")("runs/superclass_emoji_debug/export", "data/test_vendor", "words.html", "5")
    assert "of 5 pictures have a word" in capsys.readouterr().out
    page = Path("words.html").read_text(encoding="utf-8")
    captions = [cell.caption for cell in load_cells("twitter", heldout=False)[:12]]
    assert sum(f'<td class="text">{caption}</td>' in page for caption in captions) == 5
    assert page.count('<img class="pixel"') == 5
