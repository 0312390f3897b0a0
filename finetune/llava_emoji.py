"""Questions about emoji, answered by a tiny language model that reads a frozen tower: LLaVA's two stages on a laptop.

Command:  beit3 train finetune/llava_emoji.py --data DATA && beit3 train finetune/llava_emoji.py:instruct --data DATA
Needs:    DATA of examples/open_tasks.py, runs/mdm_emoji (or any other tower), and a language model of the captions:
          python examples/tiny_language_model.py DATA/captions.train.jsonl runs/text_emoji/tokenizer.spm runs/tiny_gpt2
Hardware: one CPU core, three and seven minutes
Expected: docs/language_models.md
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.language_bridge import INSTRUCT_TEMPLATE, LanguageBridgeConfig


def recipe() -> Run:
    """First stage: the projector learns on captions."""
    return Run(
        name="llava_emoji",
        task=LanguageBridgeConfig(
            stage="align",
            tower="runs/mdm_emoji/export",
            language_model="runs/tiny_gpt2",
            train="captions.train.jsonl",
            eval="captions.test.jsonl",
            batch_size=64,
            eval_batch_size=128,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=20, weight_decay=0.0, clip_grad=1.0),
        loop=LoopConfig(steps=200, log_every=50, save_every=200),
    )


def instruct() -> Run:
    """Second stage: projector and language model learn on questions."""
    return replace(
        recipe(),
        name="llava_emoji_instruct",
        **{
            "task.stage": "instruct",
            "task.init_from": Path("runs/llava_emoji/export"),
            "task.writing": WritingConfig(template=INSTRUCT_TEMPLATE, max_new_tokens=16, num_beams=1),
            "task.train": "vqa.train.jsonl",
            "task.eval": "vqa.test.jsonl",
            "task.labels": Path("vqa.labels.json"),
            "optim.lr": 1e-3,
            "loop.steps": 400,
        },
    )


def debug() -> Run:
    """Two steps between random weights."""
    return replace(
        instruct(),
        name="llava_emoji_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.language_model": "tiny:runs/text_emoji/tokenizer.spm",
            "task.init_from": None,
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
