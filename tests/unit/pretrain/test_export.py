"""What a Task writes is all that an application needs: embeddings and hidden words come back from the folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit3.data.emoji import load_cells
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.predict import Predictor, load
from beit3.pretrain.contrastive import Contrastive
from beit3.pretrain.masked_data_modeling import MaskedDataModeling

Build = Callable[..., MaskedDataModeling]
TEXTS = ["cat face", "red heart", "a", "person walking dog", "grinning face with big eyes"]


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [cell.image for cell in load_cells("google")[:5]]


@pytest.fixture
def pretrained(build_mdm: Build, tmp_path: Path) -> tuple[MaskedDataModeling, Predictor]:
    task = build_mdm().eval()
    task.save(tmp_path / "export")
    return task, load(tmp_path / "export", device="cpu")


@pytest.fixture
def tuned(build_contrastive: Callable[..., Contrastive], tmp_path: Path) -> tuple[Contrastive, Predictor]:
    task = build_contrastive().eval()
    task.save(tmp_path / "export")
    return task, load(tmp_path / "export", device="cpu")


def pixels(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_folder_holds_what_its_format_promises(
    pretrained: tuple[MaskedDataModeling, Predictor], tmp_path: Path
) -> None:
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.spm", "preprocess.json"} <= files
    preprocess = json.loads((tmp_path / "export/preprocess.json").read_text())
    assert preprocess["image_size"] == [48, 48]
    assert preprocess["max_text_length"] == 24


def test_all_weights_come_back(pretrained: tuple[MaskedDataModeling, Predictor]) -> None:
    task, predictor = pretrained
    assert not predictor.model.training
    state = predictor.model.state_dict()
    assert state.keys() == task.model.state_dict().keys()
    for name, value in task.model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_embeddings_are_those_of_the_trained_model(
    tuned: tuple[Contrastive, Predictor], pictures: list[Image.Image]
) -> None:
    task, predictor = tuned
    with torch.no_grad():
        images = torch.cat([task.model.encode_image(pixels(picture)) for picture in pictures])
        texts = torch.cat(
            [task.model.encode_text(torch.tensor([task.text_tokenizer.encode(text, 24)])) for text in TEXTS]
        )
    torch.testing.assert_close(predictor.embed_images(pictures), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predictor.embed_texts(TEXTS), texts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pretrained", "tuned"])
def test_embeddings_do_not_depend_on_order_or_neighbours(
    kind: str, request: pytest.FixtureRequest, pictures: list[Image.Image]
) -> None:
    predictor: Predictor = request.getfixturevalue(kind)[1]
    order = [3, 0, 4, 2, 1]
    images, texts = predictor.embed_images(pictures), predictor.embed_texts(TEXTS)
    assert images.shape == texts.shape == (5, 16)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
    turned = predictor.embed_images([pictures[i] for i in order]), predictor.embed_texts([TEXTS[i] for i in order])
    torch.testing.assert_close(turned[0], images[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[1], texts[order], rtol=1e-4, atol=1e-5)
    alone = torch.cat([predictor.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(alone, texts, rtol=1e-4, atol=1e-5)
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_many_inputs_go_through_in_pieces(
    pretrained: tuple[MaskedDataModeling, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = pretrained[1]
    whole = predictor.embed_texts(TEXTS)
    monkeypatch.setattr("beit3.predict._TEXTS", 2)
    torch.testing.assert_close(predictor.embed_texts(TEXTS), whole, rtol=1e-4, atol=1e-5)
    assert predictor.embed_texts([]).shape == (0, 16)
    assert predictor.embed_images([]).shape == (0, 16)


def test_pictures_come_as_objects_or_paths(
    pretrained: tuple[MaskedDataModeling, Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    predictor = pretrained[1]
    pictures[0].save(tmp_path / "one.png")
    whole = predictor.embed_images([pictures[0]])
    assert torch.equal(predictor.embed_images([tmp_path / "one.png"]), whole)
    assert torch.equal(predictor.embed_images([str(tmp_path / "one.png")]), whole)
    with pytest.raises(DataMissingError, match=r"two\.png"):
        predictor.embed_images([tmp_path / "two.png"])
    (tmp_path / "bad.png").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"bad\.png cannot be read"):
        predictor.embed_images([tmp_path / "bad.png"])


@pytest.mark.parametrize("beside", [False, True])
def test_hidden_words_get_the_models_own_probabilities(
    pretrained: tuple[MaskedDataModeling, Predictor], pictures: list[Image.Image], beside: bool
) -> None:
    task, predictor = pretrained
    tokenizer = task.text_tokenizer
    found = predictor.fill_mask("cat <mask> with <mask>", pictures[0] if beside else None, top=3)
    ids = [0, *tokenizer.encode("cat")[1:-1], tokenizer.mask_id, *tokenizer.encode("with")[1:-1], tokenizer.mask_id, 2]
    with torch.no_grad():
        out = task.model(pixels(pictures[0]) if beside else None, torch.tensor([ids]))
        logits = task.model.mlm_head(out.text[0])
    assert len(found) == 2
    for place, row in zip([i for i, w in enumerate(ids) if w == tokenizer.mask_id], found, strict=True):
        chances = logits[place, : tokenizer.mask_id].softmax(0)
        best = chances.argsort(descending=True)[:3]
        assert [piece for piece, _ in row] == [tokenizer.piece(int(i)) for i in best]
        assert [chance for _, chance in row] == pytest.approx([float(chances[i]) for i in best], rel=1e-4)


def test_filling_needs_a_mask_and_a_word_head(
    pretrained: tuple[MaskedDataModeling, Predictor], build_contrastive: Callable[..., Contrastive], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="<mask>"):
        pretrained[1].fill_mask("no hidden word")
    build_contrastive().save(tmp_path / "tuned")
    with pytest.raises(ConfigError, match="pretraining model"):
        load(tmp_path / "tuned", device="cpu").fill_mask("a <mask>")


def test_a_folder_without_preprocessing_is_prepared_as_its_task_was(
    pretrained: tuple[MaskedDataModeling, Predictor], tmp_path: Path
) -> None:
    (tmp_path / "export/preprocess.json").unlink()
    loaded = load(tmp_path / "export", device="cpu")
    assert loaded.preprocess == Preprocess.of_task(pretrained[0].config.model, "pretraining")
    with pytest.raises(DataMissingError, match="nowhere"):
        load(tmp_path / "nowhere")
