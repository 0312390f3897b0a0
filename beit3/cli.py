"""The command `beit3`: one verb, its arguments, one clear line when something is wrong.

Exit codes: 0 done, 1 error, 2 usage or configuration, 3 data missing, 4 diverged, 75 stopped with its state saved.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from beit3.config import Run, nearest
from beit3.errors import BeitError, ConfigError

if TYPE_CHECKING:
    from beit3.recipes import AnyRun

Arguments = Sequence[str]
T = TypeVar("T")


def main() -> None:
    """Entry point: run a verb and exit with its code."""
    try:
        code = run_command(sys.argv[1:])
    except Exception:  # a mistake in the program
        traceback.print_exc()
        code = BeitError.exit_code
    ranks = sys.modules.get("beit3.train.pulse")
    if ranks is not None and any(thread.name.startswith(ranks.THREADS) for thread in threading.enumerate()):
        # One that waits in C++ for a lost rank would abort an orderly end, with a core file of the whole memory.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(arguments: Arguments) -> int:
    """Run a verb and return the exit code; errors of the package and of the system become one line on stderr."""
    try:
        os.getcwd()
    except OSError:  # libraries of PyTorch end a process that starts there
        print("beit3: the current folder was deleted: go to another one", file=sys.stderr)
        return ConfigError.exit_code
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _run_verb(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BeitError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"beit3: {error if isinstance(error, BeitError) else _name_reason(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, BeitError) else 1
    except KeyboardInterrupt:
        print("beit3: interrupted", file=sys.stderr)
        return 130
    except SystemExit:  # help was printed
        return 0
    return 0


def _run_verb(arguments: Arguments) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] not in VERBS:
        raise ConfigError(f"unknown command '{arguments[0]}'; {nearest(arguments[0], VERBS)}")
    VERBS[arguments[0]](arguments[1:])


def _name_reason(error: OSError) -> str:
    """What the system refused, in one line."""
    place = "" if error.filename is None else f"{error.filename}: "
    return " ".join(f"{place}{error.strerror or error or type(error).__name__}".split())


def _train(arguments: Arguments) -> None:
    """Train a recipe: beit3 train FILE[:variant] [--field value ...]."""
    from beit3.pretrain.text_tokenizer import train_from_corpora
    from beit3.recipes import list_recipes
    from beit3.train.loop import fit

    names = "\n".join(f"  recipe:{name}" for name in list_recipes())
    told = f"recipes:\n{names}\n\nbeit3 train FILE --help lists the fields."
    default = _recipe_of(arguments, "beit3 train FILE[:variant] [--field value ...]", told)
    run = _override(default, arguments[1:], f"beit3 train {arguments[0]}")
    if isinstance(run, Run):
        fit(run)
    else:
        tokenizer = train_from_corpora(run)
        print(f"{run.folder}: text tokenizer with {len(tokenizer):,} ids")


def _plan(arguments: Arguments) -> None:
    """What a run needs on other machines: beit3 plan FILE[:variant] --gpus N [--gpu h100] [--field value ...]."""
    from beit3.plan.page import PlanOptions, print_plan

    told = """Memory, time, traffic, data and checkpoints of a run on GPUs that need not be here.
