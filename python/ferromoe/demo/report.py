"""One self-contained HTML page: answers first, then tables and plots; light and dark."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --soft: #6b7280; --line: #e5e7eb;
  --card: #f6f7f9; --accent: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #16171a; --soft: #9aa1ac;
  --line: #2d3036; --card: #1f2126; --accent: #f0935a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p.lead, figcaption, .note { color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; }
.answer { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; }
.answer b { display: block; font-size: 1.35rem; color: var(--accent); }
.answer span { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.25rem 0; } figure svg { max-width: 100%; height: auto; }
"""

# Legible on white and on near-black alike.
COLOURS = {"ferromoe": "#d9692b", "eager": "#8a93a3", "grouped_mm": "#4f83c4", "limit": "#5f9e6e"}
_GREY = "#868e99"


@dataclass
class Page:
    """A report under construction; `html()` gives the page."""

    title: str
    lead: str
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, short answer, how it was found)."""
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; the first column is its rows' name."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def figure(self, figure: Any, caption: str) -> None:
        """Add a matplotlib figure as inline SVG."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        note = f"<figcaption>{html.escape(caption)}</figcaption>"
        self._parts.append(f"<figure>{svg}{note}</figure>")

    def html(self) -> str:
        """Return the whole page."""
        answers = "".join(
            f'<div class="answer">{html.escape(question)}<b>{html.escape(answer)}</b>'
            f"<span>{html.escape(how)}</span></div>"
            for question, answer, how in self.answers
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f'<h1>{html.escape(self.title)}</h1><p class="lead">{html.escape(self.lead)}</p>'
            f'<div class="answers">{answers}</div>{"".join(self._parts)}</body></html>\n'
        )


def new_figure(width: float = 7.5, height: float = 3.2, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes, in colours that suit a light and a dark page."""
    import matplotlib

    # Text stays text (small, searchable), and the same figure gives the same bytes.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "ferromoe"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.tick_params(colors=_GREY, labelcolor=_GREY)
        axis.xaxis.label.set_color(_GREY)
        axis.yaxis.label.set_color(_GREY)
        axis.title.set_color(_GREY)
        for name, spine in axis.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(_GREY)
    return figure, axes


def short(value: float) -> str:
    """Return three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def bars(axis: Any, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
    """Draw horizontal bars with their values at the end, the first on top."""
    colours = [COLOURS.get(label, _GREY) for label in labels]
    drawn = axis.barh(range(len(labels)), values, color=colours, height=0.62)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.bar_label(drawn, labels=[f" {short(value)} {unit}" for value in values], color=_GREY)
    axis.set_xlim(0, max(values) * 1.28)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
