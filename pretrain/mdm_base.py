"""Masked data modeling at the size of the paper (BEiT-3, arXiv 2208.10442, section 3 and table 11).

Command:  torchrun --nnodes N --nproc-per-node 8 -m beit3 train pretrain/mdm_base.py[:large|giant|released] --data DATA
Needs:    DATA/pairs, DATA/images, DATA/text (`beit3 prepare`), a text and a visual tokenizer (recipes in tokenizers/)
Hardware: 1M steps at a global batch of 3 x 2,048 are about 16 (base) or 54 (large) H100-days at half of peak
Expected: the paper trains the giant model alone; its release trained base and large this way. Not run here
Source:   batch, steps, optimizer, masks and drop path as in the paper; the text length is not stated there, 128 is ours
"""

from pathlib import Path

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.model.presets import ModelConfig, model_config
from beit3.pretrain.masked_data_modeling import MaskedDataModelingConfig


def recipe() -> Run:
    """Base, shared self-attention, fusion experts in the top three layers."""
    return Run(
        name="mdm_base",
        task=MaskedDataModelingConfig(
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
    return replace(recipe(), name="mdm_large", **{"task.model": model_config("beit3_large_patch16_224", drop_path=0.1)})


def giant() -> Run:
    """Giant, the paper's model: patch 14; its 16 x 16 grid needs a visual tokenizer of 256 codes an image."""
    model = model_config("beit3_giant_patch14_224", drop_path=0.1, activation_checkpointing=True)
    return replace(
        recipe(),
        name="mdm_giant",
        **{
            "task.model": model,
            "task.visual_tokenizer": Path("runs/vqkd_base_256/export"),
            "task.crop.tokenizer_size": 256,
        },
    )


def released() -> Run:
    """Go on from the released base model on pairs of your own, as its `indomain` files did on COCO and Visual Genome.

    The release names no settings for that: a tenth of the peak rate and 20,000 steps of 1,024 pairs are ours.
    """
    return replace(
        recipe(),
        name="mdm_released",
        **{
            "task.model": model_config("beit3_base_patch16_224", attention="decoupled", drop_path=0.1),
            "task.init_from": Path("beit3_base_patch16_224.pth"),
            "task.text_tokenizer": Path("beit3.spm"),
            "task.pairs.batch_size": 1024,
            "task.images": None,
            "task.texts": None,
            "optim.lr": 1e-4,
            "optim.warmup_steps": 1000,
            "loop.steps": 20_000,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model on the embedded corpus, with the quickstart's tokenizers."""
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
    pairs = (Source(path="pairs"),)
    return replace(
        recipe(),
        name="mdm_base_debug",
        **{
            "task.model": tiny,
            "task.visual_tokenizer": Path("runs/vqkd_emoji/export"),
            "task.text_tokenizer": Path("runs/text_emoji/tokenizer.spm"),
            "task.crop": CropConfig(size=48),
            "task.pairs": Stream(sources=pairs, batch_size=4),
            "task.images": Stream(sources=pairs, batch_size=4),
            "task.texts.batch_size": 4,
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
