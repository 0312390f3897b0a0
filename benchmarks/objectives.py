"""Which objective teaches the vision tower most: at equal images seen, and at equal time.

    python benchmarks/objectives.py --data DATA --tasks TASKS --visual-tokenizer VQKD --out runs/objectives

DATA holds `pairs` (split=train) and `held_out` (split=test) of the open pictures without Twemoji (docs/data.md), and
`test_vendor` of `beit3 prepare emoji`; TASKS is written by examples/open_tasks.py; VQKD is the export of a tokenizer
trained on DATA (`beit3 train tokenizers/vqkd_emoji.py:open_pictures`).

Every arm trains the same tower (1.5M parameters, 48 pixels) at a constant learning rate, so that one run gives both
readings: its last measurement is that at equal time, and the one where it has seen as many images as the slowest arm
sees in that time is that at equal images. Time is processor time of one thread, so that neighbours disturb it little.
Finished runs are kept. What comes before is not counted: the visual tokenizer of `mdm`. Words of SuperClass are scored
with the weights that each arm trained with.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit3.config import LoopConfig, OptimConfig, Run, TaskConfig, replace
from beit3.data.shards import load_prepared
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, TextTowerConfig
from beit3.pretrain.contrastive import ContrastiveConfig
from beit3.pretrain.masked_data_modeling import MaskedDataModelingConfig
from beit3.pretrain.mixture import MixtureConfig
from beit3.pretrain.probe import ProbeConfig
from beit3.pretrain.superclass import SuperClassConfig
from beit3.pretrain.text_tokenizer import TextTokenizerRun, train_from_corpora
from beit3.train import loop
from beit3.train.log import read_log

ARMS = (
    *("superclass", "superclass-no-idf", "bce", "soft_margin", "asymmetric", "two_way"),
    *("clip", "siglip", "mdm", "mdm+superclass"),
)
COLUMNS = {
    "groups/few_shot": "10-shot, emoji groups",
    "stamps/few_shot": "10-shot, stamp categories",
    "image_to_text_r10": "image to text R@10",
    "text_to_image_r10": "text to image R@10",
}
PIECES = 4000
MODEL = ModelConfig(
    width=128,
    num_layers=4,
    num_heads=4,
    ffn_width=512,
    patch_size=8,
    image_size=(48, 48),
    vocab_size=4096,
    max_text_positions=66,
    fusion_layers=1,
)
STAMPS = "tuxpaint"
PER_GROUP = 100
"""Pictures of each group that are kept for the probe."""


def main() -> None:
    """Train what is missing, then print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--visual-tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, in each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setattr(loop, "_now", time.process_time)  # noqa: B010 - the loop's clock, for this program alone
    prepare(options)
    for seed in options.seeds:
        for batch in options.batch:
            for arm in options.arms:
                train(arm, batch, seed, options)
    for batch in options.batch:
        show(batch, options)


