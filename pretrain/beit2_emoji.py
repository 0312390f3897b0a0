"""BEiT v2's masked image modeling (arXiv 2208.06366) on the embedded corpus, for comparing targets on a small machine.

Command:  beit3 train pretrain/beit2_emoji.py --data DATA        (DATA: `beit3 prepare emoji --out DATA`)
Needs:    runs/vqkd_emoji (tokenizers/vqkd_emoji.py); the variant `pixels` does not
Hardware: two CPU cores, about three minutes
Expected: hidden visual tokens named right more often than by always naming the commonest; no published score
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig
from beit3.pretrain.masked_image_modeling import MaskedImageModelingConfig


def recipe() -> Run:
    """Visual tokens as targets, with patch aggregation."""
    return Run(
        name="beit2_emoji",
        task=MaskedImageModelingConfig(
            model=ModelConfig(
                width=128,
                num_layers=4,
                num_heads=4,
                ffn_width=512,
                patch_size=8,
                image_size=(48, 48),
                vocab_size=2048,
                max_text_positions=66,
                fusion_layers=0,
            ),
            visual_tokenizer=Path("runs/vqkd_emoji/export"),
            images=Stream(sources=(Source(path="pairs"),), batch_size=128),
            crop=CropConfig(size=48, scale=(0.5, 1.0), flip=0.5, color_jitter=0.2),
            early_layer=3,
            eval_images="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=1e-2, warmup_steps=20, weight_decay=0.05),
        loop=LoopConfig(steps=300, log_every=20, save_every=100, num_workers=1),
    )


def pixels() -> Run:
    """The same model and masks, with normalised pixels as targets (MAE's)."""
    return replace(recipe(), name="beit2_emoji_pixels", **{"task.target": "pixels", "task.visual_tokenizer": None})


def open_pictures() -> Run:
    """On the open set of examples/open_pictures.py (docs/data.md); needs runs/vqkd_open_pictures."""
    return replace(
        recipe(),
        name="beit2_open_pictures",
        **{
            "task.visual_tokenizer": Path("runs/vqkd_open_pictures/export"),
            "task.eval_images": "held_out",
            "optim.warmup_steps": 50,
            "loop.steps": 600,
            "loop.save_every": 300,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model."""
    return replace(
        recipe(),
        name="beit2_emoji_debug",
        **{
            "task.model.width": 32,
            "task.model.ffn_width": 64,
            "task.images.batch_size": 8,
            "task.eval_images": None,
            "optim.warmup_steps": 0,
            "loop.steps": 2,
        },
    )
