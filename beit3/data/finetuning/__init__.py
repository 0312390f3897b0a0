"""Index files of the finetuning sets, from the files as published; nothing is downloaded.

One file a set; docs/finetuning_data.md says where people unpack what, and what a row holds.
"""

from collections.abc import Callable

from beit3.data.finetuning.ade20k import prepare_ade20k
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.finetuning.image_folders import prepare_image_folder, prepare_imagenet
from beit3.data.finetuning.index_writer import IndexReport
from beit3.data.finetuning.karpathy import prepare_coco_captions, prepare_coco_retrieval, prepare_flickr30k
from beit3.data.finetuning.nlvr2 import prepare_nlvr2
from beit3.data.finetuning.nocaps import prepare_nocaps
from beit3.data.finetuning.vqav2 import prepare_vqav2

__all__ = ["FINETUNING_SETS", "IndexReport"]

FINETUNING_SETS: dict[str, Callable[..., IndexReport]] = {
    "coco-captions": prepare_coco_captions,
    "coco-retrieval": prepare_coco_retrieval,
    "flickr30k": prepare_flickr30k,
    "vqav2": prepare_vqav2,
    "nlvr2": prepare_nlvr2,
    "nocaps": prepare_nocaps,
    "imagenet": prepare_imagenet,
    "image-folder": prepare_image_folder,
    "coco-detection": prepare_coco_detection,
    "ade20k": prepare_ade20k,
}
"""What `beit3 prepare` calls for each set: `function(root, *, out, overwrite, ...)`."""
