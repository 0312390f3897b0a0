"""The loop: steps that are not finite, accumulation, moving average, signals, resume, folders."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.config import Run, replace
from beit3.errors import BadDataError, BeitError, ConfigError, DataMissingError, DivergedError, PreemptedError
from beit3.train import checkpoint
from beit3.train.checkpoint import list_checkpoints
from beit3.train.distributed import Ranks
from beit3.train.folder import open_folder
from beit3.train.log import read_log
from beit3.train.loop import fit

MakeRun = Callable[..., Run]
Tasks = list[Any]


def exported(run: Run) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(run.folder / "export" / "line.pt", weights_only=True)
    return state


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_run_leaves_log_metrics_checkpoints_and_export(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run()
    metrics = fit(run)
    assert json.loads((run.folder / "metrics.json").read_text()) == metrics
    assert [record["step"] for record in read_log(run.folder)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert_same(exported(run), tasks[0].linear.state_dict())
    assert read_log(run.folder)[-1]["skipped/odd"] == 6
    assert read_log(run.folder, "eval")[-1]["answer"] == pytest.approx(metrics["answer"], rel=1e-5)


def test_the_weights_follow_adamw_and_the_schedule(line_run: MakeRun, tasks: Tasks) -> None:
    """Six steps of AdamW (Loshchilov and Hutter, algorithm 2), written out for the weight matrix."""
    run = line_run(**{"optim.clip_grad": 1e9, "optim.weight_decay": 0.1, "optim.warmup_steps": 2})
    fit(run)
    (first, second), eps = run.optim.betas, run.optim.eps
    weight = tasks[0].seen[0].double()
    # The bias has no say in the weight's rule but in its gradient: follow both.
    torch.manual_seed(run.seed)
    bias = torch.nn.Linear(4, 1).bias.detach().double()
    m = [torch.zeros_like(weight), torch.zeros_like(bias)]
    v = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(6):
        rows = range(step * 8, step * 8 + 8)
        batch = torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(row)) for row in rows]).double()
        error = batch[:, 1:] @ weight[0] + bias - batch[:, 0]
        gradients = [(2 * error[:, None] * batch[:, 1:]).mean(0)[None], (2 * error).mean()[None]]
        cosine = 1e-5 + 0.5 * (0.05 - 1e-5) * (1 + math.cos(math.pi * (step - 2) / 4))
        lr = 0.05 * step / 2 if step < 2 else cosine
        moved = []
        for i, (value, gradient) in enumerate(zip((weight, bias), gradients, strict=True)):
            m[i] = first * m[i] + (1 - first) * gradient
            v[i] = second * v[i] + (1 - second) * gradient**2
            adam = (m[i] / (1 - first ** (step + 1))) / ((v[i] / (1 - second ** (step + 1))).sqrt() + eps)
            moved.append(value * (1 - lr * (0.1 if i == 0 else 0.0)) - lr * adam)
        weight, bias = moved
        assert read_log(run.folder)[step]["lr"] == pytest.approx(lr, rel=1e-5, abs=1e-12)
    torch.testing.assert_close(exported(run)["weight"].double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(exported(run)["bias"].double(), bias, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_global_norm(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"optim.name": "momentum", "optim.clip_grad": 0.01, "optim.weight_decay": 0.0, "loop.steps": 1})
    torch.manual_seed(run.seed)
    before = torch.nn.Linear(4, 1)
    fit(run)
    after = exported(run)
    moved = torch.cat([(after[name] - value.detach()).flatten() for name, value in before.named_parameters()]).norm()
    assert float(moved) == pytest.approx(0.05 * 0.01, rel=1e-3)
    assert read_log(run.folder)[0]["grad_norm"] > 0.01, "the norm before clipping is logged"


def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"task.nan_at": (3,)})
    fit(run)
    seen = tasks[0].seen
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True, True, False, True, True]
    assert torch.isfinite(exported(run)["weight"]).all()
    assert read_log(run.folder)[2]["bad_steps"] == 1
    assert read_log(run.folder)[3]["bad_steps"] == 0


def test_many_bad_steps_in_a_row_end_the_run_as_diverged(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"task.nan_at": (2, 4, 5, 6), "loop.steps": 20, "loop.max_bad_steps": 3})
    with pytest.raises(DivergedError, match="3 steps in a row") as caught:
        fit(run)
    assert caught.value.exit_code == 4
    assert tasks[0].passes == 6
    assert not (run.folder / "export").exists()


def test_bad_steps_that_are_not_in_a_row_do_not_add_up(line_run: MakeRun, tasks: Tasks) -> None:
    fit(line_run(**{"task.nan_at": (1, 2, 4, 5, 7, 8), "loop.steps": 9, "loop.max_bad_steps": 3}))


def test_two_accumulated_batches_equal_one_of_double_size(line_run: MakeRun, tasks: Tasks) -> None:
    one = line_run(name="one", **{"task.batch_size": 8})
    two = line_run(name="two", **{"task.batch_size": 4, "loop.accumulate": 2})
    fit(one)
    fit(two)
    assert tasks[1].passes == 2 * tasks[0].passes
    for name, value in exported(one).items():
        torch.testing.assert_close(exported(two)[name], value, rtol=1e-5, atol=1e-6)


def test_a_bad_batch_among_accumulated_ones_spoils_the_whole_step(line_run: MakeRun, tasks: Tasks) -> None:
    fit(line_run(**{"task.nan_at": (3,), "loop.accumulate": 2}))
    seen = tasks[0].seen[::2]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_the_moving_average_follows_its_formula_and_is_what_is_exported(line_run: MakeRun, tasks: Tasks) -> None:
    """timm's rule: update t decays by min(decay, 1 - t^(-2/3)) of t = steps before this one, 0 at the first two."""
    run = line_run(**{"optim.ema_decay": 0.6, "loop.steps": 8})
    metrics = fit(run)
    trained = [*tasks[0].seen[1:], tasks[0].linear.weight.detach()]
    average = tasks[0].seen[0]
    decays = []
    for step, weight in enumerate(trained):
        decay = 0.0 if step < 2 else min(0.6, 1 - step ** (-2 / 3))
        decays.append(decay)
        average = decay * average + (1 - decay) * weight
    assert 0 < decays[2] < 0.6 == decays[-1], "both branches of the rule are met"
    torch.testing.assert_close(exported(run)["weight"], average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(exported(run)["weight"], trained[-1])
    answer = 2 * float(exported(run)["weight"].sum() + exported(run)["bias"])
    assert metrics["answer"] == pytest.approx(answer, rel=1e-5)


def test_an_evaluation_that_fails_costs_no_training(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"loop.save_every": 100, "task.evaluation_fails": True})
    with pytest.raises(DataMissingError, match="held out"):
        fit(run)
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step-00000006"]


