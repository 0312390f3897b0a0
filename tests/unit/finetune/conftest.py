"""Small index files of every task over emoji pictures, and tiny Tasks on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from beit3.data.augment import ClassificationViewConfig
from beit3.data.emoji import load_cells
from beit3.finetune.captioning import CaptioningConfig
from beit3.finetune.classification import ClassificationConfig
from beit3.finetune.nlvr2 import NLVR2Config
from beit3.finetune.retrieval import RetrievalConfig
from beit3.finetune.vqa import VQAConfig
from beit3.model.presets import ModelConfig

if TYPE_CHECKING:
    from tests.conftest import Workspace

NUM = 12
TASKS = ("classification", "vqa", "nlvr2", "captioning", "retrieval")
TINY: dict[str, Any] = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_width": 24,
    "patch_size": 8,
    "image_size": (24, 24),
    "vocab_size": 420,
    "max_text_positions": 40,
}


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve pictures and an index file of each task."""
    folder = tmp_path_factory.mktemp("sets")
    cells = load_cells("google")[:NUM]
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in (*TASKS, "captions", "answered")}
    for number, cell in enumerate(cells):
        name = f"{number:02d}.png"
        cell.image.save(folder / name)
        other = f"{(number + 1) % NUM:02d}.png"
        picture = {"image_path": name}
        rows["classification"].append({**picture, "label": number % 3})
        rows["vqa"].append(
            {
                **picture,
                "qid": number,
                "text": f"is it {cell.caption}?",
                "labels": [number % 4, 4],
                "scores": [1.0, 0.3],
            }
        )
        people = ["yes"] * number + ["no"] * (10 - number) if number <= 10 else ["maybe"] * 10
        rows["answered"].append({**rows["vqa"][-1], "answers": people})
        sentence = {"text": cell.caption, "label": number % 2, "identifier": f"test-{number // 2}-{number % 2}-0"}
        rows["nlvr2"].append({**picture, "image2_path": other, **sentence})
        rows["captioning"].append({**picture, "text": cell.caption, "image_id": number})
        rows["captions"].append({**picture, "image_id": number, "captions": [cell.caption, "a small picture"]})
        for text in (cell.caption, *cell.keywords[:1]):
            rows["retrieval"].append({**picture, "text": text, "image_id": number})
    for task, lines in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "answers.json").write_text(json.dumps(["yes", "no", "two", "red", "cat"]))
    (folder / "classes.json").write_text(json.dumps(["ant", "bee", "cat"]))
    return folder


@pytest.fixture
def config(sets: Path, workspace: Workspace) -> Callable[..., Any]:
    """The configuration of a task, in either attention style."""

    def make(task: str, attention: Literal["shared", "decoupled"] = "decoupled", **changes: Any) -> Any:
        plain = task in ("classification", "vqa")
        model = ModelConfig(**TINY, attention=attention, fusion_layers=int(attention == "shared"), final_norm=not plain)
        common: dict[str, Any] = {"model": model, "train": f"{task}.jsonl", "batch_size": 4, "eval_batch_size": 5}
        texts: dict[str, Any] = {"text_tokenizer": workspace.text_tokenizer, "max_text_length": 16}
        if task == "classification":
            view = ClassificationViewConfig(auto_augment=None)
            own = {"num_classes": 3, "labels": sets / "classes.json", "eval": "classification.jsonl", "view": view}
            return ClassificationConfig(**{**common, **own, **changes})
        if task == "vqa":
            return VQAConfig(
                **{**common, **texts, "labels": sets / "answers.json", "eval": "answered.jsonl", **changes}
            )
        if task == "nlvr2":
            return NLVR2Config(**{**common, **texts, "eval": "nlvr2.jsonl", **changes})
        if task == "captioning":
            return CaptioningConfig(**{**common, **texts, "eval": "captions.jsonl", **changes})
        return RetrievalConfig(**{**common, **texts, "eval": "retrieval.jsonl", **changes})

    return make


@pytest.fixture
def build(config: Callable[..., Any]) -> Callable[..., Any]:
    """A Task whose every weight is random, norms and biases too."""

    def make(task: str, attention: str = "decoupled", **changes: Any) -> Any:
        made = config(task, attention, **changes).build()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return made

    return make
