"""Forms: a plain slow loop is the oracle of the decoder, ``json.loads`` that of what it writes."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.generate import Sampling, generate
from selfevo.generate import decoder as generate_room
from selfevo.generate.cache import SlotCache
from selfevo.generate.form import Form, Rules, Slot, Step
from selfevo.generate.json_form import json_form, template_in
from selfevo.generate.sampling import draw, logits_to_probs, uniform_noise
from selfevo.models import ChatTokenizer, Transformer, load_tokenizer

PROMPTS = [[3, 1, 4, 1, 5], [3, 1, 4], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 1, 4, 1, 5], [2], [3, 1, 9, 9]]
ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = {name: SHARED / "tokenizers" / name for name in ("llama3", "qwen2", "mistral-v0.3")}
TOKENIZERS["embedded"] = ROOT / "examples" / "embedded" / "backbone"
TEMPLATE = {
    "understanding": {"user_profile": "", "käse": ""}, "evaluation_score": 0, "early": False, "feedback": "",
    "refined_response": "",
}  # fmt: skip


@st.composite
def forms(draw: st.DrawFn, vocab: int = 61) -> Form:
    """Automata over 61 ids in which many end the slot, or lead to a state where few are allowed."""
    some = st.lists(st.integers(0, vocab - 1), max_size=2).map(tuple)
    kinds = draw(st.lists(st.sampled_from("...eebx"), min_size=vocab, max_size=vocab))
    kinds[0], kinds[1] = ".", "e"
    left = draw(st.lists(some, min_size=vocab, max_size=vocab))
    ends = {i: Step(None, left[i]) for i in range(vocab) if kinds[i] == "e"}
    turns = {i: Step(2, left[i]) for i in range(vocab) if kinds[i] == "x"}
    banned = [i for i in range(vocab) if kinds[i] == "b"]
    rules = Rules(
        (torch.tensor([*banned, *ends]), torch.tensor(banned), torch.tensor([*range(3, vocab)])),
        (turns, ends | turns, {}),
    )
    digits = Rules((torch.tensor([i for i in range(vocab) if i % 12]),), ({},))
    count = draw(st.integers(1, 4))
    slots = [Slot(digits, 1) if draw(st.booleans()) else Slot(rules, draw(st.integers(1, 9))) for _ in range(count)]
    fixed = [draw(some), *((*draw(some), draw(st.integers(0, vocab - 1))) for _ in slots)]
    return Form(tuple(fixed), tuple(slots))


def slowly(model: Transformer, prompt: list[int], form: Form, sampling: Sampling, key: int) -> list[int]:
    """The whole sequence anew for every token, one reply at a time."""
    reply, step = list(form.fixed[0]), 0
    for slot, behind in zip(form.slots, form.fixed[1:]):
        state: int | None = 0
        for place in range(slot.limit):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *reply]]))[0, -1, :, None].clone()
            assert state is not None
            logits[slot.rules.banned[state]] = -torch.inf
            seen = torch.tensor([sorted({*prompt, *reply})])
            probs, ids = logits_to_probs(
                logits, seen, penalty=sampling.repetition_penalty, temperature=sampling.temperature,
                top_k=sampling.top_k, top_p=sampling.top_p,
            )  # fmt: skip
            token = int(draw(probs, ids, uniform_noise(sampling.seed, torch.tensor([key]), torch.tensor([step]))))
            step += 1
            assert token not in slot.rules.banned[state]
            state, left = slot.rules.step(state, token)
            if state is None or place + 1 == slot.limit:
                reply += left
                break
            reply.append(token)
        reply += behind
    return reply


@settings(max_examples=25, deadline=None)
@given(
    form=forms(), seed=st.integers(0, 99), slots=st.sampled_from([1, 2, 4, 6]), own=st.booleans(),
    windows=st.sampled_from([(None, None), (None, 5), (4, 9)]), penalty=st.sampled_from([1.0, 1.3]),
    top_k=st.sampled_from([0, 5, 50]),
)  # fmt: skip
def test_a_form_is_filled_as_a_plain_loop_fills_it(
    form: Form, seed: int, slots: int, own: bool, windows: tuple[int | None, ...], penalty: float, top_k: int
) -> None:
    """Rows of a batch come to their fixed ids at different steps, leave, and others take their slots; with the cache of
    a CPU and with that of a GPU."""
    model = tiny_model(windows=windows)
    sampling = Sampling(repetition_penalty=penalty, top_k=top_k, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if own:
            patch.setattr(
                generate_room, "row_cache", lambda model, slots, old, new, tail: SlotCache(model, slots, old + new)
            )
        told: dict[int, list[int]] = {}
        found = generate(
            model, PROMPTS, max_new_tokens=form.longest, form=form, batch_size=slots, on_reply=told.__setitem__,
            **vars(sampling),
        )  # fmt: skip
    assert [told[index] for index in range(len(PROMPTS))] == found
    assert found == [slowly(model, prompt, form, sampling, key) for key, prompt in enumerate(PROMPTS)]
    assert all(len(reply) <= form.longest for reply in found)


def test_fixed_ids_take_one_pass_for_all_rows_and_are_not_sampled() -> None:
    any_id = Rules((torch.tensor([0]), torch.tensor([0])), ({}, {}))
    form = Form((tuple(range(5, 25)), tuple(range(10, 30)), (3, 4)), (Slot(any_id, 3), Slot(any_id, 2)))
    phases: list[tuple[str, int]] = []

    def observer(phase: str, rows: int, waiting: int) -> Any:
        phases.append((phase, rows))
        return generate_room._unobserved("decode", rows, waiting)

    generate(tiny_model(), PROMPTS, max_new_tokens=99, form=form, observer=observer)
    assert phases.count(("sample", 6)) == 5
    assert phases.count(("decode", 6)) == 4
    assert [rows for phase, rows in phases if phase == "fixed"] == [6 * 20]  # the sampled id, and all but the last


def test_forms_that_cannot_be_filled_are_refused() -> None:
    rules = Rules((torch.tensor([0]),), ({},))
    for fixed, slots in (((), ()), (((), ()), (Slot(rules, 1),)), (((), (1,)), (Slot(rules, 0),)), (((1,),), ())):
        with pytest.raises(ValueError, match="slot"):
            Form(fixed, slots)
    form = Form(((1,), (2, 3)), (Slot(rules, 4),))
    with pytest.raises(ValueError, match="the form takes up to 7 tokens, max_new_tokens allows 6"):
        generate(tiny_model(), PROMPTS, max_new_tokens=6, form=form)


# JSON


@lru_cache
def tokenizer_of(name: str) -> ChatTokenizer:
    return load_tokenizer(TOKENIZERS[name])


@lru_cache
def hostile(name: str, dtype: torch.dtype) -> Transformer:
    """A random model that likes what ends strings or breaks them: quotes, backslashes, control characters, ends of
    turns, halves of characters; with ids that the tokenizer lacks."""
    tokenizer = tokenizer_of(name)
    model = tiny_model(vocab_size=tokenizer.vocab_size + 7, max_positions=1024, tied=False)
    odd = [i for i, piece in enumerate(tokenizer.pieces()) if set(piece) & set('"\\\n\t\ufffd')]
    with torch.no_grad():
        model.lm_head.weight[[*odd, *tokenizer.stop_ids, *range(tokenizer.vocab_size, tokenizer.vocab_size + 7)]] *= 2
    return model.to(dtype)


def keys_of(value: Any) -> Any:
    return {key: keys_of(inner) for key, inner in value.items()} if isinstance(value, dict) else None


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.sampled_from([90, 120]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), temperature=st.sampled_from([0.0, 0.9, 5.0]),
    top_k=st.sampled_from([50, 1000]), slots=st.sampled_from([1, 3, 4]),
)  # fmt: skip
def test_every_reply_in_a_form_is_json_of_its_keys(
    name: str, seed: int, tokens: int, dtype: torch.dtype, temperature: float, top_k: int, slots: int
) -> None:
    tokenizer, model = tokenizer_of(name), hostile(name, dtype)
    form = json_form(tokenizer, model.config.vocab_size, TEMPLATE, tokens, {"refined_response": 3})
    prompts = [tokenizer.encode(text) for text in ("I feel", "Hello", '{"a": "', "one \\")]
    replies = generate(
        model, prompts, max_new_tokens=tokens, form=form, seed=seed, temperature=temperature, top_k=top_k,
        batch_size=slots, stop_ids=tokenizer.stop_ids,
    )  # fmt: skip
    for reply in replies:
        value = json.loads(tokenizer.decode(reply))
        assert keys_of(value) == keys_of(TEMPLATE)
        assert value["evaluation_score"] in (1, 2, 3, 4, 5)
        assert isinstance(value["early"], bool)
        texts = [*value["understanding"].values(), value["feedback"], value["refined_response"]]
        assert all(text.strip() for text in texts)
        assert len(reply) <= tokens
        "".join(texts).encode()  # no half of a surrogate pair
        before, behind = map(list, form.fixed[-2:])
        start = next(i for i in reversed(range(len(reply))) if reply[i : i + len(before)] == before) + len(before)
        assert form.ends_full(reply) == (len(reply) - len(behind) - start >= form.slots[-1].limit)


def outcome(text: str, *, escaped: bool) -> str:
    """What a text does to a string, a character at a time."""
    for place, character in enumerate(text):
        if escaped and character not in '"\\/bfnrt':
            return "banned"
        if not escaped and character == '"':
            return f"ends at {place}"
        if ord(character) < 32:
            return "banned"
        escaped = not escaped and character == "\\"
    return "escape" if escaped else "text"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_id_of_a_vocabulary_is_read_as_its_characters_are(name: str) -> None:
    tokenizer = tokenizer_of(name)
    vocab = tokenizer.vocab_size
    rules = json_form(tokenizer, vocab + 3, {"a": ""}, 40).slots[0].rules
    banned = [set(ids.tolist()) for ids in rules.banned]
    stops = set(tokenizer.stop_ids)
    for token, piece in enumerate(tokenizer.pieces()):
        for state, escaped in ((1, False), (2, True)):
            expected = "banned" if not piece else outcome(piece, escaped=escaped)
            if token in stops and state == 1:
                expected = "ends at 0"
            if token in banned[state]:
                assert expected == "banned" or len(piece) > 20  # a whole phrase in one id
            else:
                after, left = rules.step(state, token)
                assert expected == {1: "text", 2: "escape"}.get(after or 0, expected), (piece, state)
                if after is None:
                    text = tokenizer.decode([*tokenizer.encode("{"), *left])
                    assert expected == f"ends at {len(text) - 1}"
    assert {vocab, vocab + 1, vocab + 2} <= banned[0] & banned[1] & banned[2]
    assert stops <= banned[0] & banned[2]


def test_a_choice_is_the_models_own_however_its_vocabulary_cuts_the_words() -> None:
    tokenizer, model = tokenizer_of("embedded"), hostile("embedded", torch.float32)
    form = json_form(tokenizer, model.config.vocab_size, {"a": True}, 20)
    written = set()
    for seed in range(12):
        (reply,) = generate(model, [[5, 6]], max_new_tokens=20, form=form, seed=seed, temperature=3.0)
        written.add(json.loads(tokenizer.decode(reply))["a"])
    assert written == {True, False}


def test_the_template_of_a_request_is_found() -> None:
    assert template_in('Answer with JSON:\n{"a": "", "b": {"c": 0}}') == {"a": "", "b": {"c": 0}}
    assert template_in('Like {this}.\n{"a": ""}\nThanks.') == {"a": ""}
    assert template_in('In the form {"a": "",\n "b": 0}.') == {"a": "", "b": 0}
    assert template_in("No form, or {one} of another kind") is None
    assert template_in("[1]") is None


def test_templates_that_make_no_form_are_refused() -> None:
    tokenizer = tokenizer_of("embedded")
    for template in ({"a": []}, {"a": None}, {"a": 0.5}):
        with pytest.raises(ValueError, match="texts, whole numbers, true, false and objects"):
            json_form(tokenizer, 3000, template, 100)
    with pytest.raises(ValueError, match="a form needs slots"):
        json_form(tokenizer, 3000, {"a": {}}, 100)
    with pytest.raises(ValueError, match="10 tokens are too few"):
        json_form(tokenizer, 3000, TEMPLATE, 10)
