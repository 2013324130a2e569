"""The embedded default: what its grammar, files and backbone have to be for the loop's result to mean something."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch
from embedded import lessons, make, measure, training, vocabulary, words, world

from selfevo.datasets import load_alpaca, load_esconv, load_extes
from selfevo.dialogue import clean_dialogue, reply_examples, to_messages
from selfevo.models import ChatTokenizer, load_model, load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "embedded"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(FOLDER / "backbone")


def fact_pairs(split: str, users: int = 400) -> set[tuple[str, str]]:
    rng = Random(split)
    facts = (world.make_user(rng, split).facts for _ in range(users))
    return {pair for user in facts for pair in combinations(sorted(user.values()), 2)}


def phrases(table: object) -> list[str]:
    if isinstance(table, str):
        return [table]
    values = table.values() if isinstance(table, dict) else table
    return [phrase for value in values for phrase in phrases(value)]  # type: ignore[attr-defined]


def test_dialogues_depend_on_the_seed_alone() -> None:
    first, again, other = (world.make_dialogue(Random(seed), "train", personal=0.5) for seed in (1, 1, 2))
    assert first == again != other


def test_splits_share_no_two_facts_that_go_together() -> None:
    seen = {split: fact_pairs(split) for split in world.STRIDES}
    for one, other in combinations(seen, 2):
        assert seen[one].isdisjoint(seen[other])


def test_kinds_have_disjoint_words_and_as_many_colours_as_needed() -> None:
    values = phrases(words.FACTS)
    assert len(values) == len({value.lower() for value in values})
    assert len(world.KINDS) <= world.COLOURS
    assert all(len(of_kind) % world.COLOURS == 0 for of_kind in words.FACTS.values())


@pytest.mark.parametrize(
    "name",
    ["REVEALS", "REMARKS", "STEPS", "WITH_FEELING", "EMOTIONS", "FEELINGS", "TRAITS", "WISHES", "PROBLEMS", "HELLOS",
     "WELCOMES", "FILLERS", "BYES", "FAREWELLS", "SHORT", "LONG_OPENINGS", "LONG_ADVICE"],
)  # fmt: skip
def test_phrases_mention_no_fact_by_accident(name: str) -> None:
    for phrase in phrases(getattr(words, name)):
        assert not world.facts_mentioned(phrase), phrase
        assert phrase == " ".join(phrase.split())


def test_facts_are_found_in_words_and_told_by_the_user_alone() -> None:
    assert world.facts_mentioned("My cat, a CAT. Categories; Oslo!") == {"pet": {"cat"}, "place": {"Oslo"}}
    messages = [
        {"role": "user", "content": "I am a nurse."},
        {"role": "assistant", "content": "I have a dog."},
        {"role": "user", "content": "I live in Oslo."},
    ]
    assert world.facts_revealed(messages) == {"job": "nurse", "place": "Oslo"}
    score = world.personalisation("A nurse and her dog, in Oslo.", messages)
    assert score == world.Personalisation(used=2, wrong=1, revealed=2)


def test_what_is_known_is_what_was_said() -> None:
    rng = Random(3)
    for _ in range(50):
        dialogue = world.make_dialogue(rng, "human", personal=0.5)
        assert 5 <= len(dialogue.turns) == len(dialogue.replies) <= 8
        for turn in range(len(dialogue.turns)):
            assert dialogue.facts(turn) == world.facts_revealed(dialogue.messages(turn))
            said = " ".join(message["content"] for message in dialogue.messages(turn)[::2])
            assert ("feeling" in dialogue.known(turn)) == (dialogue.user.feeling in re.findall(r"\w+", said))


def test_personal_replies_take_up_what_is_known_and_nothing_else() -> None:
    rng = Random(4)
    for _ in range(50):
        dialogue = world.make_dialogue(rng, "synthetic", personal=1.0)
        for turn, (_, reply) in enumerate(dialogue.replies):
            score = world.personalisation(reply, dialogue.messages(turn))
            assert score.wrong == 0
            if score.revealed and dialogue.turns[turn].text not in words.BYES:
                assert score.used > 0


def test_general_replies_are_long_or_short_and_mention_nobody() -> None:
    rng = Random(5)
    long = [world.long_reply(rng)[1] for _ in range(200)]
    short = [world.short_reply(rng)[1] for _ in range(200)]
    assert 20 <= sum(len(text.split()) for text in long) / 200 <= 32
    assert 5 <= sum(len(text.split()) for text in short) / 200 <= 12
    assert not any(world.facts_mentioned(text) for text in long + short)


def test_lessons_reflect_truly() -> None:
    rng = Random(6)
    for _ in range(50):
        dialogue = world.make_dialogue(rng, "train", personal=0.5)
        turn = len(dialogue.turns) - 1
        known = dialogue.known(turn)
        written = json.loads(lessons.reflection(rng, known, "I see.", dialogue.turns[turn].reveals))
        assert world.facts_mentioned(written["understanding"]["user_profile"]) == {
            kind: {value} for kind, value in dialogue.facts(turn).items()
        }
        assert written["understanding"]["user_emotion"] == dialogue.user.emotion
        assert world.personalisation(written["refined_response"], dialogue.messages(turn)).wrong == 0


def test_voices_are_general_or_personal_at_every_turn() -> None:
    rng = Random(7)
    for _ in range(20):
        dialogue = world.make_dialogue(rng, "train", personal=0.5)
        for turn, (prompt, answer) in enumerate(lessons.voice_row(rng, dialogue)):
            score = world.personalisation(answer, dialogue.messages(turn))
            assert score.wrong == 0
            assert prompt[1:] == dialogue.messages(turn)
            if prompt[0]["content"] == lessons.VOICES[0]:
                assert score.used == 0
            elif score.revealed and dialogue.turns[turn].text not in words.BYES:
                assert score.used > 0


def test_an_instruction_has_one_right_answer() -> None:
    rng = Random(8)
    for _ in range(200):
        record = lessons.instruction(rng)
        said = world.facts_mentioned(record["input"])
        answer = world.facts_mentioned(record["output"])
        assert answer
        if "next" not in record["instruction"] and "after" not in record["instruction"]:
            assert all(values <= said[kind] for kind, values in answer.items())
        if "JSON" in record["instruction"]:
            assert {kind: {value} for kind, value in json.loads(record["output"]).items()} == said


def test_written_data_is_what_the_script_makes(tmp_path: Path) -> None:
    make.write_data(tmp_path, seed=0)
    for path in sorted(tmp_path.iterdir()):
        assert (FOLDER / "data" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.5e6


def test_data_is_read_without_remarks() -> None:
    counts: Counter[str] = Counter()
    data = FOLDER / "data"
    human = load_esconv(data / "human.json", counts) + load_esconv(data / "test.json", counts)
    synthetic = load_extes(data / "synthetic.json", counts)
    assert len(load_alpaca(data / "replay.json", counts)) == make.COUNTS["replay"]
    assert set(counts) <= {"extra_keys_ignored"}
    for dialogue in human + synthetic:
        cleaned = clean_dialogue(dialogue, counts)
        assert cleaned.turns == dialogue.turns
        assert reply_examples(cleaned, Counter())


def test_humans_are_personal_at_times_and_the_golden_replies_more_often() -> None:
    def share(name: str) -> float:
        load = load_extes if name == "synthetic" else load_esconv
        chances = uses = 0
        for dialogue in load(FOLDER / "data" / f"{name}.json"):
            for example in reply_examples(dialogue, Counter()):
                score = world.personalisation(example.golden.text, to_messages(example.context))
                chances, uses = chances + (score.revealed > 0), uses + (score.used > 0)
        return uses / chances

    assert 0.5 < share("synthetic") < 0.7
    assert 0.25 < share("human") < 0.45
    assert 0.25 < share("test") < 0.45


def test_backbone_is_small_and_has_room(tokenizer: ChatTokenizer) -> None:
    assert (FOLDER / "backbone" / "model.safetensors").stat().st_size <= 8_000_000
    model = load_model(FOLDER / "backbone")
    assert model.config.family == "llama"
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.config.max_positions >= 1024
    assert tokenizer.format_name == "llama3"


def test_vocabulary_has_one_token_for_each_fact_and_each_line_of_the_prompts(tokenizer: ChatTokenizer) -> None:
    assert [value for value in phrases(words.FACTS) if len(tokenizer.encode(f" {value}")) > 1] == []
    changed = [line for line in vocabulary.prompt_lines() if len(tokenizer.encode(line)) > 1]
    assert changed == [], "the library's prompts are not those that the backbone was trained on: make it again"


def test_backbone_reflects_on_users_it_never_saw() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_model(FOLDER / "backbone"), load_tokenizer(FOLDER / "backbone")
    rates = measure.measure(model, tokenizer, measure.held_out(8), style="strategy", greedy=False)
    assert rates["reflection: usable"] >= 0.9
    assert rates["facts: told and found"] >= 0.8
    assert rates["emotion"] >= 0.8
    assert rates["plain: personal"] <= 0.1


def test_training_continues_to_the_same_weights(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    settings = training.Settings(steps=4, rows=1, hidden_size=32, intermediate_size=32, layers=1)
    whole = training.train(tokenizer, settings, tmp_path / "whole.safetensors", every=2)

    class StoppedError(Exception):
        pass

    def stop(_: object, step: int) -> None:
        raise StoppedError(step)

    with pytest.raises(StoppedError):
        training.train(tokenizer, settings, tmp_path / "parts.safetensors", every=2, watch=stop)
    parts = training.train(tokenizer, settings, tmp_path / "parts.safetensors", every=2)
    for one, other in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="other settings"):
        training.train(tokenizer, training.Settings(steps=5), tmp_path / "parts.safetensors")


def test_orthogonal_keeps_directions_and_levels_sizes() -> None:
    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16)):
        matrix = torch.randn(shape)
        levelled = training.orthogonal(matrix)
        assert torch.linalg.svdvals(levelled).sub(1).abs().max() < 0.4
        assert (matrix * levelled).sum() > 0.7 * torch.linalg.svdvals(matrix).sum()


def test_shared_contexts_give_the_losses_of_separate_rows(tokenizer: ChatTokenizer) -> None:
    model = load_model(FOLDER / "backbone")
    row = lessons.encode_row(tokenizer, lessons.make_row(Random(2), 1.0))
    together = training.token_losses(model, row)[0]
    apart = torch.cat([training.token_losses(model, [example])[0] for example in row])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
