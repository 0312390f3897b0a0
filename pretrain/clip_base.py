"""CLIP (arXiv 2103.00020) as the baseline of the SuperClass paper (arXiv 2411.03313): 512M pairs of DataComp-1B.

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train pretrain/clip_base.py[:small|large|long] --data DATA
Needs:    DATA/pairs (`beit3 prepare pairs` of DataComp-1B's shards), runs/text_64k
Hardware: 31,250 steps at a global batch of 16,384; the paper names none
Expected: ImageNet-1k linear probe / zero-shot: small 63.6 / 52.0, base 75.5 / 59.8, large 79.7 / 65.9 (table 9);
          `long` 81.9 / 71.4 (table 8). Not run here
Source:   batch, rate, betas, decay, warm-up and crops of the released configurations, which CLIP shares with SuperClass
Other:    our towers have sub-LN, the text tower no causal mask, and the words are runs/text_64k's, cased
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, TextTowerConfig, model_config
from beit3.pretrain.contrastive import ContrastiveConfig

_POSITIONS = 77 + 2
"""CLIP's context, and the two rows that are never read."""


def _model(size: str) -> ModelConfig:
    return model_config(f"beit3_{size}_patch16_224", max_text_positions=_POSITIONS, activation_checkpointing=True)


def recipe() -> Run:
    """Base."""
    return Run(
        name="clip_base",
        task=ContrastiveConfig(
            model=_model("base"),
            text_tower=TextTowerConfig(width=512, num_layers=12, num_heads=8, embed_width=512),
            text_tokenizer=Path("runs/text_64k/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=16_384, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.9, 1.0), flip=0.0),
            max_text_length=77,
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
    return replace(recipe(), name="clip_small", **{"task.model": _model("small"), "task.text_tower": tower})


def large() -> Run:
    """Large."""
    tower = TextTowerConfig(width=768, num_layers=12, num_heads=12, embed_width=768)
    return replace(recipe(), name="clip_large", **{"task.model": _model("large"), "task.text_tower": tower})


def long() -> Run:
    """Large on 1.28B pairs."""
    return replace(large(), name="clip_large_long", **{"loop.steps": 78_125})


def debug() -> Run:
    """Two steps of tiny towers on the embedded corpus."""
    tiny = ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=2048,
        max_text_positions=_POSITIONS,
        fusion_layers=1,
    )
    return replace(
        recipe(),
        name="clip_base_debug",
        **{
            "task.model": tiny,
            "task.text_tower": TextTowerConfig(width=24, num_layers=1, num_heads=2, embed_width=16),
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.crop": CropConfig(size=48),
            "task.pairs.batch_size": 8,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
