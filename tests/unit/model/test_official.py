"""The official layout: nothing lost, nothing ignored, every refusal explained."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from beit3.config import replace
from beit3.errors import ConfigError, DataMissingError
from beit3.model.build import build_model
from beit3.model.official import to_official, to_ours
from beit3.model.presets import ModelConfig, model_config
from beit3.model.released_files import read_official
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer

Make = Callable[..., MultiwayTransformer]
State = dict[str, Tensor]


@pytest.fixture
def decoupled(tiny: ModelConfig) -> ModelConfig:
    """Sizes that a file tells by itself: square grid, head width 64."""
    return replace(tiny, attention="decoupled", fusion_layers=0, width=128, num_heads=2, image_size=(12, 12))


@pytest.fixture
def official(decoupled: ModelConfig, make: Make) -> State:
    return to_official(decoupled, make(decoupled).state_dict())


OPTIONS = {"pretraining": {"codebook_size": 24}, "classification": {"num_classes": 7}, "vqa": {"num_answers": 9}}


@pytest.mark.parametrize("task", [None, "pretraining", "retrieval", "classification", "vqa", "nlvr2", "captioning"])
def test_ours_to_official_and_back_is_bit_equal(decoupled: ModelConfig, task: str | None) -> None:
    options = OPTIONS.get(task or "", {})
    state = build_model(decoupled, task, **options).state_dict()
    back = to_ours(to_official(decoupled, state))
    assert (back.config, back.task, back.head_options) == (decoupled, task, options)
    assert back.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back.state[name], tensor), name
    build_model(back.config, back.task, **back.head_options).load_state_dict(back.state)


@pytest.mark.parametrize(("name", "tensors"), [("beit3_base_patch16_224", 491), ("beit3_large_patch16_224", 971)])
def test_the_released_sizes_have_the_released_tensors(name: str, tensors: int) -> None:
    config = model_config(name, attention="decoupled")
    with torch.device("meta"):
        official = to_official(config, MultiwayTransformer(config).state_dict())
    assert len(official) == tensors
    assert to_ours(official).config == config
    shapes = {key: tuple(value.shape) for key, value in official.items()}
    width, hidden = config.width, config.ffn_width
    assert shapes["beit3.text_embed.weight"] == (64010, width)
    assert shapes["beit3.vision_embed.cls_token"] == (1, 1, width)
    assert shapes["beit3.vision_embed.proj.weight"] == (width, 3, 16, 16)
    assert shapes["beit3.encoder.embed_positions.A.weight"] == (199, width)
    assert shapes["beit3.encoder.embed_positions.B.weight"] == (1024, width)
    assert shapes["beit3.encoder.layers.3.self_attn.q_proj.B.weight"] == (width, width)
    assert shapes["beit3.encoder.layers.3.ffn.A.fc1.weight"] == (hidden, width)
    assert shapes["beit3.encoder.layers.3.ffn.A.ffn_layernorm.weight"] == (hidden,)
    assert shapes["beit3.encoder.layers.3.final_layer_norm.B.bias"] == (width,)


def test_a_model_without_final_norm_is_recognised(decoupled: ModelConfig, make: Make) -> None:
    config = replace(decoupled, final_norm=False)
    official = to_official(config, make(config).state_dict())
    assert not [key for key in official if key.startswith("beit3.encoder.layer_norm")]
    assert to_ours(official).config == config


@pytest.mark.parametrize("prefix", ["", "beit3.", "module.beit3.", "_orig_mod.beit3.", "_orig_mod.module.beit3."])
def test_prefixes_and_wrappers_are_removed(official: State, prefix: str) -> None:
    renamed = {prefix + key.removeprefix("beit3."): value for key, value in official.items()}
    expected = to_ours(official)
    for wrapped in (renamed, {"model": renamed, "epoch": 3}, {"module": renamed}, {"module": {"model": renamed}}):
        found = to_ours(wrapped)
        assert found.config == expected.config
        assert found.state.keys() == expected.state.keys()


def test_two_names_for_one_tensor_are_refused(official: State) -> None:
    key = next(iter(official))
    with pytest.raises(ConfigError, match="two tensors are named"):
        to_ours({**official, f"module.{key}": official[key]})


def test_a_shared_model_writes_its_attention_for_both_modalities(decoupled: ModelConfig, make: Make) -> None:
    shared = replace(decoupled, attention="shared")
    model = make(shared).eval()
    official = to_official(shared, model.state_dict())
    layer = "beit3.encoder.layers.1.self_attn.v_proj"
    assert torch.equal(official[f"{layer}.A.weight"], official[f"{layer}.B.weight"])
    converted = to_ours(official)
    other = MultiwayTransformer(converted.config).eval()
    other.load_state_dict(converted.state)
    images, ids = torch.randn(2, 3, 12, 12), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        expected, actual = model(images, ids), other(images, ids)
    assert torch.equal(actual.vision, expected.vision)
    assert torch.equal(actual.text, expected.text)


def test_fusion_experts_have_no_place_in_the_official_layout(decoupled: ModelConfig, make: Make) -> None:
    fused = replace(decoupled, attention="shared", fusion_layers=1)
    with pytest.raises(ConfigError, match=r"fusion experts .* has no official layout"):
        to_official(fused, make(fused).state_dict())


def test_all_wrong_keys_are_listed_in_one_line(official: State) -> None:
    broken = dict(official)
    del broken["beit3.encoder.layers.0.ffn.A.fc1.bias"]
    del broken["beit3.encoder.layer_norm.B.weight"]
    broken["beit3.encoder.relative_position.weight"] = torch.zeros(2)
    broken["beit3.vision_embed.cls_token"] = torch.zeros(1, 1, 5)
    with pytest.raises(ConfigError) as caught:
        to_ours(broken)
    message = str(caught.value)
    assert "\n" not in message
    assert "missing encoder.layers.0.ffn.A.fc1.bias, encoder.layer_norm.B.weight;" in message
    assert "unknown encoder.relative_position.weight;" in message
    assert "vision_embed.cls_token (1, 1, 5) instead of (1, 1, 128)" in message


def test_a_gap_between_layers_is_an_error(official: State) -> None:
    moved = {key.replace("layers.2.", "layers.7."): value for key, value in official.items()}
    with pytest.raises(ConfigError, match=r"missing encoder\.layers\.2\..*unknown encoder\.layers\.7\."):
        to_ours(moved)


def test_heads_without_a_model_are_named_and_can_be_left_out(official: State) -> None:
    classifier = {**official, "fc_norm.weight": torch.ones(128), "head.weight": torch.zeros(7, 128)}
    with pytest.raises(ConfigError, match=r"do not fit: missing fc_norm\.bias, head\.bias$"):
        to_ours(classifier)
    with pytest.raises(ConfigError, match=r"do not fit: unknown decoder\.weight$"):
        to_ours({**official, "decoder.weight": torch.zeros(2)})
    converted = to_ours(classifier, heads=False)
    assert converted.task is None
    assert converted.state.keys() == to_ours(official).state.keys()


def test_another_models_file_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"not an official BEiT-3 file: it has no 'text_embed\.weight'"):
        to_ours({"cls_token": torch.zeros(1, 1, 8)})
    with pytest.raises(ConfigError, match="no named tensors under epoch"):
        to_ours({"epoch": 3})


def test_a_grid_that_is_no_square_needs_its_size(decoupled: ModelConfig, make: Make) -> None:
    wide = replace(decoupled, image_size=(12, 20))
    official = to_official(wide, make(wide).state_dict())
    for wrong in (None, (12, 12), (20, 20)):
        with pytest.raises(ConfigError, match="give image_size"):
            to_ours(official, image_size=wrong)
    assert to_ours(official, image_size=(12, 20)).config == wide


@pytest.mark.parametrize("task", ["pretraining", "retrieval", "classification", "vqa", "nlvr2", "captioning"])
def test_every_missing_tensor_of_a_head_is_named(decoupled: ModelConfig, task: str) -> None:
    """It was said to be unknown what else the file held."""
    official = to_official(decoupled, build_model(decoupled, task, **OPTIONS.get(task, {})).state_dict())
    heads = [key for key in official if not key.startswith("beit3.")]
    for gone in heads:
        if task == "pretraining" and gone.startswith("mim_head."):
            continue  # see below
        broken = {key: value for key, value in official.items() if key != gone}
        with pytest.raises(ConfigError, match=rf"the official weights do not fit: missing {re.escape(gone)}$"):
            to_ours(broken)
        with pytest.raises(ConfigError, match=rf"missing {re.escape(gone)}; unknown extra\.weight$"):
            to_ours({**broken, "extra.weight": torch.zeros(1)})
    if task == "pretraining":
        kept = {key: value for key, value in official.items() if not key.startswith("mim_head.")}
        assert to_ours(kept).task == "captioning", "its whole head is there"
        with pytest.raises(ConfigError, match=r"missing mim_head\.bias$"):
            to_ours({key: value for key, value in official.items() if key != "mim_head.bias"})


def test_missing_tensors_are_left_out_and_unknown_ones_named_only_when_asked(
    official: State, caplog: pytest.LogCaptureFixture
) -> None:
    gone = "beit3.encoder.layers.0.self_attn.k_proj.A.bias"
    broken = {key: value for key, value in official.items() if key != gone} | {"extra.weight": torch.zeros(1).long()}
    with pytest.raises(ConfigError, match=r"missing encoder\.layers\.0.*; unknown extra\.weight"):
        to_ours(broken)
    with caplog.at_level(logging.WARNING, "beit3"):
        found = to_ours(broken, strict=False)
    assert "unknown tensors are left out: extra.weight" in caplog.text
    assert to_ours(official).state.keys() - found.state.keys() == {"blocks.0.attention_in.vision.qkv.bias"}
    with pytest.raises(ConfigError, match=r"wrong shapes: encoder\.layer_norm\.A\.bias \(3,\) instead of \(128,\)$"):
        to_ours({**broken, "beit3.encoder.layer_norm.A.bias": torch.zeros(3)}, strict=False)


def test_a_width_of_no_whole_heads_needs_their_number(tiny: ModelConfig, make: Make) -> None:
    config = replace(tiny, attention="decoupled", fusion_layers=0, image_size=(12, 12))
    official = to_official(config, make(config).state_dict())
    with pytest.raises(ConfigError, match="the width 32 does not divide by a head width of 64: give num_heads"):
        to_ours(official)
    assert to_ours(official, num_heads=4).config == config


@pytest.mark.parametrize("name", ["weights.pth", "weights.zip"])
@pytest.mark.parametrize("modern", [True, False])
def test_a_file_with_training_options_is_read(tmp_path: Path, official: State, name: str, modern: bool) -> None:
    path = tmp_path / name
    content = {"model": official, "args": argparse.Namespace(lr=1e-3, model="beit3"), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=modern)
    read = read_official(path)
    assert read.keys() == official.keys()
    assert all(torch.equal(read[key], official[key]) for key in official)


class Trap:
    """What a hostile file does: call a function of its choice when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_file_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "trap": Trap()}, "bad.pth")
    with pytest.raises(
        ConfigError, match=r"bad\.pth is not read: it holds '\w+\.mkdir', which is no plain data"
    ) as caught:
        read_official("bad.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


def test_an_unpacked_file_is_explained(tmp_path: Path, official: State) -> None:
    torch.save(official, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "weights.pth") as archive:
        archive.extractall(tmp_path / "unpacked")
    for folder in (tmp_path / "unpacked", next((tmp_path / "unpacked").iterdir())):
        with pytest.raises(ConfigError, match=r"has unpacked: download the \.pth file again"):
            read_official(folder)
    with pytest.raises(ConfigError, match="a folder without a checkpoint"):
        read_official(tmp_path)


def test_missing_and_damaged_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"none\.pth does not exist"):
        read_official(tmp_path / "none.pth")
    for name, content in (("page.pth", b"<html>not found</html>"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="it is damaged, or no file of weights") as caught:
            read_official(tmp_path / name)
        assert "\n" not in str(caught.value)
    for held, kind in (([torch.zeros(1)], "list"), (torch.zeros(1), "Tensor")):
        torch.save(held, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match=f"holds a {kind}, not named weights"):
            read_official(tmp_path / "other.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_loads_as_its_values_in_fp32(tmp_path: Path, official: State, dtype: torch.dtype) -> None:
    half = {key: value.to(dtype) for key, value in official.items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    torch.save({"model": {key: value.float() for key, value in half.items()}}, tmp_path / "single.pth")
    assert {value.dtype for value in read_official(tmp_path / "half.pth").values()} == {dtype}
    for size in (None, 20):  # another size resizes the positions
        first, second = (load_model(tmp_path / name, image_size=size) for name in ("half.pth", "single.pth"))
        for (name, value), expected in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, expected), name


def test_a_safetensors_file_of_the_official_layout_is_read(tmp_path: Path, official: State) -> None:
    save_file(official, tmp_path / "weights.safetensors")
    read = read_official(tmp_path / "weights.safetensors")
    assert read.keys() == official.keys()
    assert all(torch.equal(read[key], official[key]) for key in official)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-1])
    with pytest.raises(ConfigError, match="it is damaged, or no file of weights"):
        read_official(tmp_path / "cut.safetensors")


