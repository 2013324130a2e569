"""People's scores joined with a judge's: nothing vanishes without a word."""

# ruff: noqa: F401, F811  (fixtures are imported, and named as arguments)
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import faulty
import judge
import pytest
from chat_server import Server, says, server  # a fixture
from faulty import output

from selfevo.evaluation.people import correlation, join_ratings, read_ratings
from selfevo.files import FileError, read_jsonl, write_jsonl

REPLIES = {(model, f"d{n}#1") for model in ("M0", "M1") for n in range(3)}
ASPECTS = ["Empathy", "Overall Quality"]


def join(path: Path, records: list[Any]) -> tuple[Any, str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores, sentences = join_ratings(read_ratings(path), REPLIES, ASPECTS, "people.jsonl")
    return scores, "\n".join(sentences)


def rating(n: int = 0, model: str = "M0", **scores: Any) -> dict[str, Any]:
    return {"model": model, "id": f"d{n}#1", "scores": scores}


def test_one_record_for_each_aspect_is_one_reply(tmp_path: Path) -> None:
    scores, said = join(tmp_path / "p", [rating(Empathy=4), rating(overall_quality=2), rating(1, Empathy=3)])
    assert scores == {("M0", "d0#1"): {"Empathy": 4, "Overall Quality": 2}, ("M0", "d1#1"): {"Empathy": 3}}
    assert said == "people.jsonl: 3 of 3 records joined (M0 3), 2 replies, 1 to 1 scores each, averaged"


def test_a_second_rater_of_one_aspect_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    records = [rating(**{"Empathy": 4, "Overall Quality": 2}), rating(empathy=1)]
    scores, said = join(tmp_path / "p", records)
    assert scores == {("M0", "d0#1"): {"Empathy": 2.5, "Overall Quality": 2}}
    assert "1 to 2 scores each" in said


def test_what_cannot_be_joined_is_told(tmp_path: Path) -> None:
    records = [rating(Empathy=4), rating(model="m1", Empathy=4), rating(9, Empathy=4), rating(1, Warmth=2, Empathy=3)]
    records += [rating(2, Warmth=2), rating(2, Empathy=float("nan"), **{"Overall Quality": None})]
    _, said = join(tmp_path / "p", records)
    assert "2 of 6 records joined (M0 2)" in said
    assert "1 records of 'm1', which is not judged here (M0, M1 are)" in said
    assert "1 records of M0 with ids that are not among the judged test turns" in said
    assert "2 records of M0 without a score for a judged aspect" in said
    assert "aspects that are not judged: Warmth (2 scores)" in said
    assert "2 blank scores" in said
    assert "has no scores for Overall Quality" in said


@pytest.mark.parametrize(
    "records", [[rating(model="M7", Empathy=4)], [rating(9, Empathy=1)], [rating(Warmth=3)], [rating(Empathy=None)]]
)
def test_nothing_to_join_is_an_error(tmp_path: Path, records: list[Any]) -> None:
    with pytest.raises(FileError, match=r"people.jsonl: nothing can be joined with what is judged: 1 records of "):
        join(tmp_path / "p", records)


@pytest.mark.parametrize(
    "record",
    [[], 3, None, "x", {}, {"model": "M0"}, {"model": "M0", "id": "d0#1"}, rating(), rating(Empathy="4"),
     rating(Empathy=True), rating(Empathy=[4]), rating(Empathy=float("inf")), rating(Empathy=4, empathy=3),
     rating(model=3, Empathy=4), {"model": "M0", "id": "d0#1", "scores": [4]}],
)  # fmt: skip
def test_a_record_that_is_no_rating_is_named(tmp_path: Path, record: Any) -> None:
    write = json.dumps([rating(Empathy=1), record])
    (tmp_path / "people.json").write_text(write)
    faulty.assert_one_sentence(lambda: read_ratings(tmp_path / "people.json"), "people.json, record 1", kind="data")


def test_a_correlation_needs_both_scores_of_a_reply() -> None:
    judged = {("M0", str(n)): {"Empathy": float(n)} for n in range(6)}
    people = {("M0", str(n)): {"Empathy": 2.0 * n} if n != 5 else {} for n in range(6)}
    assert correlation("Empathy", judged, people) == "1.00 (– to –, 5)"
    assert correlation("Other", judged, people) == "–"


def test_the_command_refuses_before_it_asks_and_tells_in_its_table(tmp_path: Path, server: Server) -> None:
    run = Path(shutil.copytree(Path(__file__).resolve().parents[1] / "data" / "run-0.1", tmp_path / "run"))
    server.script = [says(json.dumps({"explanation": "e", "score": 3}))]
    ids = [record["id"] for record in read_jsonl(run / "eval" / "examples.jsonl")]
    people = tmp_path / "people.jsonl"
    arguments = [run, "--judge-url", server.url, "--judge", "j", "--aspects", "personalisation", "--human", people]
    write_jsonl(people, [{"model": "m1", "id": ids[0], "scores": {"Personalisation": 3}}])
    faulty.assert_program_refuses(judge.main, *arguments, mentions=("nothing can be joined", "'m1'"))
    assert not server.requests
    write_jsonl(
        people, [{"model": m, "id": id_, "scores": {"personalisation": 3}} for id_ in ids for m in ("M1", "m1")]
    )
    shown = output(judge.main, *arguments)
    assert f"{len(ids)} of {2 * len(ids)} records joined (M1 {len(ids)})" in shown
    assert f"not joined: {len(ids)} records of 'm1'" in shown
    assert "| Pearson r | – |" in shown  # neither varies
