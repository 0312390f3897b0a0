"""Masked data modeling against a plain computation: one padded sample at a time, heads at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import Run, replace
from beit3.data.images import decode_image
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop, Views
from beit3.data.write_codes import CodesConfig, write_codes
from beit3.errors import BadSampleError, ConfigError
from beit3.model.flops import forward_flops
from beit3.model.heads import PretrainingModel
from beit3.model.official import to_official
from beit3.pretrain.masked_batches import Kind, MaskedBatch, MaskedEncoder, join_batches
from beit3.pretrain.masked_data_modeling import MaskedDataModeling, MaskedDataModelingConfig
from beit3.tokenizer.vqkd import VQKD, VQKDConfig
from tests.conftest import Workspace

Build = Callable[..., MaskedDataModeling]
IGNORE = -100
PATCHES = 36


class Drawn:
    """Encoded samples of the three streams and their batches."""

    def __init__(self, task: MaskedDataModeling, samples: list[Sample]) -> None:
        parts: dict[Kind, list[Sample]] = {"pairs": samples[:4], "images": samples[4:7], "texts": samples[7:12]}
        self.encoded: dict[str, list[Any]] = {}
        self.batches: dict[str, MaskedBatch] = {}
        for kind, chosen in parts.items():
            encoder = task.encoder(kind, RandomCrop(task.config.crop))
            encoded = [encoder.encode(sample) for sample in chosen]
            self.encoded[kind] = encoded
            self.batches[kind] = encoder.collate(encoded)
        self.joined = join_batches([self.batches[kind] for kind in parts])


@pytest.fixture
def draw(samples: list[Sample]) -> Callable[[MaskedDataModeling], Drawn]:
    return lambda task: Drawn(task, samples)


def log_losses(task: MaskedDataModeling, encoded: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """-log p of every hidden patch and of every hidden word, sample by sample through the padded form."""
    patches: list[Tensor] = []
    words: list[Tensor] = []
    for sample in encoded:
        images = mask = ids = None
        if sample.views is not None:
            images, mask = (sample.views.image[None].float() / 255 - 0.5) / 0.5, sample.mask[None]
        if sample.text is not None:
            ids = torch.tensor([sample.text.ids])
        out = task.model(images, ids, None, mask)
        if sample.views is not None:
            source = sample.views.image if sample.views.tokenizer_image is None else sample.views.tokenizer_image
            codes = task.visual_tokenizer.tokenize(source[None].float() / 255)[0]
            every = F.cross_entropy(task.model.mim_head(out.vision[0, 1:]), codes, reduction="none")
            patches += [every[place] for place in range(len(codes)) if sample.mask[place]]
        if sample.text is not None:
            logits = task.model.mlm_head(out.text[0])
            for place, word in zip(sample.text.places, sample.text.targets, strict=True):
                words.append(F.cross_entropy(logits[place], torch.tensor(word)))
    return patches, words


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


@pytest.mark.parametrize("attention", ["shared", "decoupled"])
def test_the_loss_is_the_weighted_mean_over_hidden_positions(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn], attention: str
) -> None:
    weights = {"image_weight": 0.5, "text_weight": 2.0, "pair_image_weight": 0.7, "pair_text_weight": 1.3}
    style = {"model.attention": attention, "model.fusion_layers": 1 if attention == "shared" else 0}
    task = build_mdm(**weights, **style)
    drawn = draw(task)
    values = task(drawn.joined)
    pair_patches, pair_words = log_losses(task, drawn.encoded["pairs"])
    patches, _ = log_losses(task, drawn.encoded["images"])
    _, words = log_losses(task, drawn.encoded["texts"])
    expected = {
        "mim_loss": mean(patches),
        "mlm_loss": mean(words),
        "pair_mim_loss": mean(pair_patches),
        "pair_mlm_loss": mean(pair_words),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-5)
    parts = zip((0.5, 2.0, 0.7, 1.3), expected.values(), strict=True)
    torch.testing.assert_close(values["loss"], sum(weight * value for weight, value in parts), rtol=1e-5, atol=1e-5)
    assert len({round(value.item(), 3) for value in expected.values()}) == 4, "the parts can be told apart"


def test_gradients_equal_those_of_the_plain_computation(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    task = build_mdm()
    drawn = draw(task)
    task(drawn.joined)["loss"].backward()
    fast = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    pair_patches, pair_words = log_losses(task, drawn.encoded["pairs"])
    patches, _ = log_losses(task, drawn.encoded["images"])
    _, words = log_losses(task, drawn.encoded["texts"])
    (mean(patches) + mean(words) + mean(pair_patches) + mean(pair_words)).backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-4, atol=float(1e-5 * scale + 1e-7), msg=name)


def test_three_streams_in_one_pass_equal_each_alone(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    task = build_mdm()
    drawn = draw(task)
    joined = task(drawn.joined)
    total = 0.0
    for kind, batch in drawn.batches.items():
        alone = task(batch)
        total += alone.pop("loss").item()
        assert len(alone) == (4 if kind == "pairs" else 2)
        for name, value in alone.items():
            torch.testing.assert_close(joined[name], value, rtol=1e-5, atol=1e-5)
    assert joined["loss"].item() == pytest.approx(total, rel=1e-5)


def test_rows_of_a_joined_batch_point_at_what_is_hidden(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    task = build_mdm(**{"mask.keep": 0.0, "mask.replace": 0.0})
    drawn = draw(task)
    batch = drawn.joined
    packed = batch.packed
    assert packed.image_mask is not None
    assert packed.text_ids is not None
    assert packed.text_positions is not None
    rows = [
        image * (PATCHES + 1) + 1 + patch
        for image in range(7)
        for patch in range(PATCHES)
        if packed.image_mask[image, patch]
    ]
    assert batch.patch_rows.tolist() == rows
    assert len(rows) == 7 * 14
    real = batch.words != IGNORE
    hidden = (packed.text_ids == task.text_tokenizer.mask_id).nonzero()[:, 0]
    assert sorted(batch.word_rows[real].tolist()) == hidden.tolist()
    restored = packed.text_ids.clone()
    restored[batch.word_rows[real]] = batch.words[real]
    texts = [row.tolist() for row in restored.split(packed.text_lengths)]
    originals = [[*sample.text.ids] for kind in ("pairs", "texts") for sample in drawn.encoded[kind]]
    whole = [task.text_tokenizer.decode(text) for text in texts]
    assert all("<mask>" not in text for text in whole)
    for sample, ids in zip([*drawn.encoded["pairs"], *drawn.encoded["texts"]], originals, strict=True):
        for place, target in zip(sample.text.places, sample.text.targets, strict=True):
            ids[place] = target
    assert sorted(texts) == sorted(originals)
    assert packed.text_positions.tolist() == [p for length in packed.text_lengths for p in range(length)]
    pair_rows = sum(packed.text_lengths[: packed.num_pairs])
    assert packed.num_pairs == 4
    assert (batch.word_rows[: batch.pair_words] < pair_rows).all()
    later = batch.word_rows[batch.pair_words :][real[batch.pair_words :]]
    assert (later >= pair_rows).all()


def test_hidden_word_counts_are_padded_to_a_fixed_multiple(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    batch = draw(build_mdm()).joined
    assert batch.pair_words % 64 == 0
    assert (len(batch.words) - batch.pair_words) % 64 == 0
    assert (batch.words == IGNORE).any()


def test_pairs_stay_pairs_when_sorted_by_length(
    build_mdm: Build, samples: list[Sample], draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    task = build_mdm(**{"crop": CropConfig(size=48, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5)})
    drawn = draw(task)
    packed = drawn.batches["pairs"].packed
    assert packed.images is not None
    assert list(packed.text_lengths) == sorted(packed.text_lengths)
    for place, length in enumerate(packed.text_lengths):
        owner = next(
            sample
            for sample in drawn.encoded["pairs"]
            if sample.views is not None and torch.equal(sample.views.image, packed.images[place])
        )
        assert len(owner.text.ids) == length


def test_targets_are_the_tokenizers_codes_of_its_own_view(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    shape = VQKDConfig(
        image_size=(96, 96), patch_size=16, width=16, depth=1, num_heads=2, codebook_size=24, code_width=8
    )
    VQKD(shape).save(tmp_path / "large")
    task = build_mdm(visual_tokenizer=tmp_path / "large", **{"crop.tokenizer_size": 96})
    drawn = draw(task)
    batch = drawn.joined
    assert batch.tokenizer_images is not None
    assert batch.tokenizer_images.shape == (7, 3, 96, 96)
    expected = []
    for sample in [*sorted(drawn.encoded["pairs"], key=lambda s: len(s.text.ids)), *drawn.encoded["images"]]:
        codes = task.visual_tokenizer.tokenize(sample.views.tokenizer_image[None].float() / 255)[0]
        expected += codes[sample.mask].tolist()
    assert task.hidden_codes(batch).tolist() == expected
    pair_patches, _ = log_losses(task, drawn.encoded["pairs"])
    torch.testing.assert_close(task(batch)["pair_mim_loss"], mean(pair_patches), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["shared", "decoupled"])
@pytest.mark.parametrize(
    "kinds", [["pairs"], ["images"], ["texts"], ["pairs", "images"], ["images", "texts"], ["pairs", "images", "texts"]]
)
def test_what_the_streams_reach_is_trained_and_nothing_else(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn], kinds: list[Kind], attention: str
) -> None:
    """Several ranks wait for the gradient of every trainable parameter."""
    streams = {kind: None for kind in ("pairs", "images", "texts") if kind not in kinds}
    style = {"model.attention": attention, "model.fusion_layers": 1 if attention == "shared" else 0}
    task = build_mdm(**streams, **style)
    drawn = draw(task)
    task(join_batches([drawn.batches[kind] for kind in kinds]))["loss"].backward()
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert (len(trainable) == len(list(task.parameters()))) == (
        len(kinds) == 3 or (attention == "decoupled" and kinds not in (["images"], ["texts"]))
    )


def test_accuracy_counts_hidden_positions_only(build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]) -> None:
    task = build_mdm()
    batch = draw(task).joined
    with torch.no_grad():  # a head that always names one word, or one code
        for head, word in ((task.model.mlm_head, int(batch.words[0])), (task.model.mim_head, 0)):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[word] = 1
    values = task(batch)
    pair_words = [int(word) for word in batch.words[: batch.pair_words] if word != IGNORE]
    assert float(values["pair_mlm_accuracy"]) == pytest.approx(pair_words.count(pair_words[0]) / len(pair_words))
    codes = task.hidden_codes(batch)
    assert float(values["mim_accuracy"]) == pytest.approx(float((codes[4 * 14 :] == 0).float().mean()))


def test_work_counts_what_passes_through_the_model(
    build_mdm: Build, draw: Callable[[MaskedDataModeling], Drawn]
) -> None:
    task = build_mdm()
    batch = draw(task).joined
    work = task.work(batch)
    layout = batch.packed.layout(8)
    assert work.images == 7
    assert work.tokens == 7 * (PATCHES + 1) + sum(batch.packed.text_lengths)
    least = 3 * forward_flops(task.config.model, layout, 7 * 14, int((batch.words != IGNORE).sum()), 24)
    assert least <= work.flops <= 1.5 * least


def test_a_sample_that_misses_its_part_is_counted_not_trained(build_mdm: Build) -> None:
    task = build_mdm()

    def encoder(kind: Kind) -> MaskedEncoder:
        return task.encoder(kind, RandomCrop(task.config.crop))

    with pytest.raises(BadSampleError, match="missing_image"):
        encoder("pairs").encode(Sample("k", None, "a cat"))
    with pytest.raises(BadSampleError, match="empty_caption"):
        encoder("texts").encode(Sample("k", None, "  \n"))
    with pytest.raises(BadSampleError):
        encoder("images").encode(Sample("k", b"<html>", None))


def test_long_captions_are_cut_to_the_longest_text(build_mdm: Build) -> None:
    task = build_mdm()
    encoder = task.encoder("texts", RandomCrop(task.config.crop))
    encoded = encoder.encode(Sample("k", None, "a cat and a dog " * 6000))
    assert encoded.text is not None
    assert len(encoded.text.ids) == 24
    task(encoder.collate([encoded]))["loss"].backward()


def test_a_text_without_words_trains_on_the_others(build_mdm: Build, samples: list[Sample]) -> None:
    """A caption may tokenize to nothing; its batch still has a finite loss."""
    task = build_mdm()
    encoder = task.encoder("texts", RandomCrop(task.config.crop))
    encoded = encoder.encode(samples[0])
    assert encoded.text is not None
    bare = replace_fields(encoded, text=replace_fields(encoded.text, ids=[0, 2], places=[], targets=[]))
    alone, together = task(encoder.collate([encoded])), task(encoder.collate([encoded, bare]))
    torch.testing.assert_close(alone["mlm_loss"], together["mlm_loss"], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(task(encoder.collate([bare]))["loss"])


def test_the_frozen_tokenizer_is_in_no_checkpoint_and_gets_no_gradient(build_mdm: Build) -> None:
    task = build_mdm()
    assert all(name.startswith("model.") for name in task.state_dict())
    assert not any(parameter.requires_grad for parameter in task.visual_tokenizer.parameters())
    assert task.to(torch.float64).visual_tokenizer.quantize.codebook.dtype == torch.float64


def test_evaluation_repeats_and_pictures_matter(build_mdm: Build, workspace: Workspace) -> None:
    task = build_mdm().eval()
    run = Run(name="x", task=task.config, data=workspace.data)
    loaders = [task.eval_loader(run) for _ in range(2)]
    assert loaders[0] is not None
    assert loaders[1] is not None
    with torch.no_grad():
        first, second = task.evaluate(loaders[0]), task.evaluate(loaders[1])
    assert first == second
    assert 0 < first["commonest_code"] <= 1
    assert len({first[f"mlm_loss_{name}"] for name in ("right_picture", "wrong_picture", "no_picture")}) == 3


def test_evaluation_equals_the_plain_computation(build_mdm: Build, workspace: Workspace, samples: list[Sample]) -> None:
    task = build_mdm(eval_pairs="pairs", eval_batch_size=32).eval()
    view = EvalResize(48)
    encoder = task.encoder("pairs", lambda image: Views(view(image), None))
    encoded = [encoder.encode(sample) for sample in samples[:6]]
    with torch.no_grad():
        metrics = task.evaluate([encoder.collate(encoded[:3]), encoder.collate(encoded[3:])])
        patches, words = log_losses(task, encoded)
        texts = [replace_fields(sample, views=None, mask=None) for sample in encoded]
        _, blind = log_losses(task, texts)
    assert metrics["mim_loss"] == pytest.approx(float(mean(patches)), rel=1e-5)
    assert metrics["mlm_loss_right_picture"] == pytest.approx(float(mean(words)), rel=1e-5)
    assert metrics["mlm_loss_no_picture"] == pytest.approx(float(mean(blind)), rel=1e-5)
    assert decode_image(samples[0].image or b"").size == (48, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": None, "images": None, "texts": None}, "at least one of"),
        ({"crop.size": 40}, "crop.size"),
        ({"max_text_length": 39}, "max_text_length must lie in 3..38"),
        ({"max_text_length": 2}, "max_text_length must lie in 3..38"),
    ],
)
def test_contradictions_fail_when_the_task_is_described(
    mdm_config: MaskedDataModelingConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(mdm_config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.patch_size": 16}, r"grid of \(6, 6\) codes, the model one of \(3, 3\)"),
        ({"model.vocab_size": 100}, "ids, the model 100"),
        ({"crop.tokenizer_size": 96}, r"visual tokenizer's image size \(48, 48\)"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(build_mdm: Build, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mdm(**changes)


def test_recorded_codes_are_targets_in_place_of_the_tokenizer(
    build_mdm: Build, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("pairs", "text"):
        (tmp_path / "data" / name).symlink_to(workspace.data / name, target_is_directory=True)
    task = build_mdm()
    crop = replace(task.config.crop, flip=0.0)  # so that pairs and images share their codes
    codes = CodesConfig(tokenizer=workspace.visual_tokenizer, crop=crop, crops=2)
    write_codes(workspace.data / "pairs", tmp_path / "data" / "codes", codes, device=torch.device("cpu"))
    sources = (Source(path="pairs", codes="codes"),)
    task = build_mdm(
        crop=crop, pairs=Stream(sources=sources, batch_size=4), images=Stream(sources=sources, batch_size=3)
    )
    run = Run(name="run", task=task.config, data=tmp_path / "data")
    batch = next(iter(task.train_loader(run, 0, 1)))
    assert batch.codes is not None
    assert batch.codes.shape == batch.patch_rows.shape
    assert task.hidden_codes(batch) is batch.codes
    online = task.hidden_codes(replace_fields(batch, codes=None))
    assert batch.codes.tolist() == online.tolist()
    assert len(set(online.tolist())) > 2
    task(batch)["loss"].backward()


def test_codes_for_some_sources_only_are_refused(mdm_config: MaskedDataModelingConfig) -> None:
    with pytest.raises(ConfigError, match="either pairs and images both have `codes`, or neither"):
        replace(mdm_config, images=Stream(sources=(Source(path="images", codes="codes"),), batch_size=3))


def test_pretraining_goes_on_from_a_saved_model_with_its_heads(build_mdm: Build, tmp_path: Path) -> None:
    before = build_mdm()
    before.save(tmp_path / "export")
    task = MaskedDataModeling(replace(before.config, init_from=tmp_path / "export"))
    for name, value in before.model.state_dict().items():
        assert torch.equal(task.model.state_dict()[name], value), name


def test_pretraining_goes_on_from_a_released_file_with_heads_of_its_own_sizes(build_mdm: Build, tmp_path: Path) -> None:
    """The released heads belong to the released tokenizers: other sizes begin at random."""
    form: dict[str, Any] = {"attention": "decoupled", "fusion_layers": 0, "width": 64, "num_heads": 1}
    config = build_mdm().config
    config = replace(config, model=replace(config.model, **form))
    release = PretrainingModel(config.model, codebook_size=7)
    torch.save({"model": to_official(release.model_config, release.state_dict())}, tmp_path / "released.pth")
    task = MaskedDataModeling(replace(config, init_from=tmp_path / "released.pth"))
    for name, value in release.backbone.state_dict().items():
        assert torch.equal(task.model.backbone.state_dict()[name], value), name
    assert task.model.mim_head.out_features != 7
