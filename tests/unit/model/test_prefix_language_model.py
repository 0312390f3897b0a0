"""A language model behind a prefix: transformers' own loss, decoding without a cache, and no trace of padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from beit3.errors import ConfigError
from beit3.model.prefix_language_model import (
    ConnectorConfig,
    ConnectorKind,
    MLPMapper,
    PrefixLanguageModel,
    TransformerMapper,
)

KINDS: tuple[ConnectorKind, ...] = ("clipcap_transformer", "clipcap_mlp", "llava_linear", "llava_mlp")
WIDTH, EMBEDDING, WORDS, END = 10, 16, 23, 2


def language_model(family: str, words: int = WORDS, width: int = EMBEDDING) -> Any:
    """A tiny model whose weights are large enough to have opinions."""
    if family == "gpt2":
        made: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=words, n_embd=width, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=2
            )
        )
    else:
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=40,
            )
        )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def build(
    family: str = "gpt2", kind: ConnectorKind = "clipcap_transformer", *, trained: bool = False, words: int = WORDS
) -> PrefixLanguageModel:
    connector = ConnectorConfig(kind=kind, prefix_length=4, clip_length=3, num_layers=2, num_heads=2)
    return PrefixLanguageModel(
        language_model(family, words),
        connector.build(WIDTH, EMBEDDING),
        opening=(4, 3),
        trains_language_model=trained,
    ).eval()


def features(kind: ConnectorKind, count: int = 3) -> Tensor:
    return torch.randn(count, 6, WIDTH) if kind.startswith("llava") else torch.randn(count, WIDTH)


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Three texts of 5, 3 and 4 ids, prompts of 2, 1 and 0 of them; the padding is no special id."""
    ids = torch.randint(3, WORDS, (3, 5))
    places = torch.arange(5)
    mask = places < torch.tensor([5, 3, 4])[:, None]
    return ids, mask, mask & (places >= torch.tensor([2, 1, 0])[:, None])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["clipcap_transformer", "llava_mlp"])