def deepspeed(official: State) -> dict[str, object]:
    """What DeepSpeed 0.4 to 0.19 write beside the weights, and what the official finetuning script adds."""
    return {
        "module": official,
        "buffer_names": [],
        "optimizer": {"dynamic_loss_scale": True, "cur_scale": 65536, "fp32_groups_flat": [torch.zeros(3)]},
        "param_shapes": [OrderedDict(a=torch.Size([2, 3]))],
        "lr_scheduler": None,
        "csr_tensor_module_names": set(),
        "sparse_tensor_module_names": {"text_embed"},
        "skipped_steps": 3,
        "global_steps": 20,
        "dp_world_size": 8,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 64, "fp16": {"enabled": True, "initial_scale_power": 16}},
        "ds_version": "0.4.0",
        "epoch": 3,
        "model_ema": {key: torch.zeros_like(value) for key, value in official.items()},
    }


RANK = "mp_rank_00_model_states.pt"


def test_a_deepspeed_file_and_its_folders_are_read(tmp_path: Path, official: State) -> None:
    for folder in ("checkpoint-3", "global_step10", "global_step20"):
        (tmp_path / folder).mkdir()
        torch.save(deepspeed(official), tmp_path / folder / RANK)
    torch.save({"optimizer": Trap()}, tmp_path / "checkpoint-3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(
        deepspeed({**official, "beit3.text_embed.weight": torch.ones(40, 128)}), tmp_path / "global_step20" / RANK
    )
    for path in (tmp_path / "checkpoint-3", tmp_path / "checkpoint-3" / RANK):
        read = read_official(path)
        assert all(torch.equal(read[key], official[key]) for key in official)
        assert load_model(path).state_dict().keys() == to_ours(official).state.keys()
    with pytest.raises(ConfigError, match="give one of the folders checkpoint-3, global_step10, global_step20"):
        read_official(tmp_path)
    (tmp_path / "latest").write_text("global_step20")
    assert torch.equal(read_official(tmp_path)["beit3.text_embed.weight"], torch.ones(40, 128))


