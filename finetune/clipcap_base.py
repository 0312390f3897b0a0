"""ClipCap on COCO, Karpathy's split: how much of a picture a frozen GPT-2 reads out of a frozen tower's feature.

Command:  beit3 train finetune/clipcap_base.py[:finetuned] --data COCO --task.tower TOWER
Needs:    COCO/coco_captioning.*.jsonl (`beit3 prepare coco-captions`), GPT-2's weights (a folder or the Hub's "gpt2")
Hardware: 10 epochs of 566,747 captions: about 2 H100-hours for a ViT-L at 400 TFLOP/s. Not run here
Expected: COCO test CIDEr 113.0 (SuperClass ViT-L/16), 112.6 (CLIP ViT-L/16), 113.5 (OpenAI CLIP ViT-L/14);
          SuperClass (2411.03313), table 3. Printed here as 1.130
Source:   ClipCap (2111.09734), section 4; rmokady/CLIP_prefix_caption. The cosine in place of a line is ours
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.prefix_captioning import PrefixCaptioningConfig
from beit3.model.prefix_language_model import ConnectorConfig


def recipe() -> Run:
    """The transformer mapper in front of a frozen GPT-2."""
    return Run(
        name="clipcap_base",
        task=PrefixCaptioningConfig(
            tower="timm:vit_large_patch14_clip_224.openai",
            language_model="gpt2",
            connector=ConnectorConfig(kind="clipcap_transformer", prefix_length=40, clip_length=40),
            writing=WritingConfig(max_text_length=64, max_new_tokens=67, num_beams=5),
            train="coco_captioning.train.jsonl",
            eval="coco_captioning.test.jsonl",
            batch_size=40,
        ),
        optim=OptimConfig(
            lr=2e-5, min_lr=0.0, warmup_steps=5_000, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-6, clip_grad=None
        ),
        loop=LoopConfig(steps=141_686, log_every=100, save_every=5_000, num_workers=8),
    )


def finetuned() -> Run:
    """GPT-2 is trained too, behind the MLP mapper with a prefix of 10: the paper's other model."""
    return replace(
        recipe(),
        name="clipcap_finetuned",
        **{
            "task.finetunes_language_model": True,
            "task.connector": ConnectorConfig(kind="clipcap_mlp", prefix_length=10),
        },
    )


def debug() -> Run:
    """Two steps between random weights."""
    return replace(
        recipe(),
        name="clipcap_base_debug",
        **{
            "task.tower": "timm:test_vit",
            "task.tower_pretrained": False,
            "task.language_model": "tiny:runs/text_emoji/tokenizer.spm",
            "task.train": "captions.train.jsonl",
            "task.eval": "captions.test.jsonl",
            "task.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
