"""The Multiway Transformer: one pass over a mixture equals separate passes, whatever way it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from beit3.config import replace
from beit3.model.attention import Backend
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer, PackedOutput

Make = Callable[..., MultiwayTransformer]
Close = Callable[..., None]


def loss_of(out: PackedOutput) -> Tensor:
    """A linear loss whose weights depend on the place in the stream only."""
    vision, text = (torch.arange(x.numel()).mul(0.37).sin().view_as(x) for x in (out.vision, out.text))
    return (out.vision * vision).sum() + (out.text * text).sum()


def gradients(model: MultiwayTransformer, losses: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(losses)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def separate(batch: PackedBatch) -> list[PackedBatch]:
    """The same sequences as three batches: pairs, lone images, lone texts."""
    assert batch.images is not None
    assert batch.image_mask is not None
    assert batch.text_ids is not None
    assert batch.text_positions is not None
    n, rows = batch.num_pairs, sum(batch.text_lengths[: batch.num_pairs])
    return [
        PackedBatch(
            images=batch.images[:n],
            image_mask=batch.image_mask[:n],
            text_ids=batch.text_ids[:rows],
            text_positions=batch.text_positions[:rows],
            text_lengths=batch.text_lengths[:n],
            num_pairs=n,
        ),
        PackedBatch(images=batch.images[n:], image_mask=batch.image_mask[n:]),
        PackedBatch(
            text_ids=batch.text_ids[rows:],
            text_positions=batch.text_positions[rows:],
            text_lengths=batch.text_lengths[n:],
        ),
    ]


def test_a_mixed_batch_equals_three_separate_passes(
    config: ModelConfig, batch: PackedBatch, make: Make, close: Close
) -> None:
    model = make(config)
    mixed = model.forward_packed(batch)
    parts = [model.forward_packed(part) for part in separate(batch)]
    vision, text = torch.cat([part.vision for part in parts]), torch.cat([part.text for part in parts])
    close(mixed.vision, vision, "vision")
    close(mixed.text, text, "text")
    actual = gradients(model, [loss_of(mixed)])
    expected = gradients(model, [loss_of(PackedOutput(vision, text, mixed.layout))])
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient, name)


def reference_states(model: MultiwayTransformer, vision: Tensor, text: Tensor) -> Tensor:
    """The paper's shared model on one sequence, written as its figure: (T, D) rows of one image, text or pair."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + config.norm_eps).sqrt()
        out: Tensor = unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return out

    def linear(name: str, x: Tensor) -> Tensor:
        out: Tensor = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return out

    def expert(name: str, x: Tensor) -> Tensor:
        hidden = linear(f"{name}.fc1", norm(f"{name}.norm", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return linear(f"{name}.fc2", norm(f"{name}.inner_norm", hidden))

    x, split = torch.cat([vision, text]).double(), len(vision)
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        q, k, v = linear(f"{block}.attention_in.shared.qkv", norm(f"{block}.attention_in.shared.norm", x)).chunk(3, 1)
        heads = []
        for columns in torch.arange(config.width).chunk(config.num_heads):
            scores = q[:, columns] @ k[:, columns].T / math.sqrt(config.width / config.num_heads)
            heads.append(scores.softmax(1) @ v[:, columns])
        mixed = norm(f"{block}.attention_out.shared.norm", torch.cat(heads, 1))
        x = x + linear(f"{block}.attention_out.shared.out", mixed)
        if index >= config.num_layers - config.fusion_layers and 0 < split < len(x):
            x = x + expert(f"{block}.ffn.fusion", x)
        else:
            x = x + torch.cat([expert(f"{block}.ffn.vision", x[:split]), expert(f"{block}.ffn.text", x[split:])])
    return torch.cat([norm("norm.vision", x[:split]), norm("norm.text", x[split:])]).float()


@torch.no_grad()
def test_the_shared_form_computes_the_papers_figure(
    tiny: ModelConfig, batch: PackedBatch, make: Make, close: Close
) -> None:
    model = make(tiny).eval()
    out = model.forward_packed(batch)
    vision, text, _ = model.embed(batch)
    images, texts = torch.split(vision, 7), torch.split(text, list(batch.text_lengths))
    expected_vision, expected_text = [], []
    for image, words in zip(images[:3], texts[:3], strict=True):
        pair = reference_states(model, image, words)
        expected_vision.append(pair[:7])
        expected_text.append(pair[7:])
    expected_vision += [reference_states(model, image, text[:0]) for image in images[3:]]
    expected_text += [reference_states(model, vision[:0], words) for words in texts[3:]]
    close(out.vision, torch.cat(expected_vision))
    close(out.text, torch.cat(expected_text))


@pytest.mark.parametrize("with_images", [False, True])
def test_padding_changes_nothing(config: ModelConfig, make: Make, close: Close, with_images: bool) -> None:
    model = make(config)
    lengths = torch.tensor([4, 1, 6])
    ids = torch.randint(0, 40, (3, 6))
    mask = torch.arange(6) < lengths[:, None]
    images = torch.randn(3, 3, 12, 8) if with_images else None
    image_mask = torch.rand(3, 6) < 0.5 if with_images else None
    padded = model(images, ids, mask, image_mask)
    assert padded.text is not None
    assert padded.text[~mask].abs().max() == 0
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = model(
            None if images is None else images[one],
            ids[one, :length],
            image_mask=None if image_mask is None else image_mask[one],
        )
        close(padded.text[one, :length], alone.text, f"text {row}")
        if padded.vision is not None:
            close(padded.vision[one], alone.vision, f"vision {row}")


def test_real_tokens_may_stand_anywhere_in_a_row(tiny: ModelConfig, make: Make, close: Close) -> None:
    model = make(tiny)
    scattered = model(text_ids=torch.tensor([[1, 9, 1, 8]]), text_mask=torch.tensor([[False, True, False, True]])).text
    together = model(text_ids=torch.tensor([[9, 8]])).text
    assert scattered is not None
    # Positions count columns of the padded form, as the released code does.
    assert scattered[0, [0, 2]].abs().max() == 0
    assert together is not None
    assert not torch.allclose(scattered[0, [1, 3]], together[0])


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_attention_backends_give_equal_states_and_gradients(
    config: ModelConfig, batch: PackedBatch, make: Make, close: Close, backend: Backend
) -> None:
    model = make(config)
    actual, expected = model.forward_packed(batch, backend), model.forward_packed(batch, "reference")
    close(actual.vision, expected.vision)
    close(actual.text, expected.text)
    reference = gradients(model, [loss_of(expected)])
    for name, gradient in gradients(model, [loss_of(actual)]).items():
        close(gradient, reference[name], name)


@torch.no_grad()
def test_eight_threads_give_the_serial_result_bit_for_bit(
    config: ModelConfig, make: Make, ragged: Callable[..., PackedBatch]
) -> None:
    model = make(config).eval()
    kinds = [ragged((2, 5), 2, ()), ragged((), 3, ()), ragged((), 0, (6, 1)), ragged((3,), 2, (4,))]
    work = kinds * 12

    def run(batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model.forward_packed(batch)
        return out.vision, out.text

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(8) as eight:
        serial, threaded = list(one.map(run, work)), list(eight.map(run, work))
    for expected, actual in zip(serial, threaded, strict=True):
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_every_parameter_is_trained_by_a_mixed_batch(config: ModelConfig, batch: PackedBatch, make: Make) -> None:
    model = make(config)
    found = gradients(model, [loss_of(model.forward_packed(batch))])
    names = {name for name, _ in model.named_parameters()}
    assert found.keys() == names
    assert {name for name, gradient in found.items() if not gradient.abs().max() > 0} == set()
    # The two dead rows of the official tables are never read.
    assert found["vision_embedding.positions"][:2].abs().max() == 0
    assert found["text_embedding.positions"][:2].abs().max() == 0


def test_a_single_modality_trains_no_expert_of_the_other(
    config: ModelConfig, make: Make, ragged: Callable[..., PackedBatch]
) -> None:
    model = make(config)
    found = gradients(model, [loss_of(model.forward_packed(ragged((), 2, ())))])
    assert not [name for name in found if ".text." in name or ".fusion." in name or "text_embedding" in name]
    assert any(".ffn.vision." in name for name in found)


def test_fusion_experts_see_the_tokens_of_pairs_only(tiny: ModelConfig, batch: PackedBatch, make: Make) -> None:
    model = make(tiny)
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".ffn.fusion"):
            module.register_forward_hook(lambda _module, given, _out: seen.append(len(given[0])))
    model.forward_packed(batch)
    assert seen == [3 * 7 + 2 + 5 + 5] * tiny.fusion_layers


def last_block_change(model: MultiwayTransformer, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """What the last block adds to each stream, as multiples of what it adds without drop path: one number a row."""
    states: list[tuple[Tensor, Tensor]] = []
    block = model.blocks[-1]
    handles = [
        block.register_forward_pre_hook(lambda _module, given: states.append((given[0], given[1]))),
        block.register_forward_hook(lambda _module, _given, out: states.append(out)),
    ]
    with torch.no_grad():
        model.forward_packed(batch)
    for handle in handles:
        handle.remove()
    (vision, text), (new_vision, new_text) = states
    return new_vision - vision, new_text - text


def test_drop_path_skips_whole_sequences_and_pairs_share_their_draw(
    config: ModelConfig, make: Make, ragged: Callable[..., PackedBatch]
) -> None:
    model = make(config, drop_path=0.5, num_layers=2, fusion_layers=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # leave the attention branch alone in the last block
            if name.startswith("blocks.1.ffn") and ".fc2." in name:
                parameter.zero_()
    num_pairs, num_images, batch = 12, 24, ragged((3,) * 12, 24, (3,) * 12)
    plain = last_block_change(model.eval(), batch)
    torch.manual_seed(5)
    dropped = last_block_change(model.train(), batch)
    factors = []
    for change, full, length in zip(dropped, plain, (7, 3), strict=True):
        ratio = (change * full).view(-1, length * 32).sum(1) / full.square().view(-1, length * 32).sum(1)
        # Each sequence is either gone or twice as strong (kept with probability 1/2), in all its rows.
        assert torch.allclose(change.view(-1, length, 32), ratio[:, None, None] * full.view(-1, length, 32), atol=1e-4)
        assert torch.allclose(ratio, ratio.round(), atol=1e-4)
        factors.append(ratio.round().int().tolist())
    images, texts = factors
    assert len(images) == num_images
    assert images[:num_pairs] == texts[:num_pairs]
    for part in (images[:num_pairs], images[num_pairs:], texts[num_pairs:]):
        assert set(part) == {0, 2}


def test_drop_path_is_off_in_evaluation(tiny: ModelConfig, batch: PackedBatch, make: Make) -> None:
    with torch.no_grad():
        dropping, plain = make(tiny, drop_path=0.5).eval(), make(tiny).eval()
        assert torch.equal(dropping.forward_packed(batch).text, plain.forward_packed(batch).text)


def block_runs(model: MultiwayTransformer) -> list[int]:
    """Numbers of the blocks that are run from now on, in order; the list grows."""
    seen: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    return seen


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_activation_checkpointing_gives_equal_gradients(
    config: ModelConfig, batch: PackedBatch, make: Make, close: Close, drop_path: float
) -> None:
    found, runs = [], []
    for checkpointing in (False, True):
        model = make(config, drop_path=drop_path, activation_checkpointing=checkpointing).train()
        seen = block_runs(model)
        torch.manual_seed(6)
        found.append(gradients(model, [loss_of(model.forward_packed(batch))]))
        runs.append(seen)
    every = list(range(config.num_layers))
    assert runs == [every, every + every[::-1]], "once; and once more, from the last, in the backward pass"
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_equal_eager_and_new_lengths_do_not_recompile(
    config: ModelConfig, make: Make, close: Close, ragged: Callable[..., PackedBatch]
) -> None:
    torch.compiler.reset()
    eager, compiled = make(config), make(config)
    compiled.compile_blocks()
    batches = [ragged((2, 3), 4, (5, 6)), ragged((4, 6), 3, (2, 2, 7)), ragged((3, 3, 8), 6, (9, 4))]

    def compare(batch: PackedBatch) -> None:
        ours, expected = compiled.forward_packed(batch), eager.forward_packed(batch)
        close(ours.vision, expected.vision)
        close(ours.text, expected.text)
        reference = gradients(eager, [loss_of(expected)])
        for name, gradient in gradients(compiled, [loss_of(ours)]).items():
            close(gradient, reference[name], name)

    try:
        compare(batches[0])
        torch.compiler.set_stance("fail_on_recompile")
        for batch in batches[1:]:
            compare(batch)
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()


@torch.no_grad()
def test_bf16_autocast_is_close_to_fp32(config: ModelConfig, batch: PackedBatch, make: Make) -> None:
    model = make(config).eval()
    expected = model.forward_packed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.forward_packed(batch)
    for actual, reference in ((out.vision, expected.vision), (out.text, expected.text)):
        assert (actual.float() - reference).abs().max() <= 3e-2 * reference.abs().max()


def test_a_pair_with_an_empty_text_is_an_image(tiny: ModelConfig, make: Make, close: Close) -> None:
    model = make(tiny, fusion_layers=0)
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(0, 40, (2, 4))
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = model(images, ids, mask)
    alone = model(images[:1])
    assert out.vision is not None
    assert out.text is not None
    assert alone.vision is not None
    close(out.vision[:1], alone.vision)
    assert out.text[0].abs().max() == 0
    assert out.text[1].abs().min() > 0


def test_an_empty_text_alone_is_zero(tiny: ModelConfig, make: Make) -> None:
    out = make(tiny)(text_ids=torch.zeros(2, 3, dtype=torch.long), text_mask=torch.zeros(2, 3, dtype=torch.bool)).text
    assert out is not None
    assert out.shape == (2, 3, 32)
    assert out.abs().max() == 0


@torch.no_grad()
def test_sub_ln_gain_stands_on_values_outputs_and_feed_forward_only() -> None:
    config = ModelConfig(width=256, num_layers=4, num_heads=4, ffn_width=512, vocab_size=300, patch_size=4)
    torch.manual_seed(0)
    model = MultiwayTransformer(replace(config, image_size=(16, 16)))
    gain = math.sqrt(math.log(2 * 4))

    def xavier(fan_in: int, fan_out: int) -> float:
        return math.sqrt(2 / (fan_in + fan_out))

    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            q, k, v = (part.std().item() / xavier(256, 256) for part in parameter.chunk(3))
            assert (q, k, v) == pytest.approx((1, 1, gain), rel=0.03), name
        elif name.endswith(("out.weight", "fc1.weight", "fc2.weight")):
            assert parameter.std().item() / xavier(*parameter.shape) == pytest.approx(gain, rel=0.03), name
        elif "norm" in name:
            assert bool((parameter == (1 if name.endswith("weight") else 0)).all()), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            assert 0 < parameter.std().item() < 0.12, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to encode"),
        ({"images": torch.zeros(2, 12, 8)}, "images must be float"),
        ({"images": torch.zeros(2, 3, 12, 8, dtype=torch.uint8)}, "images must be float"),
        ({"images": torch.zeros(2, 3, 12, 9)}, "does not divide by the patch size"),
        ({"image_mask": torch.zeros(2, 6, dtype=torch.bool), "text_ids": torch.zeros(2, 3).long()}, "needs images"),
        ({"images": torch.zeros(2, 3, 12, 8), "text_mask": torch.ones(2, 3).bool()}, "text_mask needs text_ids"),
        ({"text_ids": torch.zeros(3).long()}, r"text_ids must be \(B, T\)"),
        ({"text_ids": torch.zeros(2, 3).long(), "text_mask": torch.ones(2, 3)}, "text_mask must be bool"),
        ({"text_ids": torch.zeros(2, 3).long(), "text_mask": torch.ones(2, 4).bool()}, "text_mask must be bool"),
        ({"images": torch.zeros(2, 3, 12, 8), "text_ids": torch.zeros(3, 3).long()}, "2 images but 3 texts"),
        ({"images": torch.zeros(2, 3, 12, 8), "image_mask": torch.zeros(2, 5).bool()}, "image_mask must be bool"),
        ({"images": torch.zeros(2, 3, 12, 8), "image_mask": torch.zeros(2, 6)}, "image_mask must be bool"),
        ({"text_ids": torch.zeros(1, 19).long()}, "a text has 19 tokens, the position table holds 18"),
    ],
)
def test_wrong_inputs_are_explained_in_one_line(
    tiny: ModelConfig, make: Make, arguments: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(tiny)(**arguments)
    assert "\n" not in str(caught.value)
