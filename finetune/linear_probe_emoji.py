"""Linear probe of the quickstart's model on emoji groups, and on handwritten digits: MAE's recipe on a laptop.

Command:  beit3 train finetune/linear_probe_emoji.py[:digits] --data DATA
Needs:    DATA of examples/open_tasks.py, runs/mdm_emoji
Hardware: one CPU core, two minutes
Expected: top-1 of a quickstart's model: 69.5 of groups, 57.7 of digits, of which it has seen none; one run, seed 0
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.linear_probe import LinearProbeConfig


def recipe() -> Run:
    """The nine groups of emoji."""
    return Run(
        name="linear_probe_emoji",
        task=LinearProbeConfig(
            tower="runs/mdm_emoji/export",
            train="groups.train.jsonl",
            eval="groups.test.jsonl",
            num_classes=9,
            batch_size=512,
            scale=(0.8, 1.0),
            flip=0.0,
            central_crop=1.0,
        ),
        optim=OptimConfig(
            name="lars",
            lr=20.0,
            min_lr=0.0,
            warmup_steps=20,
            weight_decay=1e-20,  # as good as none; at 0 timm's LARS would not scale its steps and be plain SGD
            clip_grad=None,
        ),
        loop=LoopConfig(steps=300, log_every=20, save_every=300),
    )


def digits() -> Run:
    """Handwritten digits, of which the model has seen none."""
    return replace(
        recipe(),
        name="linear_probe_digits",
        **{"task.train": "digits.train.jsonl", "task.eval": "digits.test.jsonl", "task.num_classes": 10},
    )


def debug() -> Run:
    """Two steps on a tiny network with random weights."""
    return replace(
        recipe(),
        name="linear_probe_emoji_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.pretrained": False,
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
