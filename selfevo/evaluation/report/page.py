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

from selfevo.evaluation.folder import failed_reflections, read_replies, stage_names
from selfevo.evaluation.report.analysis import Embed, analyse_pairs, frequent_phrases, phrase_shares
from selfevo.evaluation.report.figures import pair_figures, phrases_figure, training_figures
from selfevo.evaluation.report.samples import sample_answers, sample_pairs
from selfevo.evaluation.report.score_tables import judge_table, score_tables
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
    models = [f"M{t}" for t in range(settings["iterations"] + 1)]
    steps = _present(run, stages, "{}/metrics.jsonl", read_jsonl)
    replies = _present(run, stages, "eval/{}.replies.jsonl", read_replies)
    sections = {
        "Scores": score_tables(run / "eval"),
        "Judge": judge_table(run / "eval"),
        "Training": [(name, own, training_figures(name, own) if draw else []) for name, own in steps.items() if own],
        "Preference pairs": _pairs(run, embed, draw) if compare else None,
        "Phrases": _phrases(replies, draw),
        "Replies side by side": sample_answers(run / "eval", replies),
        "From reply to refinement": sample_pairs(run, stages),
        "Data": _data(run),
        "Settings": config,
    }
    html = template.render(
        title=f"Run {run.resolve().name}",
        backbone="/".join(Path(settings["backbone"]).parts[-2:]),
        settings=settings,
        failed=failed_reflections(run),
        stages=stages,
        missing=[name for name in models if not (run / "eval" / f"{name}.json").is_file()],
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


def _present(run: Path, stages: Sequence[str], pattern: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The content of a file of each stage that has it; in the ``pattern`` of its path ``{}`` stands for the stage."""
    paths = {stage: run / pattern.format(stage) for stage in stages}
    return {stage: read(path) for stage, path in paths.items() if path.is_file()}


def _pairs(run: Path, embed: Embed | None, draw: bool) -> dict[str, Any] | None:
    """Figure 5 with its numbers, lengths, and what the data rules did."""
    analyses = analyse_pairs(run)
    if not analyses:
        return None
    by_measure = {"TF-IDF": analyses}
    if embed is not None:
        by_measure["mean hidden states"] = analyse_pairs(run, embed=embed)
    changed = _present(run, [one.stage for one in analyses], "{}/filter.json", read_json)
    rules = dict.fromkeys(rule for counts in changed.values() for rule in counts)
    return {
        "analyses": analyses,
        "measures": [(name, own, pair_figures(name, own) if draw else []) for name, own in by_measure.items()],
        "changed": list(changed),
        "rules": {rule: [counts.get(rule, 0) for counts in changed.values()] for rule in rules},
    }


def _phrases(replies: Mapping[str, Sequence[str | None]], draw: bool) -> list[dict[str, Any]]:
    """Figure 6: the stock phrases of the first model and of the last one, and who still uses them."""
    texts = {name: [text for text in own if text] for name, own in replies.items()}
    names = [name for name, own in texts.items() if own]
    found = []
    for name in dict.fromkeys(names[:1] + names[-1:]):
        phrases = [phrase.words for phrase in frequent_phrases(texts[name], TOP_PHRASES)]
        if phrases:
            caption, shares = f"Most frequent phrases of {name}", phrase_shares(texts, phrases)
            drawings = [phrases_figure(caption, phrases, shares)] if draw else []
            found.append({"caption": caption, "phrases": phrases, "shares": shares, "drawings": drawings})
    return found


def _data(run: Path) -> dict[str, Any] | None:
    """Sizes of the splits, and what cleaning changed in each file; names of files go without their folders."""
    if not (run / "data.json").is_file():
        return None
    data = read_json(run / "data.json")
    sizes = data["sizes"]
    if (run / "M0" / "sft.json").is_file():
        sizes |= {f"phase 1, {name}": count for name, count in read_json(run / "M0" / "sft.json").items()}
    sizes = {name: [size] if isinstance(size, int) else size for name, size in sizes.items()}
    statistics = {Path(source).name: own for source, own in data.get("statistics", {}).items()}  # 0.1 had none
    return {
        "sizes": sizes,
        "statistics": statistics,
        "rules": [(Path(source).name, counts) for source, counts in data["rules"].items()],
    }
