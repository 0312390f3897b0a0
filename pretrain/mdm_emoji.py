"""Masked data modeling of the quickstart (BEiT-3, arXiv 2208.10442): a small Multiway Transformer on emoji.

Command:  beit3 train pretrain/mdm_emoji.py --data DATA          (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/text_emoji and runs/vqkd_emoji (recipes in tokenizers/)
Hardware: two CPU cores, about three minutes
Expected: the results table of the README
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.masked_data_modeling import MaskedDataModelingConfig


def _model() -> ModelConfig:
    """Four layers of width 128; the top one has a fusion expert."""
    return ModelConfig(
        width=128,
        num_layers=4,
        num_heads=4,
        ffn_width=512,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=2048,
        max_text_positions=66,
        fusion_layers=1,
    )


def recipe() -> Run:
    """Three streams in one pass: images, texts and pairs."""
    pairs = (Source(path="pairs"),)
    return Run(
        name="mdm_emoji",
        task=MaskedDataModelingConfig(
            model=_model(),
            visual_tokenizer=Path("runs/vqkd_emoji/export"),
            text_tokenizer=Path("runs/text_emoji/tokenizer.spm"),
            pairs=Stream(sources=pairs, batch_size=96),
            images=Stream(sources=pairs, batch_size=96),
            texts=Stream(sources=(Source(path="text"),), batch_size=96),
            crop=CropConfig(size=48, scale=(0.5, 1.0), flip=0.5, color_jitter=0.2),
            max_text_length=32,
            eval_pairs="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=1e-2, warmup_steps=20, weight_decay=0.05),
        loop=LoopConfig(steps=150, log_every=10, save_every=50, num_workers=1),
    )


def full() -> Run:
    """Wider, and 1,200 steps: a quarter of an hour on two CPU cores with bf16 instructions."""
    return replace(
        recipe(),
        name="mdm_emoji_full",
        **{
            "task.model.width": 192,
            "task.model.num_heads": 6,
            "task.model.ffn_width": 768,
            "optim.warmup_steps": 100,
            "loop.steps": 1200,
            "loop.save_every": 200,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model."""
    return replace(
        recipe(),
        name="mdm_emoji_debug",
        **{
            "task.model.width": 32,
            "task.model.num_layers": 2,
            "task.model.ffn_width": 64,
            "task.pairs.batch_size": 4,
            "task.images.batch_size": 4,
            "task.texts.batch_size": 4,
            "task.eval_pairs": None,
            "optim.warmup_steps": 0,
            "loop.steps": 2,
        },
    )
