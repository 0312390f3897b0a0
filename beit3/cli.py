"""The command `beit3`: one verb, its arguments, one clear line when something is wrong.

Exit codes: 0 done, 1 error, 2 usage or configuration, 3 data missing, 4 diverged, 75 stopped with its state saved.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from beit3.config import Run, nearest, require
from beit3.errors import BeitError, ConfigError

Arguments = Sequence[str]
T = TypeVar("T")


def main() -> None:
    """Entry point: run a verb and exit with its code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Arguments) -> int:
    """Run a verb and return the exit code; errors of the package become one line on stderr."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            raise ConfigError(f"unknown command '{verb}'; {nearest(verb, VERBS)}")
        VERBS[verb](rest)
    except BeitError as error:
        if debug:
            traceback.print_exc()
        print(f"beit3: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("beit3: interrupted", file=sys.stderr)
        return 130
    except SystemExit:  # help was printed
        return 0
    return 0


def _train(arguments: Arguments) -> None:
    """Train a recipe: beit3 train FILE[:variant] [--field value ...]."""
    from beit3.pretrain.text_tokenizer import train_from_corpora
    from beit3.recipes import list_recipes, load_recipe
    from beit3.train.loop import fit

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: beit3 train FILE[:variant] [--field value ...]\n\nrecipes:")
        print("\n".join(f"  recipe:{name}" for name in list_recipes()))
        print("\nbeit3 train FILE --help lists the fields.")
        return
    if arguments[0].startswith("-"):
        raise ConfigError(f"beit3 train needs a recipe before '{arguments[0]}': beit3 train FILE[:variant] ...")
    default = load_recipe(arguments[0])
    run = _override(default, arguments[1:], f"beit3 train {arguments[0]}")
    if isinstance(run, Run):
        fit(run)
    else:
        tokenizer = train_from_corpora(run)
        print(f"{run.folder}: text tokenizer with {len(tokenizer):,} ids")


def _prepare(arguments: Arguments) -> None:
    """Make and index shards: beit3 prepare pairs|images|text SOURCE ... --out FOLDER."""
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
    def run(*args: Any, **named: Any) -> None:
        print(convert(*args, **named))

    _call(run, arguments, "beit3 convert")


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
    from beit3.search.embed import embed_folder

    def embed(
        folder: tyro.conf.Positional[Path],
        *,
        model: str,
        out: Path,
        update: bool = False,
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    ) -> None:
        """Embed all pictures below a folder and write an index; if interrupted, the same command goes on.

        Args:
            folder: of pictures, with sub-folders.
            model: exchange folder, hf-hub:organisation/name, or released .pth file.
            out: folder of the index.
            update: embed only what is new or changed since the index was made, and drop what is gone.
            device: where the model runs.
        """
        try:
            report = embed_folder(folder, model, out, update=update, device=device)
        except KeyboardInterrupt:
            print("what is embedded is kept: the same command goes on from there", file=sys.stderr)
            raise
        print("\n".join(report.lines(out)))

    _call(embed, arguments, "beit3 embed")


def _search(arguments: Arguments) -> None:
    """Find pictures by sentences and by pictures: beit3 search INDEX QUERY ... [--sheet FILE]."""
    from beit3.model.heads import RetrievalModel
    from beit3.predict import load
    from beit3.search.contact_sheet import check_sheet, contact_sheet, save_sheet
    from beit3.search.index import Index, embed_queries, names_picture
    from beit3.search.pictures import printable

    def search(
        index: tyro.conf.Positional[Path],
        queries: tyro.conf.Positional[tuple[str, ...]],
        *,
        top: int = 10,
        model: str | None = None,
        sheet: Path | None = None,
    ) -> None:
        """Print the pictures nearest to each query, with scores (cosines), best first.

        Args:
            index: folder written by `beit3 embed`.
            queries: sentences, or paths of pictures.
            top: pictures of each query.
            model: as for beit3 embed; needed only if the one the index was made with has moved.
            sheet: picture file (.png, .jpg, .webp) to draw the hits on.
        """
        require(bool(queries), "beit3 search needs a sentence or the path of a picture: beit3 search INDEX QUERY ...")
        held = Index.load(index)
        if sheet is not None:
            check_sheet(sheet, queries, held)
        predictor = load(model or held.settings.model)
        if not held.made_with(predictor):
            changed = f"{held.settings.model} has changed since {index} was made"
            require(model is not None, f"{changed}: embed the folder again, or name the old model with --model")
            print(f"note: {model} is not the model {index} was made with", file=sys.stderr)
        if not isinstance(predictor.model, RetrievalModel) and not all(map(names_picture, queries)):
            print("note: this model was not tuned for retrieval: sentences find little", file=sys.stderr)
        found = held.search(embed_queries(predictor, queries), top)
        for number, (query, hits) in enumerate(zip(queries, found, strict=True)):
            if len(queries) > 1:
                print("\n" * (number > 0) + printable(query))
            print("\n".join(f"{hit.score:.3f}  {printable(_from_here(hit.path))}" for hit in hits))
        if sheet is not None:
            save_sheet(contact_sheet(queries, found), sheet)

    _call(search, arguments, "beit3 search")


def _caption(arguments: Arguments) -> None:
    """Describe pictures: beit3 caption PICTURE|FOLDER ... --model SOURCE [--out FILE.jsonl]."""
    from beit3.asking import caption

    _call(caption, arguments, "beit3 caption")


def _answer(arguments: Arguments) -> None:
    """Answer a question about pictures: beit3 answer PICTURE|FOLDER ... --question TEXT --model SOURCE."""
    from beit3.asking import answer

    _call(answer, arguments, "beit3 answer")


def _call(function: Callable[..., None], arguments: Arguments, prog: str) -> None:
    """Call a function with arguments of the command line; parsing ends before it starts."""

    @functools.wraps(function)
    def bind(*args: object, **named: object) -> Callable[[], None]:
        return functools.partial(function, *args, **named)

    with _one_line(prog):
        call = tyro.cli(bind, args=list(arguments), prog=prog)
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


def _from_here(path: Path) -> Path:
    """A path below the current folder without what leads there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _field(item: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not sign:
        raise ConfigError(f"--where takes FIELD=VALUE, not '{item}'")
    return name, value


VERBS: dict[str, Callable[[Arguments], None]] = {
    "quickstart": _quickstart,
    "train": _train,
    "prepare": _prepare,
    "tokenize": _tokenize,
    "convert": _convert,
    "info": _info,
    "embed": _embed,
    "search": _search,
    "caption": _caption,
    "answer": _answer,
}


def _help() -> str:
    lines = ["usage: beit3 VERB [arguments]", ""]
    for verb, function in VERBS.items():
        lines.append(f"  {verb:<12}{(function.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "beit3 VERB --help says more; --debug adds the traceback to errors."])
