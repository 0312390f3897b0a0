"""Compose pictures whose objects are known, to measure detection and segmentation without any download.

    python examples/compose_scenes.py --out SCENES [--backgrounds FOLDER] [--count 200]

The emoji are those of concepts that no training set holds, the backgrounds soft colours or pictures of FOLDER, which
should be others than those of training. SCENES gets the pictures with COCO's json, and the index files of both tasks:
boxes and masks (9 groups of emoji), and in label_maps a label for every pixel (background first).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beit3.data.compose import ComposeConfig, write_composites
from beit3.data.emoji import VENDORS
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.label_maps import write_label_maps


def main() -> None:
    """Write the scenes and their index files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    out: Path = arguments.out
    scenes = ComposeConfig(vendors=VENDORS, held_out=True, backgrounds=arguments.backgrounds)
    write_composites(out, scenes, arguments.count, seed=0)
    print("\n".join(prepare_coco_detection(out).lines()))  # as `beit3 prepare coco-detection` does
    index = out / "coco_detection.val.jsonl"
    maps = write_label_maps(index, out / "label_maps")
    print(f"{index}: boxes and masks; {maps}: a label for every pixel")
    own = "" if arguments.backgrounds is None else " --task.compose.backgrounds OTHER_PICTURES"
    print("\nNow train, and measure on these scenes (`:random` needs no pretrained model):")
    for task in ("detection", "segmentation"):
        print(f"  beit3 train finetune/{task}_emoji.py:random --data {out}{own}")


if __name__ == "__main__":
    main()
