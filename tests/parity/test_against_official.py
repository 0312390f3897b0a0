"""Our task models against the released finetuning code, from one file each: heads, captioning, decoding, beam search.

The stored tensors (see README.md) make this run everywhere; where the released code is unpacked it is asked live too.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import beit3
from beit3.model.heads import CaptioningModel

HERE = Path(__file__).parent
SCRIPT: dict[str, Any] = runpy.run_path(str(HERE / "make_official_tensors.py"))
KINDS: tuple[str, ...] = SCRIPT["KINDS"]
TASKS = {"pretrained": "pretraining", "in1k": "classification"}
SEARCHES: dict[str, Any] = SCRIPT["SEARCHES"]
live = pytest.mark.skipif(not SCRIPT["is_available"](), reason="needs torchscale and the released code, see README.md")


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    tensors = load_file(HERE / "official.safetensors")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_stored_ones(kind: str, tmp_path: Path, stored: dict[str, Tensor]) -> None:
    _assert_answers(_load(_weights(kind, stored), tmp_path), kind, _below(stored, f"outputs/{kind}/"))


@live
@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_released_code_run_now(kind: str, tmp_path: Path, stored: dict[str, Tensor]) -> None:
    peer = SCRIPT["build"](kind)
    expected = SCRIPT["outputs"](kind, peer)
    _assert_answers(_load(peer.state_dict(), tmp_path), kind, expected)
    for name, value in expected.items():
        _assert_equal(stored[f"outputs/{kind}/{name}"], value, "the stored tensors are out of date")


@pytest.mark.parametrize("side", SCRIPT["SIDES"])
def test_positions_are_interpolated_as_stored(side: int, tmp_path: Path, stored: dict[str, Tensor]) -> None:
    _assert_positions(_weights("pretrained", stored), side, tmp_path, stored[f"interpolated/{side}"])


@live
@pytest.mark.parametrize("side", SCRIPT["SIDES"])
def test_positions_are_interpolated_as_by_the_released_loader_run_now(
    side: int, tmp_path: Path, stored: dict[str, Tensor]
) -> None:
    expected = SCRIPT["interpolated"](side)
    _assert_positions(SCRIPT["build"]("pretrained").state_dict(), side, tmp_path, expected)
    _assert_equal(stored[f"interpolated/{side}"], expected, "the stored tensors are out of date")


@pytest.mark.parametrize("name", SEARCHES)
def test_captions_equal_the_stored_ones(name: str, tmp_path: Path, stored: dict[str, Tensor]) -> None:
    weights = _weights("captioning", stored)
    weights["mlm_head.bias"][SCRIPT["EOS"]] += SEARCHES[name].eos
    _assert_captions(_load(weights, tmp_path), name, _below(stored, f"captions/{name}/"))


@live
@pytest.mark.parametrize("name", SEARCHES)
def test_captions_equal_the_released_search_run_now(name: str, tmp_path: Path) -> None:
    peer = SCRIPT["build"]("captioning", SEARCHES[name].eos)
    _assert_captions(_load(peer.state_dict(), tmp_path), name, SCRIPT["captions"](SEARCHES[name]))


def test_the_stored_captions_end_early_and_late_and_hold_special_ids(stored: dict[str, Tensor]) -> None:
    """Otherwise they would not show that the search is the released one."""
    pad = SCRIPT["PAD"]
    words = [stored[f"captions/{name}/words"] for name in SEARCHES]
    lengths = [(part != pad).sum(1) / part.shape[1] for part in words]
    assert min(float(length.min()) for length in lengths) < 0.5
    assert max(float(length.max()) for length in lengths) == 1
    assert any(((part == 0) | (part == 3)).any() for part in words)


def test_the_default_search_writes_words_only(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    model, mask = _load(_weights("captioning", stored), tmp_path), SCRIPT["MASK"]
    for search in SEARCHES.values():
        found = model.generate(
            SCRIPT["inputs"]()["images"], num_beams=search.num_beams, max_length=search.max_length, mask_id=mask
        )
        for row in found.ids:
            words = row[row != SCRIPT["PAD"]]
            assert ((words > 3) & (words < mask)).all()
            assert (row[len(words) :] == SCRIPT["PAD"]).all()


def _weights(kind: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    backbone: dict[str, Tensor] = SCRIPT["backbone_weights"](kind not in ("in1k", "vqa"))
    return {**backbone, **{name: value.clone() for name, value in _below(stored, f"heads/{kind}/").items()}}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load(weights: dict[str, Tensor], folder: Path, **options: Any) -> Any:
    """Through a file in the released layout, as a user would."""
    path = folder / "released.pth"
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, path)
    return beit3.load_model(path, **options)


def _assert_positions(weights: dict[str, Tensor], side: int, folder: Path, expected: Tensor) -> None:
    """The table of the model; and a picture of that size goes through."""
    model = _load(weights, folder, image_size=side)
    table = model.backbone.vision_embedding.positions.detach()
    assert table.shape[0] == 3 + (side // SCRIPT["BACKBONE"]["PATCH"]) ** 2
    _assert_equal(table, expected, f"positions for {side} pixels")
    assert model.backbone(torch.randn(1, 3, side, side)).vision.shape[1] == table.shape[0] - 2


@torch.no_grad()
def _assert_answers(model: Any, kind: str, expected: dict[str, Tensor]) -> None:
    assert model.task == TASKS.get(kind, kind)
    given = SCRIPT["inputs"]()
    images, ids, mask = given["images"], given["text_ids"], given["text_mask"]
    if kind == "pretrained":
        out = model(images, ids, mask)
        actual = {"mim": model.mim_head(out.vision[:, 1:]), "mlm": model.mlm_head(out.text)}
    elif kind == "retrieval":
        actual = {"image": model.encode_image(images), "text": model.encode_text(ids, mask)}
    elif kind == "in1k":
        actual = {"logits": model(images)}
    elif kind == "vqa":
        actual = {"logits": model(images, ids, mask)}
    elif kind == "nlvr2":
        actual = {"logits": model(torch.stack([images, images.roll(1, 0)], dim=1), ids, mask)}
    else:
        actual = {"logits": model(images, ids, mask), "steps": _steps(model, images)}
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        real = mask if name in ("mlm", "logits") and value.shape[:2] == mask.shape else ...
        _assert_equal(value[real], expected[name][real], f"{kind}: {name}")


def _steps(model: CaptioningModel, images: Tensor) -> Tensor:
    """Logits of `<mask>` behind ever more words, one word at a time from our cache."""
    texts = torch.cat([torch.full((len(images), 1), SCRIPT["BOS"]), SCRIPT["WORDS"]], dim=1)
    caches, answers = model.backbone.start_decoding(images), []
    for word in texts.unbind(1):
        states = model.backbone.decode(torch.stack([word, torch.full_like(word, SCRIPT["MASK"])], dim=1), caches)
        answers.append(model.mlm_head(states[:, 1]))
    return torch.stack(answers, dim=1)


def _assert_captions(model: CaptioningModel, name: str, expected: dict[str, Tensor]) -> None:
    num_beams, max_length, length_penalty, _ = SEARCHES[name]
    found = model.generate(
        SCRIPT["inputs"]()["images"],
        num_beams=num_beams,
        max_length=max_length,
        length_penalty=length_penalty,
        mask_id=SCRIPT["MASK"],
        official=True,
    )
    assert found.ids.tolist() == expected["words"].tolist()
    _assert_equal(found.scores, expected["scores"], name)


def _assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal within 1e-5 of the largest value."""
    assert actual.shape == expected.shape, what
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-5 * largest, f"{what}: error {error:.2e}, largest value {largest:.2e}"
