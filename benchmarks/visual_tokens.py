"""Visual tokens measured: how the codebook lives, what codes teach, what tokenizing costs. Each prints a table.

    python benchmarks/visual_tokens.py codebook --data DATA --out runs/visual_tokens
    python benchmarks/visual_tokens.py targets  --data DATA --out runs/visual_tokens
    python benchmarks/visual_tokens.py speed    --data DATA --out runs/visual_tokens

DATA holds the open pictures of examples/open_pictures.py without Twemoji: `pairs` (split=train) and `held_out`
(split=test), see docs/data.md. Finished runs are kept, so that a call can be interrupted and made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.config import Run, replace
from beit3.data.emoji import HELD_OUT_VENDOR, TRAIN_VENDORS, load_cells
from beit3.data.images import decode_image
from beit3.data.shards import load_prepared
from beit3.data.streams import Source
from beit3.data.transforms import EvalResize, normalize
from beit3.data.write_codes import CodesConfig, write_codes
from beit3.metrics.probe import knn_accuracy, linear_accuracy
from beit3.model.build import build_model
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer
from beit3.pretrain.image_tokenizer import ImageTokenizerConfig
from beit3.pretrain.masked_batches import MaskedBatch
from beit3.pretrain.masked_image_modeling import MaskedImageModeling, MaskedImageModelingConfig
from beit3.recipes import load_recipe
from beit3.tokenizer.vqkd import VQKD, vqkd_config
from beit3.train.folder import EXPORT
from beit3.train.loop import fit

Features = dict[str, Tensor]
"""(n, D) by name."""
Pictures = tuple[Tensor, Tensor]
"""(n, 3, S, S) uint8 and labels (n,)."""
SIZES = (512, 1024, 4096)
USUAL = 1024
"""Codebook size of the ablation and of the comparison of targets."""
STAMPS = "tuxpaint"


def finish(run: Run) -> Path:
    """Train a run unless it is finished; return its export."""
    if not (run.folder / EXPORT).is_dir():
        fit(run)
    return run.folder / EXPORT


def tokenizer_run(options: argparse.Namespace, seed: int, codes: int, kind: str = "", **changes: Any) -> Run:
    """A VQ-KD run; all runs of a seed and a teacher share the teacher's features."""
    made = load_recipe("recipe:tokenizers/vqkd_emoji:open_pictures")
    assert isinstance(made, Run)
    name = f"vqkd-{codes}{kind}-seed{seed}"
    changes["task.tokenizer.codebook_size"] = codes
    run = replace(made, name=name, data=options.data, out=options.out, seed=seed, resume=True, **changes)
    (options.out / "cache").mkdir(parents=True, exist_ok=True)
    run.folder.mkdir(exist_ok=True)
    if not (run.folder / "cache").exists():
        (run.folder / "cache").symlink_to((options.out / "cache").resolve(), target_is_directory=True)
    return run


