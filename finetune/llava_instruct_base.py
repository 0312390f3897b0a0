"""LLaVA-1.5, second stage: projector and Vicuna learn to answer questions about what a frozen tower sees.

Command:  torchrun --nproc-per-node 8 -m beit3 train finetune/llava_instruct_base.py --data DATA
Needs:    runs/llava_align_base; DATA/vqa.train.jsonl, the 665k instructions of LLaVA-1.5 as a VQA index, a row for each
          question with its `answers`, and vqa.test.jsonl; for `beit3 prepare vqav2` add --task.labels labels.json
Hardware: 5,197 steps; weights, gradients and Adam take 16 bytes a weight on each GPU, 112 GB for 7B. Not run here
Expected: VQAv2 75.24, GQA 60.96, VizWiz 54.33, TextVQA 39.20 (SuperClass tower); 74.54, 61.03, 50.47, 38.16 (OpenCLIP);
          SuperClass (2411.03313), table 11, which names no version of LLaVA
Source:   LLaVA-1.5 (2310.03744): batch 128, rate 2e-5, cosine, 3 % warm-up, no decay
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.language_bridge import LanguageBridgeConfig
from beit3.model.prefix_language_model import ConnectorConfig

_TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {image}\n{question}\n"
    "Answer the question using a single word or phrase. ASSISTANT:"
)


def recipe() -> Run:
    """On from the first stage."""
    return Run(
        name="llava_instruct_base",
        task=LanguageBridgeConfig(
            stage="instruct",
            tower="timm:vit_large_patch14_clip_336.openai",
            language_model="vicuna-7b-v1.5",
            connector=ConnectorConfig(kind="llava_mlp"),
            init_from=Path("runs/llava_align_base/export"),
            writing=WritingConfig(template=_TEMPLATE, max_text_length=1024, max_new_tokens=32, num_beams=1),
            activation_checkpointing=True,
            train="vqa.train.jsonl",
            eval="vqa.test.jsonl",
            batch_size=128,
        ),
        optim=OptimConfig(
            lr=2e-5, min_lr=0.0, warmup_steps=156, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, clip_grad=1.0
        ),
        loop=LoopConfig(steps=5_197, log_every=10, save_every=1000, num_workers=8),
    )


def debug() -> Run:
    """Two steps between random weights."""
    return replace(
        recipe(),
        name="llava_instruct_base_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.language_model": "tiny:runs/text_emoji/tokenizer.spm",
            "task.init_from": None,
            "task.labels": Path("vqa.labels.json"),
            "task.writing": WritingConfig(template="{image}\n{question} ASSISTANT:", max_new_tokens=8, num_beams=1),
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
