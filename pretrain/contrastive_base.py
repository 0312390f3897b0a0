"""Intermediate contrastive tuning at the size of the paper (BEiT-3, arXiv 2208.10442, appendix A).

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train pretrain/contrastive_base.py[:large] --data DATA
Needs:    DATA/pairs and the export of pretrain/mdm_base.py
Hardware: 5 epochs over the pretraining pairs (21M in the paper) at a global batch of 16,384 are 6,400 steps
Expected: official files tuned this way reach COCO image-to-text R@1 79.1 (base) and 82.1 (large) after finetuning;
          not run here
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, model_config
from beit3.pretrain.contrastive import ContrastiveConfig


def recipe() -> Run:
    """Base."""
    return Run(
        name="contrastive_base",
        task=ContrastiveConfig(
            model=model_config("beit3_base_patch16_224", drop_path=0.3, activation_checkpointing=True),
            text_tokenizer=Path("runs/text_64k/tokenizer.spm"),
            init_from=Path("runs/mdm_base/export"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=16_384, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.5, 1.0), flip=0.0),
        ),
        optim=OptimConfig(
            lr=3e-5,
            min_lr=1e-6,
            warmup_steps=1280,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            layer_decay=0.95,
        ),
        loop=LoopConfig(steps=6400, log_every=10, save_every=500, num_workers=4),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="contrastive_large",
        **{
            "task.model": model_config("beit3_large_patch16_224", drop_path=0.3, activation_checkpointing=True),
            "task.init_from": Path("runs/mdm_large/export"),
        },
    )


def debug() -> Run:
    """Two steps of a tiny model from random weights on the embedded corpus."""
    tiny = ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=2048,
        fusion_layers=1,
    )
    return replace(
        recipe(),
        name="contrastive_base_debug",
        **{
            "task.model": tiny,
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.init_from": None,
            "task.crop": CropConfig(size=48),
            "task.pairs.batch_size": 8,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
