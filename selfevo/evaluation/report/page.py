"""A run as one page to read and to send around: ``RUN/report.html``.

The page needs nothing but itself. It shows what the run folder holds, so an unfinished run gives a shorter page, and
the same folder always gives the same page. What is said and how it is laid out is in ``templates/page.html``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfevo.evaluation.folder import (
    VANILLA,
    answered_models,
    diverged_stages,
    failed_reflections,
    is_stage,
    read_counts,
    read_examples,
    read_replies,
    read_steps,
    stage_names,
)
from selfevo.evaluation.judgements import read_judgings
from selfevo.evaluation.report.analysis import Embed, analyse_pairs, kept_analyses
from selfevo.evaluation.report.figures import pair_figures, phrases_figure, training_figures
from selfevo.evaluation.report.phrases import frequent_phrases, phrase_shares
from selfevo.evaluation.report.samples import sample_answers, sample_pairs, telling_case
from selfevo.evaluation.report.score_tables import plain_tables, score_tables
from selfevo.files import Fields, read_object, write_text

if TYPE_CHECKING:
    from jinja2 import Template

TOP_PHRASES = 12
_MOST_ITERATIONS = 10_000  # one that is larger is a damaged file's
# No HTML file may hold control characters or halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
Replies = Mapping[str, Sequence[str | None]]


def write_report(
    run: Path, *, embed: Embed | None = None, embed_name: str = "mean hidden states", baseline: str = ""
) -> Path:
    """Writes ``report.html`` into the folder of a run, of the loop or of Decoupled ESC, and returns its path.

    Models are compared with the ``baseline``, by default the first row of their table. With ``embed`` the pairs are
    also compared by those embeddings, called ``embed_name``. Without matplotlib there are no figures, without
    scikit-learn no comparison of pairs, which the page says. Raises ValueError for what is no run folder, for a file in
    it that cannot be read, or where Jinja2 is not installed.
    """
    template = _template()
    stages, config = stage_names(run), _config(run / "config.json")
    settings = config["settings"]
    decoupled = "planning" in settings
    draw, compare = (find_spec(name) is not None for name in ("matplotlib", "sklearn"))
    names = answered_models(run / "eval") if any((run / "eval").glob("*.replies.jsonl")) else []
    replies = {name: read_replies(run / "eval" / f"{name}.replies.jsonl") for name in names}
    own = replies if decoupled else {name: replies[name] for name in names if name == VANILLA or is_stage(name)}
    steps = _present(run, stages, "{}/metrics.jsonl", read_steps)
    sections = {
        "Scores": score_tables(run / "eval", baseline),
        "More scores": plain_tables(run / "eval"),
        "One case": telling_case(run / "eval", own),
        "Judge": read_judgings(run / "eval"),
        "Training": [
            (name, rows, training_figures(name, rows) if draw else []) for name, rows in steps.items() if rows
        ],
        "Preference pairs": _pairs(run, {embed_name: embed} if embed else {}, draw, compare),
        "Phrases": _phrases(run / "eval", own, draw),
        "Replies side by side": sample_answers(run / "eval", replies),
        "From reply to refinement": sample_pairs(run, stages),
        "Data": _data(run),
        "Settings": config,
    }
    html = template.render(
        title=f"Run {run.resolve().name}",
        backbone="/".join(Path(settings["backbone"]).parts[-2:]),
        settings=settings,
        decoupled=decoupled,
        failed=failed_reflections(run) + diverged_stages(run),
        stages=stages,
        missing=[] if decoupled else _not_scored(run, settings),
        sections={heading: content for heading, content in sections.items() if content},
        draw=draw,
        compare=compare,
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


def _config(path: Path) -> dict[str, Any]:
    """A run's config.json, with all that the page says of it."""
    config = read_object(path)
    settings = Fields(config.take("settings", dict), f"{path}, 'settings'")
    for name in ("backbone", *(() if "planning" in settings.values else ("chosen",))):
        settings.take(name, str)
    for name in ("seed", *(() if "planning" in settings.values else ("iterations",))):
        settings.take(name, int, low=0, **({"high": _MOST_ITERATIONS} if name == "iterations" else {}))
    for name, value in (("start", "M0"), ("control", "none"), ("sft_data", "human")):
        settings.take(name, str, value)
    for part in ("versions", "data"):
        texts = Fields(config.take(part, dict), f"{path}, {part!r}")
        for name in texts.values:
            texts.take(name, str)
    return config.values


