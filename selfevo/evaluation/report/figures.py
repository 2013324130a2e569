"""Figures of a report, drawn with matplotlib (the optional extra ``report``).

A drawing has a ``caption``, a ``description`` for those who cannot see it, and its SVG as a data URI, ``source``. It is
transparent, and its colours have contrast on light and dark pages, so that it serves both.
"""

from __future__ import annotations

import io
import warnings
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from selfevo.evaluation.report.analysis import PairAnalysis, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
Drawing = dict[str, str]
Series = tuple[str, str, Values]  # label, colour, values (N,)
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


def training_figures(stage: str, records: Records) -> list[Drawing]:
    """The curves of a stage: the loss, and for DPO rewards, accuracy and log-probabilities per token.

    Lines are running means over a twentieth of the steps; points are evaluations on held-out items.
    """
    if "dpo" not in records[0]:
        return [_curves(stage, "loss", records, {"loss": ("SFT", BLUE)})]
    chosen, rejected = ("chosen", BLUE), ("rejected", ORANGE)
    panels = {
        "loss": {"loss": ("all", BLUE), "dpo": ("DPO", ORANGE), "sft": ("SFT", GREEN)},
        "implicit reward": {"chosen_reward": chosen, "rejected_reward": rejected},
        "share of pairs ranked right": {"accuracy": ("accuracy", BLUE)},
        "log-probability per token": {"chosen_logp_per_token": chosen, "rejected_logp_per_token": rejected},
    }
    return [_curves(stage, title, records, lines) for title, lines in panels.items()]


def _curves(stage: str, title: str, records: Records, lines: Mapping[str, tuple[str, str]]) -> Drawing:
    """``lines``: label and colour of each measure of ``records``."""
    with _panels(1, height=2.3, width=3.4) as (figure, (axes,)):
        steps = [record["step"] + 1 for record in records]
        held = [record for record in records if "held_out" in record]
        for name, (label, colour) in lines.items():
            axes.plot(steps, _smooth([record[name] for record in records]), color=colour, label=label, linewidth=1.5)
            points = [record["held_out"][name] for record in held]
            axes.plot([record["step"] + 1 for record in held], points, "o", color=colour, markersize=4)
        if len(lines) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines))
        if "accuracy" in lines:
            axes.set_ylim(0, 1.03)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step")
        return _drawing(figure, title, f"{stage}: {title} by step")


def _smooth(values: Sequence[float]) -> Values:
    """The running mean over the last twentieth of the steps."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 20))
    return (sums[ends] - sums[starts]) / (ends - starts)


def pair_figures(measure: str, analyses: Sequence[PairAnalysis]) -> list[Drawing]:
    """Figure 5, for cosines of ``measure``: how close replies are to the user's statements, and to one another."""
    relevance, similarity = {}, {}
    for one in analyses:
        chosen, rejected = one.chosen_relevance.values, one.rejected_relevance.values
        relevance[one.stage] = [("chosen", BLUE, chosen), ("rejected", ORANGE, rejected)]
        similarity[one.stage] = [("pairs", GREEN, one.similarity.values)]
    caption = f"Relevance of replies ({measure}); dashed: means"
    return [
        _histograms(caption, "relevance to the user's statements", relevance),
        _histograms(f"Similarity within pairs ({measure})", "similarity of chosen and rejected", similarity),
    ]


def _histograms(caption: str, quantity: str, stages: Mapping[str, Sequence[Series]]) -> Drawing:
    """A row per stage on one scale: the share of pairs in each of thirty bins, and dashed lines at the means."""
    everything = np.concatenate([values for series in stages.values() for _, _, values in series])
    low, high = everything.min(), everything.max()
    edges = np.linspace(low, high if high > low else low + 1, 31)
    with _panels(len(stages), height=0.6 + 1.5 * len(stages), width=5.0) as (figure, panels):
        for axes, (stage, series) in zip(panels, stages.items()):
            for label, colour, values in series:
                percent = 100 * np.histogram(values, edges)[0] / len(values)
                axes.stairs(percent, edges, fill=True, color=colour, alpha=0.3)
                axes.stairs(percent, edges, color=colour, linewidth=1.2, label=label)
                axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1.2)
            axes.set(title=stage, ylabel="% of pairs")
        if len(series) > 1:
            panels[0].legend(loc="upper right")
        panels[-1].set_xlabel(quantity)
        return _drawing(figure, caption, f"Histograms: {quantity}, per iteration")


