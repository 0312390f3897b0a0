"""Floating-point operations of one forward pass, the numerator of every throughput figure.

Symbols: T tokens of a sequence, D width, F feed-forward width, L layers, N patches, P patch side, V vocabulary,
K codebook size. One multiplication with its addition counts as 2.

Only matrix products count (norms, GELU, softmax and drop path do not), only real tokens, and each token counts the one
expert it visits. A training step is three times the forward pass; work that is recomputed is not useful work.
"""

from __future__ import annotations

from beit3.model.packing import Layout
from beit3.model.presets import ModelConfig
from beit3.model.windows import Windows


def forward_flops(
    config: ModelConfig,
    layout: Layout,
    masked_patches: int = 0,
    masked_words: int = 0,
    codebook_size: int = 0,
    patches: int | None = None,
) -> float:
    """Count the operations of a forward pass over one packed batch.

    Each sequence costs `L (8 T D^2 + 4 T D F + 4 T^2 D)`; patches, visual-token logits and word logits are added.

    Args:
        config: sizes of the model.
        layout: lengths of all sequences of the batch.
        masked_patches: patches of the whole batch whose visual token is predicted.
        masked_words: text tokens of the whole batch that are predicted.
        codebook_size: K; needed with `masked_patches`.
        patches: patches of the whole batch that are embedded; None counts those of the layout.

    Returns:
        Operations of the whole batch.

    Raises:
        ValueError: masked patches without a codebook size.
    """
    if masked_patches and not codebook_size:
        raise ValueError("masked_patches needs codebook_size: the number of visual tokens decides the head's cost")
    width, hidden = config.width, config.ffn_width
    tokens = squares = 0
    for group in layout.groups:
        length = group.vision_length + group.text_length
        tokens += group.count * length
        squares += group.count * length * length
    if patches is None:
        patches = layout.num_images * max(layout.vision_length - 1, 0)
    blocks = config.num_layers * (8 * tokens * width**2 + 4 * tokens * width * hidden + 4 * squares * width)
    embedding = 2 * patches * 3 * config.patch_size**2 * width
    heads = 2 * width * (masked_patches * codebook_size + masked_words * config.vocab_size)
    return float(blocks + embedding + heads)


def unseen_flops(config: ModelConfig, windows: Windows | None) -> float:
    """Operations that windows save of the forward pass of one image of the native size."""
    if windows is None:
        return 0.0
    tokens = 1 + config.num_patches
    narrow = config.num_layers - len(windows.global_layers)
    return float(4 * config.width * (tokens**2 - windows.pairs(config.grid)) * narrow)
