"""What came of a study: ``STUDY/results`` with tables, figures, CSV files, transcripts, and what ``judge.py`` reads.

Conversations that were finished count; those that were stopped or not ended are told, and their transcripts kept.
Whatever is resampled or tested is participants, as the conversations and the turns of one are not independent.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Example, Turn
from selfevo.evaluation.folder import write_examples
from selfevo.evaluation.significance import bootstrap_interval, sign_test
from selfevo.evaluation.tables import markdown_table
from selfevo.files import FileError, write_jsonl, write_text
from selfevo.study.plan import POINTWISE, SIDES, StudySettings
from selfevo.study.store import Exchange, Session, Store


def write_results(store: Store) -> tuple[Path, str]:
    """Writes the results of a study; their folder, and the main table in Markdown. Raises FileError where nobody has
    finished a conversation yet."""
    settings, folder = store.settings, store.folder / "results"
    sessions = store.sessions()
    finished = [session for session in sessions if session.state == "finished"]
    if not finished:
        raise FileError(
            f"{store.folder}: nobody has finished a conversation yet (begun: {len(sessions)}); wait for some"
        )
    shutil.rmtree(folder / "transcripts", ignore_errors=True)
    for session in sessions:
        write_text(folder / "transcripts" / f"{session.id:04}.md", transcript(session, settings))
    _write_csv(folder / "conversations.csv", _conversations(sessions, settings))
    if settings.mode == POINTWISE:
        head, rows, drawings = _ratings(finished, settings)
        _write_csv(folder / "scores.csv", _scores(finished, settings))
        _write_for_judge(folder, finished, settings)
    else:
        head, rows, drawings = _votes(finished, settings)
        _write_csv(folder / "votes.csv", _every_vote(finished))
    _write_page(folder / "report.html", sessions, settings, head, rows, drawings)
    return folder, markdown_table(head, rows)


Table = tuple[list[str], dict[str, list[str]], list[dict[str, str]]]  # head, rows, drawings


def _ratings(finished: Sequence[Session], settings: StudySettings) -> Table:
    """Figure 3: each model's mean of each aspect with its interval."""
    rows, means, ends = {}, {}, {}
    for model in settings.models:
        own = [session for session in finished if settings.unit(session.place) == (model,)]
        if not own:
            continue
        people = [session.participant for session in own]
        scores = {aspect: [float(session.scores[aspect]) for session in own] for aspect in settings.aspects}
        means[model] = [fmean(values) for values in scores.values()]
        ends[model] = [bootstrap_interval(values, people) for values in scores.values()]
        cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, (low, high) in zip(means[model], ends[model])]
        rows[model] = [*cells, str(len(own)), str(len(set(people)))]
    drawings = []
    if find_spec("matplotlib") is not None:
        from selfevo.evaluation.report.figures import ratings_figure

        drawings.append(ratings_figure(settings.aspects, means, ends))
    return ["model", *settings.aspects, "conversations", "participants"], rows, drawings


def _votes(finished: Sequence[Session], settings: StudySettings) -> Table:
    """Figure 4: wins, ties and losses of each pair, by turns and by participants."""
    rows, counts = {}, {}
    for first, second in settings.units:
        own = [session for session in finished if set(settings.unit(session.place)) == {first, second}]
        turns = [(session.participant, turn) for session in own for turn in session.turns]
        if not turns:
            continue
        people = [participant for participant, _ in turns]
        won = Counter(_winner(turn) for _, turn in turns)
        counts[first, second] = won[first], won["tie"], won[second]
        ahead: Counter[int] = Counter()  # of each participant, how much oftener the first one won
        for participant, turn in turns:
            ahead[participant] += (_winner(turn) == first) - (_winner(turn) == second)
        plus, minus = sum(v > 0 for v in ahead.values()), sum(v < 0 for v in ahead.values())
        cells = []
        for model in (first, second):
            wins = [100.0 * (_winner(turn) == model) for _, turn in turns]
            low, high = bootstrap_interval(wins, people)
            cells.append(f"{fmean(wins):.1f} ({low:.1f} to {high:.1f})")
        kept = 100 * fmean(turn.models[turn.kept or "A"] == first for _, turn in turns)
        rows[f"{first} vs {second}"] = [
            cells[0], f"{100 * won['tie'] / len(turns):.1f}", cells[1], f"{kept:.1f}", str(len(turns)),
            f"{plus} : {minus} of {len(ahead)}", f"{sign_test(plus, minus):.3g}",
        ]  # fmt: skip
    drawings = []
    if find_spec("matplotlib") is not None:
        from selfevo.evaluation.report.figures import votes_figure

        drawings.append(votes_figure(counts))
    head = ["pair", "first wins %", "ties %", "second wins %", "gone on with the first %", "turns",
            "participants for each", "p (sign test)"]  # fmt: skip
    return head, rows, drawings


def _winner(turn: Exchange) -> str:
    """The model that a turn's vote is for, or tie."""
    return turn.models.get(turn.choice or "", "tie")


