"""Loading a model: time and memory against a plain read of the same file.

Shapes: base size, random weights, 221M parameters.

    python benchmarks/loading.py --folder /tmp/loading

Every measurement is a process of its own. Memory is the most that the process ever had resident (VmHWM) beyond what it
had once its code was there, which loading a tiny model the same way brings in; all weights have been touched then. The
file is read once before, so that all find it in the page cache; "plain read" copies it into memory and sums it,
"load_file" is safetensors' own reader followed by the same sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import beit3
from beit3.model.official import to_official

REPEATS = 5
NAME, SMALL = "beit3_base_patch16_224", "beit3_tiny_patch16_224"
SIZES: dict[str, Any] = {"num_layers": 1, "vocab_size": 100}
"""Of the small model."""


def main() -> None:
    """Make the files if need be, measure in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files of weights are put (2 GB)")
    parser.add_argument("--one", choices=list(WAYS), help="measure one way in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(WAYS[arguments.one], arguments.folder)))
        return
    size = prepare(arguments.folder)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(REPEATS):
        for name in WAYS:
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[name].append(json.loads(done.stdout))
    print(f"weights {size / 2**20:,.0f} MiB, median of {REPEATS} processes each, interleaved\n")
    print("| way | until usable, s | all touched, s | peak / weights |\n|---|---|---|---|")
    for name, found in rows.items():
        usable, touched, memory = (
            statistics.median(row[key] for row in found) for key in ("usable", "touched", "memory")
        )
        print(f"| {name} | {usable:.2f} | {touched:.2f} | {memory / size:.2f} |")


def prepare(folder: Path) -> int:
    """Write an exchange folder and a released file of the same weights; return their bytes."""
    no_change: dict[str, Any] = {}
    for place, name, sizes in ((folder, NAME, no_change), (folder / "small", SMALL, SIZES)):
        if not (place / "base.pth").is_file():
            torch.manual_seed(0)
            model = beit3.create_model(name, attention="decoupled", **sizes)
            model.save_pretrained(place / "base")
            torch.save({"model": to_official(model.model_config, model.state_dict())}, place / "base.pth")
    for path in (folder / "base" / "model.safetensors", folder / "base.pth"):
        path.read_bytes()
    return sum(tensor.nbytes for tensor in load_file(folder / "base" / "model.safetensors").values())


def measure(load: Callable[[Path], list[torch.Tensor]], folder: Path) -> dict[str, float]:
    """Seconds until a model can be used and until all of it was touched, and the most bytes of memory until then."""
    load(folder / "small")
    before = memory("VmRSS")
    start = time.perf_counter()
    tensors = load(folder)
    usable = time.perf_counter() - start
    total = sum(float(tensor.detach().sum()) for tensor in tensors)
    touched = time.perf_counter() - start
    assert total == total, "NaN"
    return {"usable": usable, "touched": touched, "memory": memory("VmHWM") - before}


def memory(kind: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM) (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {kind} in /proc/self/status")


def plain_read(folder: Path) -> list[torch.Tensor]:
    """Copy the whole file into memory and see its weights as one long vector."""
    path = folder / "base" / "model.safetensors"
    data = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        file.readinto(data)
    header = 8 + int.from_bytes(data[:8], "little")
    return [torch.frombuffer(data, dtype=torch.float32, offset=header)]


def with_safetensors(folder: Path) -> list[torch.Tensor]:
    """Safetensors alone."""
    return list(load_file(folder / "base" / "model.safetensors").values())


def exchange(folder: Path) -> list[torch.Tensor]:
    """`beit3.load_model` of an exchange folder."""
    return list(beit3.load_model(folder / "base").parameters())


def one_tower(folder: Path) -> list[torch.Tensor]:
    """`beit3.load_model` of the image tower."""
    return list(beit3.load_model(folder / "base", parts="vision").parameters())


def released(folder: Path) -> list[torch.Tensor]:
    """`beit3.load_model` of a file in the released layout, which is translated."""
    return list(beit3.load_model(folder / "base.pth").parameters())


def copied(folder: Path) -> list[torch.Tensor]:
    """The usual way: a model with random weights, then a copy of the file's."""
    is_small = folder.name == "small"
    model = beit3.create_model(SMALL if is_small else NAME, attention="decoupled", **(SIZES if is_small else {}))
    model.load_state_dict(load_file(folder / "base" / "model.safetensors"))
    return list(model.parameters())


WAYS: dict[str, Callable[[Path], list[torch.Tensor]]] = {
    "plain read of the file": plain_read,
    "safetensors load_file": with_safetensors,
    "load_model of a folder": exchange,
    "load_model, parts=vision": one_tower,
    "load_model of a .pth": released,
    "create_model + load_state_dict": copied,
}

if __name__ == "__main__":
    main()
