"""A page that shows what a run did: tables, curves and pictures in one HTML file without outside parts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from beit3.train.log import read_log

Pixels = npt.NDArray[np.uint8]


@dataclass
class Section:
    """One heading with its blocks."""

    title: str
    blocks: list[Markup] = field(default_factory=list)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.blocks.append(Markup("<p>{}</p>").format(text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> None:
        """Add a table.

        Args:
            header: column names.
            rows: cells; Markup is taken as it is, everything else is escaped.
            text_columns: leading columns that are aligned left.
        """

        def cell(tag: str, column: int, value: object) -> Markup:
            """One cell of a row."""
            style = ' class="text"' if column < text_columns else ""
            return Markup(f"<{tag}{style}>") + escape(value) + Markup(f"</{tag}>")

        lines = [Markup("").join(cell("th", i, name) for i, name in enumerate(header))]
        lines += [Markup("").join(cell("td", i, value) for i, value in enumerate(row)) for row in rows]
        body = Markup("").join(Markup("<tr>") + line + Markup("</tr>") for line in lines)
        self.blocks.append(Markup('<div class="scroll"><table>') + body + Markup("</table></div>"))

    def curves(self, folder: Path, panels: Mapping[str, Sequence[str]]) -> None:
        """Add curves of a run's log.

        Args:
            folder: the run's folder.
            panels: values to draw together, by the title of their panel.
        """
        records = read_log(folder)
        figure = Figure(figsize=(4.2 * len(panels), 2.9), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name in names:
                points = [(record["step"], record[name]) for record in records if name in record]
                axes.plot([x for x, _ in points], [y for _, y in points], label=name.replace("_", " "))
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        self.figure(figure, f"Log of {folder.name}.")

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure as SVG."""
        content = io.BytesIO()
        figure.savefig(content, format="svg")
        data = base64.b64encode(content.getvalue()).decode()
        self._image(f"data:image/svg+xml;base64,{data}", caption, "")

    def picture(self, pixels: Pixels, caption: str, scale: int = 1) -> None:
        """Add a picture (height, width, 3) uint8, enlarged by a whole factor."""
        self._image(encode(pixels, scale), caption, 'class="pixel"')

    def _image(self, address: str, caption: str, attributes: str) -> None:
        self.blocks.append(
            Markup(f'<figure><img {attributes} src="{address}" alt="">')
            + Markup("<figcaption>{}</figcaption></figure>").format(caption)
        )


@dataclass
class Report:
    """The page."""

    title: str
    lead: str
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """Start a section."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def save(self, path: Path) -> None:
        """Write the HTML file."""
        template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True)
        page = environment.from_string(template).render(title=self.title, lead=self.lead, sections=self.sections)
        path.write_text(page, encoding="utf-8")


def encode(pixels: Pixels, scale: int = 1) -> str:
    """Turn a picture (height, width, 3) into a data address of a PNG."""
    image = Image.fromarray(pixels)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def inline_picture(pixels: Pixels, scale: int = 1) -> Markup:
    """A picture as part of a table cell."""
    return Markup(f'<img class="pixel" src="{encode(pixels, scale)}" alt="">')


def tile(pictures: Sequence[Any], columns: int, gap: int = 2, background: int = 255) -> Pixels:
    """Lay pictures (height, width, 3) of one size out on white or grey, row by row."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet: Pixels = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), background, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
