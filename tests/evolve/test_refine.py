"""From replies to preference pairs: prompts, replies on disk, messy reflections, and what each rule counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.datasets import Pair, read_pairs
from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.prompts import REPLY_STYLES, Prompts, prompts_of, reply_prompt
from selfevo.dialogue import ESCONV_STRATEGIES, Example, Turn
from selfevo.evolve import EvolveConfig, evolve
from selfevo.evolve.controls import controlled
from selfevo.evolve.json_repair import json_object_end
from selfevo.evolve.refine import RefineSettings, filter_pairs
from selfevo.evolve.reflection import (
    ASPECTS,
    Reflection,
    answer_form,
    parse_reflection,
    read_reflection,
    reflection_prompt,
    whole_sentences,
    written_text,
)
from selfevo.evolve.settings import compose
from selfevo.files import FileError, write_jsonl
from selfevo.generate import Reply, Sampling, generate, sample_replies
from selfevo.generate import replies as replies_room
from selfevo.models import ChatTokenizer, Transformer, load_tokenizer
from selfevo.training.examples import encode_pairs

WHOLE = {
    "understanding": {"profile": "nurse", "emotion": "sad", "personality": "shy", "intention": "comfort"},
    "score": 2,
    "feedback": "generic",
    "refined_response": "Night shifts wear a nurse out. What helps you rest?",
}
TEXT = json.dumps(WHOLE)
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "I am a nurse and I cannot sleep."},
]


# Prompts


def test_the_reply_prompt_replaces_a_system_message() -> None:
    prompt = reply_prompt([{"role": "system", "content": "other"}, *CONVERSATION], "ours")
    assert prompt == [{"role": "system", "content": "ours"}, *CONVERSATION]


def test_the_styles_are_those_of_the_paper_and_of_version_0_1() -> None:
    assert prompts_of("plain").refine != prompts_of("vanilla").refine == prompts_of("strategy").refine
    vanilla, strategy, reflecting, plain, older = (prompts_of(style).system for style in REPLY_STYLES)
    for text in (vanilla, strategy, reflecting, older):
        assert all(name in text for name in ESCONV_STRATEGIES)
    assert len(vanilla) < len(strategy) < len(reflecting)
    assert reflecting.startswith(strategy)
    assert all(key in reflecting for key in ('"strategy"', '"text"'))
    assert not any(name in plain for name in ("Question", "Restatement"))
    with pytest.raises(ValueError, match="style should be one of vanilla, strategy"):
        prompts_of("fancy")


def test_a_file_replaces_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"vanilla": "Be kind.", "refine": "Again, as JSON."}')
    assert prompts_of("vanilla", str(path)) == Prompts("Be kind.", "Again, as JSON.")
    assert prompts_of("strategy", str(path)) == Prompts(prompts_of("strategy").system, "Again, as JSON.")
    settings = RefineSettings(style="vanilla", prompts_file=str(path))
    assert settings.prompts.system == "Be kind."
    bad = tmp_path / "bad.json"
    bad.write_text('{"vanila": "Be kind."}')
    with pytest.raises(FileError, match=r"bad\.json: expected a JSON object of texts under some of .*vanilla"):
        prompts_of("vanilla", str(bad))


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_a_reflection_continues_the_conversation_that_the_reply_came_from(shared: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    texts = prompts_of("strategy")
    prompt = reply_prompt(CONVERSATION, texts.system)
    reflection = reflection_prompt(prompt, "I am sorry.", texts.refine)
    assert [message["role"] for message in reflection[-2:]] == ["assistant", "user"]
    keys = [*(f"user_{aspect}" for aspect in ASPECTS), "evaluation_score", "feedback", "refined_response"]
    assert all(f'"{key}"' in reflection[-1]["content"] for key in keys)
    begun = tokenizer.encode_chat(prompt) + tokenizer.encode_reply("I am sorry.")
    assert tokenizer.encode_chat(reflection)[: len(begun)] == begun


def test_the_keys_of_the_paper_and_of_version_0_1_are_read_alike() -> None:
    papers = {
        "understanding": {f"user_{aspect}": text for aspect, text in WHOLE["understanding"].items()},
        "evaluation_score": "2/5",
        "feedback": "generic",
        "refined_response": WHOLE["refined_response"],
    }
    assert read_reflection(papers) == read_reflection(WHOLE) is not None


# Reflections


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Sure! Here it is:\n{TEXT}\nI hope this helps.",
        str(WHOLE),
        TEXT[:-1] + ",}",
        TEXT[:-1],
        TEXT.replace('"score": 2', "score: 2"),
        'I was asked for {"score": 0}. ' + TEXT,
        f'{{"reflection": {TEXT}}}',
    ],
)
def test_messy_reflections_are_recovered(text: str) -> None:
    reflection = parse_reflection(text)
    assert reflection is not None
    assert reflection.refined == WHOLE["refined_response"]
    assert reflection.understanding["profile"] == "nurse"
    assert reflection.score == 2


def reflection(**changes: str) -> str:
    return json.dumps({**WHOLE, **changes})


MEANT = "I hear you. Go on."


@pytest.mark.parametrize(
    "text",
    [
        reflection(refined_response=MEANT).replace("refined_response", r"refined\_response"),
        reflection(refined_response="I hear you.\\nGo on."),
        reflection(refined_response='"I hear you. Go on."'),
        reflection(refined_response="“I hear you. Go on.”"),
        reflection(refined_response="`I hear you. Go on.`"),
        reflection(refined_response='"""I hear you. Go on."""'),
        reflection(refined_response='I hear you. Go on."""'),
        reflection(refined_response="```\nI hear you. Go on.\n```"),
        json.dumps(reflection(refined_response=MEANT)),
        f"<think>{reflection(refined_response='draft.')}</think>{reflection(refined_response=MEANT)}",
        f"{reflection(refined_response='<your reply>')} {reflection(refined_response=MEANT)}",
        " ".join(json.dumps({key: MEANT if key == "refined_response" else part}) for key, part in WHOLE.items()),
    ],
)
def test_what_is_foreign_to_a_refined_reply_is_taken_off(text: str) -> None:
    found = parse_reflection(text)
    assert found is not None
    assert found.refined.split() == MEANT.split()
    assert (found.understanding["profile"], found.score, found.feedback) == ("nurse", 2, "generic")


