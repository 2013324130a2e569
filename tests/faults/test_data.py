"""Data files in every form: read rightly however they are laid out, or refused by file, record and field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest

from selfevo.datasets import load_alpaca, load_dialogues
from selfevo.dialogue import Dialogue

KIND = "data"
Place = tuple[str | int, ...]


def esconv(number: int) -> dict[str, Any]:
    return {
        "dialog": [
            {"speaker": "seeker", "annotation": {}, "content": f"I feel {number}."},
            {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": f"Why {number}?"},
        ],
        "situation": "s",
    }


def extes(number: int) -> dict[str, Any]:
    turns = [{"User": f"I feel {number}."}, {"AI Strategy": "Others", "AI": f"Why {number}?"}]
    return {"scene": "s", "description": "d", "content": turns}


def messages(number: int) -> dict[str, Any]:
    said = [{"role": "user", "content": f"I feel {number}."}, {"role": "assistant", "content": f"Why {number}?"}]
    return {"messages": said}


def sharegpt(number: int) -> dict[str, Any]:
    said = [{"from": "human", "value": f"I feel {number}."}, {"from": "gpt", "value": f"Why {number}?"}]
    return {"conversations": said, "system": ""}


def history(number: int) -> dict[str, Any]:
    return alpaca(number) | {"history": [[f"I feel {number}.", f"Why {number}?"]]}


def alpaca(number: int) -> dict[str, Any]:
    return {"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."}


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ESConv": esconv, "ServeForEmo": esconv, "ExTES": extes, "messages": messages, "ShareGPT": sharegpt,
    "Alpaca with history": history, "Alpaca": alpaca,
}  # fmt: skip
TEXTS = {"empty text": "", "text": "x", "path": "../../x", "newline": "a\nb", "surrogate": "?", "number as text": "3"}
# Places in a record, how messages name each, and the values of faulty.WRONG_VALUES that are right there.
SPOKEN, NOT_TEXT = tuple(TEXTS), tuple(set(faulty.WRONG_VALUES) - {"too long", "deep"})
PLACES: dict[str, list[tuple[Place, str, tuple[str, ...]]]] = {
    "ESConv": [
        (("dialog",), "dialog", ("list",)),
        (("dialog", 1), "dialog[1]", ()),
        (("dialog", 1, "speaker"), "dialog[1].speaker", ()),
        (("dialog", 1, "content"), "dialog[1].content", SPOKEN),
        (("dialog", 1, "annotation"), "dialog[1].annotation", ("null", "object", "nested object")),
        (("dialog", 1, "annotation", "strategy"), "dialog[1].strategy", ("null", "list", *SPOKEN)),
        (("situation",), "", NOT_TEXT),
    ],
    "ExTES": [
        (("content",), "content", ("list", "list of objects")),
        (("content", 1), "content[1]", ("object", "nested object")),  # a turn without a speaker is dropped
        (("content", 1, "AI"), "content[1].AI", SPOKEN),
        (("content", 1, "AI Strategy"), "content[1].AI Strategy", ("null", "list", *SPOKEN)),
        (("description",), "", NOT_TEXT),
    ],
    "messages": [
        (("messages",), "messages", ("list",)),
        (("messages", 1), "messages[1]", ()),
        (("messages", 1, "role"), "messages[1].role", ()),
        (("messages", 1, "content"), "messages[1].content", SPOKEN),
    ],
    "ShareGPT": [
        (("conversations",), "conversations", ("list",)),
        (("conversations", 1), "conversations[1]", ()),
        (("conversations", 1, "from"), "conversations[1].from", ()),
        (("conversations", 1, "value"), "conversations[1].value", SPOKEN),
        (("system",), "system", ("null", "false", "zero", "list", "object", *SPOKEN)),
    ],
    "Alpaca with history": [
        (("history",), "history", ("null", "list")),
        (("history", 0), "history[0]", ()),
        (("history", 0, 1), "history[0]", SPOKEN),
    ],
    "Alpaca": [
        (("instruction",), "instruction", SPOKEN),
        (("input",), "input", ("null", "false", "zero", "list", "object", *SPOKEN)),
        (("output",), "output", SPOKEN),
    ],
}
LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "a list": lambda records: json.dumps(records),
    "an indented list": lambda records: json.dumps(records, indent=2),
    "lines": lambda records: "\n".join(map(json.dumps, records)),
    "lines with a BOM between": lambda records: "\n".join("\ufeff" + json.dumps(record) for record in records) + "\n\n",
    "lines that end as on Windows": lambda records: "\r\n".join(map(json.dumps, records)) + "\r\n",
    "indented objects in a row": lambda records: "\n".join(json.dumps(record, indent=2) for record in records),
    "objects in a row": lambda records: "".join(map(json.dumps, records)),
    "texts": lambda records: json.dumps([{"text": json.dumps(record)} for record in records]),
    "lines of texts": lambda records: "\n".join(json.dumps({"text": json.dumps(record)}) for record in records),
    "texts between objects": lambda records: json.dumps(
        [{"text": json.dumps(record)} if index % 2 else record for index, record in enumerate(records)]
    ),
    "NaN beside": lambda records: json.dumps([record | {"rating": float("nan")} for record in records]),
}


def read(form: str, path: Path) -> list[Any]:
    return load_alpaca(path) if form == "Alpaca" else load_dialogues(path)


def said(found: list[Any]) -> list[list[str]]:
    """The texts of each record."""
    return [
        [turn.text for turn in record.turns] if isinstance(record, Dialogue)
        else [message["content"] for message in record.messages]
        for record in found
    ]  # fmt: skip


def clean(found: list[Any]) -> bool:
    """All that is read can be written as UTF-8."""
    notes = [
        note
        for record in found
        if isinstance(record, Dialogue)
        for note in (
            record.system, record.situation, record.emotion, record.problem,
            *(strategy for turn in record.turns for strategy in turn.strategies),
        )
    ]  # fmt: skip
    return all(text.encode() is not None for text in (*notes, *(text for texts in said(found) for text in texts)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_in_every_layout(form: str, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(LAYOUTS[layout]([FORMS[form](number) for number in range(3)]), encoding="utf-8")
    texts = [list(filter(None, _texts(FORMS[form](number)))) for number in range(3)]
    faulty.assert_one_sentence(lambda: read(form, path), kind=KIND, check=lambda found: said(found) == texts)


def _texts(record: dict[str, Any]) -> list[str]:
    if "instruction" in record:
        pairs = [text for pair in record.get("history", []) for text in pair]
        return [*pairs, record["instruction"], record["output"]]
    turns = next(record[key] for key in ("dialog", "messages", "conversations", "content") if key in record)
    return [next(turn[key] for key in ("User", "AI", "value", "content") if key in turn) for turn in turns]


@pytest.mark.parametrize("damage", faulty.BROKEN)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_none(form: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([FORMS[form](number) for number in range(3)]))
    faulty.BROKEN[damage](path)
    faulty.assert_one_sentence(lambda: read(form, path), str(path), kind=KIND)


@pytest.mark.parametrize(("form", "index"), [(form, index) for form in PLACES for index in range(len(PLACES[form]))])
def test_every_field_is_checked(form: str, index: int, tmp_path: Path) -> None:
    """In a list, in lines and as JSON in a text."""
    path = tmp_path / "data.json"
    place, field, right = PLACES[form][index]
    for name, text in faulty.WRONG_VALUES.items():
        records: list[Any] = [FORMS[form](number) for number in range(3)]
        holder = records[1]
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = "\ufdd0"
        lines = [json.dumps(record).replace('"\\ufdd0"', text) for record in records]
        texts = ["[" + ", ".join(lines) + "]", "\n".join(lines), json.dumps([{"text": line} for line in lines])]
        for layout, content in zip(("list", "lines", "texts"), texts):
            path.write_text(content)
            unread = name in ("too long", "deep")  # by json itself
            mentions = [str(path)] if unread and layout == "list" else [str(path), "1" if unread else "record 1"]
            mentions += [field] if not unread else []
            if name in right or (name == "NaN" and "null" in right):
                faulty.assert_one_sentence(lambda: read(form, path), kind=KIND, check=clean)
            else:
                faulty.assert_one_sentence(lambda: read(form, path), *mentions, kind=KIND)


@pytest.mark.parametrize(("name", "text"), TEXTS.items())
@pytest.mark.parametrize(("form", "index"), [("ESConv", 3), ("ExTES", 2), ("messages", 3), ("ShareGPT", 3)])
def test_an_odd_text_is_kept_as_it_is(form: str, index: int, name: str, text: str, tmp_path: Path) -> None:
    """But for half a surrogate pair, which no tokenizer takes."""
    path = tmp_path / "data.json"
    record = FORMS[form](0)
    holder = record
    for key in PLACES[form][index][0][:-1]:
        holder = holder[key]  # type: ignore[index]
    holder[PLACES[form][index][0][-1]] = "\ufdd0"  # type: ignore[index]
    path.write_text(json.dumps([record]).replace('"\\ufdd0"', faulty.WRONG_VALUES[name]))
    faulty.assert_one_sentence(
        lambda: said(read(form, path)), kind=KIND, check=lambda found: found == [["I feel 0.", text]]
    )


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_not_mixed(form: str, tmp_path: Path) -> None:
    """A record of another form is named; Alpaca's reader takes messages too, as does that of histories."""
    path = tmp_path / "data.json"
    for other in FORMS:
        alike = {form, other} <= {"ESConv", "ServeForEmo"} or {form, other} <= {"messages", "ShareGPT"} or form == other
        taken = {"messages", "ShareGPT", "Alpaca with history", "Alpaca"}
        alike = alike or (form in taken and other in taken)
        path.write_text(json.dumps([FORMS[form](0), FORMS[other](1)]))
        check = (lambda found: len(found) == 2) if alike else None
        mentions = () if alike else (str(path), "record 1")
        faulty.assert_one_sentence(lambda: read(form, path), *mentions, kind=KIND, check=check)


def test_mutations(tmp_path: Path) -> None:
    """Whatever is read is text, of the speakers that there are."""
    path = tmp_path / "data.json"
    for rng in faulty.rounds(8, 300):
        form = rng.choice(list(FORMS))
        records = copy.deepcopy([FORMS[form](number) for number in range(3)])
        text = faulty.mutate_json(records, rng)
        if rng.random() < 0.3:
            text = text.replace("}, {", "}\n{")
        path.write_text(text)
        faulty.assert_one_sentence(lambda: read(form, path), str(path), kind=KIND, check=clean)  # noqa: B023