def prepare(options: argparse.Namespace) -> None:
    """Words of the training captions, and what the probes look at."""
    folder = options.out / "probes"
    if not (options.out / "words" / "tokenizer.spm").is_file():
        train_from_corpora(
            TextTokenizerRun(
                name="words", corpora=("pairs",), data=options.data, out=options.out, vocab_size=PIECES, overwrite=True
            )
        )
    if (folder / "stamps.test.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = (options.tasks / f"groups.{part}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        random.Random(0).shuffle(rows)
        kept = [row for label in sorted({r["label"] for r in rows}) for row in _of(rows, label)[:PER_GROUP]]
        for row in kept:
            row["image_path"] = str((options.tasks / row["image_path"]).resolve())
        _write(folder / f"groups.{part}.jsonl", kept)
    stamps = {
        part: [s for s in load_prepared(options.data / source) if s.meta.get("vendor") == STAMPS and s.image]
        for part, source in (("train", "pairs"), ("test", "held_out"))
    }
    names = sorted({str(sample.meta["category"]) for samples in stamps.values() for sample in samples})
    (folder / "stamps").mkdir(exist_ok=True)
    for part, samples in stamps.items():
        found = []
        for sample in samples:
            path = folder / "stamps" / f"{part}-{sample.key}.webp"
            path.write_bytes(sample.image or b"")
            found.append({"image_path": str(path.resolve()), "label": names.index(str(sample.meta["category"]))})
        _write(folder / f"stamps.{part}.jsonl", found)


def _of(rows: Sequence[dict[str, Any]], label: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["label"] == label]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def task_of(arm: str, batch: int, options: argparse.Namespace) -> TaskConfig:
    """An arm's objective; its pairs are `batch`, those of masked data modeling a third each of pairs, images, texts."""
    probes = tuple(
        ProbeConfig(name=name, train=f"{folder}.train.jsonl", test=f"{folder}.test.jsonl")
        for name in ("groups", "stamps")
        for folder in [(options.out / "probes" / name).resolve()]
    )
    spm = options.out / "words" / "tokenizer.spm"
    pairs = Stream(sources=(Source(path="pairs"),), batch_size=batch)
    common: dict[str, Any] = {
        "model": MODEL,
        "pairs": pairs,
        "crop": CropConfig(size=48, scale=(0.6, 1.0), flip=0.0, color_jitter=0.2),
        "eval_pairs": "test_vendor",
        "probes": probes,
    }
    if arm in ("clip", "siglip"):
        tower = TextTowerConfig(width=128, num_layers=4, num_heads=4, embed_width=128)
        kind: Any = arm
        return ContrastiveConfig(**common, text_tokenizer=spm, max_text_length=32, loss=kind, text_tower=tower)
    if arm.startswith("mdm"):
        fields: dict[str, Any] = {
            **common,
            "text_tokenizer": spm,
            "visual_tokenizer": options.visual_tokenizer,
            "images": pairs,
            "texts": pairs,
            "max_text_length": 32,
        }
        return MaskedDataModelingConfig(**fields) if arm == "mdm" else MixtureConfig(**fields)
    loss: Any = arm if arm in ("bce", "soft_margin", "asymmetric", "two_way") else "softmax"
    return SuperClassConfig(**common, vocabulary=spm, loss=loss, idf=arm == "superclass")


def train(arm: str, batch: int, seed: int, options: argparse.Namespace) -> None:
    """One run, unless it is finished."""
    rate = 6e-3
    run = Run(
        name=name_of(arm, batch, seed),
        task=task_of(arm, batch, options),
        data=options.data,
        out=folder_of(options),
        seed=seed,
        device="cpu",
        precision="bf16",
        optim=OptimConfig(name="nmuon", lr=rate, min_lr=rate, weight_decay=0.1),
        loop=LoopConfig(
            steps=1_000_000,
            max_seconds=options.seconds,
            log_every=5,
            eval_every=4096 // batch,
            save_every=1_000_000,
            num_workers=1,  # of another process: its time is not counted
        ),
    )
    if not (run.folder / "metrics.json").is_file():
        loop.fit(replace(run, overwrite=True))
        print(f"{run.name}: {json.loads((run.folder / 'metrics.json').read_text())}", flush=True)


def folder_of(options: argparse.Namespace) -> Path:
    """Where runs of one length lie."""
    folder: Path = options.out / f"{options.seconds:g}-seconds"
    return folder


def name_of(arm: str, batch: int, seed: int) -> str:
    """A run's name."""
    return f"{arm.replace('+', '-')}-{batch}-{seed}"


def readings(arm: str, batch: int, seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Every evaluation of a run with the images and seconds until then."""
    folder = folder_of(options) / name_of(arm, batch, seed)
    seconds = {record["step"]: record["seconds"] for record in read_log(folder)}
    found = []
    for record in read_log(folder, "eval"):
        step = record["step"]
        nearest = min(seconds, key=lambda known: abs(known - step))
        images = step * batch * (2 if arm.startswith("mdm") else 1)  # those of pairs, and those alone
        found.append({**record, "images": images, "seconds": seconds[nearest] * step / nearest})
    return found


def show(batch: int, options: argparse.Namespace) -> None:
    """Both readings, at equal images / at equal time: means and ranges over the seeds that are finished."""
    seeds = [
        s
        for s in options.seeds
        if all((folder_of(options) / name_of(arm, batch, s) / "metrics.json").is_file() for arm in options.arms)
    ]
    curves = {arm: [readings(arm, batch, seed, options) for seed in seeds] for arm in options.arms}
    fewest = min(curve[-1]["images"] for runs in curves.values() for curve in runs)
    print(f"\nBatch {batch}, equal images: {fewest:,.0f}; equal time: {options.seconds:.0f} s; {len(seeds)} seeds\n")
    print(f"| objective | images in the time | step ms | kept MiB | {' | '.join(COLUMNS.values())} |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    for arm, runs in curves.items():
        cells = []
        for column in COLUMNS:
            name = _named(arm, column)
            equal = [_at(curve, name, fewest) for curve in runs]
            cells.append(" / ".join(filter(None, map(_spread, (equal, [curve[-1].get(name) for curve in runs])))))
        seen = statistics.mean(curve[-1]["images"] for curve in runs)
        step = statistics.median(1000 * curve[-1]["seconds"] / curve[-1]["step"] for curve in runs)
        kept = kept_for_backward(arm, batch, options) / 2**20
        print(f"| {arm} | {seen:,.0f} | {step:.0f} | {kept:.0f} | {' | '.join(cells)} |", flush=True)


def kept_for_backward(arm: str, batch: int, options: argparse.Namespace) -> float:
    """Bytes that a forward pass keeps for the backward pass, weights and their casts left out."""
    task = task_of(arm, batch, options).build()
    run = Run(name="memory", task=task.config, data=options.data, out=options.out, device="cpu")
    drawn = next(iter(task.train_loader(run, 0, 1)))
    task.prepare_step([drawn])
    weights = {tuple(parameter.shape) for parameter in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not {tuple(tensor.shape), tuple(reversed(tensor.shape))} & weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = task(drawn)["loss"]
    assert loss.requires_grad
    return float(sum(kept.values()))


def _at(curve: Sequence[Mapping[str, float]], name: str, images: float) -> float | None:
    """A metric where a run had seen some number of images, on the line between its neighbouring readings."""
    known = [reading for reading in curve if name in reading]
    if not known:
        return None
    return float(np.interp(images, [row["images"] for row in known], [row[name] for row in known]))


def _named(arm: str, column: str) -> str:
    """Where an arm writes a column: the mixture's words stand apart from a dual encoder's vectors."""
    return f"superclass/{column}" if arm == "mdm+superclass" and "text" in column else column


def _spread(values: Sequence[float | None]) -> str:
    found = [100 * value for value in values if value is not None]
    return f"{statistics.mean(found):.1f} ({min(found):.1f}-{max(found):.1f})" if found else ""


if __name__ == "__main__":
    main()
