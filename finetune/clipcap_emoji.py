"""Emoji and stamps to their names by a tiny frozen language model: ClipCap on a laptop.

Command:  beit3 train finetune/clipcap_emoji.py[:random|finetuned] --data DATA
Needs:    DATA of examples/open_tasks.py, runs/mdm_emoji (or any other tower), and a language model of the captions:
          python examples/tiny_language_model.py DATA/captions.train.jsonl runs/text_emoji/tokenizer.spm runs/tiny_gpt2
Hardware: one CPU core, four minutes
Expected: docs/language_models.md
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.prefix_captioning import PrefixCaptioningConfig
from beit3.model.prefix_language_model import ConnectorConfig


def recipe() -> Run:
    """The quickstart's pretrained tower, and a frozen language model."""
    return Run(
        name="clipcap_emoji",
        task=PrefixCaptioningConfig(
            tower="runs/mdm_emoji/export",
            language_model="runs/tiny_gpt2",
            connector=ConnectorConfig(prefix_length=10, clip_length=10, num_layers=4),
            writing=WritingConfig(max_text_length=24, max_new_tokens=24),
            train="captions.train.jsonl",
            eval="captions.test.jsonl",
            batch_size=64,
            eval_batch_size=128,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=50, weight_decay=0.0, clip_grad=1.0),
        loop=LoopConfig(steps=400, log_every=50, save_every=400),
    )


def random() -> Run:
    """A tower of timm with random weights: what the captions alone are worth."""
    return replace(
        recipe(), name="clipcap_emoji_random", **{"task.tower": "timm:test_vit", "task.tower_pretrained": False}
    )


def finetuned() -> Run:
    """The language model is trained too, behind the smaller mapper."""
    return replace(
        recipe(),
        name="clipcap_emoji_finetuned",
        **{"task.finetunes_language_model": True, "task.connector.kind": "clipcap_mlp", "optim.lr": 1e-3},
    )


def debug() -> Run:
    """Two steps between random weights."""
    return replace(
        random(),
        name="clipcap_emoji_debug",
        **{
            "task.language_model": "tiny:runs/text_emoji/tokenizer.spm",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
