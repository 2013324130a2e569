"""A run as one page to read and to send around: ``RUN/report.html``.

The page needs nothing but itself. It shows what the run folder holds, so an unfinished run gives a shorter page, and
the same folder always gives the same page. What is said and how it is laid out is in ``templates/page.html``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfevo.evaluation.folder import read_replies, stage_names
from selfevo.evaluation.report.analysis import Embed, Summary, analyse_pairs, frequent_phrases, phrase_shares
from selfevo.evaluation.report.figures import pair_figures, phrases_figure, training_figures
from selfevo.evaluation.report.samples import sample_answers, sample_pairs
from selfevo.evaluation.report.score_tables import judge_table, score_tables
from selfevo.evaluation.tables import interval_text
from selfevo.files import read_json, read_jsonl, write_text

if TYPE_CHECKING:
    from jinja2 import Template

TOP_PHRASES = 12
# No HTML file may hold control characters or halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_report(run: Path, *, embed: Embed | None = None) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    With ``embed`` the pairs are also compared by those embeddings. Without matplotlib there are no figures, without
    scikit-learn no comparison of pairs, which the page says. Raises ValueError for what is no run folder, for a file
    in it that cannot be read, or where Jinja2 is not installed.
    """
    template = _template()
    stages, config = stage_names(run), read_json(run / "config.json")
    settings = config["settings"]
    if "iterations" not in settings:
        raise ValueError(f"{run}: is a run of something else than the loop; its tables are in {run / 'eval'}")
    draw, compare = (find_spec(name) is not None for name in ("matplotlib", "sklearn"))
    replies = {stage: read_replies(path) for stage, path in _present(run, stages, "eval/{}.replies.jsonl").items()}
    models = [f"M{t}" for t in range(settings["iterations"] + 1)]
    sections = {
        "Scores": score_tables(run / "eval"),
        "Judge": judge_table(run / "eval"),
        "Training": _training(run, stages, draw),
        "Preference pairs": _pairs(run, embed, draw) if compare else None,
        "Phrases": _phrases(replies, draw),
        "Replies side by side": sample_answers(run / "eval", replies),
        "From reply to refinement": sample_pairs(run, stages),
        "Data": _data(run),
        "Settings": config | {"settings": {name: _listed(value) for name, value in settings.items()}},
    }
    html = template.render(
        title=f"Run {run.resolve().name}",
        backbone="/".join(Path(settings["backbone"]).parts[-2:]),
        settings=settings,
        stages=stages,
        missing=[name for name in models if not (run / "eval" / f"{name}.json").is_file()],
        draw=draw,
        compare=compare,
        sections={heading: content for heading, content in sections.items() if content},
    )
    path = run / "report.html"
    write_text(path, _UNPRINTABLE.sub("\ufffd", html))
    return path


