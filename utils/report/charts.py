"""Charts by matplotlib as SVG inside the page: text stays text, colours are the page's CSS variables."""

import importlib
import io
import re
from dataclasses import dataclass

from data.errors import InputError

# Colours that stand for CSS variables while matplotlib draws.
CSS = {
    **{"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--line)", "#040404": "var(--faint)"},
    **{"#050505": "var(--blue)", "#060606": "var(--orange)", "#070707": "var(--green)", "#080808": "var(--purple)"},
}
INK, MUTED, GRID, FAINT, BLUE, ORANGE, GREEN, PURPLE = CSS
STYLE = {
    **{"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
    **{"text.color": INK, "axes.labelcolor": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED},
    **{"axes.edgecolor": GRID, "xtick.color": GRID, "ytick.color": GRID, "axes.grid": True, "grid.color": GRID},
    **{
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.fontsize": 8,
        "axes.axisbelow": True,
    },
}
SIZE = 4.4, 2.9  # inches; wide enough for a desktop's column, its text large enough on a phone


def check_installed() -> None:
    """Raises InputError without matplotlib or jinja2, or if they do not work: at the start, not after hours."""
    for name in ("matplotlib.figure", "jinja2"):
        try:
            importlib.import_module(name)
        except Exception as error:
            name, reason = name.partition(".")[0], str(error).splitlines()[0]
            raise InputError(
                f"a report needs {name} ({reason}); pip install {name}, or leave the report out (--no_report)"
            ) from error


@dataclass
class Line:
    """A curve, its colour, and the half width of the band around it."""

    label: str
    x: list[float]
    y: list[float]
    colour: str = BLUE
    band: list[float] | None = None


@dataclass
class Level:
    """A horizontal line to compare with."""

    label: str
    y: float
    colour: str = MUTED
    dashes: str = "--"


def line_chart(
    name: str, alt: str, lines: list[Line], levels: list[Level], xlabel: str, ylabel: str, scale: str = "zero"
) -> str:
    """SVG of curves and levels.

    Args:
        name: makes its ids differ from those of the page's other charts.
        alt: what it shows, for those who cannot see it.
        scale: of the upward axis: "zero" begins at 0, "close" with the curves, "log" is logarithmic.
    """

    from matplotlib.ticker import LogLocator, NullLocator

    def draw(axes):
        for line in lines:
            marker = "o" if len(line.x) < 30 else None
            axes.plot(line.x, line.y, color=line.colour, label=line.label, marker=marker, markersize=3, linewidth=1.5)
            if line.band:
                low, high = zip(*[(y - b, y + b) for y, b in zip(line.y, line.band, strict=True)], strict=True)
                axes.fill_between(line.x, low, high, color=line.colour, alpha=0.2, linewidth=0)
        for level in levels:
            axes.axhline(level.y, color=level.colour, linestyle=level.dashes, linewidth=1.2, label=level.label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(nbins=6, integer=True)
        if scale == "zero":
            axes.set_ylim(bottom=min(0, *axes.get_ylim()))
        elif scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        _add_legend(axes, [part.label for part in (*lines, *levels)])

    return svg(name, alt, draw)


def _add_legend(axes, labels: list[str]) -> None:
    if len(labels) > 1:
        axes.figure.legend(loc="outside upper left", ncols=3 if max(map(len, labels)) < 16 else 2)


def scatter_chart(name: str, alt: str, draw, limits) -> str:
    """SVG of points in a square without numbers on its axes: draw(axes)."""

    def fill(axes):
        draw(axes)
        axes.set(xlim=limits[0], ylim=limits[1], xticklabels=[], yticklabels=[])
        axes.tick_params(length=0)
        axes.figure.legend(loc="outside upper left", ncols=2)

    return svg(name, alt, fill, (4.4, 4.4))


def svg(name: str, alt: str, draw, size=SIZE) -> str:
    """Draws on fresh axes and returns <svg role="img"> with the text alternative `alt`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), name, alt)


def _for_page(text: str, name: str, alt: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)  # it would reach beyond the chart
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    for colour, variable in CSS.items():
        text = text.replace(colour, variable)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    viewbox = re.search(r'viewBox="[^"]*"', text)[0]
    return re.sub(r"<svg[^>]*>", f'<svg {viewbox} role="img" aria-label="{label}">', text, count=1)