beit3 plan FILE --help lists the options; fields are those of beit3 train FILE."""
    usage = "beit3 plan FILE[:variant] --gpus N [--gpu h100] [--field value ...]"
    default = _recipe_of(arguments, usage, told)
    prog = f"beit3 plan {arguments[0]}"
    if not isinstance(default, Run):
        raise ConfigError(f"{arguments[0]} trains no network: there is nothing to plan")
    with _one_line(prog):
        options, fields = tyro.cli(PlanOptions, args=list(arguments[1:]), prog=prog, return_unknown_args=True)
    print_plan(_override(default, fields, prog), options)


def _recipe_of(arguments: Arguments, usage: str, told: str) -> AnyRun:
    """The run of the recipe that the first argument names; help ends the command."""
    from beit3.recipes import load_recipe

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n{told}")
        raise SystemExit(0)
    if arguments[0].startswith("-"):
        raise ConfigError(f"{' '.join(usage.split()[:2])} needs a recipe before '{arguments[0]}': {usage}")
    return load_recipe(arguments[0])


def _prepare(arguments: Arguments) -> None:
    """Make shards of a corpus, or indexes of a finetuning set: beit3 prepare KIND SOURCE ... [--out FOLDER]."""
    from beit3.data.finetuning import FINETUNING_SETS

    corpora = ("pairs", "images", "text", "emoji")
    kind = arguments[0] if arguments else ""
    if not kind or kind.startswith("-") or kind in corpora:
        _prepare_corpus(arguments)
        return
    if kind not in FINETUNING_SETS:
        raise ConfigError(f"beit3 prepare knows no '{kind}'; {nearest(kind, (*corpora, *FINETUNING_SETS))}")

    @functools.wraps(FINETUNING_SETS[kind])
    def _prepare_set(*args: Any, **named: Any) -> None:
        print("\n".join(FINETUNING_SETS[kind](*args, **named).lines()))

    _call(_prepare_set, arguments[1:], f"beit3 prepare {kind}")


def _prepare_corpus(arguments: Arguments) -> None:
    """Make and index the shards of a corpus."""
    from beit3.data.emoji import write_emoji
    from beit3.data.prepare import prepare_images, prepare_pairs, prepare_text

    def prepare(
        kind: tyro.conf.Positional[Literal["pairs", "images", "text", "emoji"]],
        sources: tyro.conf.Positional[tuple[Path, ...]] = (),
        *,
        out: Path,
        where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE")] = (),
        skip_captions: Path | None = None,
        max_per_shard: int = 5000,
        overwrite: bool = False,
    ) -> None:
        """Make and index shards; say what was left out and why.

        Finetuning sets: beit3 prepare SET ROOT writes index files from the files as published, where SET is
        coco-captions, coco-retrieval, flickr30k, vqav2, nlvr2, nocaps, imagenet, image-folder, coco-detection or
        ade20k; beit3 prepare SET --help says more. Nothing is downloaded. Indexes of the released code (*.jsonl) need
        no preparation.

        Args:
            kind: what the samples are; `emoji` writes the embedded corpus and takes no sources.
            sources: tars in img2dataset's layout (also .tar.gz), folders of pictures, or .txt and .jsonl files.
            out: folder to write; must not exist.
            where: keep samples whose json field has this value.
            skip_captions: file of captions, one a line, whose samples are left out.
            max_per_shard: samples of one tar.
            overwrite: replace an existing folder.
        """
        fields = dict(_field(item) for item in where)
        if kind == "emoji":
            report = write_emoji(out, overwrite=overwrite)
        elif kind == "text":
            report = prepare_text(sources, out, overwrite=overwrite)
        elif kind == "images":
            report = prepare_images(sources, out, where=fields, max_per_shard=max_per_shard, overwrite=overwrite)
        else:
            report = prepare_pairs(
                sources,
                out,
                where=fields,
                max_per_shard=max_per_shard,
                skip_captions=skip_captions,
                overwrite=overwrite,
            )
        print("\n".join(report.lines()))

    _call(prepare, arguments, "beit3 prepare")


def _convert(arguments: Arguments) -> None:
    """Turn a released .pth file into an exchange folder, or back: beit3 convert SOURCE OUT."""
    from beit3.convert import convert

    @functools.wraps(convert)
    def _run(*args: Any, **named: Any) -> None:
        print(convert(*args, **named))

    _call(_run, arguments, "beit3 convert")


def _tokenize(arguments: Arguments) -> None:
    """Pictures to codes, texts to ids: beit3 tokenize images FOLDER OUT | text FILE ... --tokenizer TOKENIZER."""
    from beit3.tokenizing import tokenize_images, tokenize_text

    kinds: dict[str, Callable[..., None]] = {"images": tokenize_images, "text": tokenize_text}
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: beit3 tokenize images FOLDER OUT --tokenizer T | text FILE ... --tokenizer T.spm")
        print("beit3 tokenize images --help and beit3 tokenize text --help say more.")
        return
    if not arguments or arguments[0] not in kinds:
        given = f", not '{arguments[0]}'" if arguments else ""
        raise ConfigError(f"beit3 tokenize takes images or text{given}: beit3 tokenize images FOLDER OUT --tokenizer T")
    _call(kinds[arguments[0]], arguments[1:], f"beit3 tokenize {arguments[0]}")


def _info(arguments: Arguments) -> None:
    """Say what a file or folder holds, or show a visual tokenizer: beit3 info SOURCE [--page FILE --images FOLDER]."""
    from beit3.info import info

    _call(info, arguments, "beit3 info")


def _quickstart(arguments: Arguments) -> None:
    """Train tokenizers and a small BEiT-3 on real pictures, and look at what it learned."""
    from beit3.quickstart import quickstart

    _call(quickstart, arguments, "beit3 quickstart")


def _embed(arguments: Arguments) -> None:
    """Embed a folder of pictures for searching: beit3 embed FOLDER --model SOURCE --out INDEX [--update]."""
    from beit3.search.commands import embed

    _call(embed, arguments, "beit3 embed")


def _search(arguments: Arguments) -> None:
    """Find pictures by sentences and by pictures: beit3 search INDEX QUERY ... [--sheet FILE]."""
    from beit3.search.commands import search

    _call(search, arguments, "beit3 search")


def _caption(arguments: Arguments) -> None:
    """Describe pictures: beit3 caption PICTURE|FOLDER ... --model SOURCE [--out FILE.jsonl]."""
    from beit3.search.asking import caption

    _call(caption, arguments, "beit3 caption")


def _answer(arguments: Arguments) -> None:
    """Answer a question about pictures: beit3 answer PICTURE|FOLDER ... --question TEXT --model SOURCE."""
    from beit3.search.asking import answer

    _call(answer, arguments, "beit3 answer")


def _detect(arguments: Arguments) -> None:
    """Find objects in pictures: beit3 detect PICTURE|FOLDER ... --model SOURCE [--out FOLDER]."""
    from beit3.search.dense import detect

    _call(detect, arguments, "beit3 detect")


def _segment(arguments: Arguments) -> None:
    """Name every pixel of pictures: beit3 segment PICTURE|FOLDER ... --model SOURCE [--out FOLDER]."""
    from beit3.search.dense import segment

    _call(segment, arguments, "beit3 segment")


def _evaluate(arguments: Arguments) -> None:
    """Measure a checkpoint: beit3 evaluate CHECKPOINT --data INDEX.jsonl [--task TASK] [--out FOLDER]."""
    from beit3.evaluate import evaluate

    _call(evaluate, arguments, "beit3 evaluate")


def _call(function: Callable[..., None], arguments: Arguments, prog: str) -> None:
    """Call a function with arguments of the command line; parsing ends before it starts."""

    @functools.wraps(function)
    def _bind(*args: object, **named: object) -> Callable[[], None]:
        return functools.partial(function, *args, **named)

    with _one_line(prog):
        call = tyro.cli(_bind, args=list(arguments), prog=prog)
    call()


def _override(default: T, arguments: Arguments, prog: str) -> T:
    """Change fields of a run by arguments such as `--optim.lr 1e-3`."""
    with _one_line(prog):
        return tyro.cli(
            type(default), args=list(arguments), prog=prog, default=default, config=(tyro.conf.AvoidSubcommands,)
        )


@contextlib.contextmanager
def _one_line(prog: str) -> Iterator[None]:
    """Turn what tyro refuses, and draws in a box, into one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise  # help was printed
        raise ConfigError(_condense(complaint.getvalue(), prog)) from None