def test_the_loss_is_transformers_own_with_ignored_labels(family: str, kind: ConnectorKind) -> None:
    model = build(family, kind)
    ids, mask, targets = texts()
    seen = features(kind)
    embed, prefix = model.language_model.get_input_embeddings(), model.connector(seen)
    opening = embed(torch.tensor([[4, 3]] * 3))
    ignored = torch.full((3, 2 + prefix.shape[1]), -100)
    reference = model.language_model(
        inputs_embeds=torch.cat([opening, prefix, embed(ids)], dim=1),
        attention_mask=torch.cat([torch.ones_like(ignored), mask.long()], dim=1),
        labels=torch.cat([ignored, ids.masked_fill(~targets, -100)], dim=1),
    )
    loss, accuracy = model.loss(seen, ids, mask, targets)
    torch.testing.assert_close(loss, reference.loss)
    right = reference.logits[:, -6:-1].argmax(2) == ids
    assert float(accuracy) == pytest.approx(float(right[targets].float().mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_language_model_learns_nothing_and_all_of_the_connector_does(kind: ConnectorKind) -> None:
    model = build(kind=kind).train()
    model.loss(features(kind), *texts())[0].backward()
    assert all(parameter.grad is None for parameter in model.language_model.parameters())
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert grads
    for name, grad in grads.items():
        assert name.startswith("connector.")
        assert grad is not None, name
        assert float(grad.abs().max()) > 0, name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_trained_language_model_learns_with_every_weight(family: str) -> None:
    model = build(family, trained=True).train()
    model.loss(features("clipcap_transformer"), *texts())[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    inner = {id(parameter) for parameter in model.language_model.parameters()}
    assert inner < {id(parameter) for parameter in model.parameters()}


def test_a_frozen_language_model_is_not_saved_not_trained_and_follows() -> None:
    model = build().train()
    assert all(name.startswith("connector.") for name in model.state_dict())
    assert not model.language_model.training, "its dropout would be noise"
    losses = {float(model.loss(torch.ones(3, WIDTH), *given)[0].detach()) for given in [texts()] * 3}
    assert len(losses) == 1
    model.to(torch.float64)
    assert next(model.language_model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_and_batching_change_nothing(family: str) -> None:
    model = build(family)
    ids, mask, targets = texts()
    seen = features("clipcap_transformer")
    logits = model(seen, ids, mask)
    losses = []
    for row, length in enumerate((5, 3, 4)):
        own = ids[row : row + 1, :length]
        alone = model(seen[row : row + 1], own, torch.ones_like(own, dtype=torch.bool))
        torch.testing.assert_close(alone[0], logits[row, :length])
        wanted = targets[row, :length]
        losses.append(F.cross_entropy(alone[0, wanted], own[0, wanted], reduction="sum"))
    torch.testing.assert_close(model.loss(seen, ids, mask, targets)[0], sum(losses, torch.zeros(())) / targets.sum())
    changed = ids.where(mask, (ids + 1) % WORDS)
    torch.testing.assert_close(model(seen, changed, mask)[mask], logits[mask])


@torch.no_grad()
def greedy(model: PrefixLanguageModel, seen: Tensor, prompt: Tensor, steps: int) -> list[int]:
    """The likeliest id, again and again, each time from the whole sequence, without batch, padding or cache."""
    embed = model.language_model.get_input_embeddings()
    found: list[int] = []
    while len(found) < steps and (not found or found[-1] != END):
        ids = torch.cat([prompt, torch.tensor(found, dtype=torch.int64)])
        parts = [embed(torch.tensor(model.opening, dtype=torch.int64)), model.connector(seen[None])[0], embed(ids)]
        logits = model.language_model(inputs_embeds=torch.cat(parts)[None]).logits
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["clipcap_transformer", "llava_linear"])
def test_greedy_generation_is_step_by_step_decoding(family: str, kind: ConnectorKind) -> None:
    ended = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model, seen = build(family, kind, words=7), features(kind)
        ids, mask = torch.randint(3, 7, (3, 4)), torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
        found = model.generate(seen, ids, mask, end_id=END, max_new_tokens=6)
        for row, length in enumerate((4, 0, 2)):
            expected = greedy(model, seen[row], ids[row, :length], 6)
            assert found[row].tolist() == expected + [END] * (found.shape[1] - len(expected))
            ended += expected[-1] == END
    assert ended > 0, "some texts must end by themselves"


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_with_beams_enough_finds_the_best_of_all_texts(length_penalty: float) -> None:
    words, longest = 5, 3
    model = build("gpt2", words=words)
    seen, prompts = features("clipcap_transformer", 2), torch.tensor([[3, 4], [4, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    found = model.generate(
        seen, prompts, mask, end_id=END, max_new_tokens=longest, num_beams=words**2, length_penalty=length_penalty
    )
    every = [
        text
        for length in range(1, longest + 1)
        for text in itertools.product(range(words), repeat=length)
        if END not in text[:-1] and (text[-1] == END or length == longest)
    ]
    for row in range(2):
        prompt = prompts[row][mask[row]]
        scores: dict[Any, float] = {}
        for text in every:
            ids = torch.cat([prompt, torch.tensor(text)])[None]
            chances = model(seen[row : row + 1], ids, torch.ones_like(ids, dtype=torch.bool)).log_softmax(2)
            own = chances[0, len(prompt) :].gather(1, torch.tensor(text)[:, None])
            scores[text] = float(own.sum()) / len(text) ** length_penalty
        best = list(max(scores, key=lambda text: scores[text]))
        assert found[row].tolist() == best + [END] * (found.shape[1] - len(best))


def test_generation_ignores_what_the_model_was_shipped_with() -> None:
    model = language_model("gpt2")
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.min_new_tokens = 9
    connector = ConnectorConfig(kind="clipcap_mlp", prefix_length=2).build(WIDTH, EMBEDDING)
    reader = PrefixLanguageModel(model, connector).eval()
    seen, nothing = torch.randn(1, WIDTH), torch.zeros(1, 0, dtype=torch.int64)
    found = reader.generate(seen, nothing, nothing.bool(), end_id=END, max_new_tokens=8)
    assert found[0].tolist()[:8] == greedy(reader, seen[0], nothing[0], 8)


def test_the_transformer_mapper_is_the_published_one_written_out() -> None:
    config = ConnectorConfig(prefix_length=4, clip_length=3, num_layers=2, num_heads=2)
    mapper = TransformerMapper(WIDTH, EMBEDDING, config)
    state, seen = mapper.state_dict(), torch.randn(2, WIDTH)
    x = F.linear(seen, state["linear.weight"], state["linear.bias"]).view(2, 3, EMBEDDING)
    x = torch.cat([x, state["constants"].repeat(2, 1, 1)], dim=1)
    for layer in ("blocks.0.", "blocks.1."):
        own = {name.removeprefix(layer): value for name, value in state.items() if name.startswith(layer)}
        assert "attn.qkv.bias" not in own
        y = F.layer_norm(x, (EMBEDDING,), own["norm1.weight"], own["norm1.bias"])
        q, k, v = F.linear(y, own["attn.qkv.weight"]).view(2, 7, 3, 2, 8).unbind(2)  # (2, 7, heads, 8)
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5).softmax(3)
        mixed = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 7, EMBEDDING)
        x = x + F.linear(mixed, own["attn.proj.weight"], own["attn.proj.bias"])
        y = F.layer_norm(x, (EMBEDDING,), own["norm2.weight"], own["norm2.bias"])
        y = F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]).relu()
        x = x + F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    torch.testing.assert_close(mapper(seen), x[:, 3:])


def test_the_mappers_have_the_published_sizes() -> None:
    """ClipCap, table 1: 43M trained parameters of the transformer, 156M of the MLP with GPT-2's 124M; CLIP RN50x4."""
    with torch.device("meta"):
        transformer = TransformerMapper(640, 768, ConnectorConfig(prefix_length=10, clip_length=10))
        mlp = MLPMapper(640, 768, 10)

    def count(model: nn.Module) -> float:
        return sum(parameter.numel() for parameter in model.parameters()) / 1e6

    assert round(count(transformer)) == 43
    assert round(124.44 + count(mlp)) == 156


@pytest.mark.parametrize(("kind", "shape"), [("clipcap_mlp", (3, 4, 16)), ("llava_linear", (3, 6, 16))])
def test_a_prefix_has_a_place_for_each_constant_or_patch(kind: ConnectorKind, shape: tuple[int, ...]) -> None:
    assert build(kind=kind).connector(features(kind)).shape == shape


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_operations_are_those_that_torch_counts(family: str) -> None:
    model = PrefixLanguageModel(language_model(family, width=64), nn.Linear(1, 1))
    for length in (5, 30):
        with FlopCounterMode(display=False) as counter:
            model.language_model(inputs_embeds=torch.randn(1, length, 64))
        assert model.forward_flops(length) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kind": "clipcap"}, "connector.kind must be"),
        ({"prefix_length": 0}, "connector.prefix_length must be at least 1, not 0"),
        ({"num_heads": 3}, "connector.num_heads 3 does not divide the language model's width 16"),
    ],
)
def test_what_cannot_be_built_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        ConnectorConfig(**fields).build(WIDTH, EMBEDDING)