def test_evaluation_leaves_the_random_numbers_of_training_alone(line_run: MakeRun, tasks: Tasks) -> None:
    often, never = (
        line_run(name="often", **{"task.dropout": 0.5, "loop.eval_every": 1}),
        line_run(name="never", **{"task.dropout": 0.5}),
    )
    fit(often)
    fit(never)
    assert_same(exported(often), exported(never))
    assert len(read_log(often.folder, "eval")) == 6
    assert len(read_log(never.folder, "eval")) == 1


def test_the_seed_decides_the_result(line_run: MakeRun, tasks: Tasks) -> None:
    runs = [line_run(name=f"r{i}", seed=seed, **{"task.dropout": 0.5}) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        fit(run)
    assert_same(exported(runs[0]), exported(runs[1]))
    assert not torch.equal(exported(runs[0])["weight"], exported(runs[2])["weight"])


def test_sigterm_saves_the_state_and_leaves_a_marker(line_run: MakeRun, tasks: Tasks) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = line_run(**{"task.stop_at": 3, "loop.save_every": 100})
    with pytest.raises(PreemptedError, match="--resume") as caught:
        fit(run)
    assert caught.value.exit_code == 75
    assert (run.folder / "preempted").read_text() == "3\n"
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step-00000003"]
    assert not (run.folder / "export").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    line_run: MakeRun, tasks: Tasks, stop: int, ema: float | None
) -> None:
    common = {"task.dropout": 0.5, "optim.ema_decay": ema, "loop.accumulate": 2}
    whole = line_run(name="whole", **common)
    metrics = fit(whole)
    stopped = line_run(name="stopped", **common, **{"task.stop_at": 2 * stop})
    with pytest.raises(PreemptedError):
        fit(stopped)
    record = json.loads((stopped.folder / "run.json").read_text())
    record["task"]["stop_at"] = 0
    (stopped.folder / "run.json").write_text(json.dumps(record))
    resumed = line_run(name="stopped", resume=True, **common)
    assert fit(resumed) == metrics
    assert_same(exported(resumed), exported(whole))
    assert not (resumed.folder / "preempted").exists()
    losses = [[record["loss"] for record in read_log(run.folder)] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert tasks[-1].passes == 2 * (6 - stop)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"loop.keep": 3})
    fit(run)
    finished = exported(run)
    newest = run.folder / "checkpoints" / "step-00000006"
    for path in newest.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:-1])
    fit(line_run(resume=True, **{"loop.keep": 3}))
    assert tasks[-1].passes == 2, "from step 4"
    assert_same(exported(run), finished)
    fit(line_run(resume=True, **{"loop.keep": 3}))
    assert tasks[-1].passes == 0, "the damaged checkpoint was written again"
    (alarm,) = read_log(run.folder, "alarm")
    assert alarm["text"].startswith("step-00000006 is damaged (__0_0.distcp), and put aside")
    assert len(list((run.folder / "checkpoints").glob("step-00000006.damaged-*"))) == 1


