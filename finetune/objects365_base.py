"""Boxes on Objects365, the step before COCO: Cascade Mask R-CNN, whose mask head waits for a set with masks.

Command:  torchrun --nnodes 8 --nproc-per-node 8 -m beit3 train finetune/objects365_base.py[:large|giant] --data O365
Needs:    O365/coco_detection.{train,val}.jsonl (`beit3 prepare coco-detection O365`); here the released checkpoint
Hardware: 26 million images: 2,600 (base) and 4,700 (large) A100-hours at the speed that ViTDet reports. Not run here
Expected: no figure is published for BEiT-3; it is a start for `finetune/coco_detection_base.py`, variants
          `objects365`, `objects365_large` and `giant`
Source:   arXiv 2208.10442, appendix (giant); base and large with the layer decay, drop path and size that ViTDet
          (arXiv 2203.16527) has on COCO
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.detection import DetectionConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model; 15 epochs of 1,742,289 images."""
    return Run(
        name="objects365_base",
        task=DetectionConfig(
            model=model_config(
                "beit3_base_patch16_224",
                image_size=(1024, 1024),
                attention="decoupled",
                drop_path=0.1,
            ),
            init_from=Path("beit3_base_patch16_224.pth"),
            train="coco_detection.train.jsonl",
            eval="coco_detection.val.jsonl",
            labels=Path("labels.json"),
            window_size=14,
            batch_size=64,
            eval_batch_size=8,
        ),
        optim=OptimConfig(
            lr=1e-4,
            min_lr=0.0,
            warmup_steps=250,
            weight_decay=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=None,
            layer_decay=0.7,
        ),
        loop=LoopConfig(steps=408_349, log_every=50, save_every=2500, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="objects365_large",
        **{
            "task.model": model_config(
                "beit3_large_patch16_224",
                image_size=(1024, 1024),
                attention="decoupled",
                drop_path=0.4,
            ),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "optim.layer_decay": 0.8,
        },
    )


def giant() -> Run:
    """The paper's model, from your own pretraining: 1,022 pixels, for 1,024 does not divide by the patch of 14."""
    model = model_config(
        "beit3_giant_patch14_224", image_size=(1022, 1022), drop_path=0.6, activation_checkpointing=True
    )
    return replace(
        recipe(),
        name="objects365_giant",
        **{
            "task.model": model,
            "task.init_from": Path("runs/mdm_giant/export"),
            "optim.layer_decay": 0.9,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model from random weights, on any set that `beit3 prepare coco-detection` wrote."""
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
        name="objects365_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.pyramid_width": 32,
            "task.head_width": 32,
            "task.window_size": 4,
            "task.num_global_layers": 2,
            "task.boxes_per_image": 16,
            "task.settings.max_proposals": 50,
            "task.batch_size": 2,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
