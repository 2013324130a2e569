"""What came of a study: every number counted by hand, and files that other commands read."""

from __future__ import annotations

import csv
import importlib
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import faulty
import pytest
from chat_server import Server, completion, server  # noqa: F401  (a fixture)

from selfevo.evaluation.significance import sign_test
from selfevo.study.plan import StudySettings
from selfevo.study.results import write_results
from selfevo.study.store import Store

ASPECTS = ("Empathy", "Overall")


def study(folder: Path, mode: str, **changes: Any) -> Store:
    values = {"models": ("M0", "M1"), "turns": 1, "aspects": ASPECTS, "source": ""} | changes
    return Store(folder, StudySettings(mode=mode, **values))


def rated(store: Store, scores: dict[str, list[tuple[int, int]]]) -> None:
    """One participant after the other gives a model's next scores of Empathy and Overall."""
    left = {model: list(values) for model, values in scores.items()}
    while any(left.values()):
        participant = store.participant(store.begin(None, 99))
        assert participant is not None
        session = store.session(participant)
        assert session is not None
        (model,) = store.settings.unit(session.place)
        empathy, overall = left[model].pop(0)
        store.say(participant, 1, f"<b>hello</b> {session.id}")
        store.answer(session.id, 1, "A", f"grade {empathy}{overall} for {session.id}")
        store.end(participant)
        store.rate(participant, {"Empathy": empathy, "Overall": overall}, "=SUM(A1)")


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_scores_are_averaged_and_participants_resampled(tmp_path: Path) -> None:
    store = study(tmp_path, "pointwise")
    rated(store, {"M0": [(2, 5), (4, 5), (3, 5)], "M1": [(5, 1), (4, 3), (5, 2)]})
    _, table = write_results(store)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["model", *ASPECTS, "conversations", "participants"]
    assert [row[0] for row in cells[2:]] == ["M0", "M1"]
    assert cells[2][1].startswith("3.00 (2.")
    assert cells[2][2:] == ["5.00 (5.00 to 5.00)", "3", "3"]
    assert cells[3][1].startswith("4.67 (4.")
    assert cells[3][2].startswith("2.00 (1.")
    scores = rows(tmp_path / "results" / "scores.csv")
    assert len(scores) == 1 + 12
    assert sorted(int(row[4]) for row in scores[1:] if row[2:4] == ["M1", "Empathy"]) == [4, 5, 5]


def test_pages_and_tables_hold_numbers_and_transcripts_what_was_said_as_text(tmp_path: Path) -> None:
    store = study(tmp_path, "pointwise", scenarios=("A <i>quarrel</i>.",))
    rated(store, {"M0": [(2, 5)], "M1": [(5, 1)]})
    participant = store.participant(store.begin(None, 99))
    assert participant is not None
    store.say(participant, 1, "I would rather not.")
    store.stop(participant)
    folder, _ = write_results(store)
    page = (folder / "report.html").read_text()
    assert "3 participants" in page
    assert re.search(r"2 finished,\s+1 stopped, 0 not ended", page)
    assert page.count("<img") == 1
    for path in [*folder.glob("*.csv"), folder / "report.html"]:
        assert not re.search("hello|=SUM|rather not|quarrel", path.read_text()), path
    transcripts = {path.name: path.read_text() for path in (folder / "transcripts").iterdir()}
    assert sorted(transcripts) == ["0001.md", "0002.md", "0003.md"]
    assert "**user:** &lt;b&gt;hello&lt;/b&gt; 1" in transcripts["0001.md"]
    assert "Comment: =SUM(A1)" in transcripts["0001.md"]
    assert "A &lt;i&gt;quarrel&lt;/i&gt;." in transcripts["0001.md"]
    assert "stopped" in transcripts["0003.md"]
    assert "I would rather not." in transcripts["0003.md"]
    store.delete(participant)
    write_results(store)
    assert sorted(path.name for path in (folder / "transcripts").iterdir()) == ["0001.md", "0002.md"]


def test_votes_are_counted_by_model_whatever_its_side(tmp_path: Path) -> None:
    store = study(tmp_path, "pairwise", turns=10)
    # By participant: at how many of ten turns M0 wins, at how many there is a tie (going on with M1).
    for wins, ties in [(6, 1), (7, 3), (5, 0), (10, 0), (2, 2)]:
        participant = store.participant(store.begin(None, 99))
        assert participant is not None
        for number in range(1, 11):
            store.say(participant, number, "hello")
            session = store.session(participant)
            assert session is not None
            side_of = {model: side for side, model in session.turns[-1].models.items()}
            for side, model in session.turns[-1].models.items():
                store.answer(session.id, number, side, f"I am {model}")
            choice = side_of["M0"] if number <= wins else "tie" if number <= wins + ties else side_of["M1"]
            store.vote(participant, number, choice)
            if choice == "tie":
                store.keep(participant, number, side_of["M1"])
        store.end(participant)
        store.rate(participant, {}, "")
    folder, table = write_results(store)
    (row,) = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert row[0] == "M0 vs M1"
    assert row[1].startswith("60.0 (")
    assert row[2] == "12.0"
    assert row[3].startswith("28.0 (")
    assert row[4:] == ["60.0", "50", "3 : 1 of 5", "0.625"]
    votes = rows(folder / "votes.csv")
    assert len(votes) == 51
    winners = [dict(zip("AB", vote[3:5])).get(vote[5], "tie") for vote in votes[1:]]
    assert (winners.count("M0"), winners.count("tie"), winners.count("M1")) == (30, 6, 14)
    assert {frozenset(vote[3:5]) for vote in votes[1:]} == {frozenset({"M0", "M1"})}
    assert len({vote[3] for vote in votes[1:]}) == 2  # on either side
    transcript = (folder / "transcripts" / "0002.md").read_text()
    assert transcript.count("tie, gone on with:** I am M1") == 3
    assert transcript.count("preferred:** I am M0") == 7
    assert (folder / "report.html").read_text().count("<img") == 1


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (4, 0), (3, 1), (5, 5), (2, 9)])
def test_the_sign_test_is_the_share_of_outcomes_at_least_as_uneven(wins: int, losses: int) -> None:
    outcomes = [sum(signs) for signs in product((0, 1), repeat=wins + losses)]
    total = wins + losses
    extreme = [o for o in outcomes if abs(o - total / 2) >= abs(wins - total / 2)]
    assert sign_test(wins, losses) == pytest.approx(len(extreme) / len(outcomes))


