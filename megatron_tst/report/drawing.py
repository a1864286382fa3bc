"""Renders a plot from one drawing: as SVG in the page's colours with values to hover over, as PNG
and as PDF on white."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOREGROUND = "#1f2328"
"""Stands for the text colour; the SVG takes the page's instead."""

# A date would make two reports of the same runs differ.
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    # TrueType, so that the text of a PDF can be searched and edited.
    "pdf.fonttype": 42,
    "svg.hashsalt": "megatron-tst",
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FOREGROUND,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}
"""Settings of Matplotlib for all plots."""

_NO_PDF_METADATA = dict.fromkeys(("CreationDate", "Creator", "Producer"))
_PRINTED_DOTS_PER_INCH = 220
_POINTS_PER_INCH = 72
_TARGET_RADIUS = 6


@dataclass(frozen=True)
class Plot:
    """One rendered plot.

    Attributes:
        name: for file names.
        title: heading.
        caption: one or two sentences of text.
        svg: an ``<svg>`` element without references to other files.
        png: the same plot on white.
        pdf: likewise.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    pdf: bytes


@dataclass
class Canvas:
    """Axes to draw on, and the values to show where the mouse is.

    Attributes:
        axes: where to draw.
        values: centre in data coordinates, and what to say there.
    """

    axes: Axes
    values: list[tuple[float, float, str]] = field(default_factory=list)

    def say(self, x: float, y: float, text: str) -> None:
        """Shows ``text`` while the mouse is near this point."""
        self.values.append((x, y, text))


def render(
    name: str, title: str, caption: str, draw: Callable[[Canvas], None], height: float = 3.9
) -> Plot:
    """Draws once and renders in all formats; ``height`` in inches, of 7.2 inches of width."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        canvas = Canvas(figure.add_subplot())
        draw(canvas)
        png, svg, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_PRINTED_DOTS_PER_INCH, facecolor="white")
        figure.savefig(pdf, format="pdf", facecolor="white", metadata=_NO_PDF_METADATA)
        figure.savefig(svg, format="svg", transparent=True, metadata=_NO_METADATA)
        targets = _hover_targets(canvas, figure)
    element = _embeddable(svg.getvalue().decode(), name, title)
    element = element.replace("</svg>", f"{targets}</svg>")
    return Plot(name, title, caption, element, png.getvalue(), pdf.getvalue())


def _hover_targets(canvas: Canvas, figure: Figure) -> str:
    """Invisible circles with titles, which browsers show late and the page's script at once."""
    low_x, high_x = canvas.axes.get_xlim()
    low_y, high_y = canvas.axes.get_ylim()
    height = figure.get_figheight() * _POINTS_PER_INCH
    scale = _POINTS_PER_INCH / figure.dpi
    targets = []
    for x, y, text in canvas.values:
        if not (low_x <= x <= high_x and low_y <= y <= high_y):
            continue
        across, up = canvas.axes.transData.transform((x, y)) * scale
        targets.append(
            f'<circle class="value" cx="{across:.1f}" cy="{height - up:.1f}" r="{_TARGET_RADIUS}">'
            f"<title>{escape(text)}</title></circle>"
        )
    return "\n".join(targets)


def _embeddable(document: str, name: str, label: str) -> str:
    """The ``<svg>`` element of a document, without namespaces, in the page's colour and font."""
    element = document[document.index("<svg") :]
    element = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    # Ids are unique within a document only; a page holds several.
    prefix = re.sub(r"\W", "", name)
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", element)
    return element.replace(FOREGROUND, "currentColor")
