"""Image-text retrieval on COCO and Flickr30k, Karpathy's splits (BEiT-3's released recipe).

Command:  torchrun --nproc-per-node 32 -m beit3 train finetune/retrieval_base.py[:large|flickr30k|flickr30k_large]
          --data DATA
Needs:    DATA/coco_retrieval.*.jsonl or flickr30k.*.jsonl (`beit3 prepare`); here beit3.spm, the itc checkpoint
Hardware: 15 epochs of 566,747 pairs at 384: about 2 H100-hours for base at 400 TFLOP/s. Not run here
Expected: COCO image-text R@1 79.1, text-image 61.4 (base); 82.1, 63.4 (large); Flickr30k 96.3, 86.2 (base); 97.2, 88.1
          (large); released README
Source:   microsoft/unilm beit3/get_started/get_started_for_retrieval.md; an image's captions are no negatives
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.retrieval import RetrievalConfig
from beit3.model.presets import ModelConfig, model_config


def recipe() -> Run:
    """Base on COCO, from the released itc model."""
    return Run(
        name="retrieval_base",
        task=RetrievalConfig(
            model=model_config("beit3_base_patch16_384", attention="decoupled", drop_path=0.2),
            init_from=Path("beit3_base_itc_patch16_224.pth"),
            text_tokenizer=Path("beit3.spm"),
            train="coco_retrieval.train.jsonl",
            eval="coco_retrieval.val.jsonl",
            batch_size=3072,
        ),
        optim=OptimConfig(
            lr=2e-4,
            min_lr=1e-6,
            warmup_steps=553,
            layer_decay=0.65,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=None,
        ),
        loop=LoopConfig(steps=2_767, log_every=20, save_every=200, num_workers=8),
    )


def large() -> Run:
    """Large on COCO."""
    return replace(
        recipe(),
        name="retrieval_large",
        **{
            "task.model": model_config("beit3_large_patch16_384", attention="decoupled", drop_path=0.2),
            "task.init_from": Path("beit3_large_itc_patch16_224.pth"),
            "optim.lr": 5e-5,
            "optim.layer_decay": 0.85,
        },
    )


def flickr30k() -> Run:
    """Base on Flickr30k."""
    return replace(
        recipe(),
        name="retrieval_flickr30k",
        **{
            "task.train": "flickr30k.train.jsonl",
            "task.eval": "flickr30k.val.jsonl",
            "optim.lr": 1e-4,
            "optim.warmup_steps": 236,
            "loop.steps": 944,
        },
    )


def flickr30k_large() -> Run:
    """Large on Flickr30k, which has the rate of COCO."""
    return replace(
        large(),
        name="retrieval_flickr30k_large",
        **{
            "task.train": "flickr30k.train.jsonl",
            "task.eval": "flickr30k.val.jsonl",
            "optim.warmup_steps": 236,
            "loop.steps": 944,
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
    )
    return replace(
        recipe(),
        name="retrieval_base_debug",
        **{
            "task.model": tiny,
            "task.init_from": None,
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.train": "retrieval.train.jsonl",
            "task.eval": "retrieval.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
