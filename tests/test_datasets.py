"""Readers and cleaning, on the real files and on small uneven ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfevo.datasets import load_alpaca, load_dialogues, load_esconv, load_extes, load_messages, load_serveforemo
from selfevo.dialogue import (
    ESCONV_STRATEGIES,
    Dialogue,
    Turn,
    clean_dialogue,
    reply_examples,
    split_dialogues,
    to_messages,
)
from selfevo.files import FileError

turns = st.lists(
    st.builds(
        Turn,
        st.sampled_from(["seeker", "supporter"]),
        st.text(" \nab", max_size=4),
        st.sampled_from([(), ("Question",), ("Others",)]),
    ),
    max_size=12,
)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# Real files


def test_the_real_esconv_files_have_their_known_sizes(shared: Path) -> None:
    counts: Counter[str] = Counter()
    dialogues = [d for name in ("sample", "test") for d in load_esconv(shared / "data" / f"esconv_{name}.json", counts)]
    assert len(dialogues) == 260
    assert sum(not turn.text.strip() for dialogue in dialogues for turn in dialogue.turns) == 584
    assert sum(bool(dialogue.emotion) for dialogue in dialogues) == 77
    strategies = {name for dialogue in dialogues for turn in dialogue.turns for name in turn.strategies}
    assert strategies == set(ESCONV_STRATEGIES)
    assert not counts["strategies_unknown"]
    cleaned = [clean_dialogue(dialogue, counts) for dialogue in dialogues]
    assert counts["blank_turns_dropped"] == 584 == counts["turns_merged"]
    for before, after in zip(dialogues, cleaned):
        assert [turn.speaker for turn in after.turns] == ["seeker", "supporter"] * (len(after.turns) // 2) + (
            ["seeker"] if len(after.turns) % 2 else []
        )
        joined = "\n".join(turn.text.strip() for turn in before.turns if turn.text.strip())
        assert "\n".join(turn.text for turn in after.turns) == joined


@pytest.mark.parametrize(("messages", "esconv"), [("ESC_sft_val", "esconv_sample"), ("ESC_sft_test", "esconv_test")])
def test_the_messages_form_and_the_esconv_form_of_one_corpus_agree(shared: Path, messages: str, esconv: str) -> None:
    published = load_messages(shared / "data" / f"{messages}.json")
    ours = load_esconv(shared / "data" / f"{esconv}.json")
    assert all(dialogue.system.startswith("You are a psychologist") for dialogue in published)
    assert [dialogue.turns for dialogue in published] == [dialogue.turns for dialogue in ours]


def test_rejected_dialogues_are_read_with_their_other_spellings(shared: Path) -> None:
    counts: Counter[str] = Counter()
    dialogues = load_esconv(shared / "data" / "FailedESConv.json", counts)
    assert len(dialogues) == 196
    assert counts["strategies_renamed"] == 11 + 7 + 3
    speakers = Counter(turn.speaker for dialogue in dialogues for turn in dialogue.turns)
    assert speakers == {"seeker": 2853, "supporter": 2377}
    for dialogue in dialogues:
        reply_examples(clean_dialogue(dialogue, counts), counts)  # refuses turns that do not alternate


def test_real_synthetic_and_instruction_files_are_read(shared: Path) -> None:
    data = shared / "data"
    assert len(load_extes(data / "extes_sample.json")) == 1
    assert len(load_extes(data / "escot_as_extes.json")) == 172
    assert [len(load_dialogues(data / f"{n}.json")) for n in ("esconv_test", "escot_as_extes", "ESC_sft_val")] == [
        130,
        172,
        130,
    ]
    with_history = load_dialogues(data / "extes_alpaca_sample.json")
    assert len(with_history) == 10
    assert with_history[0].turns[0].text == "Hey, how's it going?"
    instructions = load_alpaca(data / "alpaca_sample.json")
    assert len(instructions) == 500
    assert all([m["role"] for m in item.messages] == ["user", "assistant"] for item in instructions)
    assert load_esconv(data / "esconv_test.json")[12].id == "esconv_test/12"


# Uneven files


def test_uneven_extes_turns_are_mended_and_counted(tmp_path: Path) -> None:
    content = [
        {"User": "hello", "AI": "hi", "AI Strategy": "Clarification"},
        {"User": "I am sad"},
        {"AI": "why?"},
        {"AI Strategy": None, "AI": "tell me"},
        {"AI strategy": "avoid judgment AND criticism", "AI": "all right"},
        {"AI Strategy": "Magic", "AI": "abracadabra"},
        {"AI": {"Response": "wrapped", "AI Strategy": "Others"}},
        {"note": "neither"},
    ]
    counts: Counter[str] = Counter()
    (dialogue,) = load_extes(write(tmp_path / "e.json", [{"scene": "s", "content": content, "more": 1}]), counts)
    said = [turn.text for turn in dialogue.turns]
    assert said == ["hello", "hi", "I am sad", "why?", "tell me", "all right", "abracadabra", "wrapped"]
    assert dialogue.turns[5].strategies == ("Avoid Judgment and Criticism",)
    assert dialogue.turns[7].strategies == ("Others",)
    for rule, expected in {
        "joint_turns_split": 1,
        "strategies_missing": 2,
        "strategy_keys_mended": 1,
        "strategies_renamed": 1,
        "strategies_unknown": 1,
        "text_objects_unwrapped": 1,
        "turns_without_speaker_dropped": 1,
        "extra_keys_ignored": 1,
    }.items():
        assert counts[rule] == expected, rule


def test_serveforemo_is_read_in_both_forms_and_refused_in_others(tmp_path: Path) -> None:
    esconv = [{"dialog": [{"speaker": "seeker", "content": "hi", "annotation": {}}]}]
    messages = [{"messages": [{"role": "user", "content": "hi"}]}]
    first, second = (load_serveforemo(write(tmp_path / f"{n}.json", v)) for n, v in (("a", esconv), ("b", messages)))
    assert first[0].turns == second[0].turns == (Turn("seeker", "hi"),)
    with pytest.raises(FileError, match="no known form"):
        load_serveforemo(write(tmp_path / "c.json", [{"instruction": "x", "output": "y"}]))


def test_json_lines_are_read_like_a_list(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert [d.turns for d in load_dialogues(lines)] == [
        d.turns for d in load_dialogues(write(tmp_path / "l.json", records))
    ]


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([{"situation": "x"}], "no known form"),
        ([{"dialog": []}, {"situation": "x"}], r"record 1: dialog should be a list, but is missing"),
        ([{"dialog": "hi"}], r"record 0: dialog should be a list, but is 'hi'"),
        ([{"dialog": [{"speaker": "bot", "content": "x"}]}], r"record 0: dialog\[0\]\.speaker .*'bot'"),
        ([{"dialog": [{"speaker": "seeker", "content": 7}]}], r"dialog\[0\]\.content should be text, but is 7"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], r"messages\[0\]\.role"),
        ([{"scene": "s", "content": [{"User": None}]}], r"record 0: content\[0\]\.User"),
        ([3], "record 0: should be an object"),
        ([], "no records"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, records: list[Any], named: str) -> None:
    with pytest.raises(FileError, match=named) as caught:
        load_dialogues(write(tmp_path / "bad.json", records))
    assert "bad.json" in str(caught.value)


def test_alpaca_joins_instruction_and_input_and_leaves_empty_ones_out(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "", "output": " "},
        {"instruction": " ", "output": "x"},
    ]
    counts: Counter[str] = Counter()
    (one,) = load_alpaca(write(tmp_path / "a.json", records), counts)
    assert one.messages[0]["content"] == "Add.\n1 2"
    assert counts == {"blank_outputs_skipped": 1, "blank_instructions_skipped": 1}


# Cleaning and examples


@given(said=turns)
def test_cleaning_alternates_starts_with_the_seeker_and_is_idempotent(said: list[Turn]) -> None:
    cleaned = clean_dialogue(Dialogue("d", tuple(said)), Counter())
    assert all(turn.speaker == ("seeker", "supporter")[index % 2] for index, turn in enumerate(cleaned.turns))
    assert all(turn.text and turn.text == turn.text.strip() for turn in cleaned.turns)
    counts: Counter[str] = Counter()
    assert clean_dialogue(cleaned, counts) == cleaned
    assert set(counts) <= {"empty_dialogues"}


@given(said=turns)
def test_cleaning_loses_only_blank_and_leading_supporter_turns(said: list[Turn]) -> None:
    counts: Counter[str] = Counter()
    cleaned = clean_dialogue(Dialogue("d", tuple(said)), counts)
    lost = counts["blank_turns_dropped"] + counts["leading_supporter_dropped"] + counts["turns_merged"]
    assert len(cleaned.turns) == len(said) - lost


def test_a_small_dialogue_cleaned_by_hand() -> None:
    said = (
        Turn("supporter", "Welcome"),
        Turn("seeker", "Hi \n"),
        Turn("supporter", "Hello", ("Others",)),
        Turn("seeker", " "),
        Turn("supporter", "How are you?", ("Question",)),
        Turn("seeker", "Bad"),
    )
    counts: Counter[str] = Counter()
    cleaned = clean_dialogue(Dialogue("d", said), counts)
    assert cleaned.turns == (
        Turn("seeker", "Hi"),
        Turn("supporter", "Hello\nHow are you?", ("Others", "Question")),
        Turn("seeker", "Bad"),
    )
    assert counts == {
        "leading_supporter_dropped": 1,
        "whitespace_stripped": 1,
        "blank_turns_dropped": 1,
        "turns_merged": 1,
    }


@given(exchanges=st.integers(0, 8), first=st.integers(0, 3), last=st.integers(0, 3))
def test_examples_are_the_replies_but_the_first_and_the_last_ones(exchanges: int, first: int, last: int) -> None:
    said = tuple(Turn(s, f"{i}{s}") for i in range(exchanges) for s in ("seeker", "supporter"))  # type: ignore[arg-type]
    counts: Counter[str] = Counter()
    examples = reply_examples(Dialogue("d", said), counts, skip_first=first, skip_last=last)
    assert [example.golden.text for example in examples] == [
        f"{i}supporter" for i in range(first, max(first, exchanges - last))
    ]
    assert counts["examples"] + counts["first_turns_skipped"] + counts["last_turns_skipped"] == exchanges
    for example in examples:
        assert example.context == said[: example.turn]
        assert to_messages(example.context, "be kind")[0] == {"role": "system", "content": "be kind"}
        assert to_messages(example.context)[-1]["role"] == "user"


@given(total=st.integers(0, 60), seed=st.integers(0, 5), parts=st.sampled_from([(0.9, 0.1), (0.5, 0.5), (1 / 3,) * 3]))
def test_a_split_is_disjoint_complete_seeded_and_of_the_right_size(total: int, seed: int, parts: tuple[float]) -> None:
    items = list(range(total))
    split = split_dialogues(items, parts, seed=seed)
    assert sorted(item for part in split for item in part) == items
    assert all(part == sorted(part) for part in split)
    assert all(abs(len(part) - fraction * total) < 1 for part, fraction in zip(split, parts))
    assert split == split_dialogues(items, parts, seed=seed)
    if total >= 40:
        assert split != split_dialogues(items, parts, seed=seed + 1)