@pytest.mark.parametrize("text", ["...", "<response>", "[your response]", '"..."', "`reply`", "Your response.", "\\n"])
def test_a_placeholder_is_no_reply(text: str) -> None:
    assert written_text(text) is None
    assert parse_reflection(reflection(refined_response=text)) is None
    assert parse_reflection(f"<think>{reflection(refined_response=MEANT)}") is None


def test_quotes_inside_a_reply_are_its_own() -> None:
    for text in ('"No," she said, "never."', "It's fine.", "You said `go`?", "Don't 'worry'", 'She said "no"'):
        assert written_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot do that.",
        TEXT[: TEXT.index("wear a")],
        "{}",
        '{"refined_response": ""}',
        '{"refined_response": 3}',
        "[1, 2]",
    ],
)
def test_a_reflection_without_a_whole_refined_reply_is_none(text: str) -> None:
    assert parse_reflection(text) is None


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(TEXT)), text=st.text(max_size=30))
def test_parsing_never_raises(cut: int, text: str) -> None:
    for candidate in (TEXT[:cut], text, TEXT[:cut] + text):
        reflection = parse_reflection(candidate)
        assert reflection is None or reflection.refined.strip()


@pytest.mark.parametrize(
    ("written", "score"),
    [(3, 3), (3.0, 3), ("4", 4), ("2/5", 2), (0, None), (6, None), ("good", None), (None, None), (2.5, None)],
)
def test_scores_are_read_in_the_forms_that_models_write(written: Any, score: int | None) -> None:
    reflection = read_reflection(WHOLE | {"score": written, "understanding": "nurse", "feedback": ["a", "b"]})
    assert reflection is not None
    assert reflection.score == score
    assert reflection.feedback == "a, b"
    assert reflection.understanding == dict.fromkeys(ASPECTS, "")


# The data rules


def filtered(reply: Reply, refined: str | None, golden: str = "golden reply") -> tuple[list[Pair], Counter[str]]:
    example = Example("d", 3, (Turn("seeker", "hi"),), Turn("supporter", golden))
    reflection = None if refined is None else Reflection(dict.fromkeys(ASPECTS, ""), 2, "", refined)
    counts: Counter[str] = Counter()
    return filter_pairs([example], [CONVERSATION], [reply], [reflection], counts), +counts


