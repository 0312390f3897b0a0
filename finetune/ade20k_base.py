"""Semantic segmentation of ADE20K: UPerNet on the image tower (BEiT v2's recipe; BEiT-3's for giant).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/ade20k_base.py[:large|mask2former|giant] --data ADE20K
Needs:    ADE20K/ade20k.{train,val}.jsonl (`beit3 prepare ade20k ADE20K`); here the released checkpoint
Hardware: 2.6 million crops of 512 pixels, 127 epochs: BEiT trained them on 8 GPUs, two crops each. Not run here
Expected: nobody published BEiT-3 base or large. mIoU of BEiT v2, single scale: 53.1 base, 56.7 large.
          BEiT-3 giant: 62.0, and 62.8 with `beit3 evaluate --scales ... --flip`
Source:   microsoft/unilm, beit2/semantic_segmentation/configs/beit/upernet, whose rate falls along a line,
          here along a cosine, and whose tower has relative positions; giant: arXiv 2208.10442, appendix.
          Its ViT-Adapter is not here: our pyramid takes its place, and less is to be expected
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.segmentation import SegmentationConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base with UPerNet, from the released pretrained model."""
    return Run(
        name="ade20k_base",
        task=SegmentationConfig(
            model=model_config(
                "beit3_base_patch16_224",
                image_size=(512, 512),
                attention="decoupled",
                drop_path=0.15,
            ),
            init_from=Path("beit3_base_patch16_224.pth"),
            train="ade20k.train.jsonl",
            eval="ade20k.val.jsonl",
            labels=Path("labels.json"),
            pyramid_width=768,
            head_width=768,
            batch_size=16,
            eval_batch_size=8,
        ),
        optim=OptimConfig(
            lr=5e-5,
            min_lr=0.0,
            warmup_steps=1500,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=None,
            layer_decay=0.75,
        ),
        loop=LoopConfig(steps=160_000, log_every=50, save_every=2500, num_workers=4),
    )


def large() -> Run:
    """Large with UPerNet."""
    return replace(
        recipe(),
        name="ade20k_large",
        **{
            "task.model": model_config(
                "beit3_large_patch16_224",
                image_size=(512, 512),
                attention="decoupled",
                drop_path=0.2,
            ),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "task.pyramid_width": 1024,
            "task.head_width": 1024,
            "optim.lr": 4e-5,
            "optim.layer_decay": 0.9,
        },
    )


def mask2former() -> Run:
    """Base with Mask2Former; rate and clipping of the head are those of its authors (arXiv 2112.01527)."""
    return replace(
        recipe(),
        name="ade20k_mask2former_base",
        **{
            "task.head": "mask2former",
            "task.pyramid_width": 256,
            "task.head_width": 256,
            "optim.head_lr": 2.0,
            "optim.clip_grad": 0.01,
        },
    )


def giant() -> Run:
    """The paper's model with Mask2Former, from your own pretraining; 80,000 steps at 896 pixels."""
    model = model_config("beit3_giant_patch14_224", image_size=(896, 896), drop_path=0.5, activation_checkpointing=True)
    return replace(
        mask2former(),
        name="ade20k_giant",
        **{
            "task.model": model,
            "task.init_from": Path("runs/mdm_giant/export"),
            "optim.lr": 1e-5,
            "optim.head_lr": 1.0,
            "optim.layer_decay": 0.95,
            "loop.steps": 80_000,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model from random weights."""
    tiny = ModelConfig(
        width=32,
        num_layers=4,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(64, 64),
        vocab_size=2048,
        attention="decoupled",
        fusion_layers=0,
    )
    return replace(
        recipe(),
        name="ade20k_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.pyramid_width": 32,
            "task.head_width": 32,
            "task.batch_size": 2,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
