"""Whatever a model wrote: proper JSON is read as JSON, what is nearly JSON as it was meant, and nothing raises."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from faulty import rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.evolve import json_repair
from selfevo.evolve.json_repair import Salvaged, is_placeholder, json_object_end, json_objects, plain_key, salvage_json

# Plain text rarely hits what matters, so half of the strings are made of JSON's own signs.
TEXTS = st.text(max_size=12) | st.text("\"'“”‘’\\{}[],: \nabtrue1-`ü😀", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
PROSE = st.text(st.characters(exclude_characters="{"), max_size=20)


@settings(deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_proper_json_is_read_as_json_reads_it(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert salvage_json(text) == Salvaged(value, True)
    assert json_object_end(text) == len(text)


@settings(deadline=None)
@given(OBJECTS, PROSE, PROSE)
def test_text_before_and_after_makes_no_difference(value: dict[str, Any], before: str, after: str) -> None:
    text = json.dumps(value)
    assert salvage_json(before + text + after) == Salvaged(value, True)
    assert json_object_end(before + text + after) == len(before + text)


def is_beginning(part: Any, whole: Any) -> bool:
    """Whether cutting ``whole`` off somewhere can leave ``part``: only what comes last may lack something."""
    if isinstance(part, dict) and isinstance(whole, dict):
        keys = list(part)
        return keys == list(whole)[: len(keys)] and is_beginning(list(part.values()), list(whole.values()))
    if isinstance(part, list) and isinstance(whole, list):
        if not part:
            return True
        last = len(part) - 1
        return len(part) <= len(whole) and part[:last] == whole[:last] and is_beginning(part[last], whole[last])
    if isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    if type(whole) in (int, float) and type(part) in (int, float):
        return True  # "12" may be cut from 12.5 or 1234: a number at the end is taken as it stands
    return part is whole


@settings(deadline=None)
@given(OBJECTS, st.booleans(), st.data())
def test_a_cut_object_keeps_exactly_what_had_been_written(
    value: dict[str, Any], ascii_only: bool, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    assert json_object_end(cut) is None
    salvaged = salvage_json(cut)
    if salvaged is not None:
        assert not salvaged.complete
        assert is_beginning(salvaged.value, value)


@settings(deadline=None)
@given(st.dictionaries(st.text("abc ", min_size=1), st.text("xyz '\\\"", min_size=1), min_size=2), st.data())
def test_cutting_the_last_string_loses_no_earlier_member(value: dict[str, str], data: st.DataObject) -> None:
    text = json.dumps(value)
    *earlier, last = value
    inside = len(text) - data.draw(st.integers(2, len(json.dumps(value[last]))))
    salvaged = salvage_json(text[:inside])
    assert salvaged is not None
    assert {key: salvaged.value[key] for key in earlier} == {key: value[key] for key in earlier}
    assert value[last].startswith(salvaged.value[last])


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


@settings(deadline=None)
@given(st.dictionaries(ASCII, ASCII | st.booleans() | st.none() | st.lists(ASCII, max_size=3), min_size=1))
def test_a_python_dict_is_read_as_the_same_value(value: dict[str, Any]) -> None:
    assert salvage_json(f"Here you are: {value!r}.") == Salvaged(value, True)


@settings(deadline=None)
@given(st.text("{}[]\"'“”‘’\\,:;`abTrueN 1-\n") | st.text())
def test_no_text_raises_and_both_functions_agree_on_what_is_complete(text: str) -> None:
    salvaged = salvage_json(text)
    end = json_object_end(text)
    assert (end is not None) == (salvaged is not None and salvaged.complete)
    if end is not None and salvaged is not None and salvaged.value:
        assert salvage_json(text[:end]) == salvaged
        assert text[end - 1] == "}"


MENDED = {
    "fence": ('Sure!\n```json\n{"a": "x"}\n```\nHope it helps.', {"a": "x"}),
    "fence without a language": ('```\n{"a": "x"}```', {"a": "x"}),
    "braces in prose": ('I use {braces} and {}: {"a": "x"}', {"a": "x"}),
    "an open brace in prose": ('The sign { opens, so: {"a": "x"}', {"a": "x"}),
    "list around it": ('[{"a": "x"}, {"a": "y"}]', {"a": "x"}),
    "single quotes": ("{'a': 'x', 'b': ['y', 'z']}", {"a": "x", "b": ["y", "z"]}),
    "apostrophes in single quotes": ("{'a': 'I'm ok', 'b': 'the dogs' bowl'}", {"a": "I'm ok", "b": "the dogs' bowl"}),
    "apostrophe in a key": ("{'user's mood': 'low', 'b': 1}", {"user's mood": "low", "b": 1}),
    "escaped apostrophe": (r"{'a': 'I\'m ok'}", {"a": "I'm ok"}),
    "curly quotes": ("{“a”: “x ‘y’ z”, ‘b’: ‘I’m ok’}", {"a": "x ‘y’ z", "b": "I’m ok"}),
    "curly quotes of the wrong side": ("{”a”: ”x”, “b“: “y“}", {"a": "x", "b": "y"}),
    "curly and straight mixed": ('{“a": “x", "b": "“y”"}', {"a": "x", "b": "“y”"}),
    "unescaped quotes": ('{"a": "He said "no" to it", "b": "x"}', {"a": 'He said "no" to it', "b": "x"}),
    "unescaped quote and comma": ('{"a": "He said "no", and left", "b": 1}', {"a": 'He said "no", and left', "b": 1}),
    "unescaped list": ('{"a": "Say "no", "never" or "go"", "b": 1}', {"a": 'Say "no", "never" or "go"', "b": 1}),
    "trailing commas": ('{"a": ["x", "y",], "b": 1,}', {"a": ["x", "y"], "b": 1}),
    "leading and double commas": ('{, "a": [,1,,2], , "b": 1}', {"a": [1, 2], "b": 1}),
    "lost comma, new line": ('{"a": "x"\n "b": 3\n "c": true\n d: "y"}', {"a": "x", "b": 3, "c": True, "d": "y"}),
    "lost comma, bare key": ('{"a": "x"\n b: "y"}', {"a": "x", "b": "y"}),
    "unescaped quotes and a colon": ('{"a": "He said "no" note: x"}', {"a": 'He said "no" note: x'}),
    "lost comma, same line": ('{"a": "x" "b": 3 "c": {"d": 1} "e": [1] "f": "y"}',
                              {"a": "x", "b": 3, "c": {"d": 1}, "e": [1], "f": "y"}),
    "lost comma, single quotes": ("{'a': 4 'b': 'x' 'c': None}", {"a": 4, "b": "x", "c": None}),
    "lost comma in a list": ('{"a": ["x" "y"\n"z"]}', {"a": ["x", "y", "z"]}),
    "bare keys": ("{a: 1, b_c: 'x', d-e: [true]}", {"a": 1, "b_c": "x", "d-e": [True]}),
    "bare values": ('{"a": 4/5, "b": quite good\n}', {"a": "4/5", "b": "quite good"}),
    "bare value with apostrophe": ('{"a": it\'s fine, "b": 1}', {"a": "it's fine", "b": 1}),
    "python literals": ('{"a": True, "b": [False, None]}', {"a": True, "b": [False, None]}),
    "not numbers": ('{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": None, "b": None, "c": None}),
    "signed number": ('{"a": +3, "b": 4.}', {"a": 3, "b": 4.0}),
    "raw newline and tab": ('{"a": "two\nlines\tand tab"}', {"a": "two\nlines\tand tab"}),
    "unknown escape": (r'{"a": "C:\dir \u12 x"}', {"a": r"C:\dir \u12 x"}),
    "half a surrogate pair": (r'{"a": "x\ud83dy", "b": "\ud83d\ude00"}', {"a": "x\ufffdy", "b": "😀"}),
    "comment": ('{"a": 1, // why\n "b": 2}', {"a": 1, "b": 2}),
    "ellipsis": ('{"a": 1, ...}', {"a": 1}),
    "member without a value": ('{"a": , "b": 1, "c":}', {"b": 1}),
    "member without a colon": ('{"a": 1, "b", "c": 2}', {"a": 1, "c": 2}),
    "lost brace in a list": ('{"a": [{"b": 1], "c": 2}', {"a": [{"b": 1}], "c": 2}),
    "lost bracket": ('{"a": ["x", "c": 2}', {"a": ["x"], "c": 2}),
    "lost bracket at the end": ('{"a": ["x", "y"}', {"a": ["x", "y"]}),
    "one bracket too many": ('{"a": ["x"]], "b": 1}', {"a": ["x"], "b": 1}),
    "a digit repeated": ('{"a": ' + "9" * 400 + "}", {"a": int("9" * 400)}),
    "duplicate key": ('{"a": 1, "a": 2}', {"a": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_untidy_output_is_read_as_meant(name: str) -> None:
    text, expected = MENDED[name]
    assert salvage_json(text) == Salvaged(expected, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "x", "b": "cut of', {"a": "x", "b": "cut of"}),
        ('{"a": "x", "b": ["y", "z', {"a": "x", "b": ["y", "z"]}),
        ('{"a": {"b": {"c": 1', {"a": {"b": {"c": 1}}}),
        ('{"a": "x", "b', {"a": "x"}),
        ('{"a": "x", "b"', {"a": "x"}),
        ('{"a": "x", "b": tru', {"a": "x"}),
        ('{"a": "x", "b": true', {"a": "x", "b": True}),
        (r'{"a": "x\u00', {"a": "x"}),
        (r'{"a": "x\ud83d\ud', {"a": "x"}),
        ("{'a': 'I'm cu", {"a": "I'm cu"}),
        ('```json\n{"a": "x"\n```', {"a": "x"}),
        ('```json\n{"a": "x\n```', {"a": "x"}),
        ('{"a": "x"]', {"a": "x"}),
    ],
)
def test_a_cut_off_end_is_closed_and_flagged(text: str, expected: dict[str, Any]) -> None:
    assert salvage_json(text) == Salvaged(expected, False)
    assert json_object_end(text) is None


@pytest.mark.parametrize(
    "text", ["", "no object", "{", "}", '{"a', '{"a"', '{"a":', "{sad}", "[1, 2]", '{"{}', '{"{}"', '"{"']
)
def test_where_nothing_can_be_had_there_is_none(text: str) -> None:
    assert salvage_json(text) is None
    assert json_object_end(text) is None


def test_an_empty_object_is_taken_only_if_no_other_follows() -> None:
    assert salvage_json("{}") == Salvaged({}, True)
    assert json_object_end(" { } x") == 4
    assert salvage_json('{} or {"a": 1}') == Salvaged({"a": 1}, True)


def test_a_brace_inside_a_string_ends_nothing() -> None:
    text = '{"a": "}", "b": "\\"}", "c": {"d": "{"}}'
    assert json_object_end(text + " and }") == len(text)


def test_generation_can_stop_at_the_first_token_that_closes_the_object() -> None:
    written = 'Let me think {hm}.\n```json\n{"a": {"b": "}"}, "score": 3}\n``` Done. {"c": 1}'
    ends = [json_object_end(written[:length]) for length in range(len(written) + 1)]
    closing = written.index("3}") + 2
    assert ends[:closing] == [None] * closing
    assert set(ends[closing:]) == {closing}


def test_nesting_is_followed_to_64_levels_and_no_further() -> None:
    def nested(depth: int) -> str:
        return '{"a": ' * (depth - 1) + '{"a": 1}' + "}" * (depth - 1)

    assert salvage_json(nested(64)) == Salvaged(json.loads(nested(64)), True)
    assert salvage_json(nested(65)) is None
    assert salvage_json(nested(10_000), "wanted") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"note": 1} then {"wanted": "x"}', {"wanted": "x"}),
        ('{"note": {"wanted": "x", "b": 1}}', {"wanted": "x", "b": 1}),
        ('{"note": [1, {"b": {"wanted": "x"}}], "c": 2}', {"wanted": "x"}),
        ('{sad} {} {"note": 1} {"other": 2}', {"note": 1}),
        ("{'note': 'he said: {'} {'wanted': 3}", {"wanted": 3}),
    ],
)
def test_every_object_is_searched_for_the_wanted_key(text: str, expected: dict[str, Any]) -> None:
    assert salvage_json(text, "wanted") == Salvaged(expected, True)
    assert json_object_end(text, "wanted") == (len(text) if "wanted" in text else None)


def test_a_generation_goes_on_until_the_wanted_key_is_there() -> None:
    written = '{"note": {"b": 1}} {"wanted": "x"} {"wanted": "y"}'
    ends = [json_object_end(written[:length], "wanted") for length in range(len(written) + 1)]
    closing = written.index('"x"}') + 4
    assert ends == [None] * closing + [closing] * (len(written) + 1 - closing)
    assert salvage_json(written[: closing - 2], "wanted") == Salvaged({"wanted": "x"}, False)


X = {"wanted": "x"}
# Each with the object that is meant; generation stops at the end of the text, and not before.
AMONG_OTHERS = {
    "a draft in a thought": ('<think>Maybe {"wanted": "draft"}?</think>\n{"wanted": "x"}', X),
    "two thoughts": ('<think>a</think> <thinking>{"wanted": "b"}</thinking>{"wanted": "x"}', X),
    "Mistral's thought": ('[THINK]{"wanted": "b"}[/THINK]{"wanted": "x"}', X),
    "a blank form": ('The form is {"wanted": ""}. Filled in: {"wanted": "x"}', X),
    "a form with dots": ('{"wanted": "..."} becomes {"wanted": "x"}', X),
    "a form with a placeholder": ('{"wanted": "<your response>"}\n{"wanted": "x"}', X),
    "a form with null": ('{"wanted": null} {"wanted": []} {"wanted": "x"}', X),
    "an object a step": ('{"step": 1, "a": {"b": "c"}}\n{"step": 2}\n{"wanted": "x"}', X),
    "numbered steps": ('1. {"a": 1}\n2. ```json\n{"b": 2}\n```\n3. {"wanted": "x"}', X),
    "wrapped": ('{"reflection": {"wanted": "x"}}', X),
    "wrapped twice": ('{"answer": [{"note": 1}, {"inner": {"wanted": "x"}}]}', X),
    "a blank one inside": ('{"wanted": "", "final": {"wanted": "x"}}', X),
    "as a string": (json.dumps({"answer": json.dumps(X)}), X),
    "as a string of strings": (json.dumps({"answer": json.dumps({"inner": json.dumps(X)})}), X),
    "a layer of escapes": (r'{\"wanted\": \"x\"}', X),
    "a layer of escapes, laid out": (r'{\n  \"wanted\": \"A \\\"no\\\".\\nYes\"\n}', {"wanted": 'A "no".\nYes'}),
    "two layers of escapes": (r'{\\\"wanted\\\": \\\"x\\\"}', X),
    "begun anew": ('{"wanted": "I hear\n{"wanted": "x"}', X),
    "begun anew in a fence": ('{"a": "b", "wanted": "I hear\n```json\n{"wanted": "x"}', X),
    "begun anew between members": ('{"a": 1,\n{"wanted": "x"}', X),
    "two braces": ('{{"wanted": "x"}', X),
}  # fmt: skip


@pytest.mark.parametrize("name", AMONG_OTHERS)
def test_the_object_that_is_meant_is_found_among_others_and_ends_the_generation(name: str) -> None:
    text, expected = AMONG_OTHERS[name]
    assert salvage_json(text + " And {more: 1}", "wanted") == Salvaged(expected, True)
    ends = [json_object_end((text + " more")[:length], "wanted") for length in range(len(text) + 6)]
    assert ends == [None] * len(text) + [len(text)] * 6


def test_an_open_thought_holds_no_answer() -> None:
    assert salvage_json('<think>Maybe {"wanted": "draft"}', "wanted") is None
    assert json_object_end(' <think>Maybe {"wanted": "draft"} or', "wanted") is None
    begun_in_the_prompt = 'so {"wanted": "draft"} hm</think>{"wanted": "x"}'
    assert salvage_json(begun_in_the_prompt, "wanted") == Salvaged(X, True)
    assert salvage_json('{"wanted": "a </think> b"}', "wanted") == Salvaged({"wanted": "a </think> b"}, True)


def test_an_object_that_is_cut_off_gives_way_to_a_whole_one() -> None:
    text = '{"wanted": "draft\n{"wanted": "whole"}'
    assert salvage_json(text, "wanted") == Salvaged({"wanted": "whole"}, True)
    assert salvage_json(text[:-2], "wanted") == Salvaged({"wanted": "draft"}, False)


def test_where_every_form_is_blank_the_first_is_given_and_nothing_ends() -> None:
    text = '{"a": 1} {"wanted": ""} {"wanted": "..."}'
    assert salvage_json(text, "wanted") == Salvaged({"wanted": ""}, True)
    assert json_object_end(text, "wanted") is None


def test_keys_are_found_in_any_case_and_punctuation() -> None:
    for key in ("refined_response", r"refined\_response", "Refined Response", "**refined-response**"):
        text = json.dumps({key: "x"})
        assert salvage_json(text, "refined_response") == Salvaged({key: "x"}, True)
        assert json_object_end(text, "refined_response") == len(text)
        assert plain_key(key) == plain_key("refined_response")


def test_all_closed_objects_are_listed() -> None:
    assert json_objects('{"a": 1} {b} {"c": {"d": 2}} {"e": ') == [{"a": 1}, {"c": {"d": 2}}]
    assert json_objects('<think>{"a": 1}</think>{"b": 2}') == [{"b": 2}]


FOREIGN = {
    "escaped keys": (r'{"refined\_response": "x", user\_profile: "y"}', {"refined_response": "x", "user_profile": "y"}),
    "escaped values": (r'{"a": "I\_hear \*you\* \[now\] 5\. \#"}', {"a": "I_hear *you* [now] 5. #"}),
    "three quotes": ('{"a": """I hear you."""}', {"a": "I hear you."}),
    "three quotes, lines": ('{"a": """\nI "hear" you.\n""", "b": 1}', {"a": '\nI "hear" you.\n', "b": 1}),
    "three quotes behind one": ('{"a": """He said "no"""", "b": 1}', {"a": 'He said "no"', "b": 1}),
    "three single quotes": ("{'a': '''I'm ok.'''}", {"a": "I'm ok."}),
    "backticks": ('{"a": `I hear, you.`, `b`: `it\'s`}', {"a": "I hear, you.", "b": "it's"}),
    "three backticks": ('{"a": ```text\nI hear you.\n```, "b": 1}', {"a": "I hear you.\n", "b": 1}),
    "a plus": ('{"a": "I hear you. " + "Tell me more.", "b": 1}', {"a": "I hear you. Tell me more.", "b": 1}),
    "pluses over lines": ('{"a": "I hear "\n + "you. "\n + \'Go on.\'}', {"a": "I hear you. Go on."}),
    "a plus in a list": ('{"a": ["x" + "y", "z"]}', {"a": ["xy", "z"]}),
    "a plus in a text": ('{"a": "1 + 1", "b": "x+"}', {"a": "1 + 1", "b": "x+"}),
    "full-width": ('{“a”：“x”，“b”：2，“c”：［1，2］}', {"a": "x", "b": 2, "c": [1, 2]}),
    "full-width colon and comma": ('{"a"："I hear，you：go on"，"b"：1}', {"a": "I hear，you：go on", "b": 1}),
    "full-width all over": ('｛＂a＂：＂x＂，＂b＂：｛＂c＂：true｝｝', {"a": "x", "b": {"c": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_punctuation_is_none_of_the_text(name: str) -> None:
    text, expected = FOREIGN[name]
    assert salvage_json(text) == Salvaged(expected, True)
    assert json_object_end(text) == len(text)
    assert [json_object_end(text[:length]) for length in range(len(text))] == [None] * len(text)


PLACEHOLDERS = [
    "", " \n", "...", "…", "---", "<response>", "<your refined response here>", "[your response]", "[...]", "{reply}",
    "your response here", "Your refined response.", "refined_response", "string", "The improved reply goes here...",
    "N/A", "none", "Insert your answer here", "**your response**",
]  # fmt: skip
REPLIES = [
    "I hear you.", "Your response moved me.", "No.", "None of this is your fault.", "The answer is yours.", "你好",
    "[sighs] I hear you.", "<3 I hear you", "Text me.", "String quartets calm me.", "Answer me this.",
]  # fmt: skip


def test_placeholders_are_told_from_replies() -> None:
    assert [text for text in PLACEHOLDERS if not is_placeholder(text)] == []
    assert [text for text in REPLIES if is_placeholder(text)] == []


@settings(deadline=None)
@given(OBJECTS, st.sampled_from(["wanted", "a", "Text"]), st.booleans())
def test_with_a_key_proper_json_is_read_as_json_reads_it(value: dict[str, Any], wanted: str, wrapped: bool) -> None:
    value = {**value, wanted: "some text"}
    text = json.dumps({"b": [1, value]} if wrapped else value)
    first = next(iter(holders(json.loads(text), wanted)))
    assert salvage_json(text, wanted) == Salvaged(first, True)
    assert json_object_end(text, wanted) == len(text)


def holders(value: Any, wanted: str) -> list[dict[str, Any]]:
    """Those with something under the key, outermost first."""
    own = [value] if isinstance(value, dict) and filled(value, wanted) else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return own + [found for part in parts for found in holders(part, wanted)]


def filled(value: dict[str, Any], wanted: str) -> bool:
    found = [part for key, part in value.items() if plain_key(key) == plain_key(wanted)]
    return any(part not in (None, {}, []) and not (isinstance(part, str) and is_placeholder(part)) for part in found)


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *(text for part in value.values() for text in strings(part))]
    return [text for part in value for text in strings(part)] if isinstance(value, list) else []


SIGNS = "{}[]\"'“”‘’`\\,:;，：+<>think/wanted 1-\n_*"


@settings(deadline=None, max_examples=300)
@given(st.text(SIGNS, max_size=60) | st.text(), st.sampled_from([None, "wanted"]))
def test_nothing_is_made_up(text: str, wanted: str | None) -> None:
    """Every string consists of characters that stand in the text in this order, escapes replaced."""
    found = salvage_json(text, wanted)
    readable = iter(text)
    for string in strings(found.value) if found is not None else []:
        readable = iter(text)
        for char in string:
            assert char in "\n\t\r\b\f\ufffd" or char in readable or f"{ord(char):04x}" in text.lower()


BEGUN = '{"understanding": {"user_profile": "nurse, “tired”"}, "score": 2, "wanted": "I hear \\"you\\".\\nGo on."}'


def test_a_million_characters_of_anything_are_read_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what is read: the characters of every object and of every string, in all rounds together."""
    read = {"object": 0, "string": 0}
    read_object, read_string = json_repair._read_object, json_repair._read_string

    def counting_object(text: str, position: int) -> Any:
        found = read_object(text, position)
        read["object"] += found.end - position
        return found

    def counting_string(text: str, position: int, after: Any) -> Any:
        found = read_string(text, position, after)
        read["string"] += found[1] - position
        return found

    monkeypatch.setattr(json_repair, "_read_object", counting_object)
    monkeypatch.setattr(json_repair, "_read_string", counting_string)
    rows = {
        "blank forms": '{"wanted": ""} ', "drafts": '{"wanted": "I hear\n', "braces": '{"a": 1, {"b": 2, ',
        "strings of JSON": json.dumps({"a": json.dumps(X | {"wanted": ""})}), "escapes": r'{\"a\": \"',
        "quotes": '{"a": """', "backticks": '{"a": ```', "pluses": '{"a": "x" + ', "colons": "{“a”：",
        "prose": "{ a, b } ", "thoughts": '<think>{"wanted": "x"}',
    }  # fmt: skip
    for name, row in rows.items():
        text = row * (20_000 // len(row))
        read.update(object=0, string=0)
        salvage_json(text, "wanted")
        assert max(read.values()) <= 8 * len(text), (name, read)


def test_mutated_output_crashes_nothing_and_stays_in_agreement() -> None:
    for rng in rounds(18, 600):
        text = BEGUN
        for _ in range(rng.randrange(1, 6)):
            place, other = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
            text = rng.choice([
                text[:place] + rng.choice(SIGNS) + text[place:], text[:place] + text[place + 1 :], text[:place],
                text[:place] + text[min(place, other) : other] + text[place:], text + text,
                text.replace('"', rng.choice("'`“＂")),
                text[:place] + "<think>" + text[place:], text.replace("\\", "\\\\"), json.dumps(text), text[::-1],
            ]) or BEGUN  # fmt: skip
            text = text[:2000]
        found, end = salvage_json(text, "wanted"), json_object_end(text, "wanted")
        if end is not None:
            assert found is not None
            assert found.complete
            assert text[end - 1] in "}｝"


HOSTILE = {
    "open brackets": "[" * 100_000,
    "open brackets in an object": '{"a": ' + "[" * 100_000,
    "open objects": '{"a":' * 20_000,
    "open braces": "{" * 100_000,
    "braces and quotes": '{"' * 50_000,
    "keys that never end": "{“" * 50_000,
    "members without values": "{a:," * 20_000,
    "quotes": '{"a": "' + '" ' * 20_000,
    "quotes and commas": '{"a": "' + '", ' * 20_000,
    "quotes and new keys": "{'a': '" + "', 'b" * 20_000,
    "items without commas": '{"a": [' + '"b" ' * 20_000,
    "escapes": '{"a": "' + '\\"' * 50_000,
    "new lines": '{"a": "x"' + "\n" * 100_000 + "b",
    "spaces in a key": '{"a": "x", "' + " " * 100_000 + '" z',
    "spaces before a fence": '{"a": "x' + " " * 100_000 + "``",
    "digits": '{"a": ' + "9" * 100_000 + "}",
    "a bare word": "{" + "a" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_linearly_on_degenerate_output(name: str) -> None:
    # Quadratic time on these takes minutes; the longest takes a second on a slow core.
    begin = time.process_time()
    salvage_json(HOSTILE[name])
    json_object_end(HOSTILE[name] + "}")
    assert time.process_time() - begin < 20
