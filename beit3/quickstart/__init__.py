"""The whole road in one command: tokenizers, masked data modeling, contrastive tuning, evaluation, a page to look at.

    beit3 quickstart            three to ten minutes on two CPU cores, with bf16 instructions or without
    beit3 quickstart --full     the longer run, about an hour; a GPU makes it minutes

Every stage is a recipe of this repository; what is finished is kept, so that `--resume` goes on after an interruption.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import beit3
from beit3.config import Run, replace
from beit3.data.emoji import write_emoji
from beit3.errors import ConfigError, DataMissingError
from beit3.model.heads import PretrainingModel
from beit3.predict import load
from beit3.pretrain.text_tokenizer import TOKENIZER_FILE, TextTokenizerRun, train_from_corpora
from beit3.quickstart.evaluation import (
    PART_TITLES,
    Recall,
    chance_recall,
    load_parts,
    model_recall,
    pixel_recall,
    save_recall,
)
from beit3.quickstart.pictures import show_gallery, show_hidden_patches, show_hidden_words, training_codebook
from beit3.recipes import load_recipe
from beit3.tokenizer.teachers import build_teacher, read_teacher
from beit3.tokenizer.vqkd import VQKD
from beit3.tokenizer_page import show_codebook, show_similarity, show_training
from beit3.train.folder import EXPORT
from beit3.train.log import read_log
from beit3.train.loop import fit
from beit3.train.report import Report

_console = Console(stderr=True)
_MOST_SECONDS = {"visual_tokenizer": 65.0, "pretraining": 175.0, "tuning": 235.0}
"""Longest training time of the stages: a slower machine takes fewer steps, and ten minutes suffice all the same.
A comparison and the longer run have no limits."""
PRETRAINED, RANDOM, EQUAL_TIME = "pretrained", "random, equal steps", "random, equal total time"


@dataclass(frozen=True)
class Plan:
    """Where a quickstart lives and what it runs."""

    folder: Path
    data: Path
    full: bool
    limited: bool
    """Whether stages keep to `_MOST_SECONDS`."""
    seed: int

    def run(self, recipe: str, name: str, **changes: Any) -> Run:
        """A stage's run: the recipe (its `full` variant if asked), with this plan's places and seed."""
        made = load_recipe(f"recipe:{recipe}{':full' if self.full else ''}")
        assert isinstance(made, Run)
        limit = {"loop.max_seconds": _MOST_SECONDS[name]} if self.limited else {}
        changes = {**limit, **changes}
        return replace(made, name=name, data=self.data, out=self.folder, seed=self.seed, resume=True, **changes)

    @property
    def text_tokenizer(self) -> Path:
        """The `.spm` file of the first stage."""
        return self.folder / "text_tokenizer" / TOKENIZER_FILE

    def export(self, name: str) -> Path:
        """The exchange folder of a stage."""
        return self.folder / name / EXPORT


def quickstart(
    *,
    out: Path = Path("runs/quickstart"),
    data: Path | None = None,
    full: bool = False,
    compare: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train a text tokenizer, a visual tokenizer and a small BEiT-3 on real pictures, and look at what it learned.

    Args:
        out: folder of all stages and of `report.html`.
        data: prepared folder with `pairs` and `text` to train on instead of the embedded emoji; evaluation stays.
        full: longer stages.
        compare: also tune from random weights, for as many steps and for as much total time.
        seed: of everything.
        resume: go on where an earlier call stopped.
    """
    if out.exists() and not resume:
        raise ConfigError(f"{out} exists: use --resume to go on with it, or another --out")
    if data is not None and not (data / "pairs").is_dir():
        raise DataMissingError(
            f"{data / 'pairs'} does not exist: write it with `beit3 prepare pairs SOURCES --out ...`"
        )
    started = time.time()
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(out, _prepare_data(out, data), full, not (full or compare), seed)
    _train_text_tokenizer(plan)
    stages = _stages(plan, compare)
    for name, make in stages.items():
        if (plan.export(name)).is_dir():
            _console.print(f"{name}: done before")
            continue
        _console.rule(name)
        fit(make())
    _console.rule("evaluation")
    results = _evaluate(plan, compare)
    _write_report(plan, results, list(stages))
    _console.print(f"{out / 'report.html'}: written after {(time.time() - started) / 60:.1f} minutes", highlight=False)


def _prepare_data(out: Path, data: Path | None) -> Path:
    """The embedded corpus as prepared shards; the user's own `pairs` and `text` take the place of its training part."""
    folder = out / "data"
    if not (folder / "pairs").exists():
        _console.print("preparing the embedded emoji corpus")
        write_emoji(folder, overwrite=True)
    for part in ("pairs", "text"):
        own = folder / part
        if data is not None and not own.is_symlink():
            shutil.rmtree(own)
            own.symlink_to((data / part).resolve(), target_is_directory=True)
    return folder


def _train_text_tokenizer(plan: Plan) -> None:
    if plan.text_tokenizer.exists():
        return
    _console.rule("text tokenizer")
    made = load_recipe("recipe:tokenizers/text_emoji")
    assert isinstance(made, TextTokenizerRun)
    tokenizer = train_from_corpora(replace(made, name="text_tokenizer", data=plan.data, out=plan.folder))
    _console.print(f"{len(tokenizer)} ids", highlight=False)


