"""Contrastive tuning of the quickstart (BEiT-3, appendix A): the pretrained backbone as a dual encoder.

Command:  beit3 train pretrain/contrastive_emoji.py --data DATA  (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/mdm_emoji (pretrain/mdm_emoji.py; `full` its variant `full`); the variant `random` does not
Hardware: two CPU cores, about three minutes
Expected: the results table of the README
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.contrastive import ContrastiveConfig


def recipe() -> Run:
    """From the quickstart's pretrained model."""
    return Run(
        name="contrastive_emoji",
        task=ContrastiveConfig(
            model=ModelConfig(
                width=128,
                num_layers=4,
                num_heads=4,
                ffn_width=512,
                patch_size=8,
                image_size=(48, 48),
                vocab_size=2048,
                max_text_positions=66,
                fusion_layers=1,
            ),
            text_tokenizer=Path("runs/text_emoji/tokenizer.spm"),
            init_from=Path("runs/mdm_emoji/export"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=256),
            crop=CropConfig(size=48, scale=(0.8, 1.0), flip=0.0, color_jitter=0.2),
            max_text_length=32,
            keep_patches=0.5,
            eval_pairs="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=6e-3, warmup_steps=30, weight_decay=0.1),
        loop=LoopConfig(steps=300, log_every=10, save_every=50, num_workers=1),
    )


def random() -> Run:
    """From random weights."""
    return replace(recipe(), name="contrastive_emoji_random", **{"task.init_from": None})


def full() -> Run:
    """Wider, 4,000 steps under stronger augmentation: half an hour on two CPU cores with bf16 instructions."""
    return replace(
        recipe(),
        name="contrastive_emoji_full",
        **{
            "task.init_from": Path("runs/mdm_emoji_full/export"),
            "task.model.width": 192,
            "task.model.num_heads": 6,
            "task.model.ffn_width": 768,
            "task.crop.scale": (0.6, 1.0),
            "task.crop.color_jitter": 0.4,
            "task.crop.grayscale": 0.2,
            "optim.warmup_steps": 100,
            "loop.steps": 4000,
            "loop.save_every": 250,
        },
    )


def debug() -> Run:
    """Two steps from random weights."""
    return replace(
        random(),
        name="contrastive_emoji_debug",
        **{
            "task.pairs.batch_size": 8,
            "task.eval_pairs": None,
            "optim.warmup_steps": 0,
            "loop.steps": 2,
        },
    )
