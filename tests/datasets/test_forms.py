"""Forms in which people have their data, ids that cannot be confused, and drops that are told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfevo.datasets import load_dialogues
from selfevo.datasets.corpus import DataLog, DataSettings, distinct_names, load_corpus, read_dialogues
from selfevo.datasets.readers import load_esconv, load_extes, load_messages
from selfevo.dialogue import Dialogue
from selfevo.files import FileError

SAID = [("user", "I lost my job."), ("assistant", "How do you feel?")]
MESSAGES = {"messages": [{"role": role, "content": text} for role, text in SAID]}
ESCONV = {"dialog": [{"speaker": "seeker", "content": "I lost my job."},
                     {"speaker": "supporter", "content": "How?", "annotation": {"strategy": "Question"}}]}  # fmt: skip


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def texts(dialogue: Dialogue) -> list[tuple[str, str]]:
    roles = {"seeker": "user", "supporter": "assistant"}
    return [(roles[turn.speaker], turn.text) for turn in dialogue.turns]


@pytest.mark.parametrize("key", ["conversations", "conversation"])
@pytest.mark.parametrize("names", [("human", "gpt"), ("User", "ChatGPT"), (" seeker ", "supporter"), ("usr", "bot")])
def test_sharegpt_is_read_as_messages_are(tmp_path: Path, key: str, names: tuple[str, str]) -> None:
    turns = [{"from": name, "value": text} for name, (_, text) in zip(names, SAID)]
    path = written(tmp_path / "a.json", [{"id": "x", key: turns, "system": "Be kind."}])
    (dialogue,) = load_dialogues(path)
    assert texts(dialogue) == SAID
    assert dialogue.system == "Be kind."
    with pytest.raises(FileError, match=r"record 0: conversations\[0\]\.from should be user or assistant"):
        load_messages(written(path, [{"conversations": [{"from": "tool", "value": "x"}]}]))


@pytest.mark.parametrize("record", [ESCONV, MESSAGES])
def test_a_record_as_json_in_a_text_is_the_record(tmp_path: Path, record: dict[str, Any]) -> None:
    plain = load_dialogues(written(tmp_path / "plain.json", [record, record]))
    rows = "".join(json.dumps({"text": json.dumps(record)}) + "\n" for _ in range(2))
    wrapped = load_dialogues(written(tmp_path / "rows.jsonl", rows))
    assert [one.turns for one in wrapped] == [one.turns for one in plain]
    with pytest.raises(FileError, match=r"rows.jsonl, record 0.*text should be the JSON of one record"):
        load_dialogues(written(tmp_path / "rows.jsonl", json.dumps({"text": '{"dialog": ['})))


@pytest.mark.parametrize(
    "write",
    [
        lambda record: json.dumps(record, indent=2) + "\n" + json.dumps(record, indent=4),
        lambda record: json.dumps(record) + "\n\ufeff" + json.dumps(record) + "\n",
        lambda record: json.dumps(record) + "\r\n\r\n" + json.dumps(record),
        lambda record: json.dumps([record | {"situation": float("nan")}, record]),
    ],
    ids=["pretty-printed", "joined files", "CRLF", "NaN"],
)
def test_layouts_that_joined_or_exported_files_have(tmp_path: Path, write: Callable[[Any], str]) -> None:
    found = load_esconv(written(tmp_path / "a.json", write(ESCONV)))
    assert [texts(one) for one in found] == [[("user", "I lost my job."), ("assistant", "How?")]] * 2


@pytest.mark.parametrize(
    ("label", "strategies"),
    [
        ("[Question] [Information] ", ("Question", "Information")),
        ("[Question][Information]", ("Question", "Information")),
        ("[Question, Information] ", ("Question", "Information")),
        ("[Question]: ", ("Question",)),
        ("[Question]： ", ("Question",)),
        ("**[Question]** ", ("Question",)),
        ("[Question] - ", ("Question",)),
        ("[question] ", ("Question",)),
    ],
)
def test_stacked_and_punctuated_labels_are_strategies_not_text(
    tmp_path: Path, label: str, strategies: tuple[str, ...]
) -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": f"{label}How are you?"}]
    ((_, turn),) = (one.turns for one in load_messages(written(tmp_path / "a.json", [{"messages": messages}])))
    assert (turn.strategies, turn.text) == (strategies, "How are you?")


def test_extes_turns_in_lower_case_are_turns(tmp_path: Path) -> None:
    turns = [{"user": "I am sad."}, {"ai strategy": "clarification", "ai": "Why?"}]
    counts: Counter[str] = Counter()
    (dialogue,) = load_extes(written(tmp_path / "a.json", [{"scene": "s", "content": turns}]), counts)
    assert texts(dialogue) == [("user", "I am sad."), ("assistant", "Why?")]
    assert dialogue.turns[1].strategies == ("Clarification",)
    assert counts["speaker_keys_mended"] == 2
    with pytest.raises(FileError, match="2 turns have neither User nor AI"):
        load_extes(written(tmp_path / "b.json", [{"scene": "s", "content": [{"a": "x"}, {"b": "y"}]}]))


def test_two_files_of_one_name_share_no_id(tmp_path: Path) -> None:
    record = {"dialog": ESCONV["dialog"] * 4}
    paths = [str(written(tmp_path / place / "data.json", [record] * 10)) for place in ("a", "b", "a/c", "test")]
    names = distinct_names(paths)
    assert len(set(names.values())) == len(paths)
    assert names == distinct_names(paths)
    seeds = [str(written(tmp_path / place / "seeds.json", [record] * 40)) for place in ("a", "b")]
    corpus = load_corpus(DataSettings(paths[0], paths[3], synthetic=tuple(seeds)), iterations=2, seed=0)
    halves = [{example.dialogue for example in part.examples} for part in corpus.seeds]
    assert len(halves[0]) == len(halves[1]) == 40
    assert not halves[0] & halves[1]
    tested = {example.dialogue for example in corpus.test}
    assert not tested & {dialogue.id for dialogue in corpus.train + corpus.held_out}
    assert tested == {f"data/{n}" for n in range(10)}  # whatever else is read beside it


def test_drops_are_counted_and_told_where_they_are_more_than_a_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES["messages"]]}
    path = written(tmp_path / "own.json", [system] * 5)
    log = DataLog()
    assert len(read_dialogues(str(path), log=log)) == 5
    assert log.counts[f"{path}, dialogues"]["system_messages_dropped"] == 5
    assert "5 system messages" in capsys.readouterr().err
    read_dialogues(str(written(path, [system] * 2)))
    assert capsys.readouterr().err == ""
    early = {"messages": [{"role": "assistant", "content": "Hello."}, *MESSAGES["messages"]]}
    read_dialogues(str(written(path, [early] * 4)))
    assert "4 supporter turns before the seeker's first" in capsys.readouterr().err
