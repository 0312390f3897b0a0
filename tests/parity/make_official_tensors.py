"""Write `official.safetensors`: heads of small random models of the released finetuning code, and what they answer.

Run once, by hand, with torchscale installed and the released code unpacked under another name (its package is also
called `beit3`: never install it beside this one):

    pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    pip download --no-deps --dest /tmp/gml beit3-gml==0.1.3
    unzip /tmp/gml/beit3_gml-0.1.3-py3-none-any.whl 'beit3/*' -d .official
    mv .official/beit3 .official/released_beit3
    python tests/parity/make_official_tensors.py

All models share the backbone of `torchscale.safetensors`; every head is random in all its tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import runpy
import sys
import tempfile
import types
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
FILE = HERE / "official.safetensors"
RELEASED = HERE.parents[1] / ".official"
BACKBONE: dict[str, Any] = runpy.run_path(str(HERE / "make_torchscale_tensors.py"))
WIDTH, VOCAB = BACKBONE["WIDTH"], BACKBONE["VOCAB"]
NUM_CLASSES, NUM_ANSWERS, CODES = 7, 9, 24
BOS, PAD, EOS, MASK = 0, 1, 2, 45
"""`<mask>` is followed by four unused ids, as in the released vocabulary."""
WORDS = torch.tensor([[7, 30, 4, 12], [9, 9, 21, 40], [33, 5, 18, 6]])
SIDES = (8, 20, 28)
"""Of pictures to interpolate positions for; the backbone was made for 12."""
POSITION_TABLE = "beit3.encoder.embed_positions.A.weight"
KINDS = ("pretrained", "retrieval", "in1k", "vqa", "nlvr2", "captioning")


class Search(NamedTuple):
    """Settings of one beam search; `eos` is added to the bias of `</s>`, so that captions end early or never."""

    num_beams: int
    max_length: int
    length_penalty: float
    eos: float


SEARCHES = {
    "as_released": Search(3, 12, 0.6, 0.0),
    "short": Search(3, 12, 0.6, 2.0),
    "penalty_of_one": Search(2, 9, 1.0, 1.0),
    "no_penalty": Search(4, 10, 0.0, 0.7),
    "greedy": Search(1, 14, 0.6, 0.7),
    "six_beams": Search(6, 12, 0.6, 1.2),
}


def is_available() -> bool:
    """Whether torchscale and the released code are here."""
    return importlib.util.find_spec("torchscale") is not None and (RELEASED / "released_beit3").is_dir()


def released(module: str) -> Any:
    """Import a module of the released code, which expects two of its neighbours at the top level."""
    if str(RELEASED) not in sys.path:
        sys.path.append(str(RELEASED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = importlib.import_module("released_beit3.utils")
        datasets = types.ModuleType("datasets")
        vars(datasets)["get_sentencepiece_model_for_beit3"] = lambda _: _Ids()
        before = {name: sys.modules.get(name) for name in ("utils", "datasets")}
        sys.modules.update(utils=utils, datasets=datasets)
        try:
            return importlib.import_module(f"released_beit3.{module}")
        finally:
            for name, old in before.items():
                sys.modules.pop(name)
                if old is not None:
                    sys.modules[name] = old


class _Ids:
    """The tokenizer's ids, all that the search asks of it."""

    mask_token_id, cls_token_id, pad_token_id, sep_token_id = MASK, BOS, PAD, EOS

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[list[int]]:
        """Return the rows themselves."""
        assert skip_special_tokens
        return [[int(index) for index in row] for row in ids]


class _Pretrained(nn.Module):
    """The layout of the pretrained files; the code that made them was never released."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.beit3 = importlib.import_module("torchscale.model.BEiT3").BEiT3(args)
        self.mlm_head = nn.Linear(WIDTH, VOCAB)
        self.mim_head = nn.Linear(WIDTH, CODES)


def build(kind: str, eos: float = 0.0, side: int | None = None) -> Any:
    """Build a model of the released code with the stored backbone and random heads, or bare for another image side."""
    from torchscale.architecture.config import EncoderConfig

    code = released("modeling_finetune")
    torch.manual_seed(9)
    args = EncoderConfig(
        img_size=side or BACKBONE["SIDE"],
        patch_size=BACKBONE["PATCH"],
        vocab_size=VOCAB,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=kind not in ("in1k", "vqa"),
        no_output_layer=True,
        encoder_embed_dim=WIDTH,
        encoder_attention_heads=BACKBONE["NUM_HEADS"],
        encoder_ffn_embed_dim=BACKBONE["FFN_WIDTH"],
        encoder_layers=BACKBONE["NUM_LAYERS"],
        max_source_positions=BACKBONE["POSITIONS"],
    )
    builders: dict[str, Callable[[], Any]] = {
        "pretrained": lambda: _Pretrained(args),
        "retrieval": lambda: code.BEiT3ForRetrieval(args),
        "in1k": lambda: code.BEiT3ForImageClassification(args, num_classes=NUM_CLASSES),
        "vqa": lambda: code.BEiT3ForVisualQuestionAnswering(args, num_classes=NUM_ANSWERS),
        "nlvr2": lambda: code.BEiT3ForVisualReasoning(args, num_classes=2),
        "captioning": lambda: code.BEiT3ForCaptioning(args),
    }
    model = builders[kind]()
    if side is not None:
        return model.eval()
    backbone = backbone_weights(args.normalize_output)
    assert {name for name in model.state_dict() if name.startswith("beit3.")} == backbone.keys()
    model.load_state_dict(backbone, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("beit3."):
                parameter.add_(torch.randn_like(parameter) * 0.1)
                parameter.copy_(parameter.half())
        if kind == "captioning":
            model.mlm_head.bias[EOS] += eos
    return model.eval()


def backbone_weights(final_norm: bool) -> dict[str, Tensor]:
    """The shared backbone under its official names."""
    stored = load_file(HERE / "torchscale.safetensors")
    weights = {name.removeprefix("weights/"): value.float() for name, value in stored.items() if "weights/" in name}
    return {name: value for name, value in weights.items() if final_norm or ".encoder.layer_norm." not in name}


def inputs() -> dict[str, Tensor]:
    """The backbone's inputs."""
    given: dict[str, Tensor] = BACKBONE["inputs"]()
    return given


