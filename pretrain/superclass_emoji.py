"""SuperClass on the embedded corpus (arXiv 2411.03313): name the subwords of captions, without a text tower.

Command:  beit3 train pretrain/superclass_emoji.py[:pretrained|open_pictures|without_idf] --data DATA
          (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/text_emoji, and for `pretrained` runs/mdm_emoji (pretrain/mdm_emoji.py)
Hardware: one CPU core, about a minute
Expected: on Twemoji, which is never trained on, a third of the likeliest words are in the caption
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.superclass import SuperClassConfig


def recipe() -> Run:
    """From random weights."""
    return Run(
        name="superclass_emoji",
        task=SuperClassConfig(
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
            vocabulary=Path("runs/text_emoji/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=256),
            crop=CropConfig(size=48, scale=(0.8, 1.0), flip=0.0, color_jitter=0.2),
            eval_pairs="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=6e-3, warmup_steps=30, weight_decay=0.1),
        loop=LoopConfig(steps=300, log_every=10, save_every=100, num_workers=1),
    )


def pretrained() -> Run:
    """The second stage after masked data modeling, as Seed-ViT is trained (arXiv 2505.07062)."""
    return replace(recipe(), name="superclass_emoji_pretrained", **{"task.init_from": Path("runs/mdm_emoji/export")})


def open_pictures() -> Run:
    """On the open set of examples/open_pictures.py (docs/data.md): 40,186 drawings, and 4,627 held out."""
    return replace(
        recipe(),
        name="superclass_open_pictures",
        **{"task.eval_pairs": "held_out", "optim.warmup_steps": 50, "loop.steps": 1200, "loop.save_every": 300},
    )


def without_idf() -> Run:
    """All words weigh the same."""
    return replace(recipe(), name="superclass_emoji_without_idf", **{"task.idf": False})


def debug() -> Run:
    """Two steps."""
    return replace(
        recipe(),
        name="superclass_emoji_debug",
        **{"task.pairs.batch_size": 8, "task.eval_pairs": None, "optim.warmup_steps": 0, "loop": LoopConfig(steps=2)},
    )
