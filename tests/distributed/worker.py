"""One of two processes of `test_ddp.py`: does each part under a process group of its own, and writes what it found.

Usage: worker.py PORT ...      (RANK and WORLD_SIZE in the environment, as torchrun sets them)
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from beit3.config import replace
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig, EvalResize
from beit3.model.presets import ModelConfig, TextTowerConfig
from beit3.pretrain import contrastive_loss
from beit3.pretrain.contrastive import Contrastive, ContrastiveConfig
from beit3.pretrain.pairs import PairBatch, PairEncoder
from beit3.tokenizer.quantizer import VectorQuantizer
from tests.processes import in_group, trained_weights

PAIRS = 4
"""Pairs of each rank."""


def samples() -> list[Sample]:
    """Eight pairs; the last of the second half has the caption of the first of the first half."""
    found = list(load_prepared(Path("data/pairs")))[: 2 * PAIRS]
    return [*found[:-1], Sample(found[-1].key, found[-1].image, found[0].text)]


def contrastive_task(**changes: Any) -> Contrastive:
    torch.manual_seed(0)
    config = ContrastiveConfig(
        model=ModelConfig(
            width=16,
            num_layers=2,
            num_heads=2,
            ffn_width=24,
            patch_size=8,
            image_size=(48, 48),
            vocab_size=420,
            max_text_positions=40,
            fusion_layers=1,
        ),
        text_tokenizer=Path("runs/text_emoji/tokenizer.spm"),
        pairs=Stream(sources=(Source(path="pairs"),), batch_size=2 * PAIRS),
        crop=CropConfig(size=48),
        max_text_length=24,
    )
    return Contrastive(replace(config, **changes))


SEPARATE = {"text_tower": TextTowerConfig(width=12, num_layers=1, num_heads=2, embed_width=10)}
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "contrastive_loss": {},
    "contrastive_loss_as_published": {"equal_captions_are_negatives": True},
    "sigmoid_loss": {"loss": "siglip"},
    "sigmoid_loss_as_published": {"loss": "siglip", "equal_captions_are_negatives": True},
    "separate_towers": SEPARATE,
    "separate_towers_sigmoid": {**SEPARATE, "loss": "siglip"},
}
"""Kinds of contrastive training, and what is changed for them."""


def batch_of(task: Contrastive, chosen: list[Sample]) -> PairBatch:
    encoder = PairEncoder(task.config, task.text_tokenizer, EvalResize(48), training=False)
    return encoder.collate([encoder.encode(sample) for sample in chosen])


def contrastive_step(task: Contrastive, chosen: list[Sample]) -> dict[str, Any]:
    """Loss and gradients of one step, as the loop takes it."""
    model: Any = DistributedDataParallel(task, broadcast_buffers=False) if dist.is_initialized() else task
    values = model(batch_of(task, chosen))
    values["loss"].backward()
    return {
        "loss": values["loss"].detach(),
        "gradients": {name: p.grad for name, p in task.named_parameters() if p.grad is not None},
    }


def contrastive_share(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A step of one rank on its half of the pairs, in chunks of three rows."""
    contrastive_loss._LOGITS = 3 * 2 * PAIRS
    return contrastive_step(contrastive_task(**changes).double(), samples()[rank * PAIRS : rank * PAIRS + PAIRS])


def quantizer_steps(batches: list[torch.Tensor], revive_after: int = 0) -> dict[str, torch.Tensor]:
    """Train a quantizer in float64 on some batches, from its k-means on."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(10, 4, decay=0.8, revive_after=revive_after).double()
    torch.manual_seed(1)
    for batch in batches:
        quantizer(batch)
    return dict(quantizer.state_dict())


def vectors(part: slice) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(60, 4, generator=generator, dtype=torch.float64)[part] for _ in range(6)]


def parts(rank: int) -> dict[str, Callable[[], Any]]:
    own = slice(rank * 30, rank * 30 + 30)
    parts_in_group: dict[str, Callable[[], Any]] = {
        **{name: partial(contrastive_share, rank, changes) for name, changes in CONTRASTIVE.items()},
        "quantizer": lambda: quantizer_steps(vectors(own)),
        "quantizer_revival": lambda: quantizer_steps([v[:3] for v in vectors(own)], revive_after=2),
    }
    runs = {
        "mdm": ["recipe:pretrain/mdm_emoji:debug"],
        "contrastive": ["recipe:pretrain/contrastive_emoji:debug"],
        "lit": ["recipe:finetune/lit_emoji:debug"],
        "pairs_alone": ["pairs_alone.py"],
        "cached_vqkd": ["recipe:tokenizers/vqkd_emoji:debug", "--task.cached-crops", "1"],
    }
    return {
        **{name: partial(in_group, part) for name, part in parts_in_group.items()},
        **{name: partial(trained_weights, arguments) for name, arguments in runs.items()},
    }


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for port, (name, part) in zip(sys.argv[1:], parts(rank).items(), strict=True):
        os.environ["MASTER_PORT"] = port
        try:
            found = part()
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
