"""Finetuning as a user runs it: interrupted runs end the same, checkpoints are measured, nothing is counted twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import beit3
from beit3.cli import run_command
from beit3.finetune.common import FinetuneTask
from beit3.model.store import load_model
from beit3.train.checkpoint import list_checkpoints
from tests.integration.conftest import Released

Start = Callable[..., subprocess.Popen[str]]
RECIPES = ("classification_emoji", "vqa_emoji", "nlvr2_emoji", "captioning_emoji", "retrieval_emoji")
RELEASED = ("imagenet_base", "vqav2_base", "nlvr2_base", "captioning_base", "retrieval_base")
"""With all that is drawn in training: mixup, CutMix, erasing, RandAugment."""
CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.mark.parametrize("name", RECIPES + RELEASED)
def test_an_interrupted_run_ends_bit_for_bit_the_same(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", f"recipe:finetune/{name}:debug", *CPU, "--loop.steps", "6"]
    assert run_command([*command, "--name", "whole"]) == 0
    steps = 0
    work = FinetuneTask.work

    def stop_at_3(self: FinetuneTask[Any, Any], batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(self, batch)

    monkeypatch.setattr(FinetuneTask, "work", stop_at_3)
    assert run_command([*command, "--name", "halted"]) == 75
    assert list_checkpoints(place / "runs/halted/checkpoints")[-1].name == "step-00000003"
    assert run_command([*command, "--name", "halted", "--resume"]) == 0
    whole, halted = (place / "runs" / run / "export/model.safetensors" for run in ("whole", "halted"))
    assert whole.read_bytes() == halted.read_bytes()


def metrics_of(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_evaluate_gives_the_metrics_of_the_run(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", f"recipe:finetune/{name}:debug", *CPU]) == 0
    run = place / "runs" / f"{name}_debug"
    part = {"classification": "groups", "captioning": "captions"}.get(name.removesuffix("_emoji"), name[:-6])
    capsys.readouterr()
    command = ["evaluate", str(run / "export"), "--data", f"data/{part}.test.jsonl", "--device", "cpu"]
    assert run_command([*command, "--batch-size", "5", "--out", "measured"]) == 0
    said = capsys.readouterr().out
    found, expected = metrics_of(place / "measured"), metrics_of(run)
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-6), metric
        assert metric in said
    rows = [json.loads(line) for line in (place / "measured/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == found["examples"]


def test_an_interrupted_evaluation_goes_on_and_another_is_refused(
    place: Path, released: Released, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released("captioning")
    command = ["evaluate", "captioning.pth", "--data", "data/captions.test.jsonl", "--device", "cpu", "--out", "out"]
    command += ["--batch-size", "5"]
    assert run_command([*command[:-3], "whole", *command[-2:]]) == 0
    from beit3.finetune.captioning import Captioning

    batches = 0
    predict = Captioning.predict

    def stop_at_second(self: Captioning, batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            raise KeyboardInterrupt
        return predict(self, batch)

    monkeypatch.setattr(Captioning, "predict", stop_at_second)
    assert run_command(command) == 130
    batches = 10
    assert run_command(command) == 0
    assert batches == 12, "one of three batches was kept"
    for file in ("metrics.json", "predictions.jsonl"):
        assert Path("out", file).read_text() == Path("whole", file).read_text()
    capsys.readouterr()
    assert run_command([*command, "--num-beams", "2"]) == 2
    assert "out holds another evaluation (num_beams differ)" in capsys.readouterr().err
    assert run_command([*command, "--num-beams", "2", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("vqa_emoji", "vqa.labels.json"),
        ("vqav2_base", "vqa.labels.json"),
        ("classification_emoji", "groups.labels.json"),
    ],
)
def test_labels_are_those_of_the_data_folder(
    name: str, labels: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recipes' headers say: `--data DATA` is enough. A file of that name in the current folder is another."""
    (place / "data").rename(place / "elsewhere")
    names = json.loads((place / "elsewhere" / labels).read_text())
    (place / labels).write_text(json.dumps(names[::-1]))
    command = ["train", f"recipe:finetune/{name}:debug", *CPU, "--data", "elsewhere", "--name", "run"]
    assert run_command(command) == 0
    assert json.loads((place / "runs/run/export/labels.json").read_text()) == names
    (place / "own.json").write_text(json.dumps(names[::-1]))
    own = [*command, "--overwrite", "--task.labels"]
    assert run_command([*own, "own.json"]) == 0
    assert json.loads((place / "runs/run/export/labels.json").read_text()) == names[::-1]
    capsys.readouterr()
    assert run_command([*own, "none.json"]) == 3
    assert capsys.readouterr().err.strip() == (
        "beit3: labels none.json are neither in elsewhere nor in the current folder: prepare the data, or name others "
        "with --task.labels"
    )