def _not_scored(run: Path, settings: Mapping[str, Any]) -> list[str]:
    first = int(settings.get("start") == VANILLA)
    models = [f"M{t}" for t in range(first, settings["iterations"] + 1)]
    return [name for name in models if not (run / "eval" / f"{name}.json").is_file()]


def _present(run: Path, stages: Sequence[str], pattern: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The content of a file of each stage that has it; in the ``pattern`` of its path ``{}`` stands for the stage."""
    paths = {stage: run / pattern.format(stage) for stage in stages}
    return {stage: read(path) for stage, path in paths.items() if path.exists()}


def _pairs(run: Path, embeds: Mapping[str, Embed], draw: bool, compare: bool) -> dict[str, Any] | None:
    """Figure 5 with its numbers, lengths, and what the data rules did."""
    by_measure = {"TF-IDF": analyse_pairs(run)} if compare else {}
    for name, embed in embeds.items():
        analyse_pairs(run, embed=embed, keep_as=name)
    by_measure |= kept_analyses(run)  # those of earlier commands too
    changed = _present(run, stage_names(run), "{}/filter.json", read_counts)
    rules = dict.fromkeys(rule for counts in changed.values() for rule in counts)
    measures = [(name, own, pair_figures(name, own) if draw else []) for name, own in by_measure.items() if own]
    if not measures and not changed:
        return None
    return {
        "analyses": measures[0][1] if measures else [],
        "measures": measures,
        "changed": list(changed),
        "rules": {rule: [counts.get(rule, 0) for counts in changed.values()] for rule in rules},
    }


def _phrases(folder: Path, replies: Replies, draw: bool) -> list[dict[str, Any]]:
    """Figure 6: the stock phrases of the first model and of the last one, and who still uses them."""
    texts = {name: [text for text in own if text] for name, own in replies.items()}
    names = [name for name, own in texts.items() if own]
    said = [example.context[-1].text for example in read_examples(folder)] if names else []
    texts["golden"] = [example.golden.text for example in read_examples(folder)] if names else []
    found = []
    trained = [name for name in names if name != VANILLA] or names
    for name in dict.fromkeys(trained[:1] + trained[-1:]):
        phrases = [phrase.words for phrase in frequent_phrases(texts[name], said, TOP_PHRASES)]
        if phrases:
            caption, shares = f"Most frequent phrases of {name}", phrase_shares(texts, phrases)
            drawings = [phrases_figure(caption, phrases, shares)] if draw else []
            found.append({"caption": caption, "phrases": phrases, "shares": shares, "drawings": drawings})
    return found


def _data(run: Path) -> dict[str, Any] | None:
    """Sizes of the splits, and what cleaning changed in each file; names of files go without their folders."""
    if not (run / "data.json").exists():
        return None
    data, path = read_object(run / "data.json"), run / "data.json"
    sizes: dict[str, list[int]] = {}
    for key, label in (("sizes", "{}"), ("turns", "turns, {}")):
        counted = Fields(data.take(key, dict, {}), f"{path}, {key!r}")
        for name, size in counted.values.items():
            own = counted.take_list(name, int) if isinstance(size, list) else [counted.take(name, int)]
            sizes[label.format(name)] = own
    sizes |= {f"phase 1, {name}": [count] for name, count in read_counts(run / "M0" / "sft.json").items()}
    return {
        "sizes": sizes,
        "statistics": {name: _statistics(one) for name, one in _of_files(data, "statistics")},  # 0.1 had none
        "rules": [(name, {rule: one.take(rule, int) for rule in one.values}) for name, one in _of_files(data, "rules")],
    }


def _of_files(data: Fields, key: str) -> list[tuple[str, Fields]]:
    """What ``data.json`` says of each file, whose name goes without its folder."""
    found = data.take(key, dict, {})
    return [(Path(source).name, Fields(own, f"{data.where}, {key!r} of {source}")) for source, own in found.items()]


def _statistics(own: Fields) -> dict[str, float]:
    means = ("session_length", "utterance_length", "seeker_utterance_length", "supporter_utterance_length")
    return {"sessions": own.take("sessions", int), **{name: own.take(name, float) for name in means}}
