"""Boxes and masks on COCO: Cascade Mask R-CNN on the image tower, with windows and a simple pyramid (ViTDet's recipe).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/coco_detection_base.py[:VARIANT] --data COCO
          VARIANT: large, mask_rcnn, objects365, objects365_large, giant
Needs:    COCO/coco_detection.{train,val}.jsonl (`beit3 prepare coco-detection COCO`); here the released checkpoint
Hardware: ViTDet's own took 1,190 (base) and 2,110 (large) A100-hours, 12 and 22 GB at an image a GPU. Not run here
Expected: nobody published BEiT-3 base or large. On val2017, box / mask AP, with MAE's weights (ViTDet's README):
          54.0 / 46.7 base, 57.6 / 50.0 large, 51.6 / 45.9 base as Mask R-CNN.
          BEiT-3 giant: 63.7 / 54.8 on test-dev with a multi-scale test, `beit3 evaluate --scales ... --flip --soft-nms`
Source:   arXiv 2203.16527 and detectron2, projects/ViTDet/configs/COCO; giant: arXiv 2208.10442, appendix.
          ViTDet's rate falls in two steps, here along a cosine; its tower has relative positions, BEiT-3's has not
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.detection import DetectionConfig
from beit3.model.detection import DetectionSettings
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model; 100 epochs."""
    return Run(
        name="coco_detection_base",
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
        loop=LoopConfig(steps=184_375, log_every=50, save_every=2500, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="coco_detection_large",
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


def mask_rcnn() -> Run:
    """Base with one box head, Mask R-CNN: faster, and 2.4 points of box AP worse in ViTDet's table."""
    return replace(recipe(), name="coco_mask_rcnn_base", **{"task.stages": 1})


def objects365() -> Run:
    """Base from a detector of Objects365, with BEiT-3's length and rate for that."""
    return replace(
        recipe(),
        name="coco_detection_base_objects365",
        **{
            "task.init_from": Path("runs/objects365_base/export"),
            "optim.lr": 5e-5,
            "loop.steps": 36_965,
        },
    )


def objects365_large() -> Run:
    """Large from a detector of Objects365, with the same length and rate."""
    return replace(
        large(),
        name="coco_detection_large_objects365",
        **{
            "task.init_from": Path("runs/objects365_large/export"),
            "optim.lr": 5e-5,
            "loop.steps": 36_965,
        },
    )


def giant() -> Run:
    """The paper's model after Objects365: 20 epochs at 1,274 pixels (1,280 does not divide by the patch of 14)."""
    model = model_config(
        "beit3_giant_patch14_224", image_size=(1274, 1274), drop_path=0.6, activation_checkpointing=True
    )
    return replace(
        objects365(),
        name="coco_detection_giant",
        **{
            "task.model": model,
            "task.init_from": Path("runs/objects365_giant/export"),
            "task.settings": DetectionSettings(soft_nms=True, score_threshold=0.001),
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
        name="coco_detection_base_debug",
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
