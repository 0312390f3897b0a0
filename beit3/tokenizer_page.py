"""A page about a visual tokenizer: patches that share a code, use of the codes, similarity to the teacher.

Shapes: n pictures, (H, W) their size, P patch side, (h, w) grid of N patches, K codes.
"""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from beit3.data.images import decode_image
from beit3.data.shards import load_prepared
from beit3.data.transforms import EvalResize
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.tokenizer.teachers import Teacher, TeacherConfig, build_teacher
from beit3.tokenizer.vqkd import VQKD
from beit3.train.log import read_log
from beit3.train.report import Pixels, Report, Section, tile

_SEED = 0
_BATCH = 128
_GREY = 225
"""Behind patches, many of which are white."""


class CodeBook:
    """Codes of some pictures, with the patches behind them.

    Args:
        tokenizer: frozen.
        pictures: (n, 3, H, W) uint8, of the tokenizer's image size.
    """

    def __init__(self, tokenizer: VQKD, pictures: Tensor) -> None:
        self.tokenizer = tokenizer
        self.pictures = pictures
        codes = torch.cat([tokenizer.tokenize(part) for part in pictures.split(_BATCH)])
        self.codes: npt.NDArray[np.int64] = codes.reshape(-1).numpy()
        patch = tokenizer.config.patch_size
        cut = pictures.unfold(2, patch, patch).unfold(3, patch, patch)  # (n, 3, h, w, P, P)
        self.patches: Pixels = cut.permute(0, 2, 3, 4, 5, 1).reshape(-1, patch, patch, 3).numpy()
        self.counts: npt.NDArray[np.int64] = np.bincount(self.codes, minlength=tokenizer.config.codebook_size)

    def mean_patches(self) -> Pixels:
        """The average patch of every code (K, P, P, 3); grey where a code is unused."""
        sums = np.zeros((len(self.counts), *self.patches.shape[1:]), dtype=np.float64)
        np.add.at(sums, self.codes, self.patches)
        means = np.full_like(sums, 128.0)
        used = self.counts > 0
        means[used] = sums[used] / self.counts[used][:, None, None, None]
        return means.astype(np.uint8)

    def examples(self, code: int, number: int) -> list[Pixels]:
        """Patches drawn at random among those of a code."""
        places = np.flatnonzero(self.codes == code)
        chosen = np.random.default_rng(_SEED).choice(places, size=min(number, len(places)), replace=False)
        return [self.patches[place] for place in chosen]


def write_tokenizer_page(
    path: Path,
    tokenizer: VQKD,
    pictures: Tensor,
    *,
    title: str,
    lead: str,
    teacher: TeacherConfig | None,
    run: Path | None,
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        tokenizer: frozen, on the CPU.
        pictures: (n, 3, H, W) uint8, of the tokenizer's image size.
        title: of the page.
        lead: what the tokenizer is and where the pictures come from.
        teacher: the one it learned from; None leaves the comparison out.
        run: folder of its training run; None leaves the curves out.
    """
    book = CodeBook(tokenizer, pictures)
    report = Report(title, lead)
    show_codebook(report.section("Codebook"), book)
    if teacher is not None:
        section = report.section("Teacher")
        try:
            show_similarity(section, book, build_teacher(teacher))
        except DataMissingError as error:
            section.text(f"No comparison: {error}")
    if run is not None:
        show_training(report.section("Training"), run)
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save(path)


def show_training(section: Section, run: Path) -> None:
    """Curves of a tokenizer's training, and its alarms."""
    section.curves(
        run,
        {
            "loss": ["distillation_loss", "commitment_loss"],
            "codebook use": ["codebook_use"],
            "perplexity": ["perplexity"],
        },
    )
    section.curves(run, {"dead codes": ["dead_codes"], "quantization error": ["quantization_error"]})
    for alarm in read_log(run, "alarm"):
        section.text(f"Alarm at step {alarm['step']}: {alarm['text']}")


def load_pictures(folder: Path, size: tuple[int, int], number: int) -> Tensor:
    """Draw pictures of a prepared folder at random, but the same in every call: (n, 3, H, W) uint8.

    Args:
        folder: written by `beit3 prepare`.
        size: H and W; pictures are resized and cropped as in evaluation.
        number: at most so many.

    Raises:
        ConfigError: no picture of the folder can be read.
    """
    kept: list[bytes] = []
    draw = random.Random(_SEED)
    for place, sample in enumerate(sample for sample in load_prepared(folder) if sample.image):
        assert sample.image is not None
        if len(kept) < number:  # a reservoir: every picture is as likely, whatever their number
            kept.append(sample.image)
        elif (drawn := draw.randint(0, place)) < number:
            kept[drawn] = sample.image
    view, pictures = EvalResize(size), []
    for content in kept:
        try:
            pictures.append(view(decode_image(content)))
        except BadSampleError:
            continue
    if not pictures:
        raise ConfigError(f"{folder} holds no readable picture: prepare it again")
    return torch.stack(pictures)


def show_codebook(section: Section, book: CodeBook, per_row: int = 40) -> None:
    """Use of the codes, and patches that share one."""
    used = book.counts[book.counts > 0]
    share = used / used.sum()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    section.text(
        f"{len(used):,} of {len(book.counts):,} codes are used by {len(book.pictures):,} pictures "
        f"({len(book.codes):,} patches); perplexity {perplexity:.0f}; the commonest code covers {share.max():.1%} of "
        "the patches."
    )
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(book.counts)), np.sort(book.counts)[::-1], width=1.0)
    axes.set_yscale("log")
    axes.set_xlabel("codes, most used first")
    axes.set_ylabel("patches")
    section.figure(figure, "Use of the codebook over all these patches.")
    order = np.argsort(-book.counts, kind="stable")[: len(used)]
    middle = order[4:-4]
    drawn = np.random.default_rng(_SEED).choice(middle, size=min(12, len(middle)), replace=False)
    for title, codes in (
        ("The four codes used most, one a row", order[:4]),
        ("Codes drawn at random, one a row", drawn),
        ("The four rarest codes that are used at all, one a row", order[4:][-4:]),
    ):
        if len(codes):
            section.picture(_rows(book, codes, per_row), f"{title}: patches that share it.", scale=_zoom(book))


