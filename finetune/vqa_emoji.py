"""Questions about emoji: visual question answering on a laptop.

Command:  beit3 train finetune/vqa_emoji.py[:random] --data DATA
Needs:    DATA of examples/open_tasks.py, runs/text_emoji, and runs/mdm_emoji, which the variant `random` does without
Hardware: one CPU core, six minutes
Expected: the table of benchmarks/README.md, `finetuning.py`
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.augment import MultimodalViewConfig
from beit3.finetune.vqa import VQAConfig
from beit3.model.presets import ModelConfig


def recipe() -> Run:
    """From the quickstart's pretrained model."""
    return Run(
        name="vqa_emoji",
        task=VQAConfig(
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
            text_tokenizer=Path("runs/text_emoji/tokenizer.spm"),
            labels=Path("vqa.labels.json"),
            train="vqa.train.jsonl",
            eval="vqa.test.jsonl",
            view=MultimodalViewConfig(scale=(0.8, 1.0)),
            max_text_length=24,
            batch_size=128,
            eval_batch_size=256,
        ),
        optim=OptimConfig(name="nmuon", lr=6e-3, warmup_steps=20, weight_decay=0.1),
        loop=LoopConfig(steps=600, log_every=20, save_every=200),
    )


def random() -> Run:
    """From random weights."""
    return replace(recipe(), name="vqa_emoji_random", **{"task.init_from": None})


def debug() -> Run:
    """Two steps from random weights."""
    return replace(
        random(),
        name="vqa_emoji_debug",
        **{"task.batch_size": 4, "optim.warmup_steps": 0, "loop": LoopConfig(steps=2)},
    )