def test_the_judge_is_correlated_with_the_people_of_the_study(
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = study(tmp_path, "pointwise")
    rated(store, {"M0": [(2, 5), (4, 4), (3, 1)], "M1": [(5, 1), (4, 3), (1, 2)]})
    folder, _ = write_results(store)

    def agree_on_empathy(handler: Any) -> None:
        """Scores Empathy as the participant did, and Overall the other way round."""
        asked = server.requests[-1]["messages"][-1]["content"]
        empathy, overall = map(int, re.search(r"grade (\d)(\d)", asked).groups())  # type: ignore[union-attr]
        body = completion(json.dumps({"explanation": "", "score": empathy if "\nEmpathy." in asked else 6 - overall}))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    server.script = [agree_on_empathy]
    monkeypatch.setenv("SELFEVO_API_KEY", "key")
    aspects = [{"name": name, "levels": {"1": "low", "5": "high"}} for name in ASPECTS]
    (tmp_path / "aspects.json").write_text(json.dumps(aspects))
    command = ["judge.py", folder, "--judge", "j", "--judge-url", server.url, "--concurrency", "1"]
    command += ["--human", folder / "human.jsonl", "--aspects", tmp_path / "aspects.json"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    assert importlib.import_module("judge").main() == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Pearson r")]
    empathy, overall = (cell.strip() for cell in row.split("|")[2:4])
    assert empathy.startswith("1.00 (")
    assert empathy.endswith(", 6)")
    assert overall.startswith("-1.00 (")


def test_a_folder_without_results_is_refused_in_one_sentence(tmp_path: Path) -> None:
    main = importlib.import_module("study").main
    faulty.assert_program_refuses(main, "results", tmp_path / "nowhere", mentions=("nowhere", "no study"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_bytes(b"no database" * 1000)
    faulty.assert_program_refuses(main, "results", tmp_path / "broken", mentions=("broken", "another folder"))
    study(tmp_path / "new", "pointwise").close()
    faulty.assert_program_refuses(main, "results", tmp_path / "new", mentions=("new", "nobody has finished"))


RUN = Path(__file__).resolve().parents[1] / "data" / "run-0.1"
SERVE = ("serve", RUN, "--mode", "pointwise", "--models", "M0", "--out")


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (("serve", "nowhere", *SERVE[2:], "{}"), ("nowhere", "run folder")),
        ((*SERVE, "{}", "--models", "M7"), ("no model M7", "vanilla, M0, M1")),
        ((*SERVE, "{}", "--models", "M0", "M0"), ("M0, M0", "once")),
        ((*SERVE, "{}", "--mode", "pairwise"), ("pairwise", "two")),
        ((*SERVE, "{}", "--turns", "0"), ("turns", "1 to 50")),
        ((*SERVE, "{}", "--conversations", "0"), ("at least 1",)),
        ((*SERVE, "{}", "--participants", "0"), ("--participants", "at least 1")),
        ((*SERVE, "{}", "--scenarios", "{}/none.txt"), ("none.txt", "no such file")),
        ((*SERVE, "{}", "--scenarios", "{}/blank.txt"), ("blank.txt", "no scenario")),
        ((*SERVE, "{}", "--port", "99999"), ("port 99999",)),
        ((*SERVE, "{}", "--host", "no.such.host.invalid"), ("no.such.host.invalid",)),
        ((*SERVE, "{}/blank.txt"), ("blank.txt",)),
        ((*SERVE, "{}/odd"), ("aspects.txt", "line 2")),
        ((*SERVE, "{}/empty"), ("consent.txt", "is empty")),
    ],
)  # fmt: skip
def test_wrong_flags_and_folders_are_refused_in_one_sentence(
    tmp_path: Path, flags: tuple[object, ...], mentions: tuple[str, ...]
) -> None:
    (tmp_path / "blank.txt").write_text("\n\n \n")
    for name, file, text in [("odd", "aspects", "Empathy: Yes?\nOverall\n"), ("empty", "consent", " ")]:
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / f"{file}.txt").write_text(text)
    given = [str(flag).format(tmp_path) for flag in flags]
    faulty.assert_program_refuses(importlib.import_module("study").main, *given, mentions=mentions)
