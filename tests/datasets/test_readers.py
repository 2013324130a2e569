"""The public files are read completely; what is uneven is mended and counted; what is wrong is named and refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfevo.datasets import (
    EXTES_STRATEGIES,
    load_alpaca,
    load_dialogues,
    load_esconv,
    load_extes,
    load_messages,
    load_serveforemo,
)
from selfevo.dialogue import ESCONV_STRATEGIES, Dialogue, Instruction, Turn, clean_dialogue, reply_examples
from selfevo.files import FileError

Loader = Callable[..., list[Dialogue]]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a value as ``data.json`` and returns the path."""

    def write(value: Any) -> Path:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(value))
        return path

    return write


def raw(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def roles(turns: tuple[Turn, ...]) -> str:
    return "".join("U" if turn.speaker == "seeker" else "A" for turn in turns)


# The published files


@pytest.mark.parametrize(
    ("name", "turns", "blank", "described"), [("esconv_sample", 3642, 281, 40), ("esconv_test", 3584, 303, 37)]
)
def test_esconv_is_read_completely(shared: Path, name: str, turns: int, blank: int, described: int) -> None:
    counts: Counter[str] = Counter()
    dialogues = load_esconv(shared / "data" / f"{name}.json", counts)
    assert counts == {}
    assert [dialogue.id for dialogue in dialogues] == [f"{name}/{index}" for index in range(130)]
    assert sum(len(dialogue.turns) for dialogue in dialogues) == turns
    assert sum(not turn.text.strip() for dialogue in dialogues for turn in dialogue.turns) == blank
    assert sum(bool(d.situation and d.emotion and d.problem) for d in dialogues) == described
    for dialogue in dialogues:
        for turn in dialogue.turns:
            assert len(turn.strategies) == (turn.speaker == "supporter")
            assert set(turn.strategies) <= set(ESCONV_STRATEGIES)


def test_a_blank_seeker_turn_between_two_supporter_messages_joins_them(shared: Path) -> None:
    counts: Counter[str] = Counter()
    dialogues = load_esconv(shared / "data" / "esconv_test.json")
    cleaned = [clean_dialogue(dialogue, counts) for dialogue in dialogues]
    # All blank turns of this file stand between two supporter turns, so each of them joins two.
    assert counts == {"blank_turns_dropped": 303, "turns_merged": 303}
    assert sum(len(dialogue.turns) for dialogue in cleaned) == 3584 - 2 * 303
    examples: Counter[str] = Counter()
    for dialogue in cleaned:
        reply_examples(dialogue, examples)
    assert examples == {"examples": 1099, "first_turns_skipped": 130, "last_turns_skipped": 260}


@pytest.mark.parametrize(("messages", "esconv"), [("ESC_sft_val", "esconv_sample"), ("ESC_sft_test", "esconv_test")])
def test_published_messages_and_esconv_schema_give_the_same_dialogues(shared: Path, messages: str, esconv: str) -> None:
    path = shared / "data" / f"{messages}.json"
    counts: Counter[str] = Counter()
    as_messages = load_messages(path, counts)
    as_esconv = load_esconv(shared / "data" / f"{esconv}.json")
    assert counts == {}
    assert [dialogue.turns for dialogue in as_messages] == [dialogue.turns for dialogue in as_esconv]
    assert {dialogue.system for dialogue in as_messages} == {raw(path)[0]["messages"][0]["content"]}
    for one, other in zip(as_messages, as_esconv, strict=True):
        assert clean_dialogue(one, Counter()).turns == clean_dialogue(other, Counter()).turns


def test_turns_put_together_again_give_the_published_messages_exactly(shared: Path) -> None:
    published = raw(shared / "data" / "ESC_sft_test.json")
    dialogues = load_esconv(shared / "data" / "esconv_test.json")
    for record, dialogue in zip(published, dialogues, strict=True):
        contents = ["".join(f"[{name}] " for name in turn.strategies) + turn.text for turn in dialogue.turns]
        assert contents == [message["content"] for message in record["messages"][1:]]


def test_failed_esconv_speaks_of_speaker_and_listener_and_has_older_strategies(shared: Path) -> None:
    path = shared / "data" / "FailedESConv.json"
    counts: Counter[str] = Counter()
    dialogues = load_esconv(path, counts)
    assert len(dialogues) == 196
    assert counts == {"strategies_renamed": 11 + 7 + 3}
    assert Counter(turn.speaker for d in dialogues for turn in d.turns) == {"seeker": 2853, "supporter": 2377}
    assert {name for d in dialogues for turn in d.turns for name in turn.strategies} == set(ESCONV_STRATEGIES)
    assert dialogues[0].situation == raw(path)[0]["situation"]
    cleaned: Counter[str] = Counter()
    for dialogue in dialogues:
        assert clean_dialogue(dialogue, cleaned).turns[0].speaker == "seeker"
    assert cleaned["whitespace_stripped"] == 2639
    assert cleaned["blank_turns_dropped"] == cleaned["empty_dialogues"] == 0


def test_the_published_extes_record_is_read_whole(shared: Path) -> None:
    path = shared / "data" / "extes_sample.json"
    counts: Counter[str] = Counter()
    (dialogue,) = load_extes(path, counts)
    (record,) = raw(path)
    assert counts == {}
    assert (dialogue.problem, dialogue.situation) == (record["scene"], record["description"])
    assert roles(dialogue.turns) == "UA" * 8
    assert [turn.text for turn in dialogue.turns] == [turn.get("User", turn.get("AI")) for turn in record["content"]]
    named = [name for turn in dialogue.turns for name in turn.strategies]
    assert named == [turn["AI Strategy"] for turn in record["content"] if turn.get("AI Strategy")]
    assert set(named) <= set(EXTES_STRATEGIES)


def test_a_whole_synthetic_corpus_is_read_as_extes(shared: Path) -> None:
    counts: Counter[str] = Counter()
    dialogues = load_extes(shared / "data" / "escot_as_extes.json", counts)
    assert len(dialogues) == 172
    assert counts == {"strategies_unknown": 172}  # ESCoT's own names, one a dialogue
    assert Counter(turn.speaker for d in dialogues for turn in d.turns) == {"seeker": 1997, "supporter": 2169}


def test_alpaca_replay_is_question_and_answer(shared: Path) -> None:
    path = shared / "data" / "alpaca_sample.json"
    counts: Counter[str] = Counter()
    instructions = load_alpaca(path, counts)
    assert counts == {}
    assert [item.id for item in instructions] == [f"alpaca_sample/{index}" for index in range(500)]
    for item, record in zip(instructions, raw(path), strict=True):
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        assert item.messages == (
            {"role": "user", "content": question},
            {"role": "assistant", "content": record["output"]},
        )


def test_alpaca_history_becomes_the_earlier_turns(shared: Path) -> None:
    path = shared / "data" / "extes_alpaca_sample.json"
    dialogues = load_dialogues(path)
    for dialogue, record in zip(dialogues, raw(path), strict=True):
        spoken = [text for pair in record["history"] for text in pair] + [record["instruction"], record["output"]]
        assert [turn.text for turn in dialogue.turns] == spoken
        assert roles(dialogue.turns) == "UA" * (len(spoken) // 2)
    assert [message["content"] for message in load_alpaca(path)[0].messages] == [t.text for t in dialogues[0].turns]


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("esconv_test", load_esconv),
        ("FailedESConv", load_esconv),
        ("ESC_sft_val", load_messages),
        ("extes_sample", load_extes),
        ("escot_as_extes", load_extes),
    ],
)
def test_the_form_of_a_file_is_told_from_its_keys(shared: Path, name: str, loader: Loader) -> None:
    path = shared / "data" / f"{name}.json"
    assert load_dialogues(path) == loader(path)
    if loader is load_extes:
        known = r"ESConv \(dialog\); messages \(messages\); ShareGPT \(conversations\)$"
        with pytest.raises(FileError, match=r"no known form.*" + known):
            load_serveforemo(path)
    else:
        assert load_serveforemo(path) == loader(path)


