"""Image features as maps, behind the interface of timm's `features_only` models: for detection and segmentation heads.

Shapes: B images, P patch side, (h, w) = (H / P, W / P) patches down and across, N = h w, D width.

The maps are the states after the layers, before any final norm, as those of timm and of the released BEiT
segmentation backbone: a head brings its own norm. The class token is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from beit3.config import replace, require
from beit3.model.embeddings import VisionEmbedding
from beit3.model.packing import PackedBatch
from beit3.model.parts import Absent
from beit3.model.task_model import TaskModel
from beit3.model.transformer import MultiwayTransformer
from beit3.model.windows import Windows


class FeatureBackbone(nn.Module):
    """The image tower of a model as a backbone that returns a list of maps.

    It holds what images alone reach up to the last layer asked for, and shares those parameters with the model, which
    stays as it is. `feature_info` is timm's: `channels()`, `reduction()`, `module_name()`, `get_dicts()`.

    Args:
        model: backbone or task model.
        out_indices: layers from 0, or from the end if negative; a number n means the last n.

    Raises:
        ConfigError: there is no such layer, or the model was loaded without its vision tower.
    """

    def __init__(self, model: MultiwayTransformer | TaskModel, out_indices: int | Sequence[int] = 3) -> None:
        from timm.models import FeatureInfo  # with torchvision: only those who ask for it wait

        super().__init__()
        backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
        config = backbone.config
        require(
            isinstance(backbone.vision_embedding, VisionEmbedding),
            "a feature backbone needs the vision tower, which this model was loaded without: load it with parts=None",
        )
        self.out_indices = _layer_indices(out_indices, config.num_layers)
        self.feature_info = FeatureInfo(
            [
                {"module": f"blocks.{index}", "num_chs": config.width, "reduction": config.patch_size}
                for index in range(config.num_layers)
            ],
            self.out_indices,
        )
        self.model = _image_tower(backbone, max(self.out_indices) + 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn images (B, 3, H, W) into a map (B, D, h, w) for each of `out_indices`, in their order."""
        return feature_maps(self.model, images, self.out_indices)


def feature_maps(
    backbone: MultiwayTransformer, images: Tensor, out_indices: Sequence[int], windows: Windows | None = None
) -> list[Tensor]:
    """Encode images and return the states of their patches after some layers as maps.

    Args:
        backbone: all its layers are run.
        images: (B, 3, H, W) float, normalised; H and W divide by P, and positions are interpolated to them.
        out_indices: layers, the first is 0.
        windows: what patches see in which layers; None: the whole image.

    Returns:
        a map (B, D, h, w) for each layer, in the order asked for.

    Raises:
        ValueError: the size does not divide by the patch size.
    """
    side = backbone.config.patch_size
    grid = (images.shape[2] // side, images.shape[3] // side)
    layers = {index + 1 for index in out_indices}
    inner = backbone.forward_packed(PackedBatch(images=images), layers=layers, windows=windows).inner
    rows = (images.shape[0], 1 + grid[0] * grid[1])
    states = [inner[index + 1][0].unflatten(0, rows)[:, 1:] for index in out_indices]  # (B, N, D)
    return [state.transpose(1, 2).unflatten(2, grid).contiguous() for state in states]


def _layer_indices(out_indices: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Indices from 0, whatever way they were given."""
    asked = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    for index in asked:
        require(
            -num_layers <= index < num_layers,
            f"out_indices holds {index}, but the layers of this model are 0..{num_layers - 1}",
        )
    require(len(asked) > 0, "out_indices is empty: name at least one layer")
    return tuple(index % num_layers for index in asked)


def _image_tower(backbone: MultiwayTransformer, num_layers: int) -> MultiwayTransformer:
    """A second view of a backbone: its first layers with the parts that images alone reach, without the final norm."""
    blocks = nn.ModuleList()
    for block in list(backbone.layers())[:num_layers]:
        view = copy.copy(block)
        view._modules = {
            part: nn.ModuleDict({n: expert for n, expert in getattr(block, part).items() if n in ("vision", "shared")})
            for part in ("attention_in", "attention_out", "ffn")
        }
        blocks.append(view)
    tower = copy.copy(backbone)
    tower.config = replace(backbone.config, num_layers=num_layers, fusion_layers=0, final_norm=False)
    tower._modules = {
        "vision_embedding": backbone.vision_embedding,
        "text_embedding": Absent("text"),
        "blocks": blocks,
        "norm": nn.ModuleDict(),
    }
    tower.part = "vision"
    return tower
