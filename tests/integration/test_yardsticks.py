"""Yardsticks as a user runs them: features computed once, the same figures however many ranks there are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from beit3.cli import run_command
from beit3.data.labelled_pictures import LabelledBatch
from beit3.finetune.image_tower import ImageTower, load_image_tower
from beit3.finetune.linear_probe import LinearProbe, load_linear_probe
from beit3.metrics.probe import few_shot_accuracy, knn_accuracy, linear_accuracy
from beit3.model.exchange import read_tensors
from beit3.train.task import Work
from tests.integration.conftest import Released

Start = Callable[..., subprocess.Popen[str]]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "beit3"]
SETS = ["--train", "data/groups.train.jsonl", "--data", "data/groups.test.jsonl", "--device", "cpu"]


@pytest.fixture
def network(place: Path) -> str:
    """A timm network with weights of its own, as timm's folders hold them."""
    save_for_hf(timm.create_model("test_vit", num_classes=3), place / "network")
    return f"timm:local-dir:{place / 'network'}"


def metrics_of(folder: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(Path(folder, "metrics.json").read_text())
    return found


def features_of(tower: ImageTower) -> Tensor:
    pictures = [Image.open(f"data/drawings/{number:02d}.png").convert("RGB") for number in range(12)]
    pixels = torch.stack([tower.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        features: Tensor = tower(tower.preprocess.normalize(pixels))
    return features


def count_forwards(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    """Pictures of each forward pass from here on; Control-C during one of them."""
    seen: list[int] = []

    def load_counted(*args: Any, **named: Any) -> ImageTower:
        tower = load_image_tower(*args, **named)

        def note(_: object, inputs: tuple[Tensor]) -> None:
            seen.append(len(inputs[0]))
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        tower.register_forward_pre_hook(note)
        return tower

    monkeypatch.setattr("beit3.yardsticks.load_image_tower", load_counted)
    return seen


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_yardsticks_measure_the_features_of_the_tower(
    kind: str, network: str, released: Released, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and test pictures are the same twelve ones; features are computed for the first yardstick alone."""
    source = str(released("pretraining", codebook_size=8)) if kind == "ours" else network
    rows, labels = features_of(load_image_tower(source)), torch.arange(12) % 3
    few_shot = few_shot_accuracy(rows, labels, rows, labels, shots=2)
    expected = {
        "few_shot": {"few_shot": few_shot.mean} | {f"few_shot_seed_{n}": few_shot.by_seed[n] for n in range(3)},
        "knn": {"knn": knn_accuracy(rows, labels, rows, labels)},
        "linear": {"linear": linear_accuracy(rows, labels, rows, labels)},
    }
    seen = count_forwards(monkeypatch)
    together: dict[str, float] = {"train_examples": 12, "examples": 12, "shots": 2}
    for task, values in expected.items():
        command = ["evaluate", source, "--task", task, *SETS, "--batch-size", "5", "--shots", "2", "--out", "out"]
        assert run_command(command) == 0
        assert seen == [5, 5, 2] * 2
        together |= values
        assert metrics_of("out") == pytest.approx(together)
        said = capsys.readouterr().out
        assert all(name in said and f"{100 * value:.2f}" in said for name, value in values.items())
    torch.testing.assert_close(load_file("out/test.safetensors")["features"], rows, rtol=1e-4, atol=1e-5)


def test_an_interrupted_yardstick_goes_on(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", network, "--task", "knn", *SETS, "--batch-size", "5"]
    assert run_command([*command, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        seen = count_forwards(patch, stop_at=5)
        assert run_command([*command, "--out", "out"]) == 130
    seen = count_forwards(monkeypatch)
    assert run_command([*command, "--out", "out"]) == 0
    assert seen == [5, 2], "three batches of training and one of test were kept"
    assert Path("out/metrics.json").read_text() == Path("whole/metrics.json").read_text()
    for part in ("train", "test"):
        one, other = (load_file(f"{folder}/{part}.safetensors") for folder in ("out", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in ("features", "labels"))
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "metrics.json",
        "settings.json",
        "test.safetensors",
        "train.safetensors",
    ]


def test_features_of_other_weights_or_pictures_are_refused(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", network, "--task", "knn", *SETS, "--out", "out"]
    assert run_command(command) == 0
    assert run_command([*command, "--central-crop", "0.875"]) == 2
    assert "out holds another evaluation (central_crop differ)" in capsys.readouterr().err
    save_for_hf(timm.create_model("test_vit", num_classes=3), Path("network"))
    assert run_command(command) == 2
    assert "out holds another evaluation (weights differ)" in capsys.readouterr().err
    assert run_command([*command, "--overwrite"]) == 0


def test_a_central_crop_sees_less_of_the_picture(network: str) -> None:
    for share in ("1.0", "0.5"):
        command = ["evaluate", network, "--task", "knn", *SETS, "--central-crop", share, "--out", share]
        assert run_command(command) == 0
    whole, middle = (load_file(f"{share}/test.safetensors")["features"] for share in ("1.0", "0.5"))
    tower = load_image_tower(network)
    torch.testing.assert_close(whole, features_of(tower), rtol=1e-4, atol=1e-5)
    picture = Image.open("data/drawings/04.png").convert("RGB").resize((320, 320), Image.Resampling.BICUBIC)
    pixels = tower.preprocess(picture.crop((80, 80, 240, 240)))
    with torch.no_grad():
        expected = tower(tower.preprocess.normalize(pixels[None]))[0]
    torch.testing.assert_close(middle[4], expected, rtol=1e-4, atol=1e-5)


def test_a_trained_linear_probe_is_loaded_and_reaches_its_figure(place: Path) -> None:
    command = ["train", "recipe:finetune/linear_probe_emoji:debug", "--device", "cpu", "--precision", "fp32"]
    assert run_command(command) == 0
    run = place / "runs/linear_probe_emoji_debug"
    probe: Any = load_linear_probe(run / "export")
    pictures = [Image.open(f"data/drawings/{number:02d}.png").convert("RGB") for number in range(12)]
    pixels = torch.stack([probe[0].preprocess(picture) for picture in pictures])
    with torch.no_grad():
        right = probe(probe[0].preprocess.normalize(pixels)).argmax(1) == torch.arange(12) % 3
    assert metrics_of(str(run))["acc1"] == pytest.approx(float(right.float().mean()))


def test_an_interrupted_linear_probe_ends_bit_for_bit_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "recipe:finetune/linear_probe_emoji:debug", "--device", "cpu", "--precision", "fp32"]
    command += ["--loop.steps", "6"]
    assert run_command([*command, "--name", "whole"]) == 0
    steps = 0
    work = LinearProbe.work

    def stop_at_3(self: LinearProbe, batch: LabelledBatch) -> Work:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(self, batch)

    monkeypatch.setattr(LinearProbe, "work", stop_at_3)
    assert run_command([*command, "--name", "halted"]) == 75
    assert run_command([*command, "--name", "halted", "--resume"]) == 0
    assert steps == 6
    whole, halted = (place / "runs" / run / "export/model.safetensors" for run in ("whole", "halted"))
    assert whole.read_bytes() == halted.read_bytes()


@pytest.mark.distributed
def test_two_ranks_measure_what_one_does(network: str, place: Path, start: Start) -> None:
    """Features come back in the order of the index, which decides what the few-shot probe draws."""
    command = ["evaluate", network, "--task", "few_shot", *SETS, "--batch-size", "4", "--shots", "2"]
    assert run_command([*command, "--out", "one"]) == 0
    process = start([*TORCHRUN, *command, "--out", "two"], place)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert metrics_of("two") == metrics_of("one")
    one, two = (load_file(f"{folder}/train.safetensors") for folder in ("one", "two"))
    assert torch.equal(one["labels"], two["labels"])
    torch.testing.assert_close(two["features"], one["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_two_ranks_train_a_linear_probe_as_one_does(place: Path, start: Start) -> None:
    """The norm sees the batch of both ranks, and what is exported does not depend on how many there are."""
    command = ["train", "recipe:finetune/linear_probe_emoji:debug", "--device", "cpu", "--precision", "fp32"]
    command += ["--task.scale", "1", "1", "--loop.steps", "4"]
    assert run_command([*command, "--name", "one"]) == 0
    process = start([*TORCHRUN, *command, "--name", "two"], place)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    one, two = (read_tensors(Path("runs") / run / "export") for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5 * float(value.abs().max()), rtol=1e-4)
    assert metrics_of("runs/one") == pytest.approx(metrics_of("runs/two"))


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["timm:test_vit", "--task", "knn"], 2, "knn learns from pictures of its own: name their index file"),
        (["timm:test_vit"], 2, "timm:test_vit is an image tower alone: name a yardstick with --task"),
        (["vqa.pth", "--train", "data/groups.train.jsonl"], 2, "--train is for yardsticks: name one with --task"),
        (["vqa.pth", *SETS, "--task", "few_shot", "--shots", "0"], 2, "shots must be at least 1"),
        (["vqa.pth", *SETS, "--task", "few_shot", "--image-size", "32"], 2, "few_shot measures a tower as it is"),
        (["none.pth", *SETS, "--task", "knn"], 3, "none.pth does not exist"),
        (["timm:none", *SETS, "--task", "knn"], 3, "tower 'timm:none' could not be loaded"),
        (["vqa.pth", *SETS, "--task", "knn", "--train", "none.jsonl"], 3, "index none.jsonl does not exist"),
        (["vqa.pth", *SETS, "--task", "knn", "--out", "data"], 2, "data exists and is no evaluation"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], code: int, line: str, released: Released, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released("vqa", num_answers=5)
    assert run_command(["evaluate", *arguments, *SETS[2:]]) == code
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("beit3")]
    assert len(said) == 1
    assert line in said[0]
