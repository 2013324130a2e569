"""Damaged files of an evaluation: every command that reads one says in a sentence which, and where."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import abilities
import chat
import describe
import evaluate
import faulty
import judge
import pytest
import report

from selfevo.datasets import read_pairs
from selfevo.evaluation import score
from selfevo.evaluation.folder import read_examples, read_steps
from selfevo.evaluation.judge import Judgement, load_aspects
from selfevo.evaluation.judgements import judging_folder, read_judgings, write_judgements
from selfevo.evaluation.people import read_ratings
from selfevo.evaluation.report import add_table, page, write_report
from selfevo.evaluation.report.score_tables import plain_tables, score_tables
from selfevo.evaluation.score import score_answers
from selfevo.files import read_json, read_jsonl, write_json

SOUND = Path(__file__).resolve().parents[1] / "data" / "run-0.1"
JUDGED = {"answered": 2, "failures": {"not_json": 1}, "scores": {"Empathy": {"mean": 3.0, "interval": [2, 4]}}}


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Without figures, METEOR and BERTScore, whose packages take long to load; the page's template is made once."""
    hidden = {"matplotlib": None, "sklearn": None, "lm_eval": mock.Mock()}
    with (
        mock.patch.object(score, "EXTRAS", ()),
        mock.patch.object(page, "_template", functools.cache(page._template)),
        mock.patch.dict(sys.modules, hidden),
    ):
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report shows."""
    run = Path(shutil.copytree(SOUND, tmp_path_factory.mktemp("sound") / "run"))
    for name in ("M0", "M1"):
        score_answers(run / "eval", name)
        write_json(run / "eval" / f"{name}.judge.json", JUDGED | {"judge": "older"})
        judging = judging_folder(run / "eval", {"judge": "j", "url": None, "temperature": 0.8})
        write_judgements(judging, name, [("a", "d")], [Judgement({"Empathy": 3}, {"Empathy": "why"})], JUDGED)
    add_table(run / "eval", "mine", "Mine.", {"M0": {"x": 1.0}})
    statistics = dict.fromkeys(("session_length", "utterance_length", "seeker_utterance_length"), 1.5)
    statistics |= {"supporter_utterance_length": 2.0, "sessions": 3}
    write_json(run / "data.json", read_json(run / "data.json") | {"statistics": {"a.json": statistics}})
    cell = {"metric": "acc,none", "value": 3.0, "stderr": None}
    models = {name: {"t": cell} for name in ("vanilla", "M0", "M1")}
    settings = {"limit": 0, "shots": None, "dtype": "auto"}
    write_json(run / "abilities.json", {"settings": settings, "models": models})
    assert write_report(run).is_file()
    return run


NO_TEXT = {
    "missing", "empty", "blank", "not UTF-8", "UTF-16", "binary", "fifo", "folder", "device", "terminal", "loop",
    "dangling",
}  # fmt: skip
MAY_LACK = {"missing", "empty", "blank", "dangling"}  # of an unfinished run
# Every file that a page shows, and who reads it there.
READERS: dict[str, Callable[[Path, Path], object]] = {
    "config.json": lambda run, path: page._config(path),
    "data.json": lambda run, path: page._data(run),
    "M0/metrics.jsonl": lambda run, path: read_steps(path),
    "M0/sft.json": lambda run, path: page._data(run),
    "M1/metrics.jsonl": lambda run, path: read_steps(path),
    "M1/filter.json": lambda run, path: page._pairs(run, {}, False, False),
    "M1/pairs.jsonl": lambda run, path: read_pairs(path),
    "eval/examples.jsonl": lambda run, path: read_examples(path.parent),
    "eval/M1.replies.jsonl": lambda run, path: score_tables(path.parent),
    "eval/M1.json": lambda run, path: score_tables(path.parent),
    "eval/M1.values.jsonl": lambda run, path: score_tables(path.parent),
    "eval/M1.judge.json": lambda run, path: read_judgings(path.parent),
    "eval/scores.json": lambda run, path: plain_tables(path.parent),
    "eval/tables.json": lambda run, path: plain_tables(path.parent),
    "JUDGING/request.json": lambda run, path: read_judgings(run / "eval"),
    "JUDGING/M1.json": lambda run, path: read_judgings(run / "eval"),
}


def damaged(sound: Path, tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A copy of the run, and the file to damage in it."""
    run = faulty.copy_of(sound, tmp_path / "run")
    (judging,) = [path.name for path in (run / "eval" / "judged").iterdir()]
    return run, run / name.replace("JUDGING", f"eval/judged/{judging}")


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_of_a_report_is_named(sound: Path, tmp_path: Path, name: str) -> None:
    run, path = damaged(sound, tmp_path, name)
    whole = path.read_bytes()
    for kind, damage in (faulty.BROKEN | faulty.ODD).items():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.with_name("moved").unlink(missing_ok=True)
        path.write_bytes(whole)
        damage(path)
        fine = kind in MAY_LACK | {"loop"} | faulty.ODD.keys() or (kind == "twice" and name == "M1/pairs.jsonl")
        mentions = () if kind in ("missing", "dangling", "loop") else (path.name,)
        faulty.assert_one_sentence(
            lambda: READERS[name](run, path), *mentions, kind="report", check=(lambda _: True) if fine else None
        )


@pytest.mark.parametrize("name", READERS)
def test_a_report_of_a_wrong_value_is_a_page_or_a_sentence(sound: Path, tmp_path: Path, name: str) -> None:
    run, path = damaged(sound, tmp_path, name)
    lines = read_jsonl(path) if path.suffix == ".jsonl" else [read_json(path)]
    for rng in faulty.rounds(1, 6):
        index = rng.randrange(len(lines))
        texts = [json.dumps(line) for line in lines]
        texts[index] = faulty.mutate_json(lines[index], rng)
        path.write_text("\n".join(texts) + "\n")
        faulty.assert_one_sentence(lambda: write_report(run), kind="report", check=Path.is_file)


