"""Go on pretraining a released model on pairs of your own.

    beit3 prepare pairs PAIRS/*.tar --out DATA/pairs
    python examples/continue_pretraining.py beit3_base_patch16_224.pth beit3.spm VISUAL_TOKENIZER DATA [STEPS]

VISUAL_TOKENIZER: the released vqkd_encoder_base_decoder_3x768x12_clip, or one of your own; with another number of
codes its head starts at random. The same as a command, with every setting at hand:

    beit3 train recipe:pretrain/mdm_base:released --data DATA --task.pairs.batch-size 32 --task.init-from FILE ...
"""

import sys
from pathlib import Path

import beit3
from beit3.config import Run, replace
from beit3.data.transforms import CropConfig
from beit3.recipes import load_recipe
from beit3.train.loop import fit


def main(released: str, text_tokenizer: str, visual_tokenizer: str, data: str, steps: str = "1000") -> None:
    """Train on one process with 32 pairs a step; `torchrun` this file for more."""
    shape = beit3.load_model(released, task="backbone").model_config
    recipe = load_recipe("recipe:pretrain/mdm_base:released")
    assert isinstance(recipe, Run)
    run = replace(
        recipe,
        name="continued",
        data=Path(data),
        **{
            "task.model": replace(shape, drop_path=0.1),
            "task.init_from": Path(released),
            "task.text_tokenizer": Path(text_tokenizer),
            "task.visual_tokenizer": Path(visual_tokenizer),
            "task.crop": CropConfig(size=shape.image_size[0], scale=(0.2, 1.0), color_jitter=0.4),
            "task.max_text_length": min(64, shape.max_text_length),
            "task.pairs.batch_size": 32,
            "optim.warmup_steps": int(steps) // 10,
            "loop.steps": int(steps),
            "loop.num_workers": 1,
        },
    )
    fit(run)
    print(f"{run.folder}: continued; beit3 info {run.folder} says what it holds")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    main(*sys.argv[1:])