def test_a_refined_reply_is_chosen_over_the_first_one() -> None:
    (pair,), counts = filtered(Reply("one two three"), "four five six seven eight nine", golden="a golden reply")
    assert (pair.chosen, pair.rejected, pair.source) == ("four five six seven eight nine", "one two three", "refined")
    assert pair.id == "d#3"
    assert counts == {"kept_refined": 1, "pairs": 1}


@pytest.mark.parametrize(
    ("reply", "refined", "rule"),
    [
        (Reply("one two"), "1 2 3 4 5", "golden_for_too_long_refinement"),
        (Reply("one two three"), "1 2 3 4 5", "golden_for_too_long_refinement"),  # over twice the golden one
        (Reply("one two three"), None, "golden_for_missing_reflection"),
    ],
)
def test_the_golden_reply_stands_in_and_is_counted(reply: Reply, refined: str | None, rule: str) -> None:
    (pair,), counts = filtered(reply, refined)
    assert (pair.chosen, pair.source) == ("golden reply", "golden")
    assert counts == {rule: 1, "kept_golden": 1, "pairs": 1}


@pytest.mark.parametrize(
    ("reply", "refined", "rule"),
    [
        (Reply(None), None, "reply_prompt_too_long_dropped"),
        (Reply(""), "x", "empty_reply_dropped"),
        (Reply("same "), "same", "identical_dropped"),
        (Reply("golden reply"), None, "identical_dropped"),
    ],
)
def test_what_makes_no_pair_is_dropped_and_counted(reply: Reply, refined: str | None, rule: str) -> None:
    pairs, counts = filtered(reply, refined)
    assert pairs == []
    assert counts[rule] == 1
    assert counts["pairs"] == 0


def test_a_rejected_reply_that_the_limit_cut_gets_no_end(shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen2")
    counts: Counter[str] = Counter()
    example = Example("d", 1, (Turn("seeker", "I am sad."),), Turn("supporter", "Tell me more."))
    for cut in (False, True):
        pairs = filter_pairs([example], [CONVERSATION], [Reply("It is", cut=cut)], None, counts)
        path = tmp_path / "pairs.jsonl"
        write_jsonl(path, [pair.as_record() for pair in pairs])
        _, (ids,) = encode_pairs(tokenizer, read_pairs(path), 1000)
        assert (ids.rejected[-1] == tokenizer.stop_ids[0]) != cut
        assert ids.chosen[-1] == tokenizer.stop_ids[0]
        (swapped,) = controlled(read_pairs(path), "swapped")
        assert not swapped.rejected_cut


def test_half_a_character_at_the_limit_is_left_out(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen2")
    whole = tokenizer.encode("It is hard 𝕳")
    assert tokenizer.decode(whole[:-1]).endswith("\ufffd")

    def cut(model: Any, prompts: Any, *, on_reply: Any, **_: Any) -> None:
        on_reply(0, whole[:-1])

    monkeypatch.setattr(replies_room, "generate", cut)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=4096)
    limit = len(whole) - 1
    (reply,) = sample_replies(
        model, tokenizer, [CONVERSATION], tmp_path / "a", sampling=Sampling(), max_new_tokens=limit
    )
    assert (reply.text, reply.cut) == ("It is hard", True)


def test_a_long_conversation_is_cut_to_the_window_in_few_steps(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen2")
    spoken = [{"role": role, "content": f"Turn {n}."} for n in range(2000) for role in ("user", "assistant")]
    counted = Mock(wraps=tokenizer)
    fitted = fit_prompt(counted, [*spoken, CONVERSATION[-1]], 500)
    assert counted.encode_chat.call_count < 16
    assert fitted.ids is not None
    assert 480 < len(fitted.ids) <= 500


def test_cut_replies_and_contexts_are_counted() -> None:
    _, counts = filtered(Reply("one two", cut=True, turns_dropped=4), "three four")
    assert counts["reply_cut_at_limit"] == counts["reply_context_cut"] == 1


def test_pairs_survive_the_file_and_a_foreign_record_is_named(tmp_path: Path) -> None:
    pairs, _ = filtered(Reply("one two three"), "four")
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair.as_record() for pair in pairs])
    assert read_pairs(path) == pairs
    write_jsonl(path, [pairs[0].as_record(), {"prompt": []}])
    with pytest.raises(FileError, match=r"pairs\.jsonl: record 1"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("I hear you. Tell me m", "I hear you."),
        ('She said "No!" and th', 'She said "No!"'),
        ("It costs 3.5 units", ""),
        ("no end", ""),
        ("One… Two?", "One… Two?"),
        ("", ""),
    ],
)
def test_a_text_without_the_sentence_it_breaks_off_in(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


@pytest.mark.parametrize("style", ["strategy", "plain"])
def test_a_form_has_the_keys_that_the_request_shows(style: str) -> None:
    """Filled with anything, it is a usable reflection; a request in other words gets the paper's keys."""
    tokenizer = load_tokenizer(Path(__file__).resolve().parents[2] / "examples" / "embedded" / "backbone")
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    for request in (prompts_of(style).refine, "Reflect, as JSON."):
        form = answer_form(model, tokenizer, request)(150)
        reply = generate(model, [[1, 2, 3]], form=form, max_new_tokens=150)[0]
        reflection = parse_reflection(tokenizer.decode(reply))
        assert reflection is not None
        assert reflection.score in (1, 2, 3, 4, 5)
        assert all(reflection.understanding[aspect] for aspect in ASPECTS)
        assert form.longest <= 150


# Controls


def some_pairs(sizes: dict[str, int]) -> list[Pair]:
    turns = [(dialogue, turn) for dialogue, size in sizes.items() for turn in range(size)]
    return [
        Pair(
            f"{d}/{t}", d, [{"role": "user", "content": f"{d}{t}"}], f"chosen {d}{t}", f"rejected {d}{t}", "", "refined"
        )
        for d, t in turns
    ]


def test_swapped_pairs_prefer_what_was_rejected() -> None:
    pairs = some_pairs({"a": 2, "b": 1})
    swapped = controlled(pairs, "swapped")
    assert [(pair.chosen, pair.rejected) for pair in swapped] == [(pair.rejected, pair.chosen) for pair in pairs]
    assert controlled(swapped, "swapped") == pairs == controlled(pairs, "none") == controlled(pairs, "sft-only")


@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8))
def test_shuffled_pairs_keep_together_and_go_to_another_dialogue(sizes: list[int]) -> None:
    pairs = some_pairs({f"d{number}": size for number, size in enumerate(sizes)})
    if 2 * max(sizes) > sum(sizes):
        with pytest.raises(ValueError, match="at least two dialogues"):
            controlled(pairs, "shuffled")
        return
    shuffled = controlled(pairs, "shuffled")
    assert [(pair.id, pair.prompt) for pair in shuffled] == [(pair.id, pair.prompt) for pair in pairs]
    assert sorted(pair.chosen for pair in shuffled) == sorted(pair.chosen for pair in pairs)
    for pair in shuffled:
        donor = pair.chosen.removeprefix("chosen ")
        assert pair.rejected == f"rejected {donor}"
        assert donor[:-1] != pair.dialogue


