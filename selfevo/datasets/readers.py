"""Readers of public files: ESConv, ExTES, ServeForEmo, chat messages (ShareGPT's too) and Alpaca.

Every reader takes a JSON list or JSON lines, also with each record as JSON in a text: ``{"text": "{...}"}``. The id of
a record is the file's stem, or a ``name`` that is given for it, and the index of the record, from 0:
``esconv_test/12``. Turns are returned as the file has them, blank ones included: ``clean_dialogue`` is the next step.
Known irregularities are repaired and counted in ``counts``, if given. Everything else raises ``FileError`` with the
file, the record, the field and the value found: also a file that cannot be read, is not a list or has no records.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from selfevo.dialogue import (
    STRATEGY_BY_FOLDED_NAME,
    Dialogue,
    Instruction,
    Message,
    Speaker,
    Turn,
    clean_dialogue,
    strategy_name,
    to_messages,
)
from selfevo.files import FileError, StrPath, read_records

EXTES_STRATEGIES: tuple[str, ...] = (
    "Reflective Statements", "Clarification", "Emotional Validation", "Empathetic Statements", "Affirmation",
    "Offer Hope", "Avoid Judgment and Criticism", "Suggest Options", "Collaborative Planning",
    "Provide Different Perspectives", "Reframe Negative Thoughts", "Share Information", "Normalize Experiences",
    "Promote Self-Care Practices", "Stress Management", "Others",
)  # fmt: skip
_EXTES_BY_FOLDED_NAME = {name.casefold(): name for name in EXTES_STRATEGIES}
# FailedESConv.json has speaker and listener; the JSON lines that ESConv's authors publish elsewhere have usr and sys.
_ESCONV_SPEAKERS: dict[str, Speaker] = {
    "seeker": "seeker", "speaker": "seeker", "usr": "seeker",
    "supporter": "supporter", "listener": "supporter", "sys": "supporter",
}  # fmt: skip
# A label before a text, and what people put after the last one: "[Question] ", "[Question]: ", "**[Question]** - ".
_LABEL = re.compile(r"\s*\**\[([^\[\]\n]{0,200})\]\**")
_AFTER_LABELS = re.compile(r"(?:[:：](?![()])|\s+[:：](?=\s)|\s*[-–—](?=\s))[^\S\n]*| ?")
_BETWEEN_LABELS = re.compile(r"\s*[,;/|+&]\s*")
# Speakers of chat messages by what messages, ShareGPT and their kin call them.
_ROLES = {
    "user": "user", "human": "user", "seeker": "user", "usr": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "supporter": "assistant", "system": "system",
}  # fmt: skip
_CHATS = ("messages", "conversations", "conversation")  # the keys of a record's list of messages
_MISSING: Any = object()


def load_esconv(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ESConv: ``{"dialog": [{"speaker", "content", "annotation": {"strategy"}}], "situation", ...}``.

    Also reads FailedESConv (speakers called speaker and listener) and the form with usr and sys, ``text`` in place of
    ``content``, and ``strategy`` beside it. Older strategy names become the eight of today. Counts
    ``strategies_renamed``, ``strategies_unknown`` (kept) and ``strategies_missing``.
    """
    return [_esconv_dialogue(record) for record in _records(path, counts)]


