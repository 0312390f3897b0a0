"""LLaVA-1.5, first stage: the projector learns on captions to speak to a frozen Vicuna.

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/llava_align_base.py[:linear] --data DATA
Needs:    DATA/captions.train.jsonl, the 558k pictures with captions of LLaVA-1.5 as a captioning index; the language
          model as a folder in Hugging Face's format with safetensors
Hardware: 2,181 steps; each GPU holds tower and language model in fp32, 28 GB for 7B. Not run here
Expected: no score of its own; see llava_instruct_base.py
Source:   LLaVA (2304.08485), LLaVA-1.5 (2310.03744): batch 256, rate 1e-3, cosine, 3 % warm-up, no decay
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.language_bridge import LanguageBridgeConfig
from beit3.model.prefix_language_model import ConnectorConfig


def recipe() -> Run:
    """The two-layer projector of LLaVA-1.5."""
    return Run(
        name="llava_align_base",
        task=LanguageBridgeConfig(
            stage="align",
            tower="timm:vit_large_patch14_clip_336.openai",
            language_model="vicuna-7b-v1.5",
            connector=ConnectorConfig(kind="llava_mlp"),
            writing=WritingConfig(template="{image}\n", max_text_length=256, max_new_tokens=64, num_beams=1),
            train="captions.train.jsonl",
            batch_size=256,
        ),
        optim=OptimConfig(
            lr=1e-3, min_lr=0.0, warmup_steps=65, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, clip_grad=1.0
        ),
        loop=LoopConfig(steps=2_181, log_every=10, save_every=500, num_workers=8),
    )


def linear() -> Run:
    """The linear projector of the first LLaVA."""
    return replace(recipe(), name="llava_align_linear", **{"task.connector": ConnectorConfig(kind="llava_linear")})


def debug() -> Run:
    """Two steps between random weights."""
    return replace(
        recipe(),
        name="llava_align_base_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.language_model": "tiny:runs/text_emoji/tokenizer.spm",
            "task.writing": WritingConfig(template="{image}\n", max_new_tokens=8, num_beams=1),
            "task.eval": "captions.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