def transcript(session: Session, settings: StudySettings) -> str:
    """A conversation in Markdown, as in Figures 7 to 10; in a pairwise study with both replies to every turn."""
    models = " and ".join(settings.unit(session.place))
    parts = [f"# Conversation {session.id}: {models}", f"Participant {session.participant}, {session.state}."]
    if scenario := settings.scenario(session.place):
        parts.append(f"Scenario: {_quoted(scenario)}")
    for turn in session.turns:
        parts.append(f"**user:** {_quoted(turn.text)}")
        for side, text in turn.replies.items():
            notes = [f" ({side})"] if settings.mode != POINTWISE else []
            notes += [", preferred"] * (turn.choice == side)
            notes += [", tie, gone on with"] * (turn.choice == "tie" and turn.kept == side)
            parts.append(f"**{turn.models[side]}{''.join(notes)}:** {_quoted(text or '')}")
    parts += [", ".join(f"{aspect} {score}" for aspect, score in session.scores.items())] * bool(session.scores)
    parts += [f"Comment: {_quoted(session.comment)}"] * bool(session.comment)
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """What people or models wrote, so that no viewer of Markdown takes it for HTML."""
    return escape(text, quote=False)


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Numbers and our own words only: what people wrote could be a formula to a spreadsheet, and is in transcripts."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def _conversations(sessions: Sequence[Session], settings: StudySettings) -> Iterable[Sequence[object]]:
    yield "conversation", "participant", "place", "models", "scenario", "state", "turns", "minutes"
    for session in sessions:
        scenario = settings.scenario(session.place)
        number = settings.scenarios.index(scenario) + 1 if scenario else ""
        minutes = "" if session.ended is None else f"{(session.ended - session.began) / 60:.1f}"
        models = " ".join(settings.unit(session.place))
        yield (session.id, session.participant, session.place, models, number, session.state, len(session.turns),
               minutes)  # fmt: skip


def _scores(finished: Sequence[Session], settings: StudySettings) -> Iterable[Sequence[object]]:
    yield "conversation", "participant", "model", "aspect", "score"
    for session in finished:
        for aspect, score in session.scores.items():
            yield session.id, session.participant, *settings.unit(session.place), aspect, score


def _every_vote(finished: Sequence[Session]) -> Iterable[Sequence[object]]:
    yield "conversation", "participant", "turn", *SIDES, "choice", "kept"
    for session in finished:
        for turn in session.turns:
            models = [turn.models[side] for side in SIDES]
            yield session.id, session.participant, turn.number, *models, turn.choice, turn.kept


def _write_for_judge(folder: Path, finished: Sequence[Session], settings: StudySettings) -> None:
    """One reply of each conversation, drawn at random, in its context, as a folder that ``judge.py`` takes, and in
    ``human.jsonl`` the scores that people gave to the conversation.

    One, as several replies of a conversation share its scores and would make the correlation look surer than it is.
    """
    examples, answers, human = [], [], []
    for session in finished:
        (model,) = settings.unit(session.place)
        said = [number for number, turn in enumerate(session.turns) if turn.reply]
        if not said:
            continue
        drawn = 2 * Random(derive_seed(settings.seed, "study", "judged", session.id)).choice(said) + 1
        context = session.context()
        examples.append(Example(f"conversation-{session.id}", drawn, context[:drawn], Turn("supporter", "")))
        answers.append((model, context[drawn].text))
        human.append({"id": examples[-1].id, "model": model, "scores": session.scores})
    (folder / "eval" / "examples.jsonl").unlink(missing_ok=True)
    write_examples(folder / "eval", examples)
    for name in dict.fromkeys(model for model, _ in answers):
        texts = [text if model == name else None for model, text in answers]
        records = [{"index": index, "text": text} for index, text in enumerate(texts)]
        write_jsonl(folder / "eval" / f"{name}.replies.jsonl", records)
    write_jsonl(folder / "human.jsonl", human)


def _write_page(
    path: Path, sessions: Sequence[Session], settings: StudySettings, head: list[str], rows: Any, drawings: Any
) -> None:
    """``report.html``: numbers only, so that it may be shown without what people wrote."""
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise FileError("the page needs Jinja2; install it with: pip install 'selfevo[study]'") from error
    loaders = [PackageLoader("selfevo.study"), PackageLoader("selfevo.evaluation.report")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    minutes = [(s.ended - s.began) / 60 for s in sessions if s.state == "finished" and s.ended is not None]
    html = environment.get_template("results.html").render(
        settings=settings, head=head, rows=rows, drawings=drawings, pointwise=settings.mode == POINTWISE,
        states=Counter(session.state for session in sessions), minutes=median(minutes),
        turns=fmean(len(session.turns) for session in sessions if session.state == "finished"),
        participants=len({session.participant for session in sessions}),
    )  # fmt: skip
    write_text(path, html)