def load_extes(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ExTES: ``{"scene", "description", "content": [{"User": text} or {"AI Strategy": name, "AI": text}, ...]}``.

    The scene becomes the problem, the description the situation. Irregularities of the full file, each counted:
    ``joint_turns_split`` (both speakers in one turn: the order of the file is kept), ``strategies_missing`` (no key, or
    null; an empty name is regular), ``strategy_keys_mended`` (another spelling of ``AI Strategy``),
    ``strategies_renamed`` (another case of one of the 16 names), ``strategies_unknown`` (another name, kept),
    ``text_objects_unwrapped`` (an object with ``Response`` and perhaps the strategy in place of the text),
    ``turns_without_speaker_dropped``, ``extra_keys_ignored`` and ``content_keys_mended`` (the list under another key),
    ``speaker_keys_mended`` (``user``, ``ai``). Raises ``FileError`` also where most turns have no speaker.
    """
    return _read_all(path, _records(path, counts), _extes_dialogue)


def load_messages(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """Chat messages: ``{"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}``.

    Or as ShareGPT has them: ``{"conversations": [{"from": "system" | "human" | "gpt", "value": text}, ...]}``, perhaps
    with the system message under ``system``. Only the first message may be a system message. ``[Strategy] `` before an
    assistant's text becomes its strategy if it names one of ESConv's eight (an older name is counted in
    ``strategies_renamed``); so do several, and those with a colon after them (``strategy_labels_mended``). Other
    brackets stay text.
    """
    return [_messages_dialogue(record) for record in _records(path, counts)]


def load_serveforemo(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ServeForEmo (SweetieChat, COLING 2025), in ESConv's form or as chat messages.

    Neither the files nor a description of their format could be found in public, so these two forms are an assumption.
    They are read as by ``load_esconv`` and ``load_messages``; a file in another form is refused.
    """
    return _load_any_form(path, counts, {form: _FORMS[form] for form in ("ESConv", "messages", "ShareGPT")})


def load_dialogues(path: StrPath, counts: Counter[str] | None = None, *, name: str = "") -> list[Dialogue]:
    """A file in any known form: ESConv, ExTES, messages, or Alpaca with ``history``, whose pairs are the earlier turns.

    The form follows from the keys of the records; all records of a file have the same form. Raises ``FileError`` with
    the known forms if no record has one of them.
    """
    return _load_any_form(path, counts, _FORMS, name)


def load_alpaca(path: StrPath, counts: Counter[str] | None = None, *, name: str = "") -> list[Instruction]:
    """Alpaca: ``{"instruction", "input", "output"}``, optionally ``history`` (pairs) and ``system``; or ``messages``.

    The user's message is the instruction and, after a newline, the input, if there is one. Records with a blank
    question or answer are skipped: ``blank_instructions_skipped``, ``blank_outputs_skipped``. Earlier messages that do
    not alternate, or are blank, are cleaned as dialogues are, since chat formats refuse them: ``histories_cleaned``.
    Raises ``FileError`` also if no record is left, and for messages that do not end with a user's and an assistant's.
    """
    instructions = []
    for record in _records(path, counts, name):
        messages = _chat(record)
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            record.fail("messages", "a list ending with a user's and an assistant's message", messages[-2:])
        if not messages[-1]["content"].strip():
            record.counts["blank_outputs_skipped"] += 1
        elif not messages[-2]["content"].strip():
            record.counts["blank_instructions_skipped"] += 1
        else:
            instructions.append(Instruction(record.id, tuple(_alternating(record, messages))))
    if not instructions:
        raise FileError(f"{path}: no record has both an instruction and an output; is this the right file?")
    return instructions


@dataclass(frozen=True)
class _Record:
    """One record of a file; its methods check fields and raise ``FileError`` for a value that does not fit."""

    where: str  # for messages: "data.json, record 3"
    id: str
    value: Mapping[str, Any]
    counts: Counter[str]

    def fail(self, field: str, expected: str, found: Any) -> NoReturn:
        state = f"is {_shortened(found)}"
        if found is _MISSING:
            keys = _shortened_keys(self.value)
            state = "is missing" if "[" in field else f"is missing (the keys are {keys})"
        raise FileError(f"{self.where}: {field} should be {expected}, but {state}; mend or remove this record")

    def entries(self, key: str) -> list[tuple[str, Any]]:
        """The entries of a list, each with its name for messages: ``content[3]``."""
        value = self.value.get(key, _MISSING)
        if not isinstance(value, list):
            self.fail(key, "a list", value)
        return [(f"{key}[{index}]", entry) for index, entry in enumerate(value)]

    def objects(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for field, value in self.entries(key):
            if not isinstance(value, dict):
                self.fail(field, "an object", value)
            yield field, value

    def text(self, field: str, value: Any) -> str:
        """The text; a lone surrogate in it, which no tokenizer takes, becomes a question mark."""
        if not isinstance(value, str):
            self.fail(field, "text", value)
        text = value.encode(errors="replace").decode()
        if text != value:
            self.counts["surrogates_replaced"] += 1
        return text

    def note(self, key: str) -> str:
        """A field that nothing is trained on, so a value that is not text is ignored."""
        value = self.value.get(key)
        if value is not None and not isinstance(value, str):
            self.counts["notes_not_text_ignored"] += 1
        return self.text(key, value) if isinstance(value, str) else ""

    def strategies(self, field: str, label: Any, by_folded_name: Mapping[str, str]) -> tuple[str, ...]:
        if label is None:
            self.counts["strategies_missing"] += 1
            return ()
        labels = label if isinstance(label, list) else [label]
        names: dict[str, None] = {}
        for each in labels:
            if not isinstance(each, str):
                self.fail(field, "a name", label)
            each = self.text(field, each)
            found = [name for name in _known_names(each, by_folded_name) or [each] if name.strip()]
            if found not in ([each], []):
                self.counts["strategy_labels_mended"] += 1
            names |= {strategy_name(name, self.counts, by_folded_name): None for name in found}
        return tuple(names)


_Forms = dict[str, tuple[set[str], Callable[[_Record], Dialogue]]]


def _records(path: StrPath, counts: Counter[str] | None, name: str = "") -> list[_Record]:
    counts = Counter() if counts is None else counts
    records = []
    for index, (where, value) in enumerate(read_records(path)):
        value = _unwrapped(where, value)
        if not isinstance(value, dict):
            raise FileError(f"{where}: should be an object, but is {_shortened(value)}; mend or remove this record")
        records.append(_Record(where, f"{name or Path(path).stem}/{index}", value, counts))
    return records


def _unwrapped(where: str, value: Any) -> Any:
    """The record inside ``{"text": "{...}"}``, the form of ESConv's copy on the hub; others as they are."""
    if not isinstance(value, dict) or value.keys() != {"text"}:
        return value
    text = value["text"]
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return value
    try:
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: text should be the JSON of one record, but is {_shortened(text)}") from error


def _load_any_form(path: StrPath, counts: Counter[str] | None, forms: _Forms, name: str = "") -> list[Dialogue]:
    records = _records(path, counts, name)
    # The first record with a known form decides, so that one bad record is named by the reader of that form.
    for record in records:
        for keys, read in forms.values():
            if keys <= record.value.keys():
                return _read_all(path, records, read)
    known = "; ".join(f"{form} ({', '.join(sorted(keys))})" for form, (keys, _) in forms.items())
    found = _shortened_keys(records[0].value)
    raise FileError(f"{path}: its records have no known form, with the keys {found}; the known forms are {known}")


def _read_all(path: StrPath, records: list[_Record], read: Callable[[_Record], Dialogue]) -> list[Dialogue]:
    dialogues = [read(record) for record in records]
    dropped = records[0].counts["turns_without_speaker_dropped"] if records else 0
    if dropped > sum(len(dialogue.turns) for dialogue in dialogues):
        raise FileError(f"{path}: {dropped} turns have neither User nor AI; is this the right file?")
    return dialogues


def _esconv_dialogue(record: _Record) -> Dialogue:
    turns = []
    for field, turn in record.objects("dialog"):
        name = turn.get("speaker", _MISSING)
        speaker = _ESCONV_SPEAKERS.get(str(name).strip().lower())
        if speaker is None:
            record.fail(f"{field}.speaker", "one of " + ", ".join(_ESCONV_SPEAKERS), name)
        key = "text" if "text" in turn and "content" not in turn else "content"
        text = record.text(f"{field}.{key}", turn.get(key, _MISSING))
        strategies: tuple[str, ...] = ()
        if speaker == "supporter":
            annotation = {} if turn.get("annotation") is None else turn["annotation"]
            if not isinstance(annotation, dict):
                record.fail(f"{field}.annotation", "an object", annotation)
            label = turn.get("strategy", annotation.get("strategy"))
            strategies = record.strategies(f"{field}.strategy", label, STRATEGY_BY_FOLDED_NAME)
        turns.append(Turn(speaker, text, strategies))
    situation, emotion, problem = map(record.note, ("situation", "emotion_type", "problem_type"))
    return Dialogue(record.id, tuple(turns), situation=situation, emotion=emotion, problem=problem)


def _extes_dialogue(record: _Record) -> Dialogue:
    key = "content"
    if key not in record.value:  # the turns may be under another key: the only one with a list of them
        lists = [(name, value) for name, value in record.value.items() if isinstance(value, list)]
        found = [
            name
            for name, value in lists
            if any(_extes_speaker(key) for turn in value if isinstance(turn, dict) for key in turn)
        ]
        if len(found) != 1:
            record.fail("content", "a list of turns", _MISSING)
        key = found[0]
        record.counts["content_keys_mended"] += 1
    turns = [turn for field, value in record.objects(key) for turn in _extes_turns(record, field, value)]
    if record.value.keys() - {"scene", "description", key}:
        record.counts["extra_keys_ignored"] += 1
    return Dialogue(record.id, tuple(turns), situation=record.note("description"), problem=record.note("scene"))


def _extes_speaker(key: str) -> str | None:
    """``User`` or ``AI``, however the key is spelt; None for another key."""
    return {"user": "User", "ai": "AI"}.get(key.strip().casefold())


def _extes_turns(record: _Record, field: str, turn: Mapping[str, Any]) -> list[Turn]:
    """Usually one turn; two if both speakers are in the object, none if neither is."""
    turns = []
    for spelt, value in turn.items():
        key = _extes_speaker(spelt)
        if key is None:
            continue
        if key != spelt:
            record.counts["speaker_keys_mended"] += 1
        inner: Mapping[str, Any] = {}
        if isinstance(value, dict):
            inner = value
            record.counts["text_objects_unwrapped"] += 1
            value = next((inner[name] for name in inner if name.lower() in ("response", "text", key.lower())), _MISSING)
        text = record.text(f"{field}.{key}", value)
        if key == "User":
            turns.append(Turn("seeker", text))
        else:
            label = _extes_label(record, turn, inner)
            strategies = record.strategies(f"{field}.AI Strategy", label, _EXTES_BY_FOLDED_NAME)
            turns.append(Turn("supporter", text, strategies))
    if len(turns) == 2:
        record.counts["joint_turns_split"] += 1
    if not turns:
        record.counts["turns_without_speaker_dropped"] += 1
    return turns


def _extes_label(record: _Record, turn: Mapping[str, Any], inner: Mapping[str, Any]) -> Any:
    """The strategy beside the text or inside its object, under any spelling of the key; None if there is none."""
    for source in (turn, inner):
        for key, value in source.items():
            if key.strip().lower() in ("ai strategy", "strategy") and value is not None:
                if source is turn and key != "AI Strategy":
                    record.counts["strategy_keys_mended"] += 1
                return value
    return None


def _messages_dialogue(record: _Record) -> Dialogue:
    messages = _chat(record)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    return Dialogue(record.id, tuple(_message_turn(record, message) for message in messages), system=system)


def _message_turn(record: _Record, message: Message) -> Turn:
    text = message["content"]
    if message["role"] == "user":
        return Turn("seeker", text)
    names: list[str] = []
    end = 0
    while label := _LABEL.match(text, end):
        found = _known_names(label[1], STRATEGY_BY_FOLDED_NAME)
        if not found:
            break
        names += found
        end = label.end()
    if not names:
        return Turn("supporter", text)
    after = _AFTER_LABELS.match(text, end)
    assert after is not None  # it matches the empty text, too
    if after[0] not in ("", " ") or len(names) > 1 or not text.startswith("["):
        record.counts["strategy_labels_mended"] += 1
    strategies = dict.fromkeys(strategy_name(name, record.counts) for name in names)
    return Turn("supporter", text[after.end() :], tuple(strategies))


def _known_names(label: str, by_folded_name: Mapping[str, str]) -> list[str]:
    """The names in a label, usually one: "Question, Information"; none if any of them is unknown."""
    names = [label] if label.strip().casefold() in by_folded_name else _BETWEEN_LABELS.split(label.strip(" []*:."))
    return names if all(name.strip().casefold() in by_folded_name for name in names) else []


def _chat(record: _Record) -> list[Message]:
    """The messages of a record in messages form, ShareGPT's or Alpaca's; only the first may be a system message."""
    key = next((name for name in _CHATS if name in record.value), None)
    if key is None:
        return _alpaca_chat(record)
    messages: list[Message] = []
    if record.value.get("system"):
        messages.append({"role": "system", "content": record.text("system", record.value["system"])})
    for field, message in record.objects(key):
        speaker, text = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
        text = "value" if text not in message and "value" in message else text
        found = message.get(speaker, _MISSING)
        role = _ROLES.get(found.strip().casefold()) if isinstance(found, str) else None
        if role is None or (role == "system" and messages):
            record.fail(f"{field}.{speaker}", "user or assistant (system only at the start)", found)
        messages.append({"role": role, "content": record.text(f"{field}.{text}", message.get(text, _MISSING))})
    return messages


def _alternating(record: _Record, messages: list[Message]) -> list[Message]:
    """Messages that every chat format can write: as they are where they alternate, else as dialogues are cleaned."""
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in spoken]
    if roles == ["user", "assistant"] * (len(roles) // 2) and all(message["content"].strip() for message in spoken):
        return messages
    record.counts["histories_cleaned"] += 1
    speakers: dict[str, Speaker] = {"user": "seeker", "assistant": "supporter"}
    turns = tuple(Turn(speakers[message["role"]], message["content"]) for message in spoken)
    system = messages[0]["content"] if spoken is not messages else ""
    return to_messages(clean_dialogue(Dialogue(record.id, turns), Counter()).turns, system)


def _alpaca_chat(record: _Record) -> list[Message]:
    messages = []
    if record.value.get("system"):
        messages.append({"role": "system", "content": record.text("system", record.value["system"])})
    for field, pair in record.entries("history") if record.value.get("history") is not None else []:
        if not isinstance(pair, list) or len(pair) != 2:
            record.fail(field, "a pair of texts", pair)
        question, answer = (record.text(field, text) for text in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = record.text("instruction", record.value.get("instruction", _MISSING))
    if record.value.get("input"):
        parts = (question, record.text("input", record.value["input"]))
        question = "\n".join(part for part in parts if part.strip())
    answer = record.text("output", record.value.get("output", _MISSING))
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# The keys by which a form is recognised, and its reader.
_FORMS: _Forms = {
    "ESConv": ({"dialog"}, _esconv_dialogue),
    "messages": ({"messages"}, _messages_dialogue),
    "ShareGPT": ({"conversations"}, _messages_dialogue),
    "conversation": ({"conversation"}, _messages_dialogue),
    "ExTES": ({"scene", "content"}, _extes_dialogue),
    "Alpaca with history": ({"instruction", "output", "history"}, _messages_dialogue),
}


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _shortened_keys(value: Mapping[str, Any]) -> str:
    return _shortened_text(", ".join(value)) or "none"


def _shortened_text(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