def _rows(book: CodeBook, codes: npt.NDArray[np.int64], per_row: int) -> Pixels:
    """One row of patches a code; grey where there are no more."""
    blank = np.full_like(book.patches[0], _GREY)
    patches: list[Pixels] = []
    for code in codes:
        found = book.examples(int(code), per_row)
        patches += found + [blank] * (per_row - len(found))
    return tile(patches, per_row, gap=1, background=_GREY)


def _zoom(book: CodeBook) -> int:
    """Small patches are drawn larger."""
    return max(1, 16 // book.tokenizer.config.patch_size)


@torch.inference_mode()
def show_similarity(section: Section, book: CodeBook, teacher: Teacher, number: int = 12) -> None:
    """How well the codes rebuild the teacher's features, patch by patch."""
    tokenizer = book.tokenizer
    config = tokenizer.config
    if teacher.width != config.teacher_width:
        section.text(
            f"No comparison: the teacher has {teacher.width} features, the tokenizer rebuilds {config.teacher_width}."
        )
        return
    shown = book.pictures[torch.randperm(len(book.pictures), generator=torch.Generator().manual_seed(_SEED))[:256]]
    similarity = torch.cat([_similarity(tokenizer, teacher, part) for part in shown.split(_BATCH)])
    section.text(
        f"Cosine between what the decoder makes of the codes and the teacher's features: {similarity.mean():.3f} on "
        f"average over {len(shown):,} pictures; a tenth of the patches lies below "
        f"{similarity.flatten().quantile(0.1):.3f}."
    )
    number = min(number, len(shown))
    means = book.mean_patches()
    codes = tokenizer.tokenize(shown[:number]).numpy()
    paint = matplotlib.colormaps["viridis"]
    side = config.patch_size
    sheet: list[Pixels] = [picture.permute(1, 2, 0).numpy() for picture in shown[:number]]
    sheet += [tile([means[code] for code in row], config.grid[1], gap=0) for row in codes]
    for row in similarity[:number].view(number, *config.grid).numpy():
        colors = (paint(row.clip(0, 1))[..., :3] * 255).astype(np.uint8)
        sheet.append(colors.repeat(side, axis=0).repeat(side, axis=1))
    section.picture(
        tile(sheet, number, gap=4),
        "Rows: pictures; their codes, each drawn as the average of the patches that share it; cosine to the teacher, "
        "from 0 (dark) to 1 (yellow).",
        scale=max(1, 80 // config.image_size[1]),
    )


def _similarity(tokenizer: VQKD, teacher: Teacher, pictures: Tensor) -> Tensor:
    """Cosine (n, N) between rebuilt and true features."""
    images = pictures.float() / 255
    decoded, _, _ = tokenizer(images)
    return F.cosine_similarity(decoded, teacher.patch_features(images, tokenizer.config.grid), dim=-1)
