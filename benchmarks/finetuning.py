"""Every finetuning task from a pretrained model and from random weights, at equal steps, over seeds.

    beit3 quickstart --out runs/q0 --seed 0 ...                    # one pretrained model for each seed
    python examples/open_tasks.py --pairs PAIRS --questions QUESTIONS --digits MNIST --out DATA
    python benchmarks/finetuning.py --data DATA --quickstart runs/q0 runs/q1 runs/q2 --out OUT

Runs that are finished are kept, so that an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from beit3.config import Run, replace
from beit3.recipes import load_recipe
from beit3.train.loop import fit

RECIPES = Path(__file__).parents[1] / "finetune"
TASKS = {
    "digits (classification)": ("classification_emoji.py:digits", "acc1"),
    "emoji groups (classification)": ("classification_emoji.py", "acc1"),
    "questions (VQA)": ("vqa_emoji.py", "score"),
    "sentences (NLVR2 form)": ("nlvr2_emoji.py", "accuracy"),
    "captions": ("captioning_emoji.py", "cider"),
    "retrieval, text to image": ("retrieval_emoji.py", "text_to_image_r1"),
}
ARMS = ("pretrained", "random")


def main() -> None:
    """Train what is missing, then print a table of means and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by examples/open_tasks.py")
    parser.add_argument("--quickstart", type=Path, nargs="+", required=True, help="a quickstart's folder for each seed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed, quickstart in enumerate(arguments.quickstart):
        for task in arguments.tasks:
            for arm in ARMS:
                metrics = measure(task, arm, seed, quickstart, arguments.data, arguments.out)
                found.setdefault(task, {}).setdefault(arm, []).append(metrics)
                print(f"seed {seed} {task} {arm}: {metrics}", flush=True)
    show(found)


def measure(task: str, arm: str, seed: int, quickstart: Path, data: Path, out: Path) -> dict[str, float]:
    """Metrics of one run; of an earlier one if it is finished."""
    recipe = load_recipe(str(RECIPES / TASKS[task][0]))
    assert isinstance(recipe, Run)
    changes: dict[str, Any] = {"task.init_from": quickstart / "pretraining/export" if arm == "pretrained" else None}
    if hasattr(recipe.task, "text_tokenizer"):
        changes["task.text_tokenizer"] = quickstart / "text_tokenizer/tokenizer.spm"
    run = replace(recipe, name=f"{recipe.name}-{arm}-{seed}", data=data, out=out, seed=seed, **changes)
    record = run.folder / "measured.json"
    if not record.is_file():
        started = time.perf_counter()
        metrics = fit(replace(run, resume=(run.folder / "run.json").is_file()))
        record.write_text(json.dumps({**metrics, "minutes": (time.perf_counter() - started) / 60}))
    found: dict[str, float] = json.loads(record.read_text())
    return found


def show(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """A row for each task: means over the seeds, and their ranges."""
    print("\n| task | metric | pretrained | random | minutes a run |\n|---|---|---|---|---|")
    for task, arms in found.items():
        metric = TASKS[task][1]
        cells = []
        for arm in ARMS:
            values = [100 * row[metric] for row in arms[arm]]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        minutes = statistics.median(row["minutes"] for rows in arms.values() for row in rows)
        print(f"| {task} | {metric} | {' | '.join(cells)} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