def test_parts_of_a_model_are_refused_with_what_to_do(tmp_path: Path, official: State) -> None:
    for name in (RANK, "mp_rank_01_model_states.pt"):
        torch.save(deepspeed(official), tmp_path / name)
    for path in (tmp_path, tmp_path / RANK):
        with pytest.raises(ConfigError, match=r"cut into 2 parts \(model parallelism of DeepSpeed\): join them"):
            read_official(path)
    third = tmp_path / "stage3"
    third.mkdir()
    torch.save({}, third / f"zero_pp_rank_0_{RANK}")
    with pytest.raises(ConfigError, match=r"ZeRO stage 3\): run the zero_to_fp32\.py"):
        read_official(third)


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "/", "a\nb", "gone", "file", "nul\0", "x" * 5000])
def test_a_latest_file_names_nothing_but_a_folder_beside_it(tmp_path: Path, official: State, name: str) -> None:
    for folder in ("secret", "run"):
        (tmp_path / folder).mkdir()
    torch.save(deepspeed(official), tmp_path / "secret" / RANK)
    torch.save(deepspeed(official), tmp_path / RANK)
    (tmp_path / "run" / "file").touch()
    (tmp_path / "run" / "latest").write_text(name)
    with pytest.raises(ConfigError, match=r"latest names '.*', which is no folder beside it") as caught:
        read_official(tmp_path / "run")
    assert str(caught.value).isprintable()


