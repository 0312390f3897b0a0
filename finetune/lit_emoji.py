"""LiT (arXiv 2111.07991) on the embedded corpus: words for a locked image tower of the quickstart.

Command:  beit3 train finetune/lit_emoji.py[:siglip|superclass] --data DATA  (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/text_emoji, and runs/mdm_emoji (pretrain/mdm_emoji.py; `superclass`: pretrain/superclass_emoji.py)
Hardware: one CPU core, two minutes
Expected: recall at 1 of image to text / text to image on DATA/test_vendor: 8.9 / 10.9; `siglip` 8.7 / 9.6; beside the
          tower of pretrain/clip_emoji.py:separate (--task.tower) 19.2 / 21.5 (measured, seed 0)
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.finetune.lit import LitConfig
from beit3.model.presets import TextTowerConfig


def recipe() -> Run:
    """Beside the tower of masked data modeling."""
    return Run(
        name="lit_emoji",
        task=LitConfig(
            tower="runs/mdm_emoji/export",
            text_tower=TextTowerConfig(width=128, num_layers=4, num_heads=4, embed_width=128),
            text_tokenizer=Path("runs/text_emoji/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=256),
            crop=CropConfig(size=48, scale=(0.8, 1.0), flip=0.0, color_jitter=0.2),
            max_text_length=32,
            eval_pairs="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=6e-3, warmup_steps=30, weight_decay=0.1),
        loop=LoopConfig(steps=300, log_every=10, save_every=100, num_workers=1),
    )


def siglip() -> Run:
    """The sigmoid loss."""
    return replace(recipe(), name="lit_emoji_siglip", **{"task.loss": "siglip"})


def superclass() -> Run:
    """Beside the tower of SuperClass."""
    return replace(recipe(), name="lit_emoji_superclass", **{"task.tower": "runs/superclass_emoji/export"})


def debug() -> Run:
    """Two steps beside a tiny network of timm with random weights."""
    return replace(
        siglip(),
        name="lit_emoji_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.crop.size": 160,
            "task.pairs.batch_size": 8,
            "task.eval_pairs": None,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
