"""Emoji to their nine groups, and handwritten digits: classification on a laptop.

Command:  beit3 train finetune/classification_emoji.py[:random|digits|digits_random] --data DATA
Needs:    DATA of examples/open_tasks.py, runs/text_emoji, and runs/mdm_emoji, which the variant `random` does without
Hardware: one CPU core, a minute
Expected: the table of benchmarks/README.md, `finetuning.py`
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.augment import ClassificationViewConfig
from beit3.data.preprocess import Preprocess
from beit3.finetune.classification import ClassificationConfig
from beit3.model.presets import ModelConfig


def recipe() -> Run:
    """From the quickstart's pretrained model."""
    return Run(
        name="classification_emoji",
        task=ClassificationConfig(
            model=ModelConfig(
                width=128,
                num_layers=4,
                num_heads=4,
                ffn_width=512,
                patch_size=8,
                image_size=(48, 48),
                vocab_size=2048,
                max_text_positions=66,
                fusion_layers=1,
            ),
            init_from=Path("runs/mdm_emoji/export"),
            train="groups.train.jsonl",
            eval="groups.test.jsonl",
            labels=Path("groups.labels.json"),
            preprocess=Preprocess(image_size=(48, 48)),
            view=ClassificationViewConfig(scale=(0.6, 1.0), flip=0.0, auto_augment=None, color_jitter=0.2, erase=0.0),
            mixup=0.0,
            cutmix=0.0,
            batch_size=128,
            eval_batch_size=256,
        ),
        optim=OptimConfig(name="nmuon", lr=6e-3, warmup_steps=20, weight_decay=0.1),
        loop=LoopConfig(steps=200, log_every=20, save_every=200),
    )


def random() -> Run:
    """From random weights."""
    return replace(recipe(), name="classification_emoji_random", **{"task.init_from": None})


def digits() -> Run:
    """Handwritten digits instead, from the quickstart's pretrained model, which has seen none."""
    return replace(
        recipe(),
        name="classification_digits",
        **{
            "task.train": "digits.train.jsonl",
            "task.eval": "digits.test.jsonl",
            "task.labels": Path("digits.labels.json"),
        },
    )


def digits_random() -> Run:
    """Handwritten digits from random weights."""
    return replace(digits(), name="classification_digits_random", **{"task.init_from": None})


def debug() -> Run:
    """Two steps from random weights."""
    return replace(
        random(),
        name="classification_emoji_debug",
        **{"task.batch_size": 4, "optim.warmup_steps": 0, "loop": LoopConfig(steps=2)},
    )