def test_identifiers_that_cannot_be_judged_end_a_run_before_it_begins(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path("data/nlvr2.test.jsonl").read_text().splitlines()]
    rows = [
        {**row, "image_path": f"data/{row['image_path']}", "image2_path": f"data/{row['image2_path']}"} for row in rows
    ]
    lines = [json.dumps({**row, "identifier": f"pair {number}"}) for number, row in enumerate(rows)]
    Path("odd.jsonl").write_text("\n".join(lines))
    command = ["train", "recipe:finetune/nlvr2_emoji:debug", *CPU, "--task.eval", str(place / "odd.jsonl")]
    assert run_command(command) == 3
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("beit3"))
    assert "0 of 12 rows; left out: 12 invalid_identifier (such as odd.jsonl:1, odd.jsonl:2, odd.jsonl:3)" in said
    assert not list((place / "runs/nlvr2_emoji_debug").glob("checkpoints/*"))


KEEP_WEIGHTS = """
import os, sys
import torch
from beit3.cli import run_command
from beit3.train import loop

save = loop._save

def keep_and_save(trainer, *rest, **options):
    torch.save(trainer.task.state_dict(), f"weights-{os.environ['RANK']}.pt")
    save(trainer, *rest, **options)

loop._save = keep_and_save
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["vqa_emoji", "captioning_emoji", "retrieval_emoji"])
def test_two_ranks_train_as_one_does(name: str, place: Path, start: Start) -> None:
    """No rank waits for a gradient that never comes, and the mean gradient is that of the whole batch."""
    command = ["train", f"recipe:finetune/{name}:debug", *CPU, "--task.view.scale", "1", "1", "--optim.name", "sgd"]
    assert run_command([*command, "--name", "one"]) == 0
    (place / "keep_weights.py").write_text(KEEP_WEIGHTS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "keep_weights.py"]
    process = start([*torchrun, *command, "--name", "two"], place)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    first, second = (torch.load(place / f"weights-{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for parameter, value in first.items():
        assert torch.equal(second[parameter], value), parameter
    one, two = (load_model(place / "runs" / run / "export").state_dict() for run in ("one", "two"))
    for parameter, value in two.items():
        assert torch.equal(first[f"model.{parameter}"], value), "the export is what both hold"
    if name == "captioning_emoji":
        return  # each rank averages over its own hidden words, whose number differs
    for parameter, value in one.items():
        torch.testing.assert_close(two[parameter], value, atol=2e-5, rtol=1e-4)


@pytest.mark.distributed
def test_two_ranks_count_every_example_once(place: Path, released: Released, start: Start) -> None:
    released("retrieval")
    command = [
        "evaluate",
        "retrieval.pth",
        "--data",
        "data/retrieval.test.jsonl",
        "--device",
        "cpu",
        "--batch-size",
        "4",
    ]
    assert run_command([*command, "--out", "one"]) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "beit3"]
    process = start([*torchrun, *command, "--out", "two"], place)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    one, two = metrics_of(place / "one"), metrics_of(place / "two")
    assert one.keys() == two.keys()
    assert all(two[name] == pytest.approx(value, abs=1e-6) for name, value in one.items())


def test_a_backbone_is_measured_by_its_class_tokens(place: Path, released: Released) -> None:
    """Zero-shot: the figures are those of the predictor's own vectors."""
    load_model(released("pretraining", codebook_size=8), task="backbone").save_pretrained("backbone")
    Path("backbone/tokenizer.spm").write_bytes(Path("beit3.spm").read_bytes())
    Path("backbone/preprocess.json").write_text('{"image_size": [24, 24], "max_text_length": 32}')
    command = ["evaluate", "backbone", "--task", "retrieval", "--data", "data/retrieval.test.jsonl", "--device", "cpu"]
    assert run_command([*command, "--out", "zero"]) == 0
    rows = [json.loads(line) for line in Path("data/retrieval.test.jsonl").read_text().splitlines()]
    predictor = beit3.load("backbone", device="cpu")
    images = predictor.embed_images([f"data/drawings/{number:02d}.png" for number in range(12)])
    scores = predictor.embed_texts([row["text"] for row in rows]) @ images.T
    best = scores.argmax(1).tolist()
    hits = [row["image_id"] == place for row, place in zip(rows, best, strict=True)]
    assert metrics_of(Path("zero"))["text_to_image_r1"] == pytest.approx(sum(hits) / len(rows))


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["vqa.pth", "--data", "none.jsonl"], 3, "index none.jsonl does not exist"),
        (["vqa.pth", "--data", "data/vqa.test.jsonl", "--task", "nlvr2"], 2, "a vqa is not evaluated as nlvr2"),
        (["none.pth", "--data", "data/vqa.test.jsonl"], 3, "none.pth does not exist"),
        (["vqa.pth", "--data", "data/groups.test.jsonl"], 3, "no usable VQARow"),
        (["vqa.pth", "--data", "data/vqa.test.jsonl", "--out", "data"], 2, "data exists and is no evaluation"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], code: int, line: str, place: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    released("vqa", num_answers=5)
    assert run_command(["evaluate", *arguments, "--device", "cpu"]) == code
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("beit3")]
    assert len(said) == 1
    assert line in said[0]
    assert torch.is_grad_enabled()
