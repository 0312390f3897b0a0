"""Contrastive tuning against CLIP's formula, written out pair by pair."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace as replace_fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.config import Run, replace
from beit3.data.shards import Sample
from beit3.data.transforms import EvalResize
from beit3.errors import BadSampleError, ConfigError
from beit3.metrics.retrieval import recall_at_k
from beit3.model.exchange import write_folder
from beit3.model.presets import TextTowerConfig
from beit3.pretrain.contrastive import Contrastive, ContrastiveConfig
from beit3.pretrain.masked_data_modeling import MaskedDataModeling
from beit3.pretrain.pairs import PairBatch, PairEncoder, ZeroShotConfig
from beit3.pretrain.probe import Probe, ProbeConfig
from tests.conftest import Workspace

Build = Callable[..., Contrastive]
TOWER = TextTowerConfig(width=12, num_layers=1, num_heads=2, embed_width=10)


def encoder(task: Contrastive, training: bool = True) -> PairEncoder:
    return PairEncoder(task.config, task.text_tokenizer, EvalResize(48), training)


def batch_of(task: Contrastive, samples: list[Sample], training: bool = True) -> PairBatch:
    made = encoder(task, training)
    return made.collate([made.encode(sample) for sample in samples])


def plain_loss(images: Tensor, texts: Tensor, captions: list[int], scale: float) -> float:
    """Mean over pairs of -log p(own text | image) and -log p(own image | text), halved; equal captions left out."""
    total = 0.0
    count = len(images)
    for queries, candidates in ((images, texts), (texts, images)):
        for i in range(count):
            scores = [scale * (queries[i] @ candidates[j]).item() for j in range(count)]
            allowed = [j for j in range(count) if j == i or captions[j] != captions[i]]
            total += math.log(sum(math.exp(scores[j]) for j in allowed)) - scores[i]
    return total / count / 2


def plain_sigmoid_loss(images: Tensor, texts: Tensor, captions: list[int], scale: float, bias: float) -> float:
    """Sum over images and texts of -log p(they belong together, or not), over the images; equal captions left out."""
    total = 0.0
    for i in range(len(images)):
        for j in range(len(images)):
            if j == i or captions[j] != captions[i]:
                score = scale * (images[i] @ texts[j]).item() + bias
                total += math.log(1 + math.exp(-score if i == j else score))
    return total / len(images)


def embeddings(task: Contrastive, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Both sides through the padded form, one sample at a time."""
    packed = batch.packed
    assert packed.images is not None
    assert packed.text_ids is not None
    images = torch.cat([task.model.encode_image(image[None].float() / 127.5 - 1) for image in packed.images])
    texts = torch.cat([task.model.encode_text(ids[None]) for ids in packed.text_ids.split(packed.text_lengths)])
    return images, texts


def test_the_loss_is_the_symmetric_cross_entropy(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive()
    batch = batch_of(task, samples[:6])
    values = task(batch)
    images, texts = embeddings(task, batch)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(6))
    scale = math.exp(task.model.logit_scale.item())
    expected = plain_loss(images, texts, batch.captions.tolist(), scale)
    assert float(values["loss"]) == pytest.approx(expected, rel=1e-5)
    right = sum(int((images[i] @ texts.T).argmax()) == i for i in range(6)) / 6
    assert float(values["batch_accuracy"]) == pytest.approx(right)


