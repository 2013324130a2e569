"""Figures of a report as SVG, drawn with matplotlib (the optional extra ``report``).

They are transparent and their colours have contrast on light and dark pages, so one drawing serves both.
"""

from __future__ import annotations

import io
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from selfevo.evaluation.report.analysis import PairAnalysis, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
# All have a contrast of at least 3 on white and on the dark ground alike, text of at least 4.
BLUE, ORANGE, GREY, GREEN, PURPLE = "#2f80c2", "#d2691e", "#7f8790", "#2e9160", "#9467bd"
TEXT = "#747c85"
_STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "selfevo", "font.family": "sans-serif",
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 9,
    "font.size": 10, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.grid": True,
    "grid.color": TEXT, "grid.alpha": 0.2, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


class FiguresError(ValueError):
    """Figures cannot be drawn; the message says what to install."""


class Drawing(NamedTuple):
    """A figure: its caption, a description for those who cannot see it, and the SVG as a data URI."""

    caption: str
    description: str
    source: str


def figures_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _drawing() -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise FiguresError("figures need matplotlib; install it with: pip install 'selfevo[report]'") from error
    return mpl.rc_context(_STYLE)


def training_figures(stage: str, records: Records) -> list[Drawing]:
    """The curves of a stage: the loss, and for DPO rewards, accuracy and log-probabilities per token.

    Lines are running means over a twentieth of the steps; points are evaluations on held-out items.
    """
    panels = {"loss": {"loss": ("SFT", BLUE)}}
    if "dpo" in records[0]:
        panels = {
            "loss": {"loss": ("all", BLUE), "dpo": ("DPO", ORANGE), "sft": ("SFT", GREEN)},
            "implicit reward": {"chosen_reward": ("chosen", BLUE), "rejected_reward": ("rejected", ORANGE)},
            "share of pairs ranked right": {"accuracy": ("accuracy", BLUE)},
            "log-probability per token": {
                "chosen_logp_per_token": ("chosen", BLUE),
                "rejected_logp_per_token": ("rejected", ORANGE),
            },
        }
    return [_curves(title, f"{stage}: {title} by step", records, lines) for title, lines in panels.items()]


def _curves(caption: str, description: str, records: Records, lines: Mapping[str, tuple[str, str]]) -> Drawing:
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
        return Drawing(caption, description, _data_uri(figure))


def _smooth(values: Sequence[float]) -> Values:
    """The running mean over the last twentieth of the steps."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 20))
    smooth: Values = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth


def pair_figures(measure: str, analyses: Sequence[PairAnalysis]) -> list[Drawing]:
    """Figure 5: how close replies are to the user's statements (left), and chosen and rejected to one another (right).

    ``measure`` names what the cosines are of.
    """
    relevance = {
        one.stage: {"chosen": (one.chosen_relevance.values, BLUE), "rejected": (one.rejected_relevance.values, ORANGE)}
        for one in analyses
    }
    similarity = {one.stage: {"pairs": (one.similarity.values, GREEN)} for one in analyses}
    return [
        _histograms(
            f"Relevance of replies ({measure}); dashed: means", "relevance to the user's statements", relevance
        ),
        _histograms(f"Similarity within pairs ({measure})", "similarity of chosen and rejected", similarity),
    ]


def _histograms(caption: str, label: str, stages: Mapping[str, Mapping[str, tuple[Values, str]]]) -> Drawing:
    """A row per stage on one scale: the share of pairs in each of thirty bins, and dashed lines at the means."""
    everything = np.concatenate([values for parts in stages.values() for values, _ in parts.values()])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1, 31)
    with _drawing():
        figure, panels = _panels(len(stages), height=0.6 + 1.5 * len(stages), width=5.0)
        for axes, (stage, parts) in zip(panels, stages.items()):
            for text, (values, colour) in parts.items():
                shares = np.histogram(values, edges)[0] / len(values)
                axes.stairs(100 * shares, edges, fill=True, color=colour, alpha=0.3)
                axes.stairs(100 * shares, edges, color=colour, linewidth=1.2, label=text)
                axes.axvline(float(values.mean()), color=colour, linestyle="--", linewidth=1.2)
            axes.set_title(stage)
            axes.set_ylabel("% of pairs")
        if len(panels[0].get_legend_handles_labels()[1]) > 1:
            panels[0].legend(loc="upper right")
        panels[-1].set_xlabel(label)
        return Drawing(caption, f"Histograms: {label}, per iteration", _data_uri(figure))


def phrases_figure(caption: str, phrases: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Drawing:
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
        description = "Frequent phrases: share of each model's replies that hold them"
        return Drawing(caption, description, _data_uri(figure))


def _panels(rows: int, *, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """A figure (inches) outside of matplotlib's global state, and its rows of axes on one horizontal scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that matplotlib's font lacks is drawn as a box
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(buffer.getvalue()).decode()}"