def test_a_run_without_one_whole_checkpoint_is_not_silently_started_again(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run()
    fit(run)
    for path in (run.folder / "checkpoints").glob("*/*.distcp"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
        fit(line_run(resume=True))
    assert len(list_checkpoints(run.folder / "checkpoints")) == 2


def test_an_existing_run_is_neither_continued_nor_overwritten_unasked(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run()
    fit(run)
    before = (run.folder / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="--resume, --overwrite or another --name"):
        fit(run)
    assert (run.folder / "log.jsonl").read_bytes() == before
    fit(line_run(overwrite=True, **{"loop.steps": 3}))
    assert [record["step"] for record in read_log(run.folder)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optim.lr": 0.1}, "optim.lr"),
        ({"task.batch_size": 4}, "task.batch_size"),
        ({"seed": 5}, "seed"),
        ({"loop.steps": 9}, "loop.steps"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_a_changed_run_is_not_resumed_and_the_field_is_named(
    line_run: MakeRun, tasks: Tasks, changes: dict[str, Any], name: str
) -> None:
    fit(line_run())
    with pytest.raises(ConfigError, match=rf"other values of {name}: cannot resume"):
        fit(line_run(resume=True, **changes))


def test_fields_that_do_not_decide_the_result_may_change(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run()
    fit(run)
    finished = exported(run)
    fit(line_run(resume=True, **{"loop.log_every": 3, "loop.save_every": 5, "loop.keep": 1, "loop.eval_every": 2}))
    assert_same(exported(run), finished)


def test_resuming_a_run_that_never_started_starts_it(line_run: MakeRun, tasks: Tasks) -> None:
    fit(line_run(resume=True))
    assert tasks[0].passes == 6


def test_a_time_limit_ends_the_run_early(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"loop.max_seconds": 1e-9, "loop.steps": 1000})
    fit(run)
    assert tasks[0].passes == 1
    assert (run.folder / "export").is_dir()


def test_a_slow_first_step_within_the_time_limit_changes_nothing(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step takes three of ten seconds, more than its share of six steps; the limit is never reached."""
    fit(line_run(name="free"))
    clock = itertools.chain([0.0, 3.0], itertools.repeat(3.0))
    monkeypatch.setattr("beit3.train.loop._now", lambda: next(clock))
    run = line_run(**{"loop.max_seconds": 10.0})
    fit(run)
    assert read_log(run.folder)[-1]["seconds"] == 3.0
    assert_same(exported(run), exported(line_run(name="free")))


def test_a_folder_that_cannot_be_made_is_one_line(line_run: MakeRun, tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        fit(line_run(out=tmp_path / "file"))


def test_bf16_trains_with_weights_in_full_precision(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(precision="bf16")
    fit(run)
    assert exported(run)["weight"].dtype == torch.float32
    full = line_run(name="full")
    fit(full)
    assert not torch.equal(exported(run)["weight"], exported(full)["weight"])
    torch.testing.assert_close(exported(run)["weight"], exported(full)["weight"], rtol=0.1, atol=0.05)


def test_a_step_that_is_not_finite_is_told_and_its_samples_are_written_down(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"task.nan_at": (3,), "loop.accumulate": 2})
    fit(run)
    (path,) = (run.folder / "bad_steps").iterdir()
    found = json.loads(path.read_text())
    assert (found["step"], found["losses"][0]) == (2, "nan")
    assert found["samples"] == [f"row {row}" for row in range(16, 32)]
    (alarm,) = read_log(run.folder, "alarm")
    assert alarm["step"] == 2
    assert "bad_steps" in alarm["text"]


@pytest.mark.parametrize(("metric", "best"), [("answer", 5), ("-answer", 2)])
def test_the_best_evaluation_is_kept_beside_the_newest(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    run = line_run(**{"loop.eval_every": 1, "loop.save_every": 100, "loop.keep": 1, "loop.keep_best": metric})
    answers = iter([3.0, 1.0, 2.0, 4.0, 5.0, 0.0])
    monkeypatch.setattr(type(run.task.build()), "evaluate", lambda self, loader: {"answer": next(answers)})
    fit(run)
    assert _steps(run) == [best, 6]


def test_an_evaluation_that_is_not_a_number_is_never_the_best(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = line_run(**{"loop.eval_every": 1, "loop.save_every": 100, "loop.keep": 1, "loop.keep_best": "answer"})
    answers = iter([math.nan, 1.0, 3.0, 2.0, math.inf, 0.0])
    monkeypatch.setattr(type(run.task.build()), "evaluate", lambda self, loader: {"answer": next(answers)})
    fit(run)
    assert _steps(run) == [3, 6]


def test_the_best_stays_as_long_as_a_better_one_is_not_saved(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = line_run(**{"loop.eval_every": 1, "loop.save_every": 100, "loop.keep": 1, "loop.keep_best": "answer"})
    answers = iter([0.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    monkeypatch.setattr(type(run.task.build()), "evaluate", lambda self, loader: {"answer": next(answers)})
    commit = checkpoint._commit

    def fail_at_4(folder: Path, target: Path, *rest: Any) -> None:
        if target.name == "step-00000004":
            raise OSError("no room")
        commit(folder, target, *rest)

    monkeypatch.setattr(checkpoint, "_commit", fail_at_4)
    fit(run)
    assert _steps(run) == [2, 6]


def test_an_unknown_metric_to_keep_is_refused(line_run: MakeRun, tasks: Tasks) -> None:
    with pytest.raises(ConfigError, match=r"'anser' is no metric .* did you mean 'answer'"):
        fit(line_run(**{"loop.eval_every": 1, "loop.keep_best": "anser"}))


def test_checkpoints_of_round_steps_are_kept_for_ever(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"loop.save_every": 1, "loop.keep": 1, "loop.keep_every": 2})
    fit(run)
    assert _steps(run) == [2, 4, 6]


def test_time_asks_for_checkpoints_as_well(line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes 40 seconds by this clock, the first half of it: two make a minute."""
    clock = itertools.count(0, 20)  # asked at the beginning and twice in a step
    monkeypatch.setattr("beit3.train.loop._now", lambda: float(next(clock)))
    run = line_run(**{"loop.save_every": 100, "loop.save_minutes": 1.0, "loop.keep": 9})
    fit(run)
    assert _steps(run) == [2, 4, 6]


def test_data_that_are_too_bad_end_the_run(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run(**{"loop.steps": 400, "loop.max_bad_fraction": 0.1})
    with pytest.raises(BadDataError, match=r"loop.max_bad_fraction"):
        fit(run)
    assert read_log(run.folder)[-1]["step"] == 112, "a thousand samples were seen, one in nine was odd"


@pytest.mark.parametrize("place", ["_autocast", "_take_step", "_evaluate"])
def test_a_lack_of_memory_is_one_line_with_the_shape_of_the_batch(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def grow(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(f"beit3.train.loop.{place}", grow)
    with pytest.raises(
        BeitError, match=r"out of memory after step \d on rank 0, with the batch batch \(8, 5\) float32"
    ):
        fit(line_run())


def test_a_step_that_is_not_finite_leaves_the_statistics_of_batch_norms_alone(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Normed(type(line_run().task.build())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(5)

        def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = batch * torch.nan if self.passes + 1 in self.config.nan_at else batch
            values: dict[str, torch.Tensor] = super().forward(self.norm(rows))
            return values

    built: list[Any] = []

    def build(self: Any) -> Any:
        built.append(Normed(self))
        return built[-1]

    monkeypatch.setattr(type(line_run().task), "build", build)
    fit(line_run(**{"task.nan_at": (3,)}))
    skipped = built[-1].norm
    assert torch.isfinite(skipped.running_mean).all()
    assert torch.isfinite(skipped.running_var).all()
    assert skipped.num_batches_tracked == 5, "of six steps"


def test_a_jump_of_the_loss_is_an_alarm(line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    line = type(line_run().task.build())
    forward = line.forward

    def jump(self: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = forward(self, batch)
        return {name: value * (1000 if self.passes == 15 else 1) for name, value in values.items()}

    monkeypatch.setattr(line, "forward", jump)
    run = line_run(**{"loop.steps": 18})
    fit(run)
    (alarm,) = read_log(run.folder, "alarm")
    assert alarm["step"] == 15
    assert alarm["text"].startswith("the loss jumped to")


def test_a_folder_in_use_is_refused(line_run: MakeRun, tasks: Tasks) -> None:
    run = line_run()
    with (
        open_folder(run, Ranks(0, 1, torch.device("cpu"))),
        pytest.raises(ConfigError, match="in use by another process"),
    ):
        fit(replace(run, resume=True))
    fit(replace(run, resume=True))


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    line_run: MakeRun, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = line_run(**{"loop.keep": 9})
    write = checkpoint._write_tensors

    def fail(folder: Path, *rest: Any) -> None:
        if "step-00000004" in folder.name:
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(checkpoint, "_write_tensors", fail)
    fit(run)
    assert _steps(run) == [2, 6]
    (alarm,) = read_log(run.folder, "alarm")
    assert "No space left" in alarm["text"]


def _steps(run: Run) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run.folder / "checkpoints")]