def test_equal_captions_are_no_negatives(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive()
    twice = [*samples[:4], replace_fields(samples[7], text=samples[0].text), replace_fields(samples[8], text=b"a  b ")]
    twice.append(replace_fields(samples[9], text="a b"))
    batch = batch_of(task, twice)
    captions = batch.captions.tolist()
    assert len(set(captions)) == 5
    images, texts = embeddings(task, batch)
    scale = math.exp(task.model.logit_scale.item())
    assert float(task(batch)["loss"]) == pytest.approx(plain_loss(images, texts, captions, scale), rel=1e-5)
    naive = plain_loss(images, texts, list(range(7)), scale)
    assert float(task(batch)["loss"]) < naive - 1e-4


@pytest.mark.parametrize("tower", [None, TOWER])
@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_each_form_computes_its_formula_and_trains_all_it_holds(
    loss: str, as_published: bool, tower: TextTowerConfig | None, build_contrastive: Build, samples: list[Sample]
) -> None:
    task = build_contrastive(loss=loss, text_tower=tower, equal_captions_are_negatives=as_published)
    chosen = [*samples[:5], replace_fields(samples[7], text=samples[0].text)]
    batch = batch_of(task, chosen)
    captions = list(range(6)) if as_published else batch.captions.tolist()
    images, texts = embeddings(task, batch)
    scale = math.exp(task.model.logit_scale.item())
    values = task(batch)
    if loss == "clip":
        assert task.model.logit_bias is None
        expected = plain_loss(images, texts, captions, scale)
    else:
        assert task.model.logit_bias is not None
        expected = plain_sigmoid_loss(images, texts, captions, scale, task.model.logit_bias.item())
        assert values["logit_bias"].item() == task.model.logit_bias.item()
    assert values["loss"].item() == pytest.approx(expected, rel=1e-5)
    values["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("tower", [None, TOWER])
def test_what_is_exported_embeds_as_in_training(
    tower: TextTowerConfig | None, build_contrastive: Build, samples: list[Sample], tmp_path: Path
) -> None:
    task = build_contrastive(loss="siglip", text_tower=tower).eval()
    task.save(tmp_path / "export")
    predictor = beit3.load(tmp_path / "export", device="cpu")
    assert predictor.model.task == ("retrieval" if tower is None else "clip")
    pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples[:4] if isinstance(sample.image, bytes)]
    captions = [sample.text.decode() for sample in samples[:4] if isinstance(sample.text, bytes)]
    images, texts = embeddings(task, batch_of(task, samples[:4], training=False))
    found = predictor.embed_images(pictures), predictor.embed_texts(captions)
    order = [task.text_tokenizer.encode(caption, 24) for caption in captions]
    shortest_first = sorted(range(4), key=lambda place: len(order[place]))
    torch.testing.assert_close(found[0][shortest_first], images, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1][shortest_first], texts, atol=1e-5, rtol=0)


def test_a_text_tower_counts_its_own_work(build_contrastive: Build, samples: list[Sample]) -> None:
    shared, apart = (build_contrastive(text_tower=tower) for tower in (None, TOWER))
    batch = batch_of(shared, samples[:5])
    lengths = batch.packed.text_lengths
    works = [task.work(batch) for task in (shared, apart)]
    assert works[0].tokens == works[1].tokens

    def texts(width: int, hidden: int, layers: int) -> int:
        return sum(layers * (8 * t * width**2 + 4 * t * width * hidden + 4 * t * t * width) for t in lengths)

    assert works[0].flops - works[1].flops == pytest.approx(3 * (texts(16, 24, 2) - texts(12, 48, 1)))