def interpolated(side: int) -> Tensor:
    """The vision position table that the released loader makes for pictures of another side, from a pretrained file."""
    utils = released("utils")
    small, large = build("pretrained"), build("pretrained", side=side)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = f"{folder}/pretrained.pth"
        torch.save({"model": small.state_dict()}, path)
        utils.load_model_and_may_interpolate(path, large, "model|module", "")
    table: Tensor = large.state_dict()[POSITION_TABLE]
    return table


@torch.no_grad()
def outputs(kind: str, model: Any) -> dict[str, Tensor]:
    """What a model answers."""
    given = inputs()
    images, ids, padding = given["images"], given["text_ids"], ~given["text_mask"]
    if kind == "pretrained":
        out = model.beit3(visual_tokens=images, textual_tokens=ids, text_padding_position=padding)
        states, split = out["encoder_out"], out["multiway_split_position"]
        return {"mim": model.mim_head(states[:, 1:split]), "mlm": model.mlm_head(states[:, split:])}
    if kind == "retrieval":
        image, _ = model(image=images, only_infer=True)
        _, text = model(text_description=ids, padding_mask=padding, only_infer=True)
        return {"image": image, "text": text}
    if kind == "in1k":
        return {"logits": model(images)}
    if kind == "vqa":
        return {"logits": model(images, ids, padding)}
    if kind == "nlvr2":
        return {"logits": model(images, images.roll(1, 0), ids, padding)}
    logits, _ = model(images, ids, padding.long(), language_masked_pos=None)
    return {"logits": logits, "steps": steps(model, images)}


def steps(model: Any, images: Tensor) -> Tensor:
    """Logits (B, words + 1, V) of `<mask>` behind ever more of WORDS, one word at a time from the released cache."""
    texts = torch.cat([torch.full((len(images), 1), BOS), WORDS], dim=1)
    memory: dict[int, dict[str, Tensor]] = {}
    answers = []
    for place in range(texts.shape[1]):
        now = torch.stack([texts[:, place], torch.full((len(images),), MASK)], dim=1)
        logits, memory = model(
            images if place == 0 else None,
            now,
            torch.zeros_like(now),
            language_masked_pos=None,
            text_len=place + 2,
            incremental_state=memory,
        )
        memory = {layer: {name: value[:, :, :-1] for name, value in part.items()} for layer, part in memory.items()}
        answers.append(logits[:, 1])
    return torch.stack(answers, dim=1)


@torch.no_grad()
def captions(search: Search) -> dict[str, Tensor]:
    """Words (B, max_length - 3) and scores (B,) that the released search finds."""
    engine, kept = released("engine_for_finetuning"), []

    class Recorded(engine.utils.BeamHypotheses):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            kept.append(self)

    handler = engine.CaptioningHandler(
        Namespace(
            label_smoothing=0.1,
            drop_worst_ratio=0,
            drop_worst_after=0,
            num_beams=search.num_beams,
            num_max_bpe_tokens=search.max_length,
            length_penalty=search.length_penalty,
            vocab_size=VOCAB,
        )
    )
    original, engine.utils.BeamHypotheses = engine.utils.BeamHypotheses, Recorded
    try:
        handler.eval_batch(build("captioning", search.eos), inputs()["images"], torch.arange(3))
    finally:
        engine.utils.BeamHypotheses = original
    words = torch.full((3, search.max_length - 3), PAD)
    for row, hypotheses in zip(words, kept, strict=True):
        [(_, text)] = hypotheses.hyp
        assert (int(text[0]), int(text[-1])) == (BOS, MASK)
        row[: len(text) - 2] = text[1:-1]
    return {"words": words, "scores": torch.tensor([hypotheses.hyp[0][0] for hypotheses in kept])}


def main() -> None:
    """Write the file and say how large it is."""
    tensors: dict[str, Tensor] = {}
    for kind in KINDS:
        model = build(kind)
        heads = {name: value for name, value in model.state_dict().items() if not name.startswith("beit3.")}
        tensors |= {f"heads/{kind}/{name}": value.half() for name, value in heads.items()}
        tensors |= {f"outputs/{kind}/{name}": value for name, value in outputs(kind, model).items()}
    for name, search in SEARCHES.items():
        tensors |= {f"captions/{name}/{part}": value for part, value in captions(search).items()}
    tensors |= {f"interpolated/{side}": interpolated(side) for side in SIDES}
    save_file({name: value.contiguous() for name, value in tensors.items()}, FILE)
    print(f"{FILE.name}: {len(tensors)} tensors, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
