"""LiT (arXiv 2111.07991) as SuperClass is measured zero-shot (arXiv 2411.03313): a text tower for a locked image tower.

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train finetune/lit_base.py[:small|large|long] --data DATA
Needs:    DATA/pairs (`beit3 prepare pairs` of DataComp-1B's shards), runs/text_64k, and the export of
          pretrain/superclass_base.py; another tower with --task.tower (any checkpoint of ours, or timm:NAME)
Hardware: 31,250 steps at a global batch of 16,384, as many samples as the tower has seen; the paper names none
Expected: ImageNet-1k zero-shot with OpenAI's names and prompts: small 52.8, base 61.7, large 69.0 (table 9); `long`
          73.6 (table 8). Not run here
Source:   batch, rate, betas, decay, warm-up and text towers of the released configurations
Other:    for the score at every evaluation: --task.zero-shot.index, --task.zero-shot.labels
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.finetune.lit import LitConfig
from beit3.model.presets import TextTowerConfig


def recipe() -> Run:
    """Base."""
    return Run(
        name="lit_base",
        task=LitConfig(
            tower="runs/superclass_base/export",
            text_tower=TextTowerConfig(width=512, num_layers=12, num_heads=8, embed_width=512),
            text_tokenizer=Path("runs/text_64k/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=16_384, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.9, 1.0), flip=0.0),
            max_text_length=77,
            activation_checkpointing=True,
            equal_captions_are_negatives=True,
        ),
        optim=OptimConfig(
            lr=5e-4,
            min_lr=0.0,
            warmup_steps=500,
            weight_decay=0.2,
            betas=(0.9, 0.98),
            eps=1e-6,
            clip_grad=None,
        ),
        loop=LoopConfig(steps=31_250, log_every=50, save_every=1000, num_workers=8),
    )


def small() -> Run:
    """Small."""
    tower = TextTowerConfig(width=384, num_layers=12, num_heads=6, embed_width=384)
    return replace(
        recipe(), name="lit_small", **{"task.tower": "runs/superclass_small/export", "task.text_tower": tower}
    )


def large() -> Run:
    """Large."""
    tower = TextTowerConfig(width=768, num_layers=12, num_heads=12, embed_width=768)
    return replace(
        recipe(), name="lit_large", **{"task.tower": "runs/superclass_large/export", "task.text_tower": tower}
    )


def long() -> Run:
    """Large on 1.28B pairs."""
    changes = {"task.tower": "runs/superclass_large_long/export", "loop.steps": 78_125}
    return replace(large(), name="lit_large_long", **changes)


def debug() -> Run:
    """Two steps beside a tiny network of timm with random weights."""
    return replace(
        recipe(),
        name="lit_base_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.text_tower": TextTowerConfig(width=24, num_layers=1, num_heads=2, embed_width=16),
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.crop": CropConfig(size=160),
            "task.pairs.batch_size": 8,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
