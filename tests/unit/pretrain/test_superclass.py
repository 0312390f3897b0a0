"""SuperClass as a Task: what is trained, what is counted, what is measured, and what an application gets of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace as replace_fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import beit3
from beit3.config import Run, replace
from beit3.data.emoji import load_cells
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig, EvalResize
from beit3.errors import BadSampleError, ConfigError
from beit3.model.presets import ModelConfig
from beit3.pretrain.masked_data_modeling import MaskedDataModeling
from beit3.pretrain.probe import ProbeConfig
from beit3.pretrain.subword_loss import join_words
from beit3.pretrain.superclass import SuperClass, SuperClassConfig, WordsBatch, WordsEncoder, word_metrics
from beit3.train.loop import fit
from tests.conftest import Workspace

Build = Callable[..., SuperClass]


@pytest.fixture
def superclass_config(workspace: Workspace, tiny_model: ModelConfig) -> SuperClassConfig:
    return SuperClassConfig(
        model=tiny_model,
        vocabulary=workspace.text_tokenizer,
        pairs=Stream(sources=(Source(path="pairs"),), batch_size=6),
        crop=CropConfig(size=48),
        eval_pairs="test_vendor",
    )


@pytest.fixture
def build(superclass_config: SuperClassConfig) -> Build:
    return lambda **changes: SuperClass(replace(superclass_config, **changes))


def caption(sample: Sample) -> str:
    assert isinstance(sample.text, bytes)
    return sample.text.decode()


def batch_of(task: SuperClass, samples: list[Sample]) -> WordsBatch:
    encoder = WordsEncoder(task.subwords, EvalResize(48))
    return encoder.collate([encoder.encode(sample) for sample in samples])


def test_the_loss_is_that_of_the_mean_patch_through_norm_and_linear_map(build: Build, samples: list[Sample]) -> None:
    task = build(idf=False).eval()
    batch = batch_of(task, samples[:5])
    out = task.model.backbone(batch.images.float() / 127.5 - 1)
    head = task.model.word_head
    state = F.layer_norm(out.vision[:, 1:].mean(1), (16,), head.norm.weight, head.norm.bias)
    chances = F.linear(state, head.linear.weight, head.linear.bias).log_softmax(1)
    losses = []
    for row, sample in enumerate(samples[:5]):
        ids = sorted(set(task.subwords.encode(caption(sample))))
        losses.append(-chances[row, ids].mean())
    assert task(batch)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_no_parameter_waits_for_a_gradient_in_vain_and_text_experts_get_none(
    build: Build, samples: list[Sample]
) -> None:
    """Nothing is hidden from DistributedDataParallel: what is trained gets a gradient, all of text is frozen."""
    task = build()
    batch = batch_of(task, samples[:6])
    task.prepare_step([batch])
    task(batch)["loss"].backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    textual = {name for name, _ in task.named_parameters() if ".text" in name or "text_embedding" in name}
    assert textual
    assert textual <= frozen
    assert "model.backbone.blocks.1.ffn.fusion.fc1.weight" in frozen


def test_the_whole_step_is_counted_before_any_of_it_is_weighted(build: Build, samples: list[Sample]) -> None:
    task, parts = build(), [samples[:2], samples[2:6]]
    batches = [batch_of(task, part) for part in parts]
    task.prepare_step(batches)
    assert task.criterion.num_documents.item() == 6
    ids = [set(task.subwords.encode(caption(sample))) for sample in samples[:6]]
    for word in set.union(*ids):
        assert task.criterion.document_frequency[word].item() == sum(word in caption for caption in ids)


def test_a_resumed_run_goes_on_with_its_counts_bit_for_bit(
    superclass_config: SuperClassConfig, workspace: Workspace, tmp_path: Path
) -> None:
    run = Run(name="whole", task=superclass_config, data=workspace.data, out=tmp_path, device="cpu")
    run = replace(run, **{"loop.steps": 4, "loop.save_every": 2, "loop.accumulate": 2, "precision": "bf16"})
    fit(run)
    halted = replace(run, name="halted")
    fit(replace(halted, **{"loop.max_seconds": 1e-9}))
    fit(replace(halted, resume=True))
    first, second = (tmp_path / name / "export" for name in ("whole", "halted"))
    assert (first / "words.json").read_bytes() == (second / "words.json").read_bytes()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert json.loads((first / "words.json").read_text())["num_documents"] == 4 * 2 * 6


def test_samples_without_picture_or_caption_are_refused_by_name(build: Build, samples: list[Sample]) -> None:
    encoder = WordsEncoder(build().subwords, EvalResize(48))
    with pytest.raises(BadSampleError) as caught:
        encoder.encode(replace_fields(samples[0], image=None))
    assert caught.value.reason == "missing_image"
    with pytest.raises(BadSampleError) as caught:
        encoder.encode(replace_fields(samples[0], text=b"  "))
    assert caught.value.reason == "empty_caption"


def test_a_saved_model_names_words_and_weighs_them(
    build: Build, samples: list[Sample], tmp_path: Path, workspace: Workspace
) -> None:
    task = build(lower_case=True)
    batch = batch_of(task, samples[:6])
    task.prepare_step([batch])
    task.save(tmp_path / "made")
    predictor = beit3.load(tmp_path / "made")
    picture = load_cells("google", heldout=False)[0].image
    (ranking,) = predictor.predict_words([picture], top=3)
    logits = task.eval().model(batch.images[:1].float() / 127.5 - 1).softmax(1)[0, : len(task.subwords)]
    best = logits.topk(3)
    assert [word for word, _ in ranking] == [task.subwords.word(index) for index in best.indices.tolist()]
    assert [chance for _, chance in ranking] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert predictor.words is not None
    assert torch.equal(predictor.words.weights(), task.criterion.weights())
    assert predictor.words.subwords.lower_case
    predictor.save_pretrained(tmp_path / "again")
    assert beit3.load(tmp_path / "again").predict_words([picture], top=3) == [ranking]
    mean = task.model.backbone(batch.images[:1].float() / 127.5 - 1).vision[:, 1:].mean(1)
    torch.testing.assert_close(predictor.embed_images([picture]), F.normalize(mean, dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="reads no texts"):
        predictor.embed_texts(["a"])


def test_a_second_stage_starts_from_a_checkpoint_of_another_objective(
    build: Build, build_mdm: Callable[..., MaskedDataModeling], tmp_path: Path
) -> None:
    first = build_mdm()
    first.save(tmp_path / "mdm")
    task = build(init_from=tmp_path / "mdm")
    for name, value in first.model.backbone.state_dict().items():
        assert torch.equal(task.model.backbone.state_dict()[name], value), name


def test_a_later_stage_goes_on_with_the_counts_of_the_same_vocabulary(
    build: Build, samples: list[Sample], tmp_path: Path
) -> None:
    first = build()
    first.prepare_step([batch_of(first, samples[:6])])
    first.save(tmp_path / "first")
    later = build(init_from=tmp_path / "first", **{"pairs.batch_size": 2})
    assert torch.equal(later.criterion.document_frequency, first.criterion.document_frequency)
    assert later.criterion.num_documents.item() == 6
    assert build(init_from=tmp_path / "first", idf=False).criterion.num_documents.item() == 0
    assert build(init_from=tmp_path / "first", lower_case=True).criterion.num_documents.item() == 0


def test_held_out_captions_without_a_known_word_have_no_metrics() -> None:
    assert word_metrics(torch.randn(2, 3), [(), ()], torch.ones(3)) == {}
    assert word_metrics(torch.randn(2, 3), [(1,), ()], torch.ones(3))["image_to_text_r1"] == 1


def test_word_metrics_by_hand() -> None:
    logits = torch.tensor([[9.0, 5, 1, 2, 3, 0], [2, 1, 8, 7, 3, 0], [4, 2, 3, 0, 5, 9], [1, 9, 2, 3, 4, 5]])
    found = word_metrics(logits, [(0, 1), (2,), (5, 3), ()], torch.ones(6))
    assert found["word_precision_1"] == pytest.approx(3 / 3)
    assert found["word_precision_5"] == pytest.approx((2 + 1 + 1) / 15)
    assert found["image_to_text_r1"] == pytest.approx(3 / 3)


def test_equal_captions_are_one_candidate_and_weights_decide() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0], [4.0, 0.0, 3.0, 0.0]])
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0])  # the first word is in every caption
    found = word_metrics(torch.cat([logits, torch.zeros(2, 1)], 1), [(0, 1), (0, 2)], torch.cat([weights, weights[:1]]))
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0


def test_evaluation_gives_words_recall_and_the_probe(build: Build, workspace: Workspace) -> None:
    probe = ProbeConfig(train="groups.train.jsonl", test="groups.test.jsonl", shots=1)
    task = build(probes=(probe,)).eval()
    run = Run(name="run", task=task.config, data=workspace.data)
    loader = task.eval_loader(run)
    assert loader is not None
    with torch.no_grad():
        metrics = task.evaluate(loader)
    assert {
        "word_precision_1",
        "image_to_text_r1",
        "text_to_image_r10",
        "probe/few_shot",
        "probe/knn",
    } <= metrics.keys()
    assert all(0 <= value <= 1 for value in metrics.values())


def test_contradictions_are_refused(superclass_config: SuperClassConfig) -> None:
    with pytest.raises(ConfigError, match="idf"):
        replace(superclass_config, loss="bce")
    with pytest.raises(ConfigError, match=r"crop\.size"):
        replace(superclass_config, **{"crop.size": 32})
    with pytest.raises(ConfigError, match="codes"):
        replace(superclass_config, pairs=Stream(sources=(Source(path="pairs", codes="codes"),), batch_size=4))


def test_a_caption_without_a_known_word_is_kept_and_weighs_nothing(build: Build, samples: list[Sample]) -> None:
    task = build()
    odd = replace_fields(samples[1], text="\u6f22".encode())
    batch = batch_of(task, [samples[0], odd])
    task.prepare_step([batch])
    both = task(batch)["loss"]
    alone = build()
    alone.load_state_dict(task.state_dict())
    single = batch_of(task, samples[:1])
    logits = task.model(single.images.float() / 127.5 - 1)
    assert both.item() == pytest.approx(
        alone.eval().criterion(logits, join_words([task.subwords.encode(caption(samples[0]))]))["loss"].item(),
        rel=1e-5,
    )