def _stages(plan: Plan, compare: bool) -> dict[str, Callable[[], Run]]:
    """The stages in order; each run is made when its turn comes, because it may need what earlier ones measured."""
    text = {"task.text_tokenizer": plan.text_tokenizer}
    stages: dict[str, Callable[[], Run]] = {
        "visual_tokenizer": lambda: plan.run("tokenizers/vqkd_emoji", "visual_tokenizer"),
        "pretraining": lambda: plan.run(
            "pretrain/mdm_emoji",
            "pretraining",
            **text,
            **{"task.visual_tokenizer": plan.export("visual_tokenizer")},
        ),
        "tuning": lambda: plan.run(
            "pretrain/contrastive_emoji", "tuning", **text, **{"task.init_from": plan.export("pretraining")}
        ),
    }
    if compare:

        def from_random(name: str) -> Run:
            """The contrastive stage without the pretrained weights."""
            return plan.run("pretrain/contrastive_emoji", name, **text, **{"task.init_from": None})

        def equal_time() -> Run:
            """The same with as many steps as fit into the time of all stages together."""
            run = from_random("tuning_random_equal_time")
            spent = sum(_seconds(plan.folder / name) for name in ("visual_tokenizer", "pretraining", "tuning"))
            steps = run.loop.steps * spent / _seconds(plan.folder / "tuning")
            return replace(run, **{"loop.steps": round(steps)})

        stages["tuning_random"] = lambda: from_random("tuning_random")
        stages["tuning_random_equal_time"] = equal_time
    return stages


def _seconds(folder: Path) -> float:
    """Training time of a finished run, with the teacher's features where they were computed."""
    features: float = sum(json.loads(path.read_text())["seconds"] for path in folder.glob("cache/*/cache.json"))
    return float(read_log(folder)[-1]["seconds"]) + features


def _evaluate(plan: Plan, compare: bool) -> dict[str, list[Recall]]:
    parts = load_parts()
    results = {PRETRAINED: model_recall(load(plan.export("tuning")), parts)}
    if compare:
        results[RANDOM] = model_recall(load(plan.export("tuning_random")), parts)
        results[EQUAL_TIME] = model_recall(load(plan.export("tuning_random_equal_time")), parts)
    results["raw-pixel nearest neighbour"] = pixel_recall(parts)
    results["chance"] = chance_recall(parts)
    save_recall(plan.folder / "results.json", results)
    return results


def _write_report(plan: Plan, results: dict[str, list[Recall]], stages: list[str]) -> None:
    report = Report("BEiT3 quickstart", _lead(plan))
    book = training_codebook(VQKD.load(plan.export("visual_tokenizer")))
    section = report.section("Results")
    _show_results(section, results)
    fusion = json.loads((plan.folder / "pretraining" / "metrics.json").read_text())
    section = report.section("What pretraining learned")
    section.table(
        ["hidden words of held-out pictures", "cross-entropy", "accuracy"],
        [
            [name.replace("_", " "), f"{fusion[f'mlm_loss_{name}']:.3f}", f"{fusion[f'mlm_accuracy_{name}']:.1%}"]
            for name in ("right_picture", "wrong_picture", "no_picture")
        ],
    )
    section.text(
        f"Hidden patches: the right one of {len(book.counts)} codes in "
        f"{fusion['mim_accuracy']:.1%} of the cases; always naming the commonest code would score "
        f"{fusion['commonest_code']:.1%}."
    )
    predictor = load(plan.export("pretraining"), device="cpu")
    assert isinstance(predictor.model, PretrainingModel)
    show_hidden_words(report.section("Hidden words"), predictor)
    show_hidden_patches(report.section("Hidden patches"), predictor.model, predictor, book)
    show_codebook(report.section("Codebook"), book)
    teacher = read_teacher(plan.export("visual_tokenizer"))
    assert teacher is not None
    show_similarity(report.section("Teacher"), book, build_teacher(teacher))
    show_gallery(report.section("Search"), load(plan.export("tuning")))
    section = report.section("Curves")
    show_training(section, plan.folder / "visual_tokenizer")
    section.curves(
        plan.folder / "pretraining",
        {
            "loss": ["mim_loss", "pair_mim_loss", "mlm_loss", "pair_mlm_loss"],
            "accuracy": ["mim_accuracy", "pair_mim_accuracy", "mlm_accuracy", "pair_mlm_accuracy"],
            "gradient norm": ["grad_norm"],
        },
    )
    for name in stages[2:]:
        section.curves(plan.folder / name, {"loss": ["loss"], "accuracy in the batch": ["batch_accuracy"]})
    report.save(plan.folder / "report.html")


def _lead(plan: Plan) -> str:
    minutes = sum(_seconds(plan.folder / name) for name in ("visual_tokenizer", "pretraining", "tuning")) / 60
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"beit3 {beit3.__version__}, torch {torch.__version__}, {device} with {torch.get_num_threads()} threads; seed "
        f"{plan.seed}; {minutes:.1f} minutes of training in three stages. Pictures are emoji drawings, not photographs."
    )


def _show_results(section: Any, results: dict[str, list[Recall]]) -> None:
    section.text(
        "Recall at 1 / 5 / 10 in percent. Pictures of Twemoji and of 172 concepts were never seen in training. "
        "Candidates are each part's own captions, and all captions of the corpus."
    )
    rows = []
    for place, row in enumerate(next(iter(results.values()))):
        for method, recalls in results.items():
            found = recalls[place]
            rows.append(
                [
                    PART_TITLES[row.part],
                    row.candidates,
                    method,
                    _percent(found.image_to_text),
                    _percent(found.text_to_image),
                ]
            )
    section.table(["part", "captions", "method", "image to text", "text to image"], rows, 1)


def _percent(recall: dict[str, float] | None) -> str:
    return "cannot answer" if recall is None else " / ".join(f"{100 * value:.1f}" for value in recall.values())
