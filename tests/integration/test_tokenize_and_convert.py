"""`beit3 tokenize` and `beit3 convert` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import beit3
from beit3.cli import run_command
from beit3.config import replace
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig
from beit3.train.log import read_log
from tests.conftest import Workspace

TOKENIZE = ["tokenize", "images", "data/pairs", "data/codes", "--tokenizer", "runs/vqkd_emoji/export"]
CROP = ["--crop.size", "48", "--crop.scale", "0.5", "1", "--crop.flip", "0", "--crop.color-jitter", "0.2"]


def test_a_run_trains_on_recorded_codes_and_refuses_stale_ones(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*TOKENIZE, *CROP, "--crops", "2"]) == 0
    assert "data/codes: codes of 96 pictures, 1 shards written" in capsys.readouterr().out
    assert run_command([*TOKENIZE, *CROP, "--crops", "2"]) == 0
    assert "0 shards written, 1 kept" in capsys.readouterr().out
    recipe = Path("with_codes.py")
    recipe.write_text(
        "from beit3.config import replace\nfrom beit3.data.streams import Source, Stream\n"
        "from beit3.recipes import load_recipe\n\n\ndef recipe():\n"
        "    stream = Stream(sources=(Source(path='pairs', codes='codes'),), batch_size=4)\n"
        "    run = load_recipe('recipe:pretrain/mdm_emoji:debug')\n"
        "    changes = {'task.pairs': stream, 'task.images': stream, 'task.crop.flip': 0.0}\n"
        "    return replace(run, name='codes', **changes)\n"
    )
    cpu = ["--device", "cpu", "--precision", "fp32"]
    assert run_command(["train", "with_codes.py", *cpu]) == 0
    assert read_log(Path("runs/codes"))[-1]["step"] == 2
    capsys.readouterr()
    assert run_command(["train", "with_codes.py", *cpu, "--name", "stale", "--task.crop.color-jitter", "0.4"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data/codes is stale: its codes were made with another crop.color_jitter" in line


def test_text_becomes_ids(place: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.txt").write_text("red apple\ngrinning cat\n")
    assert run_command(["tokenize", "text", "words.txt", "--tokenizer", str(workspace.text_tokenizer)]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokenizer = TextTokenizer.load(workspace.text_tokenizer)
    assert [[int(word) for word in line.split()] for line in lines] == [
        tokenizer.encode("red apple", 64),
        tokenizer.encode("grinning cat", 64),
    ]


def test_a_line_without_text_is_named_and_the_others_are_printed(
    place: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words.txt").write_text("red apple\n\ngrinning cat\n")
    assert run_command(["tokenize", "text", "words.txt", "--tokenizer", str(workspace.text_tokenizer)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert said.err.strip() == "words.txt:2: left out, empty_caption"


@pytest.mark.parametrize("kind", [[], ["images"], ["text"]])
def test_help_is_no_error(kind: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tokenize", *kind, "--help"]) == 0
    assert "beit3 tokenize" in capsys.readouterr().out


def test_a_visual_tokenizer_goes_to_the_released_layout_and_back(place: Path) -> None:
    config = VQKDConfig(image_size=(32, 32), patch_size=8, width=64, depth=1, num_heads=1, codebook_size=16)
    model = VQKD(config)
    model.save(Path("tokenizer"))
    assert run_command(["convert", "tokenizer", "files/tokenizer.pth"]) == 0
    content = torch.load("files/tokenizer.pth", weights_only=True)
    assert "quantize.embedding.weight" in content["model"]
    assert run_command(["convert", "files/tokenizer.pth", "again"]) == 0
    for name, value in load_visual_tokenizer(Path("again")).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_model_goes_to_the_released_layout_and_back(place: Path) -> None:
    model = beit3.create_model(
        "beit3_tiny_patch16_224", task="retrieval", attention="decoupled", num_layers=1, vocab_size=50
    )
    model.save_pretrained(Path("model"))
    assert run_command(["convert", "model", "model.pth"]) == 0
    assert "beit3.encoder.layers.0.self_attn.q_proj.A.weight" in torch.load("model.pth", weights_only=True)["model"]
    assert run_command(["convert", "model.pth", "again"]) == 0
    again = beit3.load_model("again")
    assert again.task == "retrieval"
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["tokenize"], 2, "takes images or text"),
        (
            ["tokenize", "text", "none.txt", "--tokenizer", "runs/text_emoji/tokenizer.spm"],
            3,
            "none.txt does not exist",
        ),
        (["tokenize", "text", "--tokenizer", "runs/text_emoji/tokenizer.spm"], 2, "give at least one file"),
        (["convert", "runs/vqkd_emoji/export", "new.pth"], 2, "does not divide by a head width of 64"),
        (["convert", "heads", "new.pth"], 2, "does not store num_heads, and 1 would be read back instead of 2"),
        (["convert", "wide", "new.pth"], 2, "does not store num_heads, and 2 would be read back instead of 4"),
        (["convert", "oblong", "new.pth"], 2, "does not store image_size"),
        (["tokenize", "pictures"], 2, "not 'pictures'"),
        ([*TOKENIZE[:4], "--tokenizer", "nowhere", "--crop.size", "48"], 3, "nowhere does not exist"),
        ([*TOKENIZE, "--crop.size", "64"], 2, "takes images of (48, 48)"),
        (["tokenize", "images", "nothing", "data/codes", *TOKENIZE[4:], "--crop.size", "48"], 3, "nothing: no such"),
        (["convert", "nowhere.pth", "out"], 3, "nowhere.pth does not exist"),
        (["convert", "runs/vqkd_emoji/export", "data"], 2, "data exists"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], code: int, hint: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = VQKDConfig(image_size=(32, 32), patch_size=8, width=64, depth=1, num_heads=1, codebook_size=16)
    if "heads" in arguments:
        VQKD(replace(small, num_heads=2)).save(Path("heads"))
    if "oblong" in arguments:
        VQKD(replace(small, image_size=(64, 16), patch_size=8)).save(Path("oblong"))
    if "wide" in arguments:
        shape: dict[str, Any] = {"width": 128, "num_heads": 4, "num_layers": 1, "vocab_size": 50, "fusion_layers": 0}
        beit3.create_model("beit3_tiny_patch16_224", attention="decoupled", **shape).save_pretrained(Path("wide"))
    capsys.readouterr()
    assert run_command(arguments) == code
    assert not Path("new.pth").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert hint in lines[0]


def test_a_tokenizer_folder_says_what_it_is_made_of(place: Path) -> None:
    settings = json.loads(Path("runs/vqkd_emoji/export/config.json").read_text())
    assert settings["kind"] == "vqkd"
    assert settings["tokenizer"]["codebook_size"] == 24