def test_dropped_patches_enter_no_tower(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive(text_tower=TOWER, keep_patches=0.25)
    batch = batch_of(task, samples[:5])
    assert batch.packed.kept_patches is not None
    whole = PairBatch(replace_fields(batch.packed, kept_patches=None), batch.captions)
    assert float(task(whole)["loss"]) != pytest.approx(float(task(batch)["loss"]), rel=1e-4)


def test_evaluation_adds_the_probe_and_zero_shot_accuracy(
    build_contrastive: Build, workspace: Workspace, tmp_path: Path
) -> None:
    """Also where a moving average is evaluated: it is a copy made before anything was read."""
    (tmp_path / "names.json").write_text(json.dumps(["ant", "bee", "cat"]))
    task = build_contrastive(
        text_tower=TOWER,
        probes=(ProbeConfig(train="groups.train.jsonl", test="groups.test.jsonl", shots=2),),
        zero_shot=ZeroShotConfig(index="groups.test.jsonl", labels=tmp_path / "names.json", prompts="plain"),
    ).eval()
    averaged = copy.deepcopy(task)
    loader = task.eval_loader(Run(name="x", task=task.config, data=workspace.data))
    assert loader is not None
    with torch.no_grad():
        metrics = averaged.evaluate(loader)
        probed = Probe(ProbeConfig(train="groups.train.jsonl", test="groups.test.jsonl", shots=2), (48, 48))
        probed.read(workspace.data)
        expected = probed.measure(task.model.backbone)
    assert {"probe/few_shot", "probe/knn", "zero_shot_acc1", "zero_shot_acc5", "image_to_text_r1"} <= metrics.keys()
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["zero_shot_acc5"] == 1.0
    alone = build_contrastive(probes=task.config.probes, eval_pairs=None)
    assert list(alone.eval_loader(Run(name="x", task=alone.config, data=workspace.data)) or [1]) == [1]


def test_half_precision_makes_no_ties_in_evaluation(
    build_contrastive: Build, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of neighbouring angles, whose products are equal in bf16."""
    task = build_contrastive().eval()
    angles = torch.arange(8) * 0.03
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    monkeypatch.setattr(task, "embed", lambda packed: (vectors, vectors))
    batch = batch_of(task, samples[:8], training=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = task.evaluate([batch])
        places = torch.arange(8)
        assert recall_at_k(vectors @ vectors.T, places, places)["r1"] < 1, "it would matter"
    assert metrics["image_to_text_r1"] == metrics["text_to_image_r1"] == 1


def test_the_logit_scale_is_learned_and_stops_at_one_hundred(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive()
    values = task(batch_of(task, samples[:4]))
    values["loss"].backward()
    assert task.model.logit_scale.grad is not None
    assert float(task.model.logit_scale.grad) != 0
    with torch.no_grad():
        task.model.logit_scale.fill_(10.0)
    assert float(task(batch_of(task, samples[:4]))["logit_scale"]) == pytest.approx(100, rel=1e-5)


def test_every_trainable_parameter_gets_a_gradient(build_contrastive: Build, samples: list[Sample]) -> None:
    """Nothing that a dual encoder never uses is left to the optimizer, and several ranks find no idle parameter."""
    task = build_contrastive()
    task(batch_of(task, samples[:6]))["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


def test_images_and_texts_of_a_batch_belong_together(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive()
    batch = batch_of(task, samples[:8], training=False)
    packed = batch.packed
    assert packed.images is not None
    assert packed.text_ids is not None
    assert packed.num_pairs == 0
    assert list(packed.text_lengths) == sorted(packed.text_lengths)
    made = encoder(task, training=False)
    known = {tuple(made.encode(sample).ids): made.encode(sample).image for sample in samples[:8]}
    for image, ids in zip(packed.images, packed.text_ids.split(packed.text_lengths), strict=True):
        assert torch.equal(known[tuple(ids.tolist())], image)


def test_dropped_patches_enter_nothing(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive(keep_patches=0.25)
    assert task.config.kept_patches == 9
    batch = batch_of(task, samples[:5])
    kept = batch.packed.kept_patches
    assert kept is not None
    assert batch.packed.images is not None
    assert kept.shape == (5, 9)
    assert all(len(set(row)) == 9 and row == sorted(row) and row[0] >= 0 and row[-1] < 36 for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) == 5, "every image has its own"
    painted = batch.packed.images.clone()
    for image, row in enumerate(kept.tolist()):
        for patch in set(range(36)) - set(row):
            top, left = patch // 6 * 8, patch % 6 * 8
            painted[image, :, top : top + 8, left : left + 8] = 255 - painted[image, :, top : top + 8, left : left + 8]
    other = PairBatch(replace_fields(batch.packed, images=painted), batch.captions)
    assert torch.equal(task(batch)["loss"], task(other)["loss"])
    whole = PairBatch(replace_fields(batch.packed, kept_patches=None), batch.captions)
    assert float(task(whole)["loss"]) != pytest.approx(float(task(batch)["loss"]), rel=1e-4)
    assert task.work(batch).tokens == 5 * 10 + sum(batch.packed.text_lengths)
    assert task.work(whole).tokens == 5 * 37 + sum(batch.packed.text_lengths)
    assert task.work(batch).flops < task.work(whole).flops


def test_evaluation_sees_all_patches_and_bare_captions(build_contrastive: Build, samples: list[Sample]) -> None:
    task = build_contrastive(keep_patches=0.25, keyword_texts=1.0)
    assert batch_of(task, samples[:3], training=False).packed.kept_patches is None
    caption = samples[0].text
    assert isinstance(caption, bytes)
    ids = encoder(task, training=False).encode(samples[0]).ids
    assert ids == task.text_tokenizer.encode(caption.decode(), 24)


def test_keywords_follow_the_caption_but_do_not_name_the_pair(build_contrastive: Build) -> None:
    task = build_contrastive(keyword_texts=1.0, max_text_length=38)
    sample = Sample("k", None, "red cat", {"keywords": ["animal", "pet"]})
    colour = replace_fields(sample, image=_png())
    texts = {task.text_tokenizer.decode(encoder(task).encode(colour).ids) for _ in range(40)}
    assert texts == {f"red cat: {words}" for words in ("animal", "pet", "animal, pet", "pet, animal")}
    bare = replace_fields(colour, meta={})
    assert encoder(task).encode(bare).caption == encoder(task).encode(colour).caption


def test_a_sample_without_a_picture_is_counted(build_contrastive: Build) -> None:
    with pytest.raises(BadSampleError, match="missing_image"):
        encoder(build_contrastive()).encode(Sample("k", None, "a cat"))


def test_recall_equals_a_plain_ranking(build_contrastive: Build, workspace: Workspace, samples: list[Sample]) -> None:
    task = build_contrastive(eval_pairs="pairs", eval_batch_size=5).eval()
    chosen = [*samples[:10], replace_fields(samples[20], text=samples[0].text)]
    batches = [batch_of(task, chosen[i : i + 4], training=False) for i in range(0, 11, 4)]
    with torch.no_grad():
        metrics = task.evaluate(batches)
        parts = [embeddings(task, batch) for batch in batches]
    images, texts = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    captions = [c for batch in batches for c in batch.captions.tolist()]
    distinct = list(dict.fromkeys(captions))
    assert len(distinct) == 10
    candidates = torch.stack([texts[captions.index(caption)] for caption in distinct])
    for k in (1, 5, 10):
        hits = [captions[i] in [distinct[j] for j in (images[i] @ candidates.T).topk(k).indices] for i in range(11)]
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(sum(hits) / 11)
        hits = [
            caption in [captions[j] for j in (candidates[i] @ images.T).topk(k).indices]
            for i, caption in enumerate(distinct)
        ]
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(sum(hits) / 10)


def test_the_loader_of_held_out_pairs_is_finite_and_repeats(build_contrastive: Build, workspace: Workspace) -> None:
    task = build_contrastive(eval_batch_size=5)
    run = Run(name="x", task=task.config, data=workspace.data)
    first, second = task.eval_loader(run), task.eval_loader(run)
    assert first is not None
    assert second is not None
    sizes = [len(batch.captions) for batch in first]
    assert sizes == [5, 5, 2]
    assert [b.captions.tolist() for b in first] == [b.captions.tolist() for b in second]
    assert build_contrastive(eval_pairs=None).eval_loader(run) is None


def test_tuning_starts_from_a_pretrained_backbone(
    build_mdm: Callable[..., MaskedDataModeling], contrastive_config: ContrastiveConfig, tmp_path: Path
) -> None:
    pretrained = build_mdm()
    pretrained.save(tmp_path / "export")
    task = Contrastive(replace(contrastive_config, init_from=tmp_path / "export", **{"model.drop_path": 0.1}))
    for name, value in pretrained.model.backbone.state_dict().items():
        assert torch.equal(task.model.backbone.state_dict()[name], value), name
    with pytest.raises(ConfigError, match="num_layers"):
        Contrastive(replace(contrastive_config, init_from=tmp_path / "export", **{"model.num_layers": 3}))


def test_a_folder_of_another_kind_is_no_start(contrastive_config: ContrastiveConfig, tmp_path: Path) -> None:
    write_folder(tmp_path / "other", {"kind": "vqkd"}, {"x": torch.zeros(1)})
    assert json.loads((tmp_path / "other/config.json").read_text())["kind"] == "vqkd"
    with pytest.raises(ConfigError, match="not a model"):
        Contrastive(replace(contrastive_config, init_from=tmp_path / "other"))


@pytest.mark.parametrize(
    "changes",
    [{"keep_patches": 0.0}, {"keep_patches": 1.1}, {"keyword_texts": 2.0}, {"crop.size": 40}, {"max_text_length": 39}],
)
def test_contradictions_fail_when_the_task_is_described(
    contrastive_config: ContrastiveConfig, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        replace(contrastive_config, **changes)


def _png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(data, "PNG")
    return data.getvalue()
