"""Masked data modeling with SuperClass on the clean pictures of its pairs, at the size of the paper's base model.

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train pretrain/mixture_base.py[:large|every] --data DATA
Needs:    as pretrain/mdm_base.py
Hardware: as pretrain/mdm_base.py and a third more, because each pair's picture passes once more
Expected: nobody has published this mixture. Seed-ViT (arXiv 2505.07062) takes the stages one after the other: here
          pretrain/mdm_base.py, then pretrain/superclass_base.py --task.init-from runs/mdm_base/export
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, model_config
from beit3.pretrain.mixture import MixtureConfig


def recipe() -> Run:
    """Base: masked data modeling and SuperClass, equal weights."""
    return Run(
        name="mixture_base",
        task=MixtureConfig(
            model=model_config("beit3_base_patch16_224", drop_path=0.1),
            visual_tokenizer=Path("runs/vqkd_base_decoder3/export"),
            text_tokenizer=Path("runs/text_64k/tokenizer.spm"),
            pairs=Stream(sources=(Source(path="pairs"),), batch_size=2048, shuffle_buffer=5000),
            images=Stream(sources=(Source(path="images"),), batch_size=2048, shuffle_buffer=5000),
            texts=Stream(sources=(Source(path="text"),), batch_size=2048, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.2, 1.0), flip=0.5, color_jitter=0.4),
            max_text_length=128,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=10_000, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, clip_grad=3.0),
        loop=LoopConfig(steps=1_000_000, log_every=50, save_every=5000, num_workers=4),
    )


def large() -> Run:
    """Large."""
    model = model_config("beit3_large_patch16_224", drop_path=0.1)
    return replace(recipe(), name="mixture_large", **{"task.model": model})


def every() -> Run:
    """The contrastive loss as well."""
    return replace(recipe(), name="mixture_base_every", **{"task.objective.contrastive": 1.0})


def debug() -> Run:
    """Two steps of a tiny model on the embedded corpus."""
    tiny = ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=2048,
        fusion_layers=1,
    )
    pairs = Stream(sources=(Source(path="pairs"),), batch_size=4)
    return replace(
        every(),
        name="mixture_base_debug",
        **{
            "task.model": tiny,
            "task.visual_tokenizer": Path("runs/vqkd_emoji/export"),
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.pairs": pairs,
            "task.images": pairs,
            "task.texts": Stream(sources=(Source(path="text"),), batch_size=4),
            "task.crop": CropConfig(size=48),
            "task.max_text_length": 32,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