# Contexts that fit


def conversation(exchanges: int) -> list[dict[str, str]]:
    said = [{"role": "system", "content": "Be kind."}]
    for turn in range(exchanges):
        said += [{"role": "user", "content": f"I feel {turn}."}, {"role": "assistant", "content": f"Why {turn}?"}]
    return said[:-1]


@pytest.mark.parametrize("name", ["llama3", "qwen2", "mistral-v0.3"])
@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_oldest_exchanges_go_first_and_the_longest_rest_that_fits_stays(
    shared: Path, name: str, keep_last: int
) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    messages = conversation(6)
    forms = [[messages[0], *messages[1 + dropped :]] for dropped in range(0, 11, 2)]
    lengths = [len(tokenizer.encode_chat(form)) for form in forms]
    shortest = next(i for i in reversed(range(len(forms))) if len(forms[i]) - 1 >= keep_last)
    for room in range(min(lengths) - 2, max(lengths) + 2):
        fitted = fit_prompt(tokenizer, messages, room, keep_last=keep_last)
        expected = next((i for i, length in enumerate(lengths) if length <= room and i <= shortest), None)
        if expected is None:
            assert fitted.ids is None
        else:
            assert fitted.ids == tokenizer.encode_chat(forms[expected])
            assert fitted.turns_dropped == 2 * expected


# Replies on disk


@pytest.fixture
def talker(shared: Path) -> tuple[Transformer, ChatTokenizer]:
    tokenizer = load_tokenizer(shared / "models" / "story")
    return tiny_model(vocab_size=tokenizer.vocab_size, max_positions=160), tokenizer


