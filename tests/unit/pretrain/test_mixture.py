"""The mixture: one packed pass gives what separate passes would give, for each of its objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import beit3
from beit3.config import Run, replace
from beit3.data.emoji import load_cells
from beit3.data.shards import Sample
from beit3.data.transforms import EvalResize, Views
from beit3.errors import ConfigError
from beit3.model.heads import PretrainingModel
from beit3.pretrain.masked_batches import KINDS, MaskedBatch, MaskedEncoder, join_batches
from beit3.pretrain.masked_data_modeling import MaskedDataModelingConfig
from beit3.pretrain.mixture import Mixture, MixtureConfig, caption_labels, clean_text_ids
from beit3.pretrain.subword_loss import SubwordLoss, join_words
from tests.conftest import Workspace

Build = Callable[..., Mixture]


@pytest.fixture
def build(mdm_config: MaskedDataModelingConfig) -> Build:
    fields = {field.name: getattr(mdm_config, field.name) for field in dataclasses.fields(mdm_config)}

    def made(**changes: object) -> Mixture:
        config = replace(MixtureConfig(**fields), **{"objective.contrastive": 1.0, **changes})
        task = Mixture(config)
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return task

    return made


def encoder(task: Mixture, kind: str) -> MaskedEncoder:
    resize = EvalResize(48)
    return task.encoder(kind, lambda image: Views(resize(image), None))  # type: ignore[arg-type]


def batch_of(task: Mixture, samples: list[Sample]) -> MaskedBatch:
    """Five pairs, two images, two texts."""
    parts = {"pairs": samples[:5], "images": samples[5:7], "texts": samples[7:9]}
    made = {kind: encoder(task, kind) for kind in KINDS}
    return join_batches([made[kind].collate([made[kind].encode(s) for s in parts[kind]]) for kind in KINDS])


def captions_in_order(samples: list[Sample], task: Mixture) -> list[tuple[str, list[int]]]:
    """Captions of the five pairs as a batch holds them: the shortest first."""
    found = []
    for sample in samples[:5]:
        assert isinstance(sample.text, bytes)
        text = " ".join(sample.text.decode().split())
        found.append((text, task.text_tokenizer.encode(text, task.config.max_text_length)))
    return sorted(found, key=lambda item: len(item[1]))


def test_captions_come_back_as_they_were_before_words_were_hidden(build: Build, samples: list[Sample]) -> None:
    task = build()
    batch = batch_of(task, samples)
    expected = [index for _, ids in captions_in_order(samples, task) for index in ids]
    assert clean_text_ids(batch).tolist() == expected
    assert batch.packed.text_ids is not None
    assert batch.packed.text_ids[: len(expected)].tolist() != expected  # something is hidden


def test_words_are_the_distinct_subwords_of_the_captions(build: Build, samples: list[Sample]) -> None:
    task = build()
    words = task.words(batch_of(task, samples))
    expected = join_words([task.subwords.encode(text) for text, _ in captions_in_order(samples, task)])
    assert torch.equal(words.ids, expected.ids)
    assert torch.equal(words.rows, expected.rows)
    assert words.num_images == 5


def test_one_pass_equals_separate_passes(build: Build, samples: list[Sample]) -> None:
    """Every part of the mixture's loss from passes of its own: masked, pictures alone, captions alone."""
    task = build().eval()
    batch = batch_of(task, samples)
    values = task(batch)
    packed, model, dual = batch.packed, task.model, task.dual
    assert packed.images is not None
    assert task.word_head is not None
    assert dual is not None
    masked = super(Mixture, task).forward(batch)
    torch.testing.assert_close(values["masked_loss"], masked["loss"], rtol=1e-5, atol=1e-6)
    pixels = packed.images[:5].float() / 127.5 - 1
    images = model.backbone(pixels).vision
    words = join_words([task.subwords.encode(text) for text, _ in captions_in_order(samples, task)])
    named = SubwordLoss(420)
    superclass = named(task.word_head(images), words)["loss"]
    torch.testing.assert_close(values["superclass_loss"], superclass, rtol=1e-5, atol=1e-6)
    texts = [torch.tensor([ids]) for _, ids in captions_in_order(samples, task)]
    text = torch.cat([model.backbone(text_ids=ids).text[:, 0] for ids in texts])
    left = F.normalize(dual.vision_head(images[:, 0]), dim=-1)
    right = F.normalize(dual.language_head(text), dim=-1)
    scores = dual.logit_scale.exp() * left @ right.T
    own = torch.arange(5)
    matched = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(values["contrastive_loss"], matched, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values["loss"], masked["loss"] + superclass + matched, rtol=1e-5, atol=1e-6)


