"""VQ-KD at official size (BEiT v2, arXiv 2208.06366): ViT-B encoder, 8,192 codes of 32, CLIP-B/16 as teacher.

Command:  torchrun --nproc-per-node 8 -m beit3 train tokenizers/vqkd_base.py --data DATA
          (DATA/images: `beit3 prepare images IMAGENET/train --out DATA/images`)
Hardware: 8 GPUs; 100 epochs of ImageNet-1k at a global batch of 512 are 250,000 steps
Expected: all codes in use with a decoder of one layer, 97% with three (official release); not run here
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.pretrain.image_tokenizer import ImageTokenizerConfig
from beit3.tokenizer.teachers import TeacherConfig
from beit3.tokenizer.vqkd import VQKDConfig, vqkd_config


def recipe() -> Run:
    """Decoder of one layer."""
    return Run(
        name="vqkd_base",
        task=ImageTokenizerConfig(
            tokenizer=vqkd_config("vqkd_base_clip"),
            teacher=TeacherConfig(kind="clip", name="openai/clip-vit-base-patch16", image_size=224),
            images=Stream(sources=(Source(path="images"),), batch_size=512, shuffle_buffer=5000),
            crop=CropConfig(size=224, scale=(0.08, 1.0), flip=0.5),
        ),
        optim=OptimConfig(
            lr=2e-4, min_lr=1e-5, warmup_steps=25_000, weight_decay=1e-4, betas=(0.9, 0.99), eps=1e-8, clip_grad=None
        ),
        loop=LoopConfig(steps=250_000, log_every=50, save_every=5000, num_workers=8),
    )


def decoder3() -> Run:
    """Decoder of three layers, the one BEiT v2 pretrains with."""
    return replace(recipe(), name="vqkd_base_decoder3", **{"task.tokenizer.decoder_depth": 3})


def dino() -> Run:
    """DINO ViT-B/16 as teacher."""
    teacher = TeacherConfig(kind="timm", name="vit_base_patch16_224.dino", image_size=224)
    return replace(
        recipe(), name="vqkd_base_dino", **{"task.teacher": teacher, "task.tokenizer": vqkd_config("vqkd_base_dino")}
    )


def debug() -> Run:
    """Two steps of a tiny tokenizer under the small teacher, on the images of the embedded corpus."""
    return replace(
        recipe(),
        name="vqkd_base_debug",
        **{
            "task.tokenizer": VQKDConfig(
                image_size=(32, 32), patch_size=16, width=32, depth=1, num_heads=2, codebook_size=16, teacher_width=112
            ),
            "task.teacher": TeacherConfig(kind="efficientnet_lite0", image_size=32),
            "task.crop": CropConfig(size=32),
            "task.images": Stream(sources=(Source(path="pairs"),), batch_size=8),
            "optim.warmup_steps": 0,
            "loop": LoopConfig(steps=2),
        },
    )
