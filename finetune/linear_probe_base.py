"""Linear probe of a frozen image tower on ImageNet-1k, base size (MAE's recipe, as SuperClass uses it).

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/linear_probe_base.py --data DATA --task.tower TOWER
Needs:    DATA/imagenet.{train,val}.index.jsonl (`beit3 prepare imagenet`); TOWER: folder, released .pth or timm:NAME
Hardware: 90 epochs of 1,281,167 pictures, the tower forward only: about 3 H100-hours at 400 TFLOP/s. Not run here
Expected: top-1 of ViT-B: SuperClass 76.0 for the tower named here (512M pictures seen; arXiv 2411.03313,
          table 9), 78.7 after 1.28B and 80.2 after 12.8B (table 1);
          MAE 67.8 (timm:vit_base_patch16_224.mae), facebookresearch/mae FINETUNE.md: the check of this recipe
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