PLAIN: dict[str, object] = {
    "namespace": argparse.Namespace(lr=1e-3, sizes=[1, 2], inner=argparse.Namespace(out=Path("runs/one"))),
    "ordered dictionary": OrderedDict(a=1),
    "default dictionaries": [defaultdict(list, a=[1]), defaultdict(int), defaultdict(dict, b={})],
    "counter": Counter("abca"),
    "sets": [{1, 2}, frozenset({3})],
    "path": [Path("a/b"), PureWindowsPath("c:/d")],
    "sizes and types": [torch.Size([2]), torch.device("cuda", 1), torch.float16, torch.strided],
    "numpy numbers": [np.float64(85.4), np.float32(1), np.int64(3), np.bool_(True)],
    "numpy arrays": [np.arange(6.0).reshape(2, 3), np.array(["word"])],
    "bytes and complex": [b"abc", bytearray(b"def"), 1j, 2**70, None],
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_data_beside_the_weights_is_passed_over(tmp_path: Path, official: State, kind: str, modern: bool) -> None:
    content = {"model": official, "best": PLAIN[kind], "args": argparse.Namespace(kept=PLAIN[kind])}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=modern)
    assert read_official(tmp_path / "weights.pth").keys() == official.keys()


def test_numbers_of_numpy_1_are_passed_over(tmp_path: Path, official: State) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": official, "best": np.float64(85.4)}, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes().count(b"numpy._core.multiarray") == 1
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_official(path).keys() == official.keys()


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (ConfigError("x"), "beit3.errors.ConfigError"),
        (os.path.join, "posixpath.join"),
        (argparse.Namespace(run=torch.nn.Linear(1, 1)), "torch.nn.modules.linear.Linear"),
        (slice(3), "slice"),
        (np.random.default_rng(0), "numpy.random._pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_class_is_named_with_why_and_what_to_do(
    tmp_path: Path, official: State, value: object, name: str, modern: bool
) -> None:
    torch.save({"model": official, "x": value}, tmp_path / "bad.pth", _use_new_zipfile_serialization=modern)
    with pytest.raises(ConfigError) as caught:
        read_official(tmp_path / "bad.pth")
    reason = str(caught.value).partition("bad.pth is not read: ")[2]
    assert reason.startswith(f"it holds '{name}")
    assert "could run code; where the file was made, save {'model': model.state_dict()} with torch.save" in reason
    assert reason.isprintable()
    assert len(reason) < 250
    assert not re.search("weights_only|safe_globals|trust", reason), "torch's advice is to switch its protection off"


