"""What fits and what does not: a refusal names a way out."""

from __future__ import annotations

import json
import re

import pytest

from beit3.cli import run_command
from beit3.errors import ConfigError
from beit3.plan.fit import fastest_fit, make_plan
from beit3.plan.gpus import GIB, Cluster
from tests.unit.plan.conftest import H100, recipe


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--gpus 96", "pairs.batch_size 2048 does not divide by 96 GPUs: use 64 or 128 GPUs"),
        ("--gpus 1024", "use --loop.num-workers 2"),
        ("--gpus 64 --mesh.shard 12", "mesh.shard 12 does not divide the 64 ranks"),
        ("--gpus 1 --mesh.shard 8", "mesh.shard 8 does not divide the 1 ranks"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("", "--gpus N"),
        ("--gpus 8 --mfu 33", "--mfu is a share"),
        ("--gpus 8 --loop.stepz 3", "did you mean --loop.steps?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "recipe:pretrain/mdm_base", *arguments.split()]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("address", ["finetune/ade20k_base", "tokenizers/vqkd_base", "tokenizers/text_64k"])
def test_tasks_that_are_not_counted_are_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    for fit in ([], ["--fit"]):
        assert run_command(["plan", f"recipe:{address}", "--gpus", "8", *fit]) == 2
        assert "plan" in capsys.readouterr().err


@pytest.mark.parametrize(("variant", "gpus", "gpu"), [(":large", 8, "h100"), (":giant", 8, "l40s"), ("", 1, "l40s")])
def test_a_refusal_names_settings_that_fit(
    variant: str, gpus: int, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", f"recipe:pretrain/mdm_base{variant}", "--gpus", str(gpus), "--gpu", gpu]
    assert run_command(command) == 2
    message = capsys.readouterr().err
    named = re.search(r"GiB a GPU, \d[\d,]* more than there are: (--.*) fits, with (\d+) GiB", message)
    assert named is not None
    assert run_command([*command, *named[1].split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] <= found["gpu_memory"]
    assert round(found["memory"]["total"] / GIB) == int(named[2])


def test_negatives_are_never_given_up_to_fit() -> None:
    assert fastest_fit(recipe("pretrain/clip_base:large"), Cluster(H100, 1)) is None


def test_nothing_is_planned_for_tasks_without_sizes() -> None:
    with pytest.raises(ConfigError, match="SegmentationConfig"):
        make_plan(recipe("finetune/ade20k_base"), Cluster(H100, 8))