def measure_codebooks(options: argparse.Namespace) -> None:
    """Use, perplexity and cosine to the teacher on held-out pictures, over codebook sizes and without revival."""
    print("| codes | idle codes revived | used on held-out pictures | perplexity | cosine to teacher |")
    print("|---|---|---|---|---|")
    unrevived: dict[str, Any] = {"kind": "-norevive", "task.tokenizer.revive_after": 0}
    ablated = sorted({USUAL, max(options.sizes)})
    for codes, changes in [*((size, {}) for size in options.sizes), *((size, unrevived) for size in ablated)]:
        found = []
        for seed in range(options.seeds):
            run = tokenizer_run(options, seed, codes, **changes)
            finish(run)
            found.append(json.loads((run.folder / "metrics.json").read_text()))
        cells = [
            spread([100 * record["codebook_use"] for record in found], "{:.1f}%"),
            spread([record["perplexity"] for record in found], "{:.0f}"),
            spread([record["teacher_similarity"] for record in found], "{:.3f}"),
        ]
        print(f"| {codes:,} | {'no' if changes else 'yes'} | {' | '.join(cells)} |", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and range where there is one."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.mean(values)) + (f" ({low}-{high})" if low != high else "")


def compare_targets(options: argparse.Namespace) -> None:
    """Codes against pixels against random weights: what frozen features know of emoji groups and stamp categories."""
    made = load_recipe("recipe:pretrain/beit2_emoji:open_pictures")
    assert isinstance(made, Run)
    assert isinstance(made.task, MaskedImageModelingConfig)
    data = {"emoji groups": emoji_parts(), "stamp categories": stamp_parts(options.data)}
    scores: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(options.seeds):
        common: dict[str, Any] = {"data": options.data, "out": options.out, "seed": seed, "resume": True}
        untrained: dict[str, Any] = {"kind": "-untrained", "task.teacher.pretrained": False}
        targets: dict[str, dict[str, Any]] = {
            "codes": {"task.visual_tokenizer": finish(tokenizer_run(options, seed, USUAL))},
            "codes of an untrained teacher": {
                "task.visual_tokenizer": finish(tokenizer_run(options, seed, USUAL, **untrained))
            },
            "pixels": {"task.target": "pixels", "task.visual_tokenizer": None},
        }
        models = {}
        for target, changes in targets.items():
            name = f"mim-{target.replace(' ', '-')}-seed{seed}"
            models[target] = load_model(finish(replace(made, name=name, **common, **changes)))
        torch.manual_seed(seed)
        models["no training"] = build_model(made.task.model, None).eval()
        for target, model in models.items():
            assert isinstance(model, MultiwayTransformer)
            for task, ((train, labels), (test, wanted)) in data.items():
                first, second = features(model, train), features(model, test)
                for name in first:
                    rows = first[name], labels, second[name], wanted
                    scores.setdefault((task, target, f"k-NN, {name}"), []).append(knn_accuracy(*rows))
                    scores.setdefault((task, target, f"linear, {name}"), []).append(linear_accuracy(*rows))
    columns = list(dict.fromkeys(column for _, _, column in scores))
    print(f"| task | target | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for task, target in dict.fromkeys((task, target) for task, target, _ in scores):
        cells = [spread([100 * value for value in scores[task, target, column]], "{:.1f}") for column in columns]
        print(f"| {task} | {target} | {' | '.join(cells)} |")


def emoji_parts() -> tuple[Pictures, Pictures]:
    """Groups of emoji: seen concepts of the training vendors, and held-out concepts of all four."""
    parts = []
    groups = sorted({cell.group for cell in load_cells(HELD_OUT_VENDOR)})
    for vendors, heldout in ((TRAIN_VENDORS, False), ((*TRAIN_VENDORS, HELD_OUT_VENDOR), True)):
        cells = [cell for vendor in vendors for cell in load_cells(vendor, heldout=heldout)]
        view = EvalResize((48, 48))
        labels = torch.tensor([groups.index(cell.group) for cell in cells])
        parts.append((torch.stack([view(cell.image) for cell in cells]), labels))
    return parts[0], parts[1]


def stamp_parts(data: Path) -> tuple[Pictures, Pictures]:
    """Tux Paint stamps with their categories: those of `pairs`, and those of `held_out`."""
    view = EvalResize((48, 48))
    found = [
        [sample for sample in load_prepared(data / folder) if sample.meta.get("vendor") == STAMPS and sample.image]
        for folder in ("pairs", "held_out")
    ]
    names = sorted({str(sample.meta["category"]) for samples in found for sample in samples})
    parts = []
    for samples in found:
        images = torch.stack([view(decode_image(sample.image or b"")) for sample in samples])
        parts.append((images, torch.tensor([names.index(str(sample.meta["category"])) for sample in samples])))
    return parts[0], parts[1]


@torch.inference_mode()
def features(model: MultiwayTransformer, images: Tensor) -> Features:
    """Class token and mean of the patches, each (n, D)."""
    found: dict[str, list[Tensor]] = {"class token": [], "mean patch": []}
    for part in images.split(256):
        vision = model(normalize(part)).vision
        assert vision is not None
        found["class token"].append(vision[:, 0])
        found["mean patch"].append(vision[:, 1:].mean(dim=1))
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def measure_speed(options: argparse.Namespace) -> None:
    """Images a second of one core, and a step of masked image modeling with the tokenizer online or its codes read."""
    torch.set_num_threads(1)
    print("| tokenizer | pixels | fp32 images/s per core | bf16 images/s per core |")
    print("|---|---|---|---|")
    small = load_recipe("recipe:tokenizers/vqkd_emoji")
    assert isinstance(small, Run)
    assert isinstance(small.task, ImageTokenizerConfig)
    shapes = {"vqkd_emoji": (small.task.tokenizer, 64)}
    shapes |= {name: (vqkd_config(name), 8) for name in ("vqkd_tiny", "vqkd_small", "vqkd_base_clip")}
    for name, (config, batch) in shapes.items():
        tokenizer = VQKD(config).eval().requires_grad_(False)
        images = torch.randint(256, (batch, 3, *config.image_size), dtype=torch.uint8)
        cells = []
        for dtype in (torch.float32, torch.bfloat16):

            def run(tokenizer: VQKD = tokenizer, images: Tensor = images, dtype: torch.dtype = dtype) -> None:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    tokenizer.tokenize(images)

            cells.append(f"{batch / statistics.median(times({'': run}, 5)['']):.1f}")
        print(f"| {name} | {config.image_size[0]} | {' | '.join(cells)} |", flush=True)
    _measure_steps(options)


def times(arms: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm, run in turn; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def _measure_steps(options: argparse.Namespace) -> None:
    made = load_recipe("recipe:pretrain/beit2_emoji:open_pictures")
    assert isinstance(made, Run)
    source = finish(tokenizer_run(options, 0, USUAL))
    online = replace(made, data=options.data, **{"task.visual_tokenizer": source, "task.images.batch_size": 128})
    assert isinstance(online.task, MaskedImageModelingConfig)
    codes = options.out / "codes"
    write_codes(
        options.data / "held_out",
        codes,
        CodesConfig(tokenizer=source, crop=online.task.crop),
        device=torch.device("cpu"),
    )
    streams = {
        "online": replace(online, **{"task.images.sources": (Source(path="held_out"),)}),
        "read": replace(online, **{"task.images.sources": (Source(path="held_out", codes=str(codes.resolve())),)}),
    }
    steps = {name: _step(run) for name, run in streams.items()}
    found = {name: statistics.median(taken) for name, taken in times(steps, options.rounds).items()}
    print("\n| codes | step of 128 pictures, s | of online |\n|---|---|---|")
    for name, taken in found.items():
        print(f"| {name} | {taken:.3f} | {taken / found['online']:.2f} |")


def _step(run: Run) -> Callable[[], None]:
    """Forward and backward pass over the next batch, which is drawn before."""
    assert isinstance(run.task, MaskedImageModelingConfig)
    task: MaskedImageModeling = run.task.build()
    batches: Iterator[MaskedBatch] = iter(task.train_loader(run, 0, 1))
    batch = next(batches)

    def step() -> None:
        torch.autograd.backward(task(batch)["loss"])
        task.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Print one table."""
    commands = {"codebook": measure_codebooks, "targets": compare_targets, "speed": measure_speed}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/visual_tokens"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    commands[options.what](options)


if __name__ == "__main__":
    main()