def test_reading_leaves_torchs_own_list_of_classes_alone(tmp_path: Path, official: State) -> None:
    torch.save({"model": official, "args": argparse.Namespace()}, tmp_path / "weights.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read_official(tmp_path / "weights.pth")
        assert set(torch.serialization.get_safe_globals()) == before
        assert isinstance(torch.load(tmp_path / "weights.pth")["args"], argparse.Namespace)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "weights.pth")


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    content = {"model": {"a": torch.ones(1)}, "args": [argparse.Namespace(number=number) for number in range(300)]}
    torch.save(content, tmp_path / "weights.pth")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(read_official, [tmp_path / "weights.pth"] * 64))
    assert all(state["a"].item() == 1 for state in read)


def test_only_numbers_that_are_in_the_file_count(tmp_path: Path) -> None:
    for value in (
        torch.ones(1).expand(2**20, 2**20),
        torch.zeros(2, device="meta"),
        torch.eye(3).to_sparse(),
    ):
        torch.save({"model": {"weight": value}}, tmp_path / "bad.pth")
        with pytest.raises(ConfigError, match="sparse, repeated or missing numbers, no plain tensors, under weight"):
            read_official(tmp_path / "bad.pth")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(official: State, dtype: torch.dtype) -> None:
    key = "beit3.encoder.layers.1.ffn.A.fc1.bias"
    with pytest.raises(ConfigError, match=rf"16 to 64 bits: encoder\.layers\.1\.ffn\.A\.fc1\.bias \({dtype}\)"):
        to_ours({**official, key: official[key].to(dtype)})


