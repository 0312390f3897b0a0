"""Does pretraining pay? The quickstart's comparison over several seeds, as one table.

    python benchmarks/pretrained_vs_random.py --out runs/compare --seeds 3

Each seed runs `beit3 quickstart --compare`: the pretrained model, the same model from random weights for as many tuning
steps, and from random weights for as much total time. About 25 minutes a seed on two CPU cores; finished stages are
kept, so that it can be interrupted and called again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from beit3.quickstart import quickstart


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        folder = arguments.out / f"seed-{seed}"
        quickstart(out=folder, full=arguments.full, compare=True, seed=seed, resume=True)
        found.append(json.loads((folder / "results.json").read_text()))
    print("\n".join(table(found)))


def table(found: list[dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Mean and range over seeds of recall in both directions, as markdown."""
    lines = ["| part | captions | method | image to text R@1 / R@5 / R@10 | text to image R@1 / R@5 / R@10 |"]
    lines.append("|---|---|---|---|---|")
    for place in range(len(next(iter(found[0].values())))):
        for method in found[0]:
            rows = [results[method][place] for results in found]
            cells = [_recalls([row[way] for row in rows]) for way in ("image_to_text", "text_to_image")]
            lines.append(f"| {rows[0]['part']} | {rows[0]['candidates']} | {method} | {cells[0]} | {cells[1]} |")
    return lines


def _recalls(rows: list[dict[str, float] | None]) -> str:
    known = [row for row in rows if row is not None]
    if not known:
        return "cannot answer"
    cells = []
    for name in known[0]:
        values = [100 * row[name] for row in known]
        spread = f" ({min(values):.1f}-{max(values):.1f})" if max(values) > min(values) else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    return " / ".join(cells)


if __name__ == "__main__":
    main()
