"""A run as one page to read and to send around: ``RUN/report.html``.

The page needs nothing but itself. It shows what the run folder holds, so an unfinished run gives a shorter page, and
the same folder always gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfevo.evaluation.folder import read_replies, stage_names
from selfevo.evaluation.report.analysis import (
    Embed,
    PairAnalysis,
    Summary,
    analyse_pairs,
    frequent_phrases,
    phrase_shares,
)
from selfevo.evaluation.report.figures import (
    figures_available,
    phrases_figure,
    relevance_figure,
    similarity_figure,
    training_figures,
)
from selfevo.evaluation.report.html import Html, contents, details, element, join, page, section, table
from selfevo.evaluation.report.samples import sample_answers, sample_pairs
from selfevo.evaluation.report.score_tables import judge_table, score_tables
from selfevo.evaluation.tables import interval_text
from selfevo.files import read_json, read_jsonl, write_text

Rows = list[list[str]]
TOP_PHRASES = 12
NOTHING = Html("")


def write_report(run: Path, *, embed: Embed | None = None) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    With ``embed`` the pairs are also compared by those embeddings. Without matplotlib there are no figures, which the
    page says. Raises ValueError for what is no run folder, or for a file in it that cannot be read.
    """
    stages, config = stage_names(run), read_json(run / "config.json")
    if "iterations" not in config["settings"]:
        raise ValueError(f"{run}: is a run of something else than the loop; its tables are in {run / 'eval'}")
    draw = figures_available()
    replies = _replies(run, stages)
    sections = [
        ("Scores", score_tables(run / "eval")),
        ("Judge", judge_table(run / "eval")),
        ("Training", _training(run, stages, draw)),
        ("Preference pairs", _pairs(run, config["settings"], embed, draw)),
        ("Phrases", _phrases(replies, draw)),
        ("Replies side by side", sample_answers(run / "eval", replies)),
        ("From reply to refinement", sample_pairs(run, stages)),
        ("Data", _data(run, stages)),
        ("Settings", _settings(config)),
    ]
    shown = [(heading, content) for heading, content in sections if content]
    body = [section(heading, content) for heading, content in shown]
    title = f"Run {run.resolve().name}"
    top = _header(title, config["settings"], run, stages, draw)
    path = run / "report.html"
    write_text(path, page(title, top, contents([heading for heading, _ in shown]), *body))
    return path


def _header(title: str, settings: Mapping[str, Any], run: Path, stages: Sequence[str], draw: bool) -> Html:
    backbone = "/".join(Path(settings["backbone"]).parts[-2:])
    preferred = "refined after reflecting on the user" if settings["chosen"] == "refined" else "found in the dialogues"
    text = (
        f"Backbone {backbone}, {settings['iterations']} iterations, seed {settings['seed']}. M0 learnt from human "
        f"dialogues; each later model learnt to prefer what the one before it {preferred} over its first replies."
    )
    notices = []
    expected = [f"M{t}" for t in range(settings["iterations"] + 1)]
    missing = [name for name in expected if not (run / "eval" / f"{name}.json").is_file()]
    if missing:
        state = f"there is a folder of {', '.join(stages)}" if stages else "no stage has begun"
        notices.append(f"This run is unfinished: {', '.join(missing)} not scored yet; {state}.")
    if settings["control"] != "none":
        notices.append(f"This is a control experiment ({settings['control']}): it is meant to do worse.")
    if not draw:
        notices.append("There are no figures, because matplotlib is not installed (pip install 'selfevo[report]').")
    return join(element("h1", title), element("p.soft", text), *(element("p.notice", one) for one in notices))


def _replies(run: Path, stages: Sequence[str]) -> dict[str, list[str | None]]:
    """The replies of M0, M1, .. to the test turns, in the order of the turns."""
    paths = {stage: run / "eval" / f"{stage}.replies.jsonl" for stage in stages}
    return {stage: read_replies(path) for stage, path in paths.items() if path.is_file()}


