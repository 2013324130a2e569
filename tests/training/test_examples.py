"""Dialogues and pairs as ids: work that grows as they do, and records that a chat format cannot write."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import tiny_model

from selfevo.datasets import Pair, load_alpaca
from selfevo.dialogue import Dialogue, Instruction, Turn
from selfevo.files import write_json
from selfevo.generate import Sampling
from selfevo.generate.replies import sample_replies
from selfevo.models import ChatTokenizer, load_tokenizer
from selfevo.models.chat import ChatError
from selfevo.training.examples import encode_pairs, sft_objective


@pytest.fixture(scope="module")
def mistral(shared: Path) -> ChatTokenizer:
    return load_tokenizer(shared / "tokenizers" / "mistral-v0.3")


def dialogue(turns: int) -> Dialogue:
    sides: Any = ("seeker", "supporter")
    return Dialogue("d", tuple(Turn(sides[turn % 2], f"I said {turn} and more.") for turn in range(turns)))


def test_examples_of_a_dialogue_take_work_in_proportion_to_its_length(mistral: ChatTokenizer) -> None:
    """Beyond the window: characters that are encoded, counted."""
    encoded = []
    for turns in (50, 100, 200):
        counted = mock.Mock(wraps=mistral)
        objective = sft_objective(counted, [dialogue(turns)], [], system="Help.", window=150, counts=Counter())
        assert len(objective) == turns // 2
        encoded.append(sum(len(m["content"]) for call in counted.encode_chat.call_args_list for m in call.args[0]))
    assert encoded[1] < 2.5 * encoded[0]
    assert encoded[2] < 2.5 * encoded[1]


@pytest.mark.parametrize("place", [0, 1])
def test_a_message_of_20_mb_takes_the_memory_of_one_copy(mistral: ChatTokenizer, place: int) -> None:
    """It cannot fit into the window, so it is not encoded; the examples without it stay."""
    turns = list(dialogue(4).turns)
    turns[place] = Turn(turns[place].speaker, "I am sad. " * 2_000_000)
    long, counts = Dialogue("d", tuple(turns)), Counter[str]()
    tracemalloc.start()
    try:
        objective = sft_objective(mistral, [long], [], system="", window=1000, counts=counts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**25
    assert len(objective) == 1 == counts["too_long_left_out"]
    assert counts["context_cut"] == 1


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say 1.", "input": "", "output": "1", "history": [["Hi", ""]]},
        {"instruction": "Say 1.", "input": "", "output": "1", "history": [["", "Hi"], ["", ""]]},
        {"messages": [{"role": role, "content": role} for role in ("user", "user", "assistant")]},
        {"messages": [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]},
    ],
)  # fmt: skip
def test_turns_that_do_not_alternate_are_cleaned_and_counted(
    mistral: ChatTokenizer, tmp_path: Path, record: dict[str, Any]
) -> None:
    write_json(tmp_path / "replay.json", [record, {"instruction": "Say 2.", "input": "", "output": "2"}])
    counts: Counter[str] = Counter()
    replay = load_alpaca(tmp_path / "replay.json", counts)
    assert len(sft_objective(mistral, [], replay, system="", window=500, counts=counts)) == 2
    assert counts["histories_cleaned"] == 1


def test_what_a_format_cannot_write_is_named(mistral: ChatTokenizer, tmp_path: Path) -> None:
    bad = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    answer = {"role": "assistant", "content": "c"}
    with pytest.raises(ChatError, match=r"alpaca/7: .*; mend or remove this record"):
        sft_objective(mistral, [], [Instruction("alpaca/7", (*bad, answer))], system="", window=99, counts=Counter())
    with pytest.raises(ChatError, match=r"extes/3#5: .*; mend or remove this record"):
        encode_pairs(mistral, [Pair("extes/3#5", "extes/3", bad, "c", "d", "c", "golden")], 99)
    path, prompts = tmp_path / "r.jsonl", [bad[:1], bad]
    with pytest.raises(ChatError, match=r"M1, conversation 1: .*; mend or remove this record"):
        sample_replies(tiny_model(), mistral, prompts, path, sampling=Sampling(), max_new_tokens=3, label="M1")
