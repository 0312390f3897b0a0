"""Captions per second: our beam search against the released one, same weights, images and words.

Base size at 224 pixels, random weights, 3 beams, 32 places, one CPU thread, fp32. Needs torchscale and the released
code (tests/parity/README.md says how both are got).

    python benchmarks/captioning.py --images 4
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from beit3.model.build import build_model
from beit3.model.official import to_ours

SCRIPT: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[1] / "tests" / "parity" / "make_official_tensors.py")
)
VOCAB, MASK, MAX_LENGTH, BEAMS, REPEATS = 64010, 64001, 32, 3, 3


def main() -> None:
    """Measure both in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="images of one batch")
    images = torch.randn(parser.parse_args().images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    peer = _released()
    config, state, task, options = to_ours(peer.state_dict())
    model: Any = build_model(config, task, **options).eval()
    model.load_state_dict(state)
    seconds: dict[str, list[float]] = {"ours": [], "released": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        model.generate(images, num_beams=BEAMS, max_length=MAX_LENGTH, mask_id=MASK, official=True)
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        _search(peer, images)
        seconds["released"].append(time.perf_counter() - start)
    print("| search | s a batch | s an image |\n|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {median / len(images):.2f} |")
    print(f"\nratio {statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)):.1f}x")


def _released() -> Any:
    code = SCRIPT["released"]("modeling_finetune")
    torch.manual_seed(0)
    model = code.BEiT3ForCaptioning(SCRIPT["released"]("modeling_utils")._get_base_config())
    with torch.no_grad():
        model.mlm_head.weight.normal_(std=0.05)
    return model.eval()


@torch.no_grad()
def _search(model: Any, images: torch.Tensor) -> None:
    engine = SCRIPT["released"]("engine_for_finetuning")
    handler = engine.CaptioningHandler(
        Namespace(
            label_smoothing=0.1,
            drop_worst_ratio=0,
            drop_worst_after=0,
            num_beams=BEAMS,
            num_max_bpe_tokens=MAX_LENGTH,
            length_penalty=0.6,
            vocab_size=VOCAB,
        )
    )
    handler.tokenizer.mask_token_id = MASK
    handler.eval_batch(model, images, torch.arange(len(images)))


if __name__ == "__main__":
    main()
