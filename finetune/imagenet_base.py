"""Image classification on ImageNet-1k (BEiT-3's released recipe).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/imagenet_base.py[:large] --data DATA
Needs:    DATA/imagenet.{train,val}.index.jsonl (`beit3 prepare imagenet`); here the released checkpoint
Hardware: 50 epochs of 1,281,167 images at 224: about 5 H100-hours for base at 400 TFLOP/s. Not run here
Expected: top-1 85.4 (base), 87.6 (large), both from the pretrained checkpoint; released README
Source:   microsoft/unilm beit3/get_started/get_started_for_image_classification.md
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.classification import ClassificationConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model."""
    return Run(
        name="imagenet_base",
        task=ClassificationConfig(
            model=model_config("beit3_base_patch16_224", attention="decoupled", final_norm=False, drop_path=0.15),
            init_from=Path("beit3_base_patch16_224.pth"),
            train="imagenet.train.index.jsonl",
            eval="imagenet.val.index.jsonl",
            num_classes=1000,
            batch_size=1024,
        ),
        optim=OptimConfig(
            lr=7e-4, min_lr=1e-6, warmup_steps=6_255, layer_decay=0.65, betas=(0.9, 0.999), eps=1e-8, clip_grad=None
        ),
        loop=LoopConfig(steps=62_557, log_every=50, save_every=1250, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="imagenet_large",
        **{
            "task.model": model_config(
                "beit3_large_patch16_224", attention="decoupled", final_norm=False, drop_path=0.25
            ),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "optim.lr": 2e-4,
            "optim.layer_decay": 0.8,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model from random weights."""
    tiny = ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=2048,
        attention="decoupled",
        fusion_layers=0,
        final_norm=False,
    )
    return replace(
        recipe(),
        name="imagenet_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.train": "groups.train.jsonl",
            "task.eval": "groups.test.jsonl",
            "task.num_classes": 9,
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
