"""Files are written whole or not at all, and every unreadable one is named in a sentence that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.files import (
    Fields,
    FileError,
    append_jsonl,
    read_json,
    read_jsonl,
    read_object,
    read_records,
    replace_file,
    resume_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

# Python takes U+2028, U+0085 and \x1c for line ends; JSON lines must not. "\ud83d" is half a surrogate pair.
ODD_TEXTS = ["é “quoted” 🙂", "two\nlines", "sep\u2028arated\x85by\x1cothers", "carriage\r\nreturn", "\ud83d"]

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half a pair must survive; two halves side by side are one character to JSON, so the low halves are left out.
    | st.text(st.characters(max_codepoint=0xDBFF) | st.characters(min_codepoint=0xE000)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_json_lines_keep_every_text_and_every_record_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [{"text": text} for text in ODD_TEXTS])
    assert [record["text"] for record in read_jsonl(path)] == ODD_TEXTS
    assert path.read_bytes().count(b"\n") == len(ODD_TEXTS)
    assert [record["text"] for _, record in read_records(path)] == ODD_TEXTS


@settings(deadline=None)
@given(JSON_VALUES)
def test_what_is_written_as_json_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    write_jsonl(path, [value, value])
    assert read_jsonl(path) == [value, value]


def test_non_ascii_text_stays_readable_in_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "é🙂"})
    assert "é🙂" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_text_is_written_without_changing_its_newlines_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    write_text(path, "a\r\nb\n")
    assert path.read_bytes() == b"a\r\nb\n"


def test_no_records_make_an_empty_file_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    write_jsonl(path, [])
    assert path.read_bytes() == b""
    assert read_jsonl(path) == []


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_numbers_that_json_lacks_are_refused_and_leave_the_file_alone(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    for write in (write_json, lambda path, value: write_jsonl(path, [0, value])):
        with pytest.raises(FileError, match=r"a\.json: cannot be written as JSON"):
            write(path, value)
    assert read_json(path) == 1


def test_text_that_has_no_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="surrogate"):
        write_text(tmp_path / "a.txt", "ab\ud83d")
    assert os.listdir(tmp_path) == []


def test_a_writer_that_fails_changes_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")

    def write_half() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_the_target_keeps_its_old_content_until_the_writer_is_done(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")
    with path.open() as reader:
        with replace_file(path) as temporary:
            temporary.write_text("new")
            assert temporary.parent == tmp_path  # a rename is atomic within one file system only
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        # Renamed, not copied over: who had the file open never sees a mixture.
        assert reader.read() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nothing was written"), replace_file(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_writing_over_a_folder_or_below_a_file_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a folder"):
        write_text(tmp_path, "a")
    with pytest.raises(FileError, match=r"file.x\.json: cannot be written"):
        write_json(tmp_path / "file" / "x.json", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.json: is empty"),
        (b" \n", r"bad\.json: is empty"),
        (b"\xef\xbb\xbf", r"bad\.json: is empty"),
        (b'{"a": "caf\xe9"}', r"bad\.json: is not UTF-8 text \(byte 10\)"),
        (b"PK\x03\x04\x90\xff", r"is not UTF-8 text.*unpack"),
        (b'[{"a": 1}, {"a"', r"ends too early"),
        (b'[{"a": "cut in a str', r"ends too early"),
        (b"<!DOCTYPE html><p>", r"is not JSON, it begins with '<!DOCTYPE html>"),
        (b'[{"a": 1},\n {"a" 2}]', r"is not valid JSON .*line 2 column 7.*mend it there"),
        (b"[" * 100_000, r"nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", r"number too long"),
    ],
)
@pytest.mark.parametrize("read", [read_json, read_records])
def test_an_unreadable_file_is_named_in_one_sentence(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_json, read_jsonl, read_records])
def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(FileError, match=r"nowhere\.json: there is no such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(FileError, match="is a folder"):
        read(tmp_path)


def test_a_bad_line_is_named_by_its_number_counting_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    for read in (read_jsonl, read_records):
        with pytest.raises(FileError, match=r"bad\.jsonl, line 3: the JSON ends too early"):
            read(path)


def test_records_of_a_list_and_of_lines_are_the_same_and_are_located(tmp_path: Path) -> None:
    records = [{"a": 1}, {"a": "two"}]
    listed, lines = tmp_path / "list.txt", tmp_path / "lines.json"  # the name must not matter
    listed.write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf-8")
    lines.write_text("\ufeff\n" + "\r\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    assert read_records(listed) == [(f"{listed}, record 0", {"a": 1}), (f"{listed}, record 1", {"a": "two"})]
    assert read_records(lines) == [
        (f"{lines}, record 0 (line 2)", {"a": 1}),
        (f"{lines}, record 1 (line 4)", {"a": "two"}),
    ]


def test_one_object_on_one_line_is_one_record_but_spread_over_lines_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text('{"a": {"b": 1}}\n')
    assert [value for _, value in read_records(path)] == [{"a": {"b": 1}}]
    path.write_text('{\n "a": {\n  "b": 1}}\n')
    with pytest.raises(FileError, match=r"holds one JSON object; expected a list of records"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "holds no records"), ("3", "a single value"), ('"a"', "single")]
)
def test_a_file_without_a_list_of_records_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "none.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        read_records(path)


def test_appended_lines_survive_a_kill_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    assert resume_jsonl(path) == []
    append_jsonl(path, {"a": "one"})
    append_jsonl(path, {"b": "zwei — ü\u2028"})
    whole = path.read_bytes()
    assert resume_jsonl(path) == [{"a": "one"}, {"b": "zwei — ü\u2028"}]
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert resume_jsonl(path) == [{"a": "one"}]
        append_jsonl(path, {"b": "again"})
        assert read_jsonl(path) == [{"a": "one"}, {"b": "again"}]


def test_a_file_of_another_kind_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore")
    with pytest.raises(FileError, match=r"notes\.txt, line 1: is not JSON"):
        resume_jsonl(path)
    assert path.read_text() == "my notes\nmore"


def test_fields_take_what_has_the_right_type_and_range(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"n": 3, "x": 3, "b": true, "s": "a", "l": ["a", "b"], "o": {"n": 1}, "none": null}')
    fields = read_object(path)
    assert (fields.take("n", int, low=3, high=3), fields.take("b", bool), fields.take("s", str)) == (3, True, "a")
    assert isinstance(fields.take("x", float), float)
    assert fields.take_list("l", str) == ["a", "b"]
    assert (fields.take("none", int, 7), fields.take("absent", int, None), fields.take_list("none", int, ())) == (
        7,
        None,
        (),
    )
    assert Fields(fields.take("o", dict), "inner").take("n", int) == 1
    assert fields.taken == {"n", "x", "b", "s", "l", "o", "none", "absent"}


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [
        ("true", int, "'true' should be an integer, not True"),
        ("one", bool, "'one' should be true or false, not 1"),
        ("text", float, "'text' should be a number, not '3'"),
        ("nan", float, "'nan' should be a number, not nan"),
        ("infinite", float, "'infinite' should be a number, not inf"),
        ("huge", float, "'huge' should be a number, not 9999"),
        ("huge", int, "'huge' should be an integer, not 9999"),
        ("list", dict, r"'list' should be an object, not \[\]"),
        ("absent", int, "the key 'absent' is missing"),
    ],
)  # fmt: skip
def test_fields_of_another_type_are_named(tmp_path: Path, key: str, kind: type, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '{"true": true, "one": 1, "text": "3", "nan": NaN, "infinite": 1e999, "list": [], "huge": %s}' % ("9" * 400)
    )
    with pytest.raises(FileError, match=f"a.json: {said}"):
        read_object(path).take(key, kind)


def test_fields_out_of_range_and_entries_of_lists_are_named() -> None:
    fields = Fields({"n": 0, "l": ["a", 1]}, "a.json")
    with pytest.raises(FileError, match=r"a.json: 'n' should be an integer from 1 to 8, not 0"):
        fields.take("n", int, low=1, high=8)
    with pytest.raises(FileError, match=r"a.json: 'l', entry 1 should be text, not 1"):
        fields.take_list("l", str)
    with pytest.raises(FileError, match=r"a.json: should hold a JSON object, not \[\]"):
        Fields([], "a.json")
