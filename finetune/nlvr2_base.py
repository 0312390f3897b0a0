"""Visual reasoning on NLVR2 (BEiT-3's released recipe).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/nlvr2_base.py[:large|indomain|indomain_large] --data DATA
Needs:    DATA/nlvr2.*.index.jsonl (`beit3 prepare nlvr2`); here beit3.spm and the released checkpoint
Hardware: 20 epochs of 86,373 sentences on two pictures each: half an H100-hour for base at 400 TFLOP/s. Not run here
Expected: dev 83.6, test-P 84.4 (base); 88.5, 89.4 (large); 84.6, 85.3 (indomain); 89.2, 90.0 (indomain_large);
          released README
Source:   microsoft/unilm beit3/get_started/get_started_for_nlvr2.md; no flips here, which the release has
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.nlvr2 import NLVR2Config
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model."""
    return Run(
        name="nlvr2_base",
        task=NLVR2Config(
            model=model_config("beit3_base_patch16_224", attention="decoupled", drop_path=0.2),
            init_from=Path("beit3_base_patch16_224.pth"),
            text_tokenizer=Path("beit3.spm"),
            train="nlvr2.train.index.jsonl",
            eval="nlvr2.dev.index.jsonl",
            batch_size=256,
        ),
        optim=OptimConfig(
            lr=7e-4,
            min_lr=1e-6,
            warmup_steps=1_687,
            weight_decay=0.2,
            layer_decay=0.65,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=None,
        ),
        loop=LoopConfig(steps=6_748, log_every=20, save_every=500, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="nlvr2_large",
        **{
            "task.model": model_config("beit3_large_patch16_224", attention="decoupled", drop_path=0.2),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "optim.lr": 3e-4,
            "optim.layer_decay": 0.85,
        },
    )


def indomain() -> Run:
    """Base, from the model that was pretrained further on COCO and Visual Genome: at a lower rate."""
    return replace(
        recipe(),
        name="nlvr2_indomain",
        **{"task.init_from": Path("beit3_base_indomain_patch16_224.pth"), "optim.lr": 5e-4},
    )


def indomain_large() -> Run:
    """Large, from the model that was pretrained further."""
    return replace(
        large(),
        name="nlvr2_indomain_large",
        **{"task.init_from": Path("beit3_large_indomain_patch16_224.pth"), "optim.lr": 1e-4},
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
    )
    return replace(
        recipe(),
        name="nlvr2_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.train": "nlvr2.train.jsonl",
            "task.eval": "nlvr2.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