def _template() -> Template:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ValueError("a report needs Jinja2; install it with: pip install 'selfevo[report]'") from error
    loader = PackageLoader("selfevo.evaluation.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _present(run: Path, stages: Sequence[str], pattern: str) -> dict[str, Path]:
    """The file of each stage that has one; ``pattern`` has ``{}`` for the stage."""
    paths = {stage: run / pattern.format(stage) for stage in stages}
    return {stage: path for stage, path in paths.items() if path.is_file()}


def _training(run: Path, stages: Sequence[str], draw: bool) -> dict[str, Any] | None:
    stored = {stage: read_jsonl(path) for stage, path in _present(run, stages, "{}/metrics.jsonl").items()}
    records = {stage: steps for stage, steps in stored.items() if steps}
    rows = []
    for stage, steps in records.items():
        best = min(
            (step for step in steps if "held_out" in step), key=lambda step: step["held_out"]["loss"], default=None
        )
        held = [f"{best['held_out']['loss']:.3f}", best["step"] + 1] if best else ["–", "–"]
        accuracy = f"{best['held_out']['accuracy']:.2f}" if best and "accuracy" in best["held_out"] else "–"
        losses = f"{steps[0]['loss']:.3f}", f"{steps[-1]['loss']:.3f}"
        minutes = f"{sum(step['seconds'] for step in steps) / 60:.1f}"
        rows.append([stage, len(steps), *losses, *held, accuracy, minutes])
    figures = {stage: training_figures(stage, steps) for stage, steps in records.items()} if draw else {}
    return {"rows": rows, "figures": figures} if rows else None


def _pairs(run: Path, embed: Embed | None, draw: bool) -> dict[str, Any] | None:
    """Figure 5 with its numbers, lengths, and what the data rules did."""
    analyses = analyse_pairs(run)
    if not analyses:
        return None
    measures = {"TF-IDF": analyses}
    if embed is not None:
        measures["mean hidden states"] = analyse_pairs(run, embed=embed)
    similarities = []
    for measure, values in measures.items():
        rows = []
        for one in values:
            cosines = one.chosen_relevance, one.rejected_relevance, one.relevance_gain, one.similarity
            rows.append([one.stage, len(one.similarity.values), *(_summary_cell(values, 3) for values in cosines)])
        figures = pair_figures(measure, values) if draw else []
        similarities.append({"measure": measure, "rows": rows, "figures": figures})
    lengths = [
        [one.stage, *(_summary_cell(words, 1) for words in (one.chosen_length, one.rejected_length, one.golden_length))]
        for one in analyses
    ]
    stages = [one.stage for one in analyses]
    changed = {stage: read_json(path) for stage, path in _present(run, stages, "{}/filter.json").items()}
    rules = dict.fromkeys(rule for counts in changed.values() for rule in counts)
    return {
        "similarities": similarities,
        "lengths": lengths,
        "changed": list(changed),
        "rules": [[_spaced(rule), *(counts.get(rule, 0) for counts in changed.values())] for rule in rules],
    }


def _summary_cell(summary: Summary, digits: int) -> list[str]:
    interval = interval_text(summary.low, summary.high, digits)
    return [f"{summary.mean:.{digits}f}", interval, f"median {summary.median:.{digits}f}"]


def _phrases(replies: Mapping[str, Sequence[str | None]], draw: bool) -> list[dict[str, Any]]:
    """Figure 6: the stock phrases of the first model and of the last one, and who still uses them."""
    texts = {name: [text for text in own if text] for name, own in replies.items()}
    names = [name for name, own in texts.items() if own]
    found = []
    for name in dict.fromkeys(names[:1] + names[-1:]):
        phrases = [phrase.words for phrase in frequent_phrases(texts[name], TOP_PHRASES)]
        if phrases:
            caption, shares = f"Most frequent phrases of {name}", phrase_shares(texts, phrases)
            rows = [[phrase, *(f"{100 * own[at]:.1f}" for own in shares.values())] for at, phrase in enumerate(phrases)]
            figures = [phrases_figure(caption, phrases, shares)] if draw else []
            found.append({"caption": caption, "models": list(shares), "rows": rows, "figures": figures})
    return found


def _data(run: Path) -> dict[str, Any] | None:
    """Sizes of the splits, and what cleaning changed in each file."""
    if not (run / "data.json").is_file():
        return None
    data = read_json(run / "data.json")
    sizes = dict(data["sizes"])
    if (run / "M0" / "sft.json").is_file():
        sizes |= {f"phase 1, {name}": count for name, count in read_json(run / "M0" / "sft.json").items()}
    return {
        "sizes": [[_spaced(name), _listed(value, "{:,}")] for name, value in sizes.items()],
        "rules": [
            [f"{Path(source).name}: {_spaced(rule)}", count]
            for source, counts in data["rules"].items()
            for rule, count in counts.items()
        ],
    }


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _listed(value: Any, form: str = "{}") -> str:
    """A value, or those of a list after one another."""
    return ", ".join(form.format(part) for part in (value if isinstance(value, list) else [value]))
