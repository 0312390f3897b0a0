"""Dense inputs: windows, any size, and maps that are the plain transformer's states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.attention import reference_attention
from beit3.model.dense import DenseModel
from beit3.model.features import feature_maps
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer
from beit3.model.windows import Windows, windowed_attention

Close = Callable[..., None]
Make = Callable[..., MultiwayTransformer]
GRIDS = [(4, 4), (5, 7), (2, 9), (1, 1)]


def seen_by(grid: tuple[int, int], side: int) -> torch.Tensor:
    """(1 + N, 1 + N) bool: which token sees which, written out place by place."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    seen = torch.ones(1 + len(places), 1 + len(places), dtype=torch.bool)
    for i, (row, column) in enumerate(places, start=1):
        for j, (other_row, other_column) in enumerate(places, start=1):
            seen[i, j] = row // side == other_row // side and column // side == other_column // side
    return seen


@pytest.mark.parametrize("side", [1, 2, 3, 9])
@pytest.mark.parametrize("grid", GRIDS)
def test_patches_see_their_window_and_the_class_token(grid: tuple[int, int], side: int, close: Close) -> None:
    count = 1 + grid[0] * grid[1]
    qkv = torch.randn(2 * count, 3 * 8)
    q, k, v = (x.transpose(1, 2) for x in qkv.view(2, count, 3, 2, 4).unbind(2))
    wanted = reference_attention(q, k, v, seen_by(grid, side)).transpose(1, 2).flatten(2).flatten(0, 1)
    close(windowed_attention(qkv, grid, side, 2, reference_attention), wanted)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_one_window_is_global_attention(backend: str, tiny: ModelConfig, make: Make, close: Close) -> None:
    model = make(tiny).eval()
    batch = PackedBatch(images=torch.randn(2, 3, 12, 20))
    plain = model.forward_packed(batch, backend)  # type: ignore[arg-type]
    windowed = model.forward_packed(batch, backend, windows=Windows(5, frozenset()))  # type: ignore[arg-type]
    close(windowed.vision, plain.vision)


def test_windows_change_what_patches_see_and_global_layers_do_not(tiny: ModelConfig, make: Make, close: Close) -> None:
    model = make(tiny).eval()
    images = torch.randn(1, 3, 16, 16)
    every = frozenset(range(1, tiny.num_layers + 1))
    plain = feature_maps(model, images, [tiny.num_layers - 1])[0]
    close(feature_maps(model, images, [tiny.num_layers - 1], Windows(2, every))[0], plain)
    narrow = feature_maps(model, images, [tiny.num_layers - 1], Windows(2, frozenset()))[0]
    assert not torch.allclose(narrow, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("num_layers", "num_global", "wanted"), [(12, 4, {3, 6, 9, 12}), (24, 4, {6, 12, 18, 24}), (5, 2, {2, 5})]
)
def test_global_layers_lie_at_equal_distances(num_layers: int, num_global: int, wanted: set[int]) -> None:
    assert Windows.spread(14, num_layers, num_global).global_layers == wanted


@pytest.mark.parametrize("num_global", [0, 6])
def test_more_global_layers_than_layers_are_refused(num_global: int) -> None:
    with pytest.raises(ConfigError, match=f"num_global_layers must lie in 1..5 .layers., not {num_global}"):
        Windows.spread(14, 5, num_global)


def test_windows_are_for_images_alone(tiny: ModelConfig, make: Make) -> None:
    batch = PackedBatch(images=torch.randn(1, 3, 8, 8), kept_patches=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="images alone"):
        make(tiny).forward_packed(batch, windows=Windows(2, frozenset()))


def test_maps_of_224_pixels_are_the_plain_transformers_states(close: Close) -> None:
    config = ModelConfig(width=16, num_layers=4, num_heads=2, ffn_width=32, vocab_size=64, max_text_positions=8)
    plain = MultiwayTransformer(replace(config, final_norm=False)).eval()
    model = DenseModel(config, 8, 1, 14, 2).eval()
    state = {name: value for name, value in plain.state_dict().items() if name in model.backbone.state_dict()}
    assert state.keys() == model.backbone.state_dict().keys()
    model.backbone.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    states = plain(images).vision[:, 1:]
    wanted = model.pyramid([states.transpose(1, 2).unflatten(2, (14, 14))] * 4)
    for found, expected in zip(model.maps(images), wanted, strict=True):
        close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("num_layers", "taken"), [(12, (4, 6, 8, 12)), (24, (8, 12, 16, 24))])
def test_four_maps_are_of_the_layers_that_beit_takes(
    num_layers: int, taken: tuple[int, ...], tiny: ModelConfig, close: Close
) -> None:
    """As in its configurations of UPerNet, base and large; finest first."""
    model = DenseModel(replace(tiny, num_layers=num_layers), 8, 4, None, 1).eval()
    states: list[torch.Tensor] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _module, _given, out: states.append(out[0]))
    found = model.maps(torch.randn(1, 3, 16, 8))
    patches = [states[layer - 1][1:].T.unflatten(1, (4, 2))[None] for layer in taken]
    for ours, wanted in zip(found, model.pyramid(patches), strict=True):
        close(ours, wanted)


@pytest.mark.parametrize("size", [(16, 16), (20, 36), (4, 4), (44, 12)])
@pytest.mark.parametrize("num_maps", [1, 4])
def test_levels_lie_at_a_quarter_half_one_and_two_patches(
    size: tuple[int, int], num_maps: int, tiny: ModelConfig
) -> None:
    model = DenseModel(replace(tiny, patch_size=4, image_size=(16, 16)), 8, num_maps, None, 1)
    rows, columns = size[0] // 4, size[1] // 4
    wanted = [
        (4 * rows, 4 * columns),
        (2 * rows, 2 * columns),
        (rows, columns),
        ((rows + 1) // 2, (columns + 1) // 2),
    ]
    assert [tuple(x.shape) for x in model.maps(torch.randn(2, 3, *size))] == [(2, 8, *side) for side in wanted]
    assert model.strides == (1, 2, 4, 8)


def test_a_dense_tower_has_no_text_parameters_and_every_parameter_learns(tiny: ModelConfig) -> None:
    model = DenseModel(tiny, 8, 1, 2, 1)
    assert not [name for name in model.state_dict() if "text" in name or "fusion" in name or "backbone.norm" in name]
    sum(x.square().mean() for x in model.maps(torch.randn(2, 3, *tiny.image_size))).backward()  # type: ignore[union-attr]
    without = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert not without


def test_recomputed_layers_give_the_same_gradients(tiny: ModelConfig, close: Close) -> None:
    images = torch.randn(2, 3, 12, 12)
    grads, runs = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = DenseModel(replace(tiny, activation_checkpointing=recompute), 8, 4, 2, 1).train()
        seen: list[int] = []
        for block in model.backbone.blocks:
            block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        runs.append(seen)
        torch.stack([x.square().mean() for x in model.maps(images)]).sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert [len(seen) for seen in runs] == [tiny.num_layers, 2 * tiny.num_layers]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad)