def phrases_figure(caption: str, phrases: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Drawing:
    """Figure 6: a row per phrase, a point per model at the share of its replies that hold the phrase."""
    with _panels(1, height=0.9 + 0.3 * len(phrases), width=5.0) as (figure, (axes,)):
        places = np.arange(len(phrases))
        values = 100 * np.array(list(shares.values()))
        axes.hlines(places, values.min(axis=0), values.max(axis=0), color=GREY, linewidth=1, alpha=0.6)
        lanes = np.linspace(-0.25, 0.25, len(shares)) if len(shares) > 1 else [0.0]  # equal shares stay apart
        looks = zip(cycle((GREY, BLUE, ORANGE, GREEN, PURPLE)), cycle("osD^v"))
        for name, row, lane, (colour, shape) in zip(shares, values, lanes, looks):
            axes.plot(row, places + lane, shape, color=colour, label=name, markersize=5)
        axes.set_yticks(places, [phrase if len(phrase) <= 34 else phrase[:33] + "…" for phrase in phrases])
        axes.set(ylim=(len(phrases) - 0.5, -0.5), xlabel="% of replies that hold the phrase")
        axes.set_xlim(left=-0.5)
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(5, len(shares)))
        return _drawing(figure, caption, "Frequent phrases: share of each model's replies that hold them")


def ratings_figure(
    aspects: Sequence[str], means: Mapping[str, Sequence[float]], ends: Mapping[str, Sequence[tuple[float, float]]]
) -> Drawing:
    """Figure 3: for each aspect a bar per model at the mean of people's scores, with its interval."""
    with _panels(1, height=0.8 + 0.32 * len(aspects) * len(means), width=5.0) as (figure, (axes,)):
        width = 0.8 / len(means)
        for number, (name, colour) in enumerate(zip(means, cycle((GREY, BLUE, ORANGE, GREEN, PURPLE)))):
            places = np.arange(len(aspects)) + (number - (len(means) - 1) / 2) * width
            values, low_high = np.array(means[name]), np.array(ends[name]).T  # (A,), (2, A)
            errors = np.abs(low_high - values)
            axes.barh(places, values, 0.9 * width, color=colour, alpha=0.8, label=name)
            axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=TEXT, elinewidth=1, capsize=2)
        axes.set_yticks(np.arange(len(aspects)), aspects)
        axes.set(xlim=(1, 5), ylim=(len(aspects) - 0.5, -0.5), xlabel="mean score, 1 to 5")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(5, len(means)))
        return _drawing(
            figure, "People's scores and 95 % intervals", "Mean scores by model and aspect, as in the table"
        )


def votes_figure(votes: Mapping[tuple[str, str], tuple[int, int, int]]) -> Drawing:
    """Figure 4: a bar per pair of models, divided into the first one's wins, ties, and the other one's wins."""
    with _panels(1, height=0.9 + 0.5 * len(votes), width=5.0) as (figure, (axes,)):
        shares = np.array([100 * np.array(counts) / max(1, sum(counts)) for counts in votes.values()])  # (P, 3)
        starts = shares.cumsum(axis=1) - shares
        for part, (label, colour) in enumerate(zip(("first wins", "tie", "second wins"), (BLUE, GREY, ORANGE))):
            bars = axes.barh(range(len(votes)), shares[:, part], left=starts[:, part], color=colour, label=label)
            axes.bar_label(
                bars, [f"{s:.0f} %" if s >= 8 else "" for s in shares[:, part]], label_type="center", color="w"
            )
        axes.set_yticks(range(len(votes)), [f"{first} vs {second}" for first, second in votes])
        axes.set(xlim=(0, 100), ylim=(len(votes) - 0.5, -0.5), xlabel="% of turns")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
        return _drawing(figure, "People's votes", "Wins, ties and losses by pair of models, as in the table")


@contextmanager
def _panels(rows: int, *, height: float, width: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure (inches) outside of matplotlib's global state, and its rows of axes on one horizontal scale."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib; install it with: pip install 'selfevo[report]'") from error
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _drawing(figure: Figure, caption: str, description: str) -> Drawing:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that matplotlib's font lacks is drawn as a box
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(buffer.getvalue()).decode()}"
    return {"caption": caption, "description": description, "source": source}
