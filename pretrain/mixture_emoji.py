"""Masked data modeling, SuperClass and a contrastive loss in one pass, on the embedded corpus.

Command:  beit3 train pretrain/mixture_emoji.py[:every] --data DATA [--task.objective.superclass 0.5]
          (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/text_emoji and runs/vqkd_emoji (recipes in tokenizers/)
Hardware: two CPU cores, a few minutes
Expected: nothing published; benchmarks/README.md, `objectives.py`, compares such a mixture with its parts
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.mixture import MixtureConfig


def recipe() -> Run:
    """Masked data modeling over three streams, and SuperClass on the clean pictures of the pairs."""
    pairs = (Source(path="pairs"),)
    return Run(
        name="mixture_emoji",
        task=MixtureConfig(
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


def every() -> Run:
    """The contrastive loss as well."""
    return replace(recipe(), name="mixture_emoji_every", **{"task.objective.contrastive": 1.0})


def debug() -> Run:
    """Two steps of a tiny model, all three objectives."""
    return replace(
        every(),
        name="mixture_emoji_debug",
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