def test_weights_of_the_objectives_scale_their_gradients(build: Build, samples: list[Sample]) -> None:
    task = build()
    batch = batch_of(task, samples)
    values = task.eval()(batch)
    changes = {"objective.masked_data_modeling": 2.0, "objective.superclass": 0.5, "objective.contrastive": 0.25}
    other = build(**changes)
    other.load_state_dict(task.state_dict())
    weighted = other.eval()(batch)["loss"]
    parts = 2 * values["masked_loss"] + 0.5 * values["superclass_loss"] + 0.25 * values["contrastive_loss"]
    torch.testing.assert_close(weighted, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("superclass", "contrastive"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("alone", [True, False], ids=["three streams", "pairs alone"])
def test_no_parameter_waits_for_a_gradient_in_vain(
    build: Build, samples: list[Sample], superclass: float, contrastive: float, alone: bool
) -> None:
    streams = {} if alone else {"images": None, "texts": None}
    task = build(**{"objective.superclass": superclass, "objective.contrastive": contrastive, **streams})
    batch = batch_of(task, samples) if alone else _pairs(task, samples)
    task.prepare_step([batch])
    task(batch)["loss"].backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def _pairs(task: Mixture, samples: list[Sample]) -> MaskedBatch:
    made = encoder(task, "pairs")
    return made.collate([made.encode(sample) for sample in samples[:5]])


def test_what_is_left_out_costs_nothing(build: Build, samples: list[Sample]) -> None:
    task = build(**{"objective.contrastive": 0.0})
    batch = batch_of(task, samples)
    assert task.dual is None
    assert task.clean_sequences(batch).text_lengths == ()
    assert build().work(batch).tokens > task.work(batch).tokens > super(Mixture, task).work(batch).tokens


def test_equal_captions_have_equal_labels_and_others_do_not(build: Build, samples: list[Sample]) -> None:
    task = build()
    made = encoder(task, "pairs")
    twice = [samples[0], samples[1], samples[0], samples[2], samples[1]]
    batch = made.collate([made.encode(sample) for sample in twice])
    labels = caption_labels(batch)
    texts = clean_text_ids(batch).split(batch.packed.text_lengths)
    for left in range(5):
        for right in range(5):
            assert (labels[left] == labels[right]).item() == torch.equal(texts[left], texts[right])


def test_all_three_models_of_a_mixture_load_by_themselves(
    build: Build, samples: list[Sample], tmp_path: Path, workspace: Workspace
) -> None:
    task = build().eval()
    task.train()
    task.prepare_step([batch_of(task, samples)])
    task.eval()
    task.save(tmp_path / "export")
    picture = load_cells("google", heldout=False)[0].image
    assert isinstance(beit3.load_model(tmp_path / "export"), PretrainingModel)
    (ranking,) = beit3.load(tmp_path / "export" / "superclass").predict_words([picture], top=2)
    pixels = EvalResize(48)(picture)[None].float() / 127.5 - 1
    states = task.model.backbone(pixels).vision
    assert task.word_head is not None
    best = task.word_head(states).softmax(1)[0, : len(task.subwords)].topk(2)
    assert [chance for _, chance in ranking] == pytest.approx(best.values.tolist(), rel=1e-4)
    found = beit3.load(tmp_path / "export" / "retrieval").embed_images([picture])
    assert task.dual is not None
    expected = F.normalize(task.dual.vision_head(states[:, 0]), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_measures_every_objective(build: Build, workspace: Workspace) -> None:
    task = build().eval()
    loader = task.eval_loader(Run(name="run", task=task.config, data=workspace.data))
    assert loader is not None
    with torch.no_grad():
        metrics = task.evaluate(loader)
    assert {"mim_accuracy", "superclass/word_precision_1", "superclass/image_to_text_r1", "text_to_image_r1"} <= set(
        metrics
    )


def test_objectives_without_pairs_or_without_weight_are_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="pairs"):
        build(pairs=None)
    with pytest.raises(ConfigError, match="above 0"):
        build(**{"objective.masked_data_modeling": 0.0})
    with pytest.raises(ConfigError, match="negative"):
        build(**{"objective.superclass": -1.0})
