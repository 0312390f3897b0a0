"""A run is one typed value: wrong names and contradictions fail when it is built, and the error helps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from beit3.cli import run_command
from beit3.config import (
    LoopConfig,
    OptimConfig,
    Run,
    TaskConfig,
    config,
    differences,
    nearest,
    replace,
    to_plain,
    with_defaults,
)
from beit3.errors import ConfigError
from beit3.train.task import Task


@config
class Inner:
    depth: int = 2
    width: int = 8


@config
class Nothing(TaskConfig):
    required: int
    inner: Inner = Inner()
    folder: Path = Path("a/b")
    pair: tuple[int, int] = (1, 2)

    def build(self) -> Task[Any]:
        raise NotImplementedError


def a_run(**changes: Any) -> Run:
    return replace(Run(name="x", task=Nothing(required=1)), **changes)


@pytest.mark.parametrize(
    ("wrong", "right"), [("lrr", "lr"), ("weight_decy", "weight_decay"), ("warmup", "warmup_steps")]
)
def test_an_unknown_field_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"OptimConfig has no field '{wrong}'; did you mean '{right}'\?"):
        OptimConfig(**{wrong: 1})  # type: ignore[arg-type]


def test_an_unlike_name_lists_the_valid_ones() -> None:
    assert nearest("zzzz", ("alpha", "beta")) == "valid names: alpha, beta"


def test_a_missing_required_field_is_named() -> None:
    with pytest.raises(ConfigError, match="Nothing needs the field 'required'"):
        Nothing()  # type: ignore[call-arg]


def test_fields_go_by_name_only() -> None:
    with pytest.raises(ConfigError, match="by name only"):
        OptimConfig("adamw")  # type: ignore[call-arg]


def test_values_are_frozen_and_have_no_room_for_more() -> None:
    value = OptimConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.lr = 2.0  # type: ignore[misc]
    assert not hasattr(value, "__dict__")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": 0.0}, "optim.lr must be above 0"),
        ({"optim.min_lr": 1.0}, "optim.min_lr must lie in"),
        ({"optim.warmup_steps": -1}, "optim.warmup_steps must not be negative"),
        ({"optim.warmup_steps": 11, "loop.steps": 10}, "longer than the run"),
        ({"optim.layer_decay": 1.5}, "optim.layer_decay"),
        ({"optim.ema_decay": 1.0}, "optim.ema_decay"),
        ({"loop.steps": 0}, "loop.steps must be at least 1"),
        ({"loop.accumulate": 0}, "loop.accumulate must be at least 1"),
        ({"loop.eval_every": -1}, "loop.eval_every must not be negative"),
        ({"loop.num_workers": -1}, "loop.num_workers must not be negative"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"name": "a/b"}, "plain folder name"),
        ({"name": ""}, "plain folder name"),
    ],
)
def test_contradictions_fail_when_a_run_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_run(**changes)


def test_replace_reaches_into_nested_values_and_leaves_the_original() -> None:
    run = a_run()
    changed = a_run(**{"optim.lr": 0.5, "task.inner.depth": 7, "task.required": 3, "name": "y"})
    assert (changed.optim.lr, changed.name) == (0.5, "y")
    assert changed.task == Nothing(required=3, inner=Inner(depth=7))
    assert run == a_run()
    assert changed.loop == run.loop


def test_replace_changes_a_value_that_is_replaced_in_the_same_call() -> None:
    changed = a_run(**{"loop": LoopConfig(steps=7), "loop.keep": 3})
    assert changed.loop == LoopConfig(steps=7, keep=3)


@pytest.mark.parametrize("name", ["optim.lrr", "loop.stps", "task.inner.deth", "nam"])
def test_replace_names_the_nearest_field(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        a_run(**{name: 1})


def test_plain_data_holds_everything_and_differences_name_what_changed() -> None:
    plain = to_plain(a_run())
    assert plain["task"] == {
        "type": "Nothing",
        "required": 1,
        "inner": {"type": "Inner", "depth": 2, "width": 8},
        "folder": str(Path("a/b")),
        "pair": [1, 2],
    }
    other = to_plain(a_run(**{"task.inner.depth": 3, "optim.lr": 0.5, "seed": 1}))
    assert differences(plain, other) == ["optim.lr", "seed", "task.inner.depth"]
    assert differences(plain, plain) == []
    assert differences({"a": {"b": 1}}, {}) == ["a"]


def test_fields_that_a_stored_configuration_does_not_know_have_their_defaults() -> None:
    run = a_run(**{"optim.lr": 1e-4})
    stored = json.loads(json.dumps(to_plain(run)))
    del stored["seed"], stored["optim"]["min_lr"], stored["loop"]["save_every"]
    plain = json.loads(json.dumps(to_plain(run)))
    assert differences(with_defaults(stored, run), plain) == []
    other = replace(run, seed=7, **{"optim.min_lr": 0.0})
    found = differences(with_defaults(stored, other), json.loads(json.dumps(to_plain(other))))
    assert found == ["optim.min_lr", "seed"]
    del stored["name"]  # it has no default
    assert differences(with_defaults(stored, run), plain) == ["name"]
    assert with_defaults([{"lr": 1}], [run.optim])[0]["name"] == OptimConfig().name


def test_the_folder_of_a_run_is_derived() -> None:
    assert a_run(out=Path("there")).folder == Path("there/x")


@pytest.mark.parametrize("wrong", [["--optim.lrr", "1"], ["--optim.lr", "fast"], ["--task.model.depth", "3"]])
def test_a_wrong_option_is_a_usage_error_and_trains_nothing(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["train", "recipe:pretrain/mdm_emoji:debug", *wrong]) == 2
    assert list(tmp_path.iterdir()) == []
    assert wrong[0] in capsys.readouterr().err


def test_a_contradiction_on_the_command_line_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["train", "recipe:pretrain/mdm_emoji:debug", "--optim.min-lr", "7"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert "optim.min_lr must lie in" in capsys.readouterr().err
