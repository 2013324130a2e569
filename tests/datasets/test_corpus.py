"""What is trained on, held out, used as seeds and tested on; and scores of what comes out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from runs import dialogue

from selfevo.datasets.corpus import Corpus, CorpusError, DataSettings, load_corpus
from selfevo.datasets.prompts import reply_prompt
from selfevo.dialogue import Instruction, reply_examples, to_messages
from selfevo.evaluation.tables import comparison_table
from selfevo.models import load_tokenizer
from selfevo.training.examples import sft_objective


def corpus(folder: Path, **changes: Any) -> Corpus:
    path = folder / "esconv.json"
    if not path.exists():
        path.write_text(json.dumps([dialogue(number) for number in range(40)]))
    iterations, seed = changes.pop("iterations", 2), changes.pop("seed", 0)
    return load_corpus(DataSettings(**({"esconv": str(path)} | changes)), iterations=iterations, seed=seed)


def ids(examples: list[Any]) -> set[str]:
    return {example.dialogue for example in examples}


def test_esconv_is_split_nine_to_one_and_nothing_leaks_into_the_test(tmp_path: Path) -> None:
    made = corpus(tmp_path, hold_out=True)
    train, held_out = {d.id for d in made.train}, {d.id for d in made.held_out}
    assert (len(train), len(held_out), len(ids(made.test))) == (32, 4, 4)
    assert not train & held_out
    assert not (train | held_out) & ids(made.test)
    assert not any(ids(part.examples) & (ids(made.test) | held_out) for part in made.seeds)
    assert made == corpus(tmp_path, hold_out=True)
    assert made.train != corpus(tmp_path, seed=1).train


def test_nine_tenths_train_unless_some_are_to_be_held_out(tmp_path: Path) -> None:
    made = corpus(tmp_path)
    assert (len(made.train), len(made.held_out), len(ids(made.test))) == (36, 0, 4)
    assert ids(made.test) == ids(corpus(tmp_path, hold_out=True).test)


def test_test_turns_are_all_supporter_turns_unless_greetings_are_skipped(tmp_path: Path) -> None:
    whole, short = corpus(tmp_path), corpus(tmp_path, skip_greetings=True)
    assert len(whole.test) == len(short.test) + 3 * len(ids(whole.test))
    assert {example.id for example in short.test} < {example.id for example in whole.test}
    assert whole.seeds == short.seeds  # Appendix A's rule is about preference data


def test_with_a_test_file_the_tenth_is_what_training_is_held_out_against(tmp_path: Path) -> None:
    other = tmp_path / "test.json"
    other.write_text(json.dumps([dialogue(number) for number in range(5)]))
    made = corpus(tmp_path, test=str(other))
    assert (len(made.train), len(made.held_out)) == (36, 4)
    assert ids(made.test) == {f"test/{number}" for number in range(5)}


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_every_iteration_has_seeds_of_its_own(tmp_path: Path, iterations: int) -> None:
    synthetic = tmp_path / "synthetic.json"
    synthetic.write_text(json.dumps([dialogue(number) for number in range(30)]))
    made = corpus(tmp_path, synthetic=(str(synthetic),), iterations=iterations)
    parts = [ids(part.examples) for part in made.seeds]
    assert len(parts) == iterations
    assert sum(map(len, parts)) == 30 == len(set().union(*parts))
    for part in made.seeds:
        assert abs(len(part.held_out) - len(ids(part.examples)) / 10) < 1 <= len(part.held_out)
        assert part.held_out <= ids(part.examples)


def test_sft_may_learn_from_the_synthetic_dialogues_instead(tmp_path: Path) -> None:
    first, second, test = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "test.json"
    first.write_text(json.dumps([dialogue(number) for number in range(100, 110)]))
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello to you."}] * 4
    second.write_text(json.dumps([{"messages": messages} for _ in range(10)]))  # of another form
    test.write_text(json.dumps([dialogue(number) for number in range(5)]))
    options = {"synthetic": (str(first), str(second)), "sft_data": "synthetic", "iterations": 0}
    made = corpus(tmp_path, **options)
    assert (len(made.train), len(made.held_out), len(made.seeds)) == (20, 0, 0)
    assert made.test == corpus(tmp_path).test
    with_test = corpus(tmp_path, test=str(test), **options)
    assert (len(with_test.train), len(with_test.held_out)) == (18, 2)


def test_who_speaks_first_is_the_seeker_on_request(tmp_path: Path) -> None:
    path = tmp_path / "opened.json"
    records = [dialogue(number) for number in range(20)]
    for record in records[:10]:
        record["dialog"].insert(0, {"speaker": "supporter", "annotation": {}, "content": "Hello, I listen."})
    path.write_text(json.dumps(records))
    dropped, exchanged = (corpus(tmp_path, esconv=str(path), first_speaker=how) for how in ("drop", "seeker"))
    texts = [{turn.text: turn.speaker for d in made.train for turn in d.turns} for made in (dropped, exchanged)]
    assert "Hello, I listen." not in texts[0]
    assert texts[1]["Hello, I listen."] == "seeker"
    assert all(d.turns[0].speaker == "seeker" for made in (dropped, exchanged) for d in made.train)
    assert exchanged.log.counts[f"{path}, dialogues"]["roles_exchanged"] == 10 * 13
    assert "roles_exchanged" not in dropped.log.counts[f"{path}, dialogues"]


def test_limit_and_replay_count_bound_what_is_read(tmp_path: Path) -> None:
    replay = tmp_path / "alpaca.json"
    replay.write_text(json.dumps([{"instruction": str(n), "output": "x"} for n in range(30)]))
    assert len(corpus(tmp_path, replay=str(replay), replay_count=7).replay) == 7
    limited = corpus(tmp_path, replay=str(replay), limit=20)
    assert len(limited.replay) == 20
    assert len(limited.train) + len(limited.held_out) + len(ids(limited.test)) == 20
    assert corpus(tmp_path, replay=str(replay), replay_count=0).replay == []


def test_files_that_leave_a_stage_without_data_are_named(tmp_path: Path) -> None:
    short = tmp_path / "short.json"
    short.write_text(json.dumps([dialogue(number, turns=3) for number in range(4)]))
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps([dialogue(number, turns=0) for number in range(4)]))
    with pytest.raises(CorpusError, match=r"short\.json: no supporter turn is left as a seed of iteration 1"):
        corpus(tmp_path, synthetic=(str(short),))
    with pytest.raises(CorpusError, match=r"silent\.json: no supporter turn is left to test on"):
        corpus(tmp_path, test=str(silent))


def test_a_training_sequence_is_the_generation_prompt_the_reply_and_one_stop_id(shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen2")
    made, counts = corpus(tmp_path), Counter[str]()
    replay = [Instruction("a", ({"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}))]
    dialogues = made.train[:3]
    options: dict[str, Any] = {"system": "Be kind.", "counts": counts}
    objective = sft_objective(tokenizer, dialogues, replay, window=4096, **options)
    turns = [e for d in dialogues for e in reply_examples(d, Counter(), skip_first=0, skip_last=0)]
    assert len(objective) == len(turns) + 1 == counts["examples"]
    for (prompt, response), example in zip(objective.examples, turns):
        assert prompt == tokenizer.encode_chat(reply_prompt(to_messages(example.context), "Be kind."))
        assert list(response) == [*tokenizer.encode(example.golden.text), tokenizer.stop_ids[0]]
    assert objective.groups[-1] == "a"
    counts.clear()
    cut = sft_objective(tokenizer, dialogues, [], window=90, **options)
    assert counts["context_cut"] > 0
    assert all(len(prompt) + len(response) <= 90 for prompt, response in cut.examples)
    counts.clear()
    assert len(sft_objective(tokenizer, dialogues, [], window=20, **options)) == 0
    assert counts["too_long_left_out"] == len(turns)


def test_the_table_has_values_and_changes() -> None:
    table = comparison_table({"M0": {"A": 1.0, "METEOR": 2.0}, "M1": {"A": 1.5, "METEOR": 1.0}})
    assert table.splitlines() == [
        "| model | A | METEOR | BERTScore |",
        "|---|---|---|---|",
        "| M0 | 1.00 | 2.00 | – |",
        "| M1 | 1.50 (+50.00 %) | 1.00 (-50.00 %) | – |",
    ]