def talk(talker: tuple[Transformer, ChatTokenizer], path: Path, count: int = 7, **changes: Any) -> list[Reply]:
    prompts = [[{"role": "user", "content": f"I feel {number}"}] for number in range(count)]
    options: dict[str, Any] = {"sampling": Sampling(seed=5), "max_new_tokens": 10} | changes
    return sample_replies(*talker, prompts, path, **options)


def test_a_rollout_that_was_cut_off_continues_with_the_same_replies(
    talker: tuple[Transformer, ChatTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk(talker, tmp_path / "whole.jsonl")
    assert len({reply.text for reply in whole}) > 3
    for killed_after in (0, 1, 5):
        path = tmp_path / f"{killed_after}.jsonl"

        def killed(*arguments: Any, after: int = killed_after, **options: Any) -> None:
            keep, seen = options.pop("on_reply"), []

            def on_reply(place: int, ids: list[int]) -> None:
                if len(seen) == after:
                    raise KeyboardInterrupt
                seen.append(place)
                keep(place, ids)

            generate(*arguments, on_reply=on_reply, **options)

        with monkeypatch.context() as patch:
            patch.setattr(replies_room, "generate", killed)
            with pytest.raises(KeyboardInterrupt):
                talk(talker, path, slots=3)
        unfinished = path.with_name(f"{path.name}.unfinished")
        assert unfinished.exists() == bool(killed_after)
        assert len(unfinished.read_text().splitlines() if killed_after else []) == killed_after
        with unfinished.open("a") as file:
            file.write('{"index": 6, "te')  # torn by the kill
        with monkeypatch.context() as patch:
            asked = Mock(side_effect=generate)
            patch.setattr(replies_room, "generate", asked)
            assert talk(talker, path) == whole
        assert len(asked.call_args.kwargs["keys"]) == 7 - killed_after
        assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
        assert not unfinished.exists()
    monkeypatch.setattr(replies_room, "generate", lambda *_, **__: pytest.fail("all of it was there"))
    assert talk(talker, tmp_path / "whole.jsonl") == whole


def test_replies_of_another_run_are_refused(talker: tuple[Transformer, ChatTokenizer], tmp_path: Path) -> None:
    talk(talker, tmp_path / "r.jsonl", count=3)
    with pytest.raises(ValueError, match="holds other replies, or in another order, than the 2 wanted"):
        talk(talker, tmp_path / "r.jsonl", count=2)


def test_a_prompt_that_cannot_fit_has_no_text_and_leaves_the_others_alone(
    talker: tuple[Transformer, ChatTokenizer], tmp_path: Path
) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("short", "long " * 200, "short too")]
    options: dict[str, Any] = {"sampling": Sampling(), "max_new_tokens": 5}
    replies = sample_replies(*talker, prompts, tmp_path / "a.jsonl", **options)
    assert [reply.text is None for reply in replies] == [False, True, False]
    assert all(reply.cut == (reply.tokens == 5) for reply in replies)


def test_a_balanced_object_ends_a_reflection(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talker = (tiny_model(), load_tokenizer(shared / "tokenizers" / "qwen2"))
    ids = talker[1].encode('x {"a": {"b": 1}} and more')

    def scripted(model: Transformer, prompts: Any, *, stop_when: Any, **options: Any) -> list[list[int]]:
        reply: list[int] = []
        for token in ids:
            reply.append(token)
            if stop_when(reply):
                break
        for place in range(len(prompts)):
            options["on_reply"](place, reply)
        return []

    monkeypatch.setattr(replies_room, "generate", scripted)
    (reply,) = talk(talker, tmp_path / "j.jsonl", 1, stop_when=lambda text: json_object_end(text) is not None)
    assert reply.text == 'x {"a": {"b": 1}}'


def test_a_form_that_cannot_fit_is_told_before_anything_is_trained_or_sampled(tmp_path: Path) -> None:
    backbone = Path(__file__).parents[2] / "examples" / "embedded" / "backbone"
    data = backbone.parent / "data"
    values = {
        "backbone": str(backbone), "esconv": str(data / "human.json"), "synthetic": (str(data / "synthetic.json"),),
        "replay": str(data / "replay.json"), "test": str(data / "test.json"), "out": str(tmp_path / "run"),
        "reflection": "guided", "reflection_tokens": 20,
    }  # fmt: skip
    with pytest.raises(ValueError, match="20 tokens are too few for"):
        evolve(compose(EvolveConfig, values))
    assert not (tmp_path / "run").exists()
