"""Visual question answering on VQAv2 (BEiT-3's released recipe).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/vqav2_base.py[:large] --data DATA
Needs:    DATA/vqa.*.jsonl and labels.json (`beit3 prepare vqav2`); here beit3.spm and the released checkpoint
Hardware: 10 epochs of about 640,000 questions (those of train and val, less 1,000 images and what has no label) at 480:
          about 3 H100-hours for base at 400 TFLOP/s. Not run here
Expected: VQAv2 test-dev 77.65 (base), 81.85 (large); from beit3_{base,large}_indomain_patch16_224.pth 78.46, 82.53;
          released README
Source:   microsoft/unilm beit3/get_started/get_started_for_vqav2.md; no flips here, which the release has
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.augment import MultimodalViewConfig
from beit3.finetune.vqa import VQAConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base, from the released pretrained model."""
    return Run(
        name="vqav2_base",
        task=VQAConfig(
            model=model_config("beit3_base_patch16_480", attention="decoupled", final_norm=False, drop_path=0.1),
            init_from=Path("beit3_base_patch16_224.pth"),
            text_tokenizer=Path("beit3.spm"),
            labels=Path("labels.json"),
            train="vqa.train.jsonl,vqa.trainable_val.jsonl",
            eval="vqa.rest_val.jsonl",
            view=MultimodalViewConfig(rand_augment=2),
            batch_size=128,
        ),
        optim=OptimConfig(
            lr=3e-5,
            min_lr=1e-6,
            warmup_steps=5_000,
            weight_decay=0.01,
            betas=(0.9, 0.98),
            eps=1e-8,
            head_lr=20,
            clip_grad=None,
        ),
        loop=LoopConfig(steps=50_000, log_every=50, save_every=1000, num_workers=8),
    )


def large() -> Run:
    """Large."""
    return replace(
        recipe(),
        name="vqav2_large",
        **{
            "task.model": model_config(
                "beit3_large_patch16_480", attention="decoupled", final_norm=False, drop_path=0.15
            ),
            "task.init_from": Path("beit3_large_patch16_224.pth"),
            "optim.lr": 2e-5,
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
        name="vqav2_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.labels": Path("vqa.labels.json"),
            "task.train": "vqa.train.jsonl",
            "task.eval": "vqa.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