@pytest.mark.parametrize("name", ["alpaca_sample", "escot_sample"])
def test_a_file_that_holds_no_dialogues_is_refused_with_the_known_forms(shared: Path, name: str) -> None:
    with pytest.raises(FileError, match=rf"{name}\.json: its records have no known form") as raised:
        load_dialogues(shared / "data" / f"{name}.json")
    for form in ("ESConv", "ExTES", "messages", "Alpaca with history"):
        assert form in str(raised.value)


# Uneven files


def test_esconv_lines_with_usr_and_sys_are_read_like_the_list(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    record = {
        "emotion_type": "fear",
        "dialog": [
            {"speaker": "usr", "text": "Hi "},
            {"speaker": "sys", "text": "Hello\u2028you", "strategy": "Other"},
            {"speaker": "sys", "text": "So?", "strategy": "Questions"},
        ],
    }
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n" + json.dumps(record) + "\n", encoding="utf-8")
    counts: Counter[str] = Counter()
    first, second = load_esconv(path, counts)
    assert first.turns == (
        Turn("seeker", "Hi "),
        Turn("supporter", "Hello\u2028you", ("Others",)),
        Turn("supporter", "So?", ("Question",)),
    )
    assert (first.id, second.id, first.emotion, first.problem) == ("train/0", "train/1", "fear", "")
    assert second.turns == first.turns
    assert counts == {"strategies_renamed": 4}


def test_esconv_strategies_that_are_missing_or_unknown_are_counted(save: Callable[[Any], Path]) -> None:
    path = save(
        [
            {
                "situation": 3,
                "dialog": [
                    {"speaker": "seeker", "content": "a"},
                    {"speaker": "supporter", "content": "b"},
                    {"speaker": "supporter", "content": "c", "annotation": None},
                    {"speaker": "supporter", "content": "d", "annotation": {"strategy": None}},
                    {"speaker": "supporter", "content": "e", "annotation": {"strategy": "Imagery"}},
                ],
            }
        ]
    )
    counts: Counter[str] = Counter()
    (dialogue,) = load_esconv(path, counts)
    assert [turn.strategies for turn in dialogue.turns] == [(), (), (), (), ("Imagery",)]
    assert dialogue.situation == ""
    assert counts == {"strategies_missing": 3, "strategies_unknown": 1, "notes_not_text_ignored": 1}


EXTES_TURNS: dict[str, tuple[dict[str, Any], list[Turn], dict[str, int]]] = {
    "as it should be": (
        {"AI Strategy": "Affirmation", "AI": "x"},
        [Turn("supporter", "x", ("Affirmation",))],
        {},
    ),
    "no strategy in a greeting": ({"AI Strategy": "", "AI": "x"}, [Turn("supporter", "x")], {}),
    "both sides, seeker first": (
        {"User": "u", "AI Strategy": "Others", "AI": "x"},
        [Turn("seeker", "u"), Turn("supporter", "x", ("Others",))],
        {"joint_turns_split": 1},
    ),
    "both sides, supporter first": (
        {"AI Strategy": "Others", "AI": "x", "User": "u"},
        [Turn("supporter", "x", ("Others",)), Turn("seeker", "u")],
        {"joint_turns_split": 1},
    ),
    "strategy missing": ({"AI": "x"}, [Turn("supporter", "x")], {"strategies_missing": 1}),
    "strategy null": ({"AI Strategy": None, "AI": "x"}, [Turn("supporter", "x")], {"strategies_missing": 1}),
    "key in another case": (
        {"AI strategy": "Offer Hope", "AI": "x"},
        [Turn("supporter", "x", ("Offer Hope",))],
        {"strategy_keys_mended": 1},
    ),
    "name in another case": (
        {"AI Strategy": "Avoid Judgment And Criticism", "AI": "x"},
        [Turn("supporter", "x", ("Avoid Judgment and Criticism",))],
        {"strategies_renamed": 1},
    ),
    "unknown name": (
        {"AI Strategy": "Validation", "AI": "x"},
        [Turn("supporter", "x", ("Validation",))],
        {"strategies_unknown": 1},
    ),
    "object with the strategy": (
        {"AI": {"AI Strategy": "Clarification", "Response": "x"}},
        [Turn("supporter", "x", ("Clarification",))],
        {"text_objects_unwrapped": 1},
    ),
    "object, strategy beside it": (
        {"AI Strategy": "Clarification", "AI": {"Response": "x"}},
        [Turn("supporter", "x", ("Clarification",))],
        {"text_objects_unwrapped": 1},
    ),
    "object, null beside it": (
        {"AI Strategy": None, "AI": {"AI strategy": "Clarification", "Response": "x"}},
        [Turn("supporter", "x", ("Clarification",))],
        {"text_objects_unwrapped": 1},
    ),
    "object without a strategy": (
        {"AI": {"Response": "x"}},
        [Turn("supporter", "x")],
        {"text_objects_unwrapped": 1, "strategies_missing": 1},
    ),
    "neither side": ({"AI Strategy": "Others"}, [], {"turns_without_speaker_dropped": 1}),
    "half of an emoji": ({"User": "x\ud83d"}, [Turn("seeker", "x?")], {"surrogates_replaced": 1}),
}


@pytest.mark.parametrize("case", EXTES_TURNS)
def test_an_uneven_extes_turn_is_mended_and_counted(save: Callable[[Any], Path], case: str) -> None:
    turn, expected, counted = EXTES_TURNS[case]
    path = save([{"scene": "s", "description": "d", "content": [{"User": "Hi"}, turn]}])
    counts: Counter[str] = Counter()
    (dialogue,) = load_extes(path, counts)
    assert dialogue.turns == (Turn("seeker", "Hi"), *expected)
    assert counts == counted


def test_other_top_level_keys_of_extes_are_mended_and_counted(save: Callable[[Any], Path]) -> None:
    turns = [{"User": "Hi"}, {"AI Strategy": "Others", "AI": "x"}]
    path = save(
        [
            {"scene": "s", "description": "d", "content": turns, "end": "bye"},
            {"scene": "s", "dialogue": turns, "tags": ["a"]},
            {"scene": ["s"], "description": None, "content": turns},
        ]
    )
    counts: Counter[str] = Counter()
    dialogues = load_extes(path, counts)
    assert [roles(dialogue.turns) for dialogue in dialogues] == ["UA"] * 3
    assert [(dialogue.problem, dialogue.situation) for dialogue in dialogues] == [("s", "d"), ("s", ""), ("", "")]
    assert counts == {"extra_keys_ignored": 2, "content_keys_mended": 1, "notes_not_text_ignored": 1}


def test_a_bracketed_strategy_is_taken_from_an_assistants_text_only_if_it_is_one(save: Callable[[Any], Path]) -> None:
    contents = [
        ("user", "[Question] a"),
        ("assistant", "[Question] a [Others] b"),
        ("assistant", "[Restatement]b"),
        ("assistant", "[smiles] c"),
        ("assistant", "[] d"),
        ("assistant", "[Others]"),
        ("assistant", "[Others]  e"),
    ]
    path = save([{"messages": [{"role": role, "content": text} for role, text in contents]}])
    counts: Counter[str] = Counter()
    (dialogue,) = load_messages(path, counts)
    assert dialogue.turns == (
        Turn("seeker", "[Question] a"),
        Turn("supporter", "a [Others] b", ("Question",)),
        Turn("supporter", "b", ("Restatement or Paraphrasing",)),
        Turn("supporter", "[smiles] c"),
        Turn("supporter", "[] d"),
        Turn("supporter", "", ("Others",)),
        Turn("supporter", " e", ("Others",)),
    )
    assert dialogue.system == ""
    assert counts == {"strategies_renamed": 1}


def test_alpaca_takes_input_history_system_and_messages_and_skips_what_teaches_nothing(
    save: Callable[[Any], Path],
) -> None:
    spoken = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    path = save(
        [
            {"instruction": "i", "input": "x", "output": "o", "history": [["h", "a"]], "system": "s"},
            {"instruction": "i", "input": " ", "output": " \n"},
            {"instruction": "", "input": "x", "output": "o"},
            {"instruction": " ", "output": "o"},
            {"instruction": "i", "input": None, "output": "o", "history": None},
            {"messages": spoken},
            {"instruction": "i", "input": "\n", "output": "o"},
        ]
    )
    counts: Counter[str] = Counter()
    instructions = load_alpaca(path, counts)
    assert [(item.id, [message["content"] for message in item.messages]) for item in instructions] == [
        ("data/0", ["s", "h", "a", "i\nx", "o"]),
        ("data/2", ["x", "o"]),
        ("data/4", ["i", "o"]),
        ("data/5", ["s", "u", "a"]),
        ("data/6", ["i", "o"]),
    ]
    assert instructions[-2] == Instruction("data/5", tuple(spoken))
    assert [message["role"] for message in instructions[0].messages] == ["system", *["user", "assistant"] * 2]
    assert counts == {"blank_outputs_skipped": 1, "blank_instructions_skipped": 1}


def test_one_odd_record_does_not_hide_the_form_of_a_file_but_is_named(save: Callable[[Any], Path]) -> None:
    path = save([{"text": "?"}, {"dialog": []}])
    with pytest.raises(
        FileError, match=r"data\.json, record 0: dialog should be a list, but is missing.*keys are text"
    ):
        load_dialogues(path)


def test_a_dialogue_without_turns_is_read_and_left_to_cleaning(save: Callable[[Any], Path]) -> None:
    assert load_esconv(save([{"dialog": []}])) == [Dialogue("data/0", ())]


# Files that are wrong

GOOD: dict[Loader, Any] = {
    load_esconv: {"dialog": []},
    load_extes: {"content": []},
    load_messages: {"messages": []},
}


def esconv(**turn: Any) -> dict[str, Any]:
    return {"dialog": [{"speaker": "seeker", "content": "a"}, {"speaker": "supporter", "content": "b"} | turn]}


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("loader", "record", "complaint"),
    [
        (load_esconv, "text", r"should be an object, but is 'text'"),
        (load_esconv, {"dialogue": []}, r"dialog should be a list, but is missing \(the keys are dialogue\)"),
        (load_esconv, {}, r"dialog .* is missing \(the keys are none\)"),
        (load_esconv, {"dialog": {"a": 1}}, r"dialog should be a list, but is \{'a': 1\}"),
        (load_esconv, {"dialog": ["Hi"]}, r"dialog\[0\] should be an object, but is 'Hi'"),
        (load_esconv, esconv(content=None), r"dialog\[1\]\.content should be text, but is None"),
        (load_esconv, esconv(speaker="narrator"), r"dialog\[1\]\.speaker should be one of seeker.*is 'narrator'"),
        (load_esconv, esconv(speaker=["seeker"]), r"dialog\[1\]\.speaker should be one of seeker"),
        (load_esconv, {"dialog": [{"content": "a"}]}, r"dialog\[0\]\.speaker .*but is missing;"),
        (load_esconv, {"dialog": [{"speaker": "seeker"}]}, r"dialog\[0\]\.content .*but is missing;"),
        (load_esconv, esconv(annotation=["x"]), r"dialog\[1\]\.annotation should be an object"),
        (load_esconv, esconv(annotation={"strategy": 1}), r"dialog\[1\]\.strategy should be a name, but is 1"),
        (load_extes, {"scene": "s"}, r"content should be a list of turns, but is missing \(the keys are scene\)"),
        (load_extes, {"content": "x"}, r"content should be a list, but is 'x'"),
        (load_extes, {"content": ["x"]}, r"content\[0\] should be an object, but is 'x'"),
        (load_extes, {"content": [{"User": None}]}, r"content\[0\]\.User should be text, but is None"),
        (load_extes, {"content": [{"AI": {"Thought": "x"}}]}, r"content\[0\]\.AI should be text, but is missing"),
        (load_extes, {"content": [{"AI": "x", "AI Strategy": 2}]}, r"content\[0\]\.AI Strategy should be a name"),
        (load_messages, {"messages": "x"}, r"messages should be a list, but is 'x'"),
        (load_messages, {"messages": [1]}, r"messages\[0\] should be an object, but is 1"),
        (load_messages, message("tool", "x"), r"messages\[1\]\.role should be user or assistant.*is 'tool'"),
        (load_messages, message("system", "x"), r"messages\[1\]\.role .*system only at the start"),
        (load_messages, message({}, "x"), r"messages\[1\]\.role should be user or assistant"),
        (
            load_messages,
            message("assistant", ["x" * 99]),
            r"messages\[1\]\.content should be text, but is \['x{58}\.\.\.",
        ),
    ],
)
def test_a_bad_record_is_named_by_file_index_and_field(
    save: Callable[[Any], Path], loader: Loader, record: Any, complaint: str
) -> None:
    path = save([GOOD[loader], record])
    with pytest.raises(FileError, match=complaint) as raised:
        loader(path)
    assert str(raised.value).startswith(f"{path}, record 1: ")
    assert str(raised.value).endswith("; mend or remove this record")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"input": "", "output": "o"}, r"instruction should be text, but is missing \(the keys are input, output\)"),
        ({"instruction": "i"}, r"output should be text, but is missing"),
        ({"instruction": "i", "output": 3}, r"output should be text, but is 3"),
        ({"instruction": "i", "output": "o", "input": ["x"]}, r"input should be text"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, r"history\[0\] should be a pair of texts"),
        ({"instruction": "i", "output": "o", "history": [["a", 1]]}, r"history\[0\] should be text, but is 1"),
        ({"instruction": "i", "output": "o", "history": "x"}, r"history should be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"messages should be a list ending with"),
        ({"messages": []}, r"messages should be a list ending with"),
    ],
)
def test_a_bad_alpaca_record_is_named(save: Callable[[Any], Path], record: Any, complaint: str) -> None:
    path = save([{"instruction": "i", "output": "o"}, record])
    with pytest.raises(FileError, match=complaint) as raised:
        load_alpaca(path)
    assert str(raised.value).startswith(f"{path}, record 1: ")


@pytest.mark.parametrize(
    "loader", [load_esconv, load_extes, load_messages, load_serveforemo, load_dialogues, load_alpaca]
)
def test_every_reader_names_a_file_that_is_empty_or_no_list_of_records(tmp_path: Path, loader: Loader) -> None:
    path = tmp_path / "bad.json"
    for content, complaint in [
        ("", "is empty"),
        ("[]", "holds no records"),
        ("7", "expected a list of records"),
        ("[7]", r"record 0: should be an object, but is 7"),
        ('[{"dialog": ', "ends too early"),
    ]:
        path.write_text(content)
        with pytest.raises(FileError, match=complaint) as raised:
            loader(path)
        assert str(raised.value).startswith(str(path))


def test_alpaca_without_anything_to_learn_is_refused(save: Callable[[Any], Path]) -> None:
    with pytest.raises(FileError, match="no record has both an instruction and an output"):
        load_alpaca(save([{"instruction": "i", "output": ""}]))