def _training(run: Path, stages: Sequence[str], draw: bool) -> Html:
    stored = [(stage, run / stage / "metrics.jsonl") for stage in stages]
    records = {stage: read_jsonl(path) for stage, path in stored if path.is_file()}
    records = {stage: steps for stage, steps in records.items() if steps}
    if not records:
        return NOTHING
    head = ["stage", "steps", "loss, first", "loss, last", "held out, best", "at step", "held-out accuracy", "minutes"]
    parts = [
        table("Every stage of training. Accuracy is the share of pairs whose chosen reply has the higher reward.", head,
              [_training_row(stage, steps) for stage, steps in records.items()])
    ]  # fmt: skip
    if draw:
        text = "Lines are running means over a twentieth of the steps, points are evaluations on held-out dialogues."
        parts.append(element("p.soft", text))
        for stage, steps in records.items():
            figures = [_figure(caption, drawing) for caption, drawing in training_figures(stage, steps)]
            parts += [element("h3", stage), element("div.curves", *figures)]
    return join(*parts)


def _training_row(stage: str, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    row = [stage, f"{len(steps):,}", f"{steps[0]['loss']:.3f}", f"{steps[-1]['loss']:.3f}"]
    held = [step for step in steps if "held_out" in step]
    if held:
        best = min(held, key=lambda step: float(step["held_out"]["loss"]))
        accuracy = best["held_out"].get("accuracy")
        row += [f"{best['held_out']['loss']:.3f}", f"{best['step'] + 1:,}"]
        row.append("–" if accuracy is None else f"{accuracy:.2f}")
    else:
        row += ["–"] * 3
    return [*row, f"{sum(step['seconds'] for step in steps) / 60:.1f}"]


def _figure(caption: str, drawing: Html) -> Html:
    return element("figure", drawing, element("figcaption", caption))


def _pairs(run: Path, settings: Mapping[str, Any], embed: Embed | None, draw: bool) -> Html:
    """Figure 5 with its numbers, lengths, and what the data rules did."""
    by_words = analyse_pairs(run)
    if not by_words:
        return NOTHING
    measures = [("TF-IDF", by_words, "words")]
    if embed is not None:
        measures.append(("mean hidden states", analyse_pairs(run, embed=embed), "states"))
    parts = [
        element(
            "p",
            "Relevance is the cosine between a reply and all that the user has said until then; the gain is that of "
            "the chosen reply minus that of the rejected one; similarity is the cosine between the two replies. TF-IDF "
            "weighs lower-cased words by how rare they are among all statements and replies of the run.",
        )
    ]
    if settings["control"] != "none":
        parts.append(element("p", "Shown are the pairs as they were made, before the control changed them."))
    for measure, analyses, mark in measures:
        parts.append(_similarity_table(measure, analyses))
        if draw:
            drawings = [
                _figure(f"Relevance of replies ({measure}); dashed: means", relevance_figure(analyses, f"{mark}-r")),
                _figure(f"Similarity within pairs ({measure})", similarity_figure(analyses, f"{mark}-s")),
            ]
            parts.append(element("div.figures", *drawings))
    tables = _length_table(by_words), _filter_table(run, [one.stage for one in by_words])
    return join(*parts, element("div.tables", *tables))


def _similarity_table(measure: str, analyses: Sequence[PairAnalysis]) -> Html:
    head = ["iteration", "pairs", "relevance of chosen", "relevance of rejected", "gain", "similarity"]
    rows: Rows = []
    for one in analyses:
        summaries = (one.chosen_relevance, one.rejected_relevance, one.relevance_gain, one.similarity)
        rows.append([one.stage, f"{len(one.similarity.values):,}", *(_summary_cell(s, 3) for s in summaries)])
    caption = f"Pairs by cosine of {measure}. Means, their 95 % intervals (dialogues resampled), and medians."
    return table(caption, head, rows)


def _summary_cell(summary: Summary, digits: int) -> Html:
    interval = interval_text(summary.low, summary.high, digits)
    median = f"median {summary.median:.{digits}f}"
    return join(f"{summary.mean:.{digits}f}", element("small", interval), element("small", median))


def _length_table(analyses: Sequence[PairAnalysis]) -> Html:
    rows = [
        [one.stage, *(_summary_cell(s, 1) for s in (one.chosen_length, one.rejected_length, one.golden_length))]
        for one in analyses
    ]
    return table("Length of replies in words. Means, their 95 % intervals, and medians.",
                 ["iteration", "chosen", "rejected", "golden"], rows)  # fmt: skip


def _filter_table(run: Path, stages: Sequence[str]) -> Html:
    counts = {
        stage: read_json(run / stage / "filter.json") for stage in stages if (run / stage / "filter.json").is_file()
    }
    rules = list(dict.fromkeys(rule for one in counts.values() for rule in one))
    rows = [[rule.replace("_", " "), *(f"{one.get(rule, 0):,}" for one in counts.values())] for rule in rules]
    return table("What each data rule changed.", ["rule", *counts], rows) if counts else NOTHING


def _phrases(replies: Mapping[str, Sequence[str | None]], draw: bool) -> Html:
    """Figure 6: the stock phrases of the first model and of the last one, and who still uses them."""
    texts = {name: [text for text in own if text] for name, own in replies.items()}
    texts = {name: own for name, own in texts.items() if own}
    if not texts:
        return NOTHING
    parts = [
        element(
            "p",
            "Phrases of two to four words, each counted once per reply. Left out is a phrase that hardly occurs but "
            "within a longer one, or in all but the same replies as another.",
        )
    ]
    drawings: list[Html] = []
    for name in dict.fromkeys((next(iter(texts)), list(texts)[-1])):
        phrases = [phrase.words for phrase in frequent_phrases(texts[name], TOP_PHRASES)]
        if not phrases:
            continue
        shares = phrase_shares(texts, phrases)
        rows = [[phrase, *(f"{100 * own[at]:.1f}" for own in shares.values())] for at, phrase in enumerate(phrases)]
        caption = f"Most frequent phrases of {name}"
        numbers = table(f"{caption}. Share of each model's replies that hold them, %.", ["phrase", *shares], rows)
        if draw:
            drawings.append(_figure(caption, phrases_figure(phrases, shares, f"phrases-{name}")))
            parts.append(details(f"{caption}: numbers", numbers))
        else:
            parts.append(numbers)
    return join(parts[0], element("div.figures", *drawings), *parts[1:])


def _data(run: Path, stages: Sequence[str]) -> Html:
    """Sizes of the splits, and what cleaning changed in each file."""
    if not (run / "data.json").is_file():
        return NOTHING
    data = read_json(run / "data.json")
    sizes = [[name.replace("_", " "), _number(value)] for name, value in data["sizes"].items()]
    if (run / "M0" / "sft.json").is_file() and "M0" in stages:
        counts = read_json(run / "M0" / "sft.json")
        sizes += [[f"phase 1, {name.replace('_', ' ')}", _number(value)] for name, value in counts.items()]
    rules = [
        [f"{_short(source)}: {rule.replace('_', ' ')}", _number(count)]
        for source, counts in data["rules"].items()
        for rule, count in counts.items()
    ]
    return join(
        table("Sizes.", ["", "number"], sizes),
        details("What cleaning changed", table("Rules by file.", ["file and rule", "cases"], rules)),
    )


def _short(source: str) -> str:
    """A file's name without its folders; what follows a comma says what of the file was counted."""
    path, _, what = source.rpartition(", ")
    return f"{Path(path).name}, {what}"


def _number(value: Any) -> str:
    return ", ".join(f"{part:,}" for part in value) if isinstance(value, list) else f"{value:,}"


def _settings(config: Mapping[str, Any]) -> Html:
    def as_text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = [[name, element("code", as_text(value))] for name, value in config["settings"].items()]
    versions = [[name, value] for name, value in config["versions"].items()]
    hashes = [[name, element("code", digest)] for name, digest in config["data"].items()]
    return join(
        details("All settings", table("Settings.", ["setting", "value"], rows)),
        details("Versions", table("Versions.", ["package", "version"], versions)),
        details("Data files", table("SHA-256 of the data files.", ["file", "hash"], hashes)),
    )
