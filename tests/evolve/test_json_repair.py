"""Whatever a model wrote: proper JSON is read as JSON, what is nearly JSON as it was meant, and nothing raises."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.evolve.json_repair import Salvaged, json_object_end, salvage_json

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
        ("{'note': 'he said: {'} {'wanted': null}", {"wanted": None}),
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
