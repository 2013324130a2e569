"""Figures of a report as inline SVG, drawn with matplotlib (the optional extra ``report``).

They take the colour of the text around them, and their background, so one drawing serves light and dark pages.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from selfevo.evaluation.report.analysis import PairAnalysis, Values
from selfevo.evaluation.report.html import Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
# All have a contrast of at least 3 on white and on the dark ground alike.
BLUE, ORANGE, GREY, GREEN, PURPLE = "#2f80c2", "#d2691e", "#7f8790", "#2e9160", "#9467bd"
_TEXT = "#010203"  # stands for currentColor while matplotlib draws
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "selfevo", "font.family": "sans-serif",
    "text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 9,
    "font.size": 10, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.grid": True,
    "grid.color": _TEXT, "grid.alpha": 0.12, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


class FiguresError(ValueError):
    """Figures cannot be drawn; the message says what to install."""


def figures_available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        _drawing()
    except FiguresError:
        return False
    return True


def _drawing() -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise FiguresError("figures need matplotlib; install it with: pip install 'selfevo[report]'") from error
    return mpl.rc_context(_STYLE)


def training_figures(stage: str, records: Records) -> list[tuple[str, Html]]:
    """The curves of a stage by caption: the loss, and for DPO rewards, accuracy and log-probabilities per token.

    Lines are running means over a twentieth of the steps; points are evaluations on held-out items.
    """
    loss = {"loss": ("all", BLUE), "dpo": ("DPO", ORANGE), "sft": ("SFT", GREEN)}
    panels: list[tuple[str, dict[str, tuple[str, str]]]] = [
        ("loss", loss if "dpo" in records[0] else {"loss": ("SFT", BLUE)})
    ]
    if "dpo" in records[0]:
        sides = ("chosen", BLUE), ("rejected", ORANGE)
        panels += [
            ("implicit reward", {f"{side}_reward": (side, colour) for side, colour in sides}),
            ("share of pairs ranked right", {"accuracy": ("accuracy", BLUE)}),
            ("log-probability per token", {f"{side}_logp_per_token": (side, colour) for side, colour in sides}),
        ]
    return [(title, _curves(f"{stage}-{index}", f"{stage}: {title} by step", records, lines))
            for index, (title, lines) in enumerate(panels)]  # fmt: skip


def _curves(mark: str, label: str, records: Records, lines: Mapping[str, tuple[str, str]]) -> Html:
    with _drawing():
        figure, (axes,) = _panels(1, height=2.3, width=3.4)
        steps = [record["step"] + 1 for record in records]
        held = [record for record in records if "held_out" in record]
        for name, (text, colour) in lines.items():
            axes.plot(steps, _smooth([record[name] for record in records]), color=colour, label=text, linewidth=1.5)
            points = [record["held_out"][name] for record in held]
            axes.plot([record["step"] + 1 for record in held], points, "o", color=colour, markersize=4)
        if len(lines) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines))
        if "accuracy" in lines:
            axes.set_ylim(0, 1.03)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step")
        return _svg(figure, mark, label)


def _smooth(values: Sequence[float]) -> Values:
    """The running mean over the last twentieth of the steps."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 20))
    smooth: Values = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth


def relevance_figure(analyses: Sequence[PairAnalysis], mark: str) -> Html:
    """Figure 5, left: how close chosen and rejected replies are to the user's statements."""
    rows = [
        (
            one.stage,
            {"chosen": (one.chosen_relevance.values, BLUE), "rejected": (one.rejected_relevance.values, ORANGE)},
        )
        for one in analyses
    ]
    return _histograms(rows, mark, "relevance to the user's statements")


def similarity_figure(analyses: Sequence[PairAnalysis], mark: str) -> Html:
    """Figure 5, right: how close chosen and rejected replies are to one another."""
    rows = [(one.stage, {"pairs": (one.similarity.values, GREEN)}) for one in analyses]
    return _histograms(rows, mark, "similarity of chosen and rejected")


def _histograms(rows: Sequence[tuple[str, Mapping[str, tuple[Values, str]]]], mark: str, measure: str) -> Html:
    """A row per stage on one scale: the share of pairs in each of thirty bins, and dashed lines at the means."""
    everything = np.concatenate([values for _, parts in rows for values, _ in parts.values()])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1, 31)
    with _drawing():
        figure, panels = _panels(len(rows), height=0.6 + 1.5 * len(rows), width=5.0)
        for axes, (stage, parts) in zip(panels, rows):
            for text, (values, colour) in parts.items():
                shares = np.histogram(values, edges)[0] / len(values)
                axes.stairs(100 * shares, edges, fill=True, color=colour, alpha=0.3)
                axes.stairs(100 * shares, edges, color=colour, linewidth=1.2, label=text)
                axes.axvline(float(values.mean()), color=colour, linestyle="--", linewidth=1.2)
            axes.set_title(stage)
            axes.set_ylabel("% of pairs")
        if len(rows[0][1]) > 1:
            panels[0].legend(loc="upper right")
        panels[-1].set_xlabel(measure)
        return _svg(figure, mark, f"Histograms: {measure}, per iteration")


def phrases_figure(phrases: Sequence[str], shares: Mapping[str, Sequence[float]], mark: str) -> Html:
    """Figure 6: a row per phrase, a point per model at the share of its replies that hold the phrase."""
    with _drawing():
        figure, (axes,) = _panels(1, height=0.9 + 0.3 * len(phrases), width=5.0)
        places = np.arange(len(phrases))
        values = 100 * np.array(list(shares.values()))
        axes.hlines(places, values.min(axis=0), values.max(axis=0), color=GREY, linewidth=1, alpha=0.6)
        lanes = 0.5 * (np.linspace(0, 1, len(shares)) - 0.5) if len(shares) > 1 else [0.0]  # equal shares stay apart
        looks = zip(cycle((GREY, BLUE, ORANGE, GREEN, PURPLE)), cycle("osD^v"))
        for name, row, lane, (colour, shape) in zip(shares, values, lanes, looks):
            axes.plot(row, places + lane, shape, color=colour, label=name, markersize=5)
        axes.set_yticks(places, [phrase if len(phrase) <= 34 else phrase[:33] + "…" for phrase in phrases])
        axes.set_ylim(len(phrases) - 0.5, -0.5)
        axes.set_xlim(left=-0.5)
        axes.set_xlabel("% of replies that hold the phrase")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(5, len(shares)))
        return _svg(figure, mark, "Frequent phrases: share of each model's replies that hold them")


def _panels(rows: int, *, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """A figure (inches) outside of matplotlib's global state, and its rows of axes on one horizontal scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _svg(figure: Figure, mark: str, label: str) -> Html:
    """The drawing as an inline element: ids begin with ``mark``, nothing refers to the outside, ink is the page's."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # only its width is guessed: the reader's own font draws it
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # it would hold for the whole page
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", drawn)
    drawn = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", drawn)
    drawn = drawn.replace(_TEXT, "currentColor")
    width, height = (72 * size for size in figure.get_size_inches())
    return Html(f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{drawn}')
