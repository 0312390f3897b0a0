"""SigLIP (arXiv 2303.15343) on the tower, data and schedule of pretrain/clip_base.py: only the loss differs.

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train pretrain/siglip_base.py[:large] --data DATA
Needs:    DATA/pairs (`beit3 prepare pairs` of DataComp-1B's shards), runs/text_64k
Hardware: 31,250 steps at a global batch of 16,384
Expected: ImageNet-1k zero-shot 60.4 (base), measured by SuperCLIP (arXiv 2512.14480) at a rate of 1e-3. Not run here
Source:   rate, betas, decay and warm-up of SuperClass's configurations (arXiv 2411.03313); scale and bias start at
          log 10 and -10 as in the SigLIP paper, whose own runs use 1e-3, betas .9 / .95 and decay 1e-4
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, TextTowerConfig, model_config
from beit3.pretrain.contrastive import ContrastiveConfig


def recipe() -> Run:
    """Base."""
    return Run(
        name="siglip_base",
        task=ContrastiveConfig(
            model=model_config("beit3_base_patch16_224", max_text_positions=79, activation_checkpointing=True),
            text_tower=TextTowerConfig(width=512, num_layers=12, num_heads=8, embed_width=512),
            text_tokenizer=Path("runs/text_64k/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=16_384, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.9, 1.0), flip=0.0),
            max_text_length=77,
            loss="siglip",
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


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="siglip_large",
        **{
            "task.model": model_config("beit3_large_patch16_224", max_text_positions=79, activation_checkpointing=True),
            "task.text_tower": TextTowerConfig(width=768, num_layers=12, num_heads=12, embed_width=768),
        },
    )


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
        max_text_positions=79,
        fusion_layers=1,
    )
    return replace(
        recipe(),
        name="siglip_base_debug",
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
