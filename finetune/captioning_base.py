"""Captioning on COCO, Karpathy's split (BEiT-3's released recipe).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/captioning_base.py[:large|nocaps|nocaps_large] --data DATA
Needs:    DATA/coco_captioning.*.jsonl (`beit3 prepare coco-captions`); here beit3.spm and the released checkpoint
Hardware: 10 epochs of 566,747 captions at 480: about 3 H100-hours for base at 400 TFLOP/s. Not run here
Expected: COCO test CIDEr 133.6 (base), 143.2 (large); NoCaps val 104.4, 120.2; from beit3_base_indomain_patch16_224.pth
          135.0 and 105.6; released README
Source:   microsoft/unilm beit3/get_started/get_started_for_captioning.md; no flips here, which the release has
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.augment import MultimodalViewConfig
from beit3.finetune.captioning import CaptioningConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model."""
    return Run(
        name="captioning_base",
        task=CaptioningConfig(
            model=model_config("beit3_base_patch16_480", attention="decoupled", drop_path=0.1),
            init_from=Path("beit3_base_patch16_224.pth"),
            text_tokenizer=Path("beit3.spm"),
            train="coco_captioning.train.jsonl",
            eval="coco_captioning.val.jsonl",
            view=MultimodalViewConfig(rand_augment=2),
            batch_size=256,
        ),
        optim=OptimConfig(lr=4e-5, min_lr=1e-6, warmup_steps=2_213, betas=(0.9, 0.999), eps=1e-8, clip_grad=None),
        loop=LoopConfig(steps=22_138, log_every=50, save_every=1000, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="captioning_large",
        **{
            "task.model": model_config("beit3_large_patch16_480", attention="decoupled", drop_path=0.1),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "optim.lr": 8e-6,
        },
    )


def nocaps() -> Run:
    """Base for NoCaps: COCO's captions at a lower rate."""
    return replace(
        recipe(),
        name="captioning_nocaps",
        **{
            "task.eval": "nocaps.val.jsonl",
            "optim.lr": 1e-5,
        },
    )


def nocaps_large() -> Run:
    """Large for NoCaps, which has the rate of COCO."""
    return replace(large(), name="captioning_nocaps_large", **{"task.eval": "nocaps.val.jsonl"})


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
    )
    return replace(
        recipe(),
        name="captioning_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.train": "captions.train.jsonl",
            "task.eval": "captions.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
