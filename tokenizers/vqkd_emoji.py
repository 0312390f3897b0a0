"""Visual tokenizer of the quickstart: VQ-KD (BEiT v2, arXiv 2208.06366) at 48 pixels, patches of 8, 512 codes.

Command:  beit3 train tokenizers/vqkd_emoji.py --data DATA       (DATA: `beit3 prepare emoji --out DATA`)
Hardware: two CPU cores, about two minutes, half of it for the teacher's features (computed once)
Teacher:  EfficientNet-Lite0 at 96 pixels, stride 16: a 6 x 6 grid of 112 features (the paper's teacher is CLIP-B/16)
Expected: the results table of the README
"""

from beit3.config import LoopConfig, OptimConfig, Run, replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.pretrain.image_tokenizer import ImageTokenizerConfig
from beit3.tokenizer.teachers import TeacherConfig
from beit3.tokenizer.vqkd import VQKDConfig


def recipe() -> Run:
    """One recorded crop of each of 4,194 pictures."""
    return Run(
        name="vqkd_emoji",
        task=ImageTokenizerConfig(
            tokenizer=VQKDConfig(
                image_size=(48, 48),
                patch_size=8,
                width=128,
                depth=3,
                decoder_depth=1,
                num_heads=2,
                codebook_size=512,
                code_width=32,
                teacher_width=112,
                revive_after=20,
            ),
            teacher=TeacherConfig(kind="efficientnet_lite0", image_size=96),
            images=Stream(sources=(Source(path="pairs"),), batch_size=128),
            crop=CropConfig(size=48, scale=(0.5, 1.0), flip=0.5, color_jitter=0.2),
            cached_crops=1,
            eval_images="test_vendor",
        ),
        optim=OptimConfig(name="nmuon", lr=1e-2, warmup_steps=20, weight_decay=1e-4, betas=(0.9, 0.99)),
        loop=LoopConfig(steps=150, log_every=20, save_every=100),
    )


def full() -> Run:
    """Three crops of each picture, 1,000 steps."""
    return replace(
        recipe(), name="vqkd_emoji_full", **{"task.cached_crops": 3, "loop.steps": 1000, "loop.save_every": 250}
    )


def open_pictures() -> Run:
    """1,024 codes from about 40,000 drawings: the open set of examples/open_pictures.py (docs/data.md)."""
    return replace(
        recipe(),
        name="vqkd_open_pictures",
        **{
            "task.tokenizer.codebook_size": 1024,
            "task.images.batch_size": 256,
            "task.eval_images": "held_out",
            "optim.warmup_steps": 50,
            "loop.steps": 400,
            "loop.save_every": 200,
        },
    )


def debug() -> Run:
    """Two steps of a tiny model."""
    return replace(
        recipe(),
        name="vqkd_emoji_debug",
        **{
            "task.tokenizer.width": 32,
            "task.tokenizer.depth": 1,
            "task.tokenizer.codebook_size": 16,
            "task.teacher.image_size": 96,
            "task.images.batch_size": 8,
            "task.cached_crops": 0,
            "task.eval_images": None,
            "optim.warmup_steps": 0,
            "loop.steps": 2,
        },
    )