def _condense(complaint: str, prog: str) -> str:
    """What tyro drew in a box, as one line."""
    text = " ".join(re.sub(r"[\u2500-\u257f]+", " ", complaint).split())
    text = re.split(r" (?:For full helptext|Argument helptext)", text)[0]
    unknown = re.search(r"Unrecognized options: (\S+)", text)
    if unknown is not None:
        name = unknown[1].rstrip(",")
        meant = re.search(r"Perhaps you meant: (\S+)", text)
        return f"{prog} has no option {name}; " + (f"did you mean {meant[1]}?" if meant else f"see {prog} --help")
    return re.sub(r"^.*?Error parsing ", "", text) + f"; see {prog} --help"


def _field(item: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not sign:
        raise ConfigError(f"--where takes FIELD=VALUE, not '{item}'")
    return name, value


VERBS: dict[str, Callable[[Arguments], None]] = {
    "quickstart": _quickstart,
    "train": _train,
    "plan": _plan,
    "evaluate": _evaluate,
    "prepare": _prepare,
    "tokenize": _tokenize,
    "convert": _convert,
    "info": _info,
    "embed": _embed,
    "search": _search,
    "caption": _caption,
    "answer": _answer,
    "detect": _detect,
    "segment": _segment,
}


def _help() -> str:
    lines = ["usage: beit3 VERB [arguments]", ""]
    for verb, function in VERBS.items():
        lines.append(f"  {verb:<12}{(function.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "beit3 VERB --help says more; --debug adds the traceback to errors."])
