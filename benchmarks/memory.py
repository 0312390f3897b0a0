"""The memory model of `beit3 plan` against real `beit3 train` processes on this machine's CPU, in fp32.

    python benchmarks/memory.py [--cases NAME ...]

The most that one had resident in three steps, over the same command with a model of width 32, beside what the plan says
of both. The plan's reserves are left out. Pictures and captions are the embedded corpus; the visual tokenizer has
random weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from beit3.config import Run, replace
from beit3.data.emoji import load_cells, texts_of, write_emoji
from beit3.data.streams import Source, Stream
from beit3.model.memory import FP32
from beit3.model.presets import model_config
from beit3.plan.footprint import count_memory, count_parameters
from beit3.plan.gpus import GIB
from beit3.recipes import load_recipe
from beit3.tokenizer.text import train_text_tokenizer
from beit3.tokenizer.vqkd import VQKD, vqkd_config
from beit3.train.checkpoint import Checkpoints
from beit3.train.loop import fit

VOCABULARY = 2000
"""Ids of the texts' tokenizer."""
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mdm small": ("pretrain/mdm_base", 1, {"batch": 8, "size": "small"}),
    "mdm small, 2 ranks": ("pretrain/mdm_base", 2, {"batch": 16, "size": "small"}),
    "mdm small, divided over 2": ("pretrain/mdm_base", 2, {"batch": 16, "size": "small", "mesh.shard": 0}),
    "mdm small, 2 batches a step": ("pretrain/mdm_base", 1, {"batch": 8, "size": "small", "loop.accumulate": 2}),
    "mdm small, muon, moving average": (
        "pretrain/mdm_base",
        1,
        {"batch": 8, "size": "small", "optim.name": "muon", "optim.ema_decay": 0.99},
    ),
    "mdm base": ("pretrain/mdm_base", 1, {"batch": 4, "size": "base"}),
    "mdm base, recomputed": (
        "pretrain/mdm_base",
        1,
        {"batch": 8, "size": "base", "task.model.activation_checkpointing": True},
    ),
    "superclass base": ("pretrain/superclass_base", 1, {"batch": 16, "size": "base"}),
    "clip base": ("pretrain/clip_base", 1, {"batch": 16, "size": "base"}),
}
"""Recipe, ranks, and what is changed."""


def case_run(name: str, tiny: bool = False) -> Run:
    """The run of a case, or the same with a model of width 32."""
    recipe, _, changes = CASES[name]
    changes = dict(changes)
    run = load_recipe(f"recipe:{recipe}")
    assert isinstance(run, Run)
    size, batch = changes.pop("size"), changes.pop("batch")
    model = model_config(f"beit3_{size}_patch16_224", drop_path=0.1)
    if tiny:
        model = replace(model, width=32, num_heads=2, ffn_width=128, num_layers=2, fusion_layers=1)
    own = {"task.model": model, "task.text_tokenizer": Path("tokenizer.spm"), "task.max_text_length": 16}
    if "superclass" in recipe:
        own = {"task.model": replace(model, vocab_size=VOCABULARY), "task.vocabulary": Path("tokenizer.spm")}
    if "mdm" in recipe:
        own["task.visual_tokenizer"] = Path("vqkd")
    for stream, folder in (("pairs", "pairs"), ("images", "pairs"), ("texts", "text")):
        if hasattr(run.task, stream):
            own[f"task.{stream}"] = Stream(sources=(Source(path=folder),), batch_size=batch, shuffle_buffer=16)
    place = {"name": "tiny" if tiny else "full", "overwrite": True, "device": "cpu", "precision": "fp32"}
    schedule = {"loop.steps": 3, "loop.num_workers": 0, "optim.warmup_steps": 0}
    found: Run = replace(run, **own, **place, **schedule, **changes)
    if tiny and hasattr(found.task, "text_tower") and "clip" in recipe:
        tower = {"task.text_tower.width": 32, "task.text_tower.num_layers": 1, "task.text_tower.num_heads": 2}
        found = replace(found, **tower)
    return found


def train(name: str, tiny: bool) -> None:
    """Train three steps in this process, and print the most bytes it had resident before the first checkpoint."""

    def stop(*_: object, **__: object) -> None:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        print(f"peak {1024 * int(peak.split()[1])}", flush=True)
        os._exit(0)

    Checkpoints.save = stop  # type: ignore[method-assign]
    fit(case_run(name, tiny))


def measure(name: str, tiny: bool, folder: Path) -> int:
    """Peak bytes of a rank of a case."""
    ranks = CASES[name][1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, str(Path(__file__).resolve()), "--train", name, *(["--tiny"] if tiny else [])]
    # glibc would keep much of what is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    if not peaks:
        raise RuntimeError(done.stderr[-2000:])
    return max(peaks)


def planned(name: str, tiny: bool) -> float:
    """What the plan says of one rank, without reserves."""
    run, ranks = case_run(name, tiny), CASES[name][1]
    counts = count_parameters(run.task.sizes, run.optim)
    return count_memory(run, run.task.sizes.of_rank(ranks), counts, ranks, FP32, reserves=False).total


def prepare(folder: Path) -> None:
    """Write the corpus and the tokenizers."""
    write_emoji(folder / "data")
    texts = [text for cell in load_cells("google", heldout=False) for text in texts_of(cell)]
    train_text_tokenizer(iter(texts), VOCABULARY, character_coverage=1.0).save(folder / "tokenizer.spm")
    VQKD(vqkd_config("vqkd_base_clip", decoder_depth=3)).save(folder / "vqkd")


def print_runs(names: list[str]) -> None:
    """Print the table."""
    print("| run | planned GiB | measured GiB | planned / measured |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for name in names:
            said = planned(name, False) - planned(name, True)
            seen = measure(name, False, folder) - measure(name, True, folder)
            print(f"| {name} | {said / GIB:.2f} | {seen / GIB:.2f} | {said / seen:.2f} |", flush=True)


def main() -> None:
    """Print the table, or train for one of its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--train", choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.train is not None:
        train(options.train, options.tiny)
        return
    print_runs(options.cases)


if __name__ == "__main__":
    main()