@pytest.mark.parametrize("kind", list(faulty.BROKEN))
@pytest.mark.parametrize("name", ["examples.jsonl", "M1.replies.jsonl", "M1.json", "M1.values.jsonl"])
def test_evaluate_and_judge_refuse_a_broken_folder(sound: Path, tmp_path: Path, name: str, kind: str) -> None:
    run = faulty.copy_of(sound, tmp_path / "run")
    faulty.BROKEN[kind](run / "eval" / name)
    gone = kind in ("missing", "dangling")
    may_succeed = gone and name in ("M1.json", "M1.replies.jsonl")  # scored anew, and a model fewer
    mentions = () if gone else (name,)
    faulty.assert_program_refuses(evaluate.main, run, mentions=mentions, may_succeed=may_succeed)
    if name in ("examples.jsonl", "M1.replies.jsonl") and not gone:
        arguments = [run, "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1"]
        faulty.assert_program_refuses(judge.main, *arguments, mentions=mentions)


def test_evaluate_reads_mutated_files_or_refuses(sound: Path, tmp_path: Path) -> None:
    run = faulty.copy_of(sound, tmp_path / "run")
    for name in ("examples.jsonl", "M1.replies.jsonl", "M1.json", "M1.values.jsonl"):
        path = run / "eval" / name
        before = path.read_bytes()
        lines = read_jsonl(path) if path.suffix == ".jsonl" else [read_json(path)]
        for rng in faulty.rounds(2, 20):
            texts = [json.dumps(line) for line in lines]
            texts[0] = faulty.mutate_json(lines[0], rng)
            path.write_text("\n".join(texts) + "\n")
            faulty.assert_one_sentence(lambda: score_answers(run / "eval", "M1"), kind="evaluate", check=bool)
        path.write_bytes(before)
        score_answers(run / "eval", "M1")


@pytest.mark.parametrize("kind", list(faulty.BROKEN))
def test_a_broken_file_of_people_or_of_aspects_is_named(sound: Path, tmp_path: Path, kind: str) -> None:
    people, aspects = tmp_path / "people.jsonl", tmp_path / "aspects.json"
    people.write_text('{"model": "M1", "id": "test/0#3", "scores": {"Empathy": 4}}\n' * 3)
    aspects.write_text('[{"name": "Warmth", "levels": {"1": "cold", "5": "warm"}}]')
    for path, flag in ((people, "--human"), (aspects, "--aspects")):
        faulty.BROKEN[kind](path)
        if path == people and kind == "twice":
            assert len(read_ratings(people)) == 6
            continue
        arguments = [sound, "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1", flag, path]
        faulty.assert_program_refuses(judge.main, *arguments, mentions=(path.name,))


def test_mutated_ratings_and_aspects_are_read_or_refused(tmp_path: Path) -> None:
    rating: Any = [{"model": "M1", "id": "a#3", "scores": {"Empathy": 4, "Overall": 2.5}}]
    aspect: Any = [{"name": "Warmth", "question": "q", "levels": {"1": "cold", "5": "warm"}, "caps": ["at most 2: x"]}]
    path = tmp_path / "x.json"
    for rng in faulty.rounds(3, 60):
        path.write_text(faulty.mutate_json(rating, rng))
        faulty.assert_one_sentence(lambda: read_ratings(path), "x.json", kind="data", check=bool)
        path.write_text(faulty.mutate_json(aspect, rng))
        faulty.assert_one_sentence(lambda: load_aspects(path), "x.json", kind="data", check=bool)


@pytest.mark.parametrize("kind", list(faulty.BROKEN))
def test_abilities_chat_and_describe_refuse_broken_files(
    sound: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])  # the run names its backbone from here
    run = faulty.copy_of(sound, tmp_path / "run")
    faulty.BROKEN[kind](run / "abilities.json")
    if kind not in ("missing", "dangling", "loop"):
        faulty.assert_program_refuses(abilities.main, run, "--tasks", "t", mentions=("abilities.json",))
    script, data = tmp_path / "script.txt", tmp_path / "data.json"
    script.write_text("I am sad.\n")
    data.write_text('[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]')
    for path in (script, data, run / "config.json"):
        faulty.BROKEN[kind](path)
    if kind in NO_TEXT:
        faulty.assert_program_refuses(chat.main, run, "--script", script, mentions=("script.txt",))
    faulty.assert_program_refuses(describe.main, data, mentions=("data.json",))
    for main in (report.main, chat.main, abilities.main, evaluate.main):
        is_file = (run / "config.json").is_file()
        may_succeed = main is evaluate.main and not is_file  # a folder of replies need not be a run
        mentions = ("config.json",) if is_file else ()
        faulty.assert_program_refuses(main, run, mentions=mentions, may_succeed=may_succeed)


def test_mutated_abilities_are_a_table_or_a_sentence(sound: Path, tmp_path: Path) -> None:
    run = faulty.copy_of(sound, tmp_path / "run")
    stored = read_json(run / "abilities.json")
    for rng in faulty.rounds(4, 40):
        (run / "abilities.json").write_text(faulty.mutate_json(stored, rng))
        faulty.assert_one_sentence(
            lambda: abilities.read_cells(run / "abilities.json", stored["settings"]),
            kind="abilities", check=lambda models: isinstance(models, dict),
        )  # fmt: skip
