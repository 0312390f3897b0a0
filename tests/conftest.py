"""For all tests: fresh seeds before each, nothing global left behind, and a workspace where recipes can train."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from beit3.data.compose import ComposeConfig, write_composites
from beit3.data.emoji import EmojiCell, load_cells, texts_of
from beit3.data.finetuning.ade20k import prepare_ade20k
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.label_maps import write_label_maps
from beit3.data.shard_writer import FolderWriter
from beit3.tokenizer.text import train_text_tokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig

ROOT = Path(__file__).parent.parent
_PICTURES = 96


@dataclass(frozen=True)
class Workspace:
    """A folder like the one a user works in: `data/` and the tokenizers under `runs/` that recipes ask for."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def text_tokenizer(self) -> Path:
        return self.folder / "runs" / "text_emoji" / "tokenizer.spm"

    @property
    def visual_tokenizer(self) -> Path:
        return self.folder / "runs" / "vqkd_emoji" / "export"

    def link(self, folder: Path) -> None:
        """Lay the data and the tokenizers into another folder, whose `runs` takes runs of its own."""
        (folder / "data").symlink_to(self.data, target_is_directory=True)
        (folder / "runs").mkdir()
        for tokenizer in (self.folder / "runs").iterdir():
            (folder / "runs" / tokenizer.name).symlink_to(tokenizer, target_is_directory=True)


@pytest.fixture(autouse=True)
def fresh_globals() -> Iterator[None]:
    """Seed all generators, and put back the default type and the process group."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Some emoji as `beit3 prepare emoji` writes them, index files of every task, tokenizers for texts and pictures."""
    place = Workspace(tmp_path_factory.mktemp("workspace"))
    seen = load_cells("google", heldout=False)
    _write_pairs(place.data / "pairs", seen[:_PICTURES])
    _write_pairs(place.data / "images", seen[:_PICTURES])
    _write_pairs(place.data / "test_vendor", load_cells("twitter", heldout=False)[:12])
    _write_indexes(place.data, seen[:12])
    _write_scenes(place.data / "coco")
    _write_label_maps(place.data / "ade20k")
    texts = [text for cell in seen[:300] for text in texts_of(cell)]
    with FolderWriter(place.data / "text", "text") as writer:
        for text in texts:
            writer.add_text(text)
    place.text_tokenizer.parent.mkdir(parents=True)
    train_text_tokenizer(iter(texts), 400, character_coverage=1.0).save(place.text_tokenizer)
    torch.manual_seed(0)
    tokenizer = VQKD(
        VQKDConfig(
            image_size=(48, 48),
            patch_size=8,
            width=16,
            depth=1,
            num_heads=2,
            codebook_size=24,
            code_width=8,
            teacher_width=8,
        )
    )
    tokenizer.save(place.visual_tokenizer)
    return place


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start Python in a fresh process: `start(["-m", "beit3", ...], folder)`."""

    def begin(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def _write_indexes(folder: Path, cells: Sequence[EmojiCell]) -> None:
    """Index files of every finetuning task over the same pictures."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, picture: dict[str, Any], **fields: Any) -> None:
        rows.setdefault(name, []).append({**picture, **fields})

    (folder / "drawings").mkdir()
    for number, cell in enumerate(cells):
        picture = {"image_path": f"drawings/{number:02d}.png"}
        cell.image.save(folder / picture["image_path"])
        known = {"labels": [number % 4, 4], "scores": [1.0, 0.3]}
        people = ["yes"] * min(number, 10) + ["no"] * max(0, 10 - number)
        other = f"drawings/{(number + 1) % len(cells):02d}.png"
        sentence = {"text": cell.caption, "label": number % 2, "identifier": f"test-{number // 2}-{number % 2}-0"}
        for part in ("train", "test"):
            add(f"groups.{part}", picture, label=number % 3)
            add(f"nlvr2.{part}", picture, image2_path=other, **sentence)
            extra = {"answers": people} if part == "test" else {}
            add(f"vqa.{part}", picture, qid=number, text=f"is it {cell.caption}?", **known, **extra)
            for text in (cell.caption, *cell.keywords[:1]):
                add(f"retrieval.{part}", picture, text=text, image_id=number)
        add("captions.train", picture, text=cell.caption, image_id=number)
        add("captions.test", picture, image_id=number, captions=[cell.caption, "a small picture"])
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "vqa.labels.json").write_text(json.dumps(["yes", "no", "two", "red", "cat"]))
    (folder / "groups.labels.json").write_text(json.dumps(["ant", "bee", "cat"]))


def _write_scenes(folder: Path) -> None:
    """Boxes and masks of emoji in COCO's form, and label maps of the same scenes."""
    write_composites(folder, ComposeConfig(size=(48, 64)), 6, 0, split="train")
    prepare_coco_detection(folder, val_share=0.5)
    write_label_maps(folder / "coco_detection.val.jsonl", folder / "label_maps")


def _write_label_maps(folder: Path) -> None:
    """ADE20K's folders with pictures of stripes."""
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(3):
            labels = np.repeat(np.arange(48, dtype=np.uint8) // 12 + 40 * number, 60).reshape(48, 60)
            Image.fromarray(labels).save(folder / f"annotations/{part}/{number}.png")
            Image.fromarray(np.dstack([labels, 5 * (labels % 50), 255 - labels])).save(
                folder / f"images/{part}/{number}.jpg"
            )
    prepare_ade20k(folder)


def _write_pairs(folder: Path, cells: Sequence[EmojiCell]) -> None:
    with FolderWriter(folder, "pairs") as writer:
        for index, cell in enumerate(cells):
            picture = io.BytesIO()
            cell.image.save(picture, "PNG")
            meta = json.dumps({"keywords": cell.keywords}).encode()
            writer.add(f"{index:04d}", {"png": picture.getvalue(), "txt": cell.caption.encode(), "json": meta})