def test_whatever_a_file_calls_its_tensors_the_message_is_one_line(tmp_path: Path, official: State) -> None:
    for key in (
        "two\nlines\x1b[2J",
        "long" * 10_000,
        3,
        b"bytes",
        None,
        ("a", 1),
        "encoder.layers." + "9" * 6000 + ".x",
    ):
        torch.save({"model": {**official, key: torch.ones(1)}}, tmp_path / "bad.pth")
        with pytest.raises(ConfigError) as caught:
            to_ours(read_official(tmp_path / "bad.pth"))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000


def test_containers_and_tensors_with_methods_of_their_own_are_harmless(tmp_path: Path, official: State) -> None:
    key = "beit3.encoder.layer_norm.A.bias"
    tensor = official[key].clone()
    for name in ("detach", "float", "numel"):
        setattr(tensor, name, "no method")
    torch.save({"model": {**official, key: tensor}}, tmp_path / "tensor.pth")
    assert torch.equal(to_ours(read_official(tmp_path / "tensor.pth")).state["norm.vision.bias"], official[key])
    shadowed = OrderedDict(official)
    shadowed.get = "no method"  # type: ignore[assignment, method-assign]
    torch.save(shadowed, tmp_path / "container.pth")
    with pytest.raises(ConfigError, match="is not read"):
        read_official(tmp_path / "container.pth")


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match="no named tensors under model"):
        read_official(tmp_path / "bad.pth")


def test_a_zip_file_that_torch_has_not_written_is_explained(tmp_path: Path, official: State) -> None:
    torch.save(official, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "around.zip", "w") as outer:
        outer.write(tmp_path / "weights.pth", "weights.pth")
    with pytest.raises(ConfigError, match=r"a zip archive of weights\.pth, not a checkpoint: if a \.pth file is in it"):
        read_official(tmp_path / "around.zip")
    with (
        zipfile.ZipFile(tmp_path / "weights.pth") as inner,
        zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as outer,
    ):
        for name in inner.namelist():
            outer.writestr(name, inner.read(name))
    with pytest.raises(ConfigError, match="has unpacked and compressed it: download"):
        read_official(tmp_path / "packed.zip")
