"""Towers read through language models as a user runs it: interrupted, in two stages, on two ranks, by the example."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3.cli import run_command
from beit3.finetune.language_model import load_language_model
from beit3.finetune.picture_reader import load_picture_reader
from beit3.finetune.prefix_task import PrefixTask
from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log

Start = Callable[..., subprocess.Popen[str]]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_language_model.py"
CPU = ["--device", "cpu", "--precision", "fp32"]
TRAINED_WORDS = ["--task.finetunes-language-model", "--optim.ema-decay", "0.9"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "options"),
    [("clipcap_emoji", []), ("clipcap_emoji", TRAINED_WORDS), ("llava_align_base", []), ("llava_emoji", [])],
)
def test_an_interrupted_run_ends_bit_for_bit_the_same(
    name: str, options: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", f"recipe:finetune/{name}:debug", *CPU, "--loop.steps", "6", *options]
    assert run_command([*command, "--name", "whole"]) == 0
    steps = 0
    work = PrefixTask.work

    def stop_at_3(self: PrefixTask[Any], batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(self, batch)

    monkeypatch.setattr(PrefixTask, "work", stop_at_3)
    assert run_command([*command, "--name", "halted"]) == 75
    assert list_checkpoints(place / "runs/halted/checkpoints")[-1].name == "step-00000003"
    assert run_command([*command, "--name", "halted", "--resume"]) == 0
    whole, halted = (contents(place / "runs" / run / "export") for run in ("whole", "halted"))
    assert whole == halted
    assert ("language_model/model.safetensors" in whole) == (bool(options) or name == "llava_emoji")
    assert json.loads((place / "runs/whole/metrics.json").read_text()) == json.loads(
        (place / "runs/halted/metrics.json").read_text()
    )


def test_the_example_trains_a_model_that_both_stages_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = "runs/text_emoji/tokenizer.spm"
    runpy.run_path(str(EXAMPLE))["main"]("data/captions.train.jsonl", tokenizer, "runs/tiny_gpt2", "3")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "runs/tiny_gpt2: written"
    assert 0 < float(said[-2].rpartition(" ")[2]) < 400, "perplexity far below that of the vocabulary"
    fresh, trained = load_language_model(f"tiny:{tokenizer}"), load_language_model("runs/tiny_gpt2")
    assert trained.words.encode("red apple") == fresh.words.encode("red apple")

    small = ["--task.batch-size", "4", "--optim.warmup-steps", "0", "--loop.steps", "2", "--loop.log-every", "1"]
    tower = ["--task.tower", "timm:test_vit", "--task.no-tower-pretrained"]
    assert run_command(["train", "recipe:finetune/llava_emoji", *CPU, *small, *tower]) == 0
    assert run_command(["train", "recipe:finetune/llava_emoji:instruct", *CPU, *small, *tower]) == 0
    metrics = json.loads(Path("runs/llava_emoji_instruct/metrics.json").read_text())
    assert {"score", "accuracy", "exact_match"} <= metrics.keys()
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in read_log(Path("runs/llava_emoji_instruct")))
    reader = load_picture_reader("runs/llava_emoji_instruct/export")
    assert isinstance(reader.write(["data/drawings/00.png"], ["is it red?"])[0], str)


@pytest.mark.distributed
def test_two_ranks_train_a_language_model(place: Path, start: Start) -> None:
    """No rank waits for a gradient that never comes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "beit3"]
    process = start([*torchrun, "train", "recipe:finetune/llava_emoji:debug", *CPU], place)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert load_picture_reader(place / "runs/llava_emoji_debug/export").owns_language_model


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--task.language-model", "runs/none"], 3, "language model runs/none does not exist: train one"),
        (["--task.tower", "runs/none", "--task.tower-pretrained"], 3, "runs/none does not exist"),
        (["--task.train", "none.jsonl"], 3, "index data/none.jsonl does not exist"),
        (["--task.init-from", "runs/text_emoji"], 3, "config.json does not exist"),
        (["--task.writing.template", "no picture"], 2, "writing.template must hold {image} once"),
    ],
)
def test_wrong_use_is_one_line(
    options: list[str], code: int, line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", "recipe:finetune/clipcap_emoji:debug", *CPU, *options]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("beit3: ")
    assert line in said[0]
