"""Linear probe of a frozen image tower on ImageNet-1k (MAE's recipe, as SuperClass uses it).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/linear_probe_base.py[:large] --data DATA
          [--task.tower TOWER]
Needs:    DATA/imagenet.{train,val}.index.jsonl (`beit3 prepare imagenet`); TOWER: folder, released .pth or timm:NAME
Hardware: 90 (large: 50) epochs of 1,281,167 pictures, the tower forward only: about 3 (6) H100-hours at 400 TFLOP/s.
          Not run here
Expected: top-1 of SuperClass for the towers named here (512M pictures seen; arXiv 2411.03313, table 9): base 76.0,
          large 80.5; after 1.28B 78.7 and 82.6, after 12.8B 80.2 and 85.0 (table 1). MAE 67.8 and 76.0
          (timm:vit_base_patch16_224.mae, vit_large), facebookresearch/mae FINETUNE.md: the check of this recipe
Source:   facebookresearch/mae main_linprobe.py: blr 0.1, lr = blr x batch / 256, LARS, no weight decay
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.linear_probe import LinearProbeConfig

STEPS_PER_EPOCH = 78
"""Whole batches of 16,384 in 1,281,167."""


def recipe() -> Run:
    """Base, 90 epochs."""
    return Run(
        name="linear_probe_base",
        task=LinearProbeConfig(
            tower="runs/superclass_base/export",
            train="imagenet.train.index.jsonl",
            eval="imagenet.val.index.jsonl",
            batch_size=16_384,
        ),
        optim=OptimConfig(
            name="lars",
            lr=0.1 * 16_384 / 256,
            min_lr=0.0,
            warmup_steps=10 * STEPS_PER_EPOCH,
            weight_decay=1e-20,  # as good as none; at 0 timm's LARS would not scale its steps and be plain SGD
            clip_grad=None,
        ),
        loop=LoopConfig(steps=90 * STEPS_PER_EPOCH, log_every=STEPS_PER_EPOCH, save_every=390, num_workers=16),
    )


def large() -> Run:
    """Large, 50 epochs."""
    changes = {"task.tower": "runs/superclass_large/export", "loop.steps": 50 * STEPS_PER_EPOCH}
    return replace(recipe(), name="linear_probe_large", **changes)


def debug() -> Run:
    """Two steps on a tiny network with random weights."""
    return replace(
        recipe(),
        name="linear_probe_base_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.pretrained": False,
            "task.train": "groups.train.jsonl",
            "task.eval": "groups.test.jsonl",
            "task.num_classes": 9,
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
