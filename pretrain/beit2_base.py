"""BEiT v2's masked image modeling at official size (arXiv 2208.06366), on the vision half of the Multiway Transformer.

Command:  torchrun --nproc-per-node 16 -m beit3 train pretrain/beit2_base.py --data DATA
          (DATA/images: `beit3 prepare images IMAGENET/train --out DATA/images`; the tokenizer: tokenizers/vqkd_base.py,
          variant decoder3, or the released file through `--task.visual-tokenizer FILE.pth`)
Hardware: 16 GPUs; 300 epochs of ImageNet-1k at a global batch of 2,048 are 187,800 steps
Expected: ImageNet-1k top-1 after finetuning 85.0 (300 epochs), 85.5 (1,600 epochs, variant `long`); large 86.6 / 87.3;
          linear probe of base 80.1 (BEiT v2, tables 1 and 5); not run here

What differs from the paper's run: absolute positions, not relative ones; sub-LN and its initialisation, not layer
scale; pixels normalised with 0.5, not with ImageNet's statistics.
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, model_config
from beit3.pretrain.masked_image_modeling import MaskedImageModelingConfig
from beit3.pretrain.masking import MaskConfig

_STEPS_PER_EPOCH = 626


def recipe() -> Run:
    """Base, 300 epochs."""
    return Run(
        name="beit2_base",
        task=MaskedImageModelingConfig(
            model=model_config("beit3_base_patch16_224", fusion_layers=0),
            visual_tokenizer=Path("runs/vqkd_base_decoder3/export"),
            images=Stream(sources=(Source(path="images"),), batch_size=2048, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.2, 1.0), flip=0.5, color_jitter=0.4),
            mask=MaskConfig(patches=75 / 196),
            early_layer=9,
        ),
        optim=OptimConfig(
            lr=1.5e-3,
            min_lr=1e-5,
            warmup_steps=10 * _STEPS_PER_EPOCH,
            weight_decay=0.05,
            betas=(0.9, 0.98),
            eps=1e-8,
            clip_grad=3.0,
        ),
        loop=LoopConfig(steps=300 * _STEPS_PER_EPOCH, log_every=50, save_every=5000, num_workers=8),
    )


def long() -> Run:
    """Base, 1,600 epochs."""
    return replace(
        recipe(),
        name="beit2_base_long",
        **{
            "task.model.drop_path": 0.1,
            "optim.betas": (0.9, 0.999),
            "loop.steps": 1600 * _STEPS_PER_EPOCH,
        },
    )


def large() -> Run:
    """Large, 300 epochs."""
    model = model_config("beit3_large_patch16_224", fusion_layers=0)
    return replace(recipe(), name="beit2_large", **{"task.model": model, "task.early_layer": 21})


def pixels() -> Run:
    """The same model and masks, with normalised pixels as targets (MAE's)."""
    return replace(recipe(), name="beit2_base_pixels", **{"task.target": "pixels", "task.visual_tokenizer": None})


def debug() -> Run:
    """Two steps of a tiny model on the images of the embedded corpus."""
    model = ModelConfig(
        width=32,
        num_layers=3,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(48, 48),
        vocab_size=16,
        max_text_positions=8,
        fusion_layers=0,
    )
    return replace(
        recipe(),
        name="beit2_base_debug",
        **{
            "task.model": model,
            "task.visual_tokenizer": Path("runs/vqkd_emoji/export"),
            "task.images": Stream(sources=(Source(path="pairs"),), batch_size=8),
            "task.crop": CropConfig(size=48),
            "task.early_layer": 2,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
