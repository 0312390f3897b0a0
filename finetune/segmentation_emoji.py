"""A class for every pixel of composed scenes of emoji: segmentation on a laptop, without any download.

Command:  beit3 train finetune/segmentation_emoji.py[:random] --data SCENES
Needs:    SCENES of examples/compose_scenes.py, and runs/mdm_emoji, which the variant `random` does without
Hardware: one CPU core, a quarter of an hour
Expected: no figure of this recipe is known. The table of `dense.py` in benchmarks/README.md is of a smaller variant
          (a narrower head) on scenes like these. Neither says anything about photographs
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.compose import ComposeConfig
from beit3.data.dense_views import SegmentationViewConfig
from beit3.finetune.segmentation import SegmentationConfig
from beit3.model.presets import ModelConfig


def recipe() -> Run:
    """A small UPerNet from the quickstart's pretrained model; no scene is seen twice."""
    return Run(
        name="segmentation_emoji",
        task=SegmentationConfig(
            model=ModelConfig(
                width=128,
                num_layers=4,
                num_heads=4,
                ffn_width=512,
                patch_size=8,
                image_size=(112, 112),
                vocab_size=2048,
                max_text_positions=66,
                fusion_layers=1,
            ),
            init_from=Path("runs/mdm_emoji/export"),
            compose=ComposeConfig(),
            eval="label_maps/coco_detection.val.jsonl",
            labels=Path("label_maps/labels.json"),
            pyramid_width=64,
            head_width=128,
            view=SegmentationViewConfig(scale=(0.8, 1.25), max_class_share=1.0, distort=False),
            batch_size=8,
            eval_batch_size=8,
        ),
        optim=OptimConfig(name="nmuon", lr=2e-3, warmup_steps=50, weight_decay=0.1),
        loop=LoopConfig(steps=1000, log_every=20, save_every=200),
    )


def random() -> Run:
    """From random weights."""
    return replace(recipe(), name="segmentation_emoji_random", **{"task.init_from": None})


def debug() -> Run:
    """Two steps of a tiny model from random weights."""
    return replace(
        random(),
        name="segmentation_emoji_debug",
        **{
            "task.model.width": 32,
            "task.model.num_layers": 2,
            "task.model.ffn_width": 64,
            "task.model.image_size": (48, 48),
            "task.compose.size": (64, 64),
            "task.pyramid_width": 32,
            "task.head_width": 32,
            "task.batch_size": 2,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
