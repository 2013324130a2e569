"""Readers of the public files: ESConv, ExTES, ServeForEmo, chat messages and Alpaca, as the records of ``dialogue``.

Every reader takes a JSON list or JSON lines. A record's id is the file's stem and the record's index, counted from 0:
``esconv_test/12``. Turns come as they stand in the file, blank ones and all: ``clean_dialogue`` is the next step. Known
unevenness is mended and counted in ``counts``, if given; anything else raises ``FileError`` with the file, the record,
the field and what was found there. So does a file that cannot be read, is no list or holds no records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from selfevo.dialogue import ESCONV_STRATEGIES, Dialogue, Instruction, Message, Speaker, Turn, strategy_name
from selfevo.files import FileError, StrPath, read_records

__all__ = [
    "EXTES_STRATEGIES",
    "load_alpaca",
    "load_dialogues",
    "load_esconv",
    "load_extes",
    "load_messages",
    "load_serveforemo",
]
EXTES_STRATEGIES: tuple[str, ...] = (
    "Reflective Statements",
    "Clarification",
    "Emotional Validation",
    "Empathetic Statements",
    "Affirmation",
    "Offer Hope",
    "Avoid Judgment and Criticism",
    "Suggest Options",
    "Collaborative Planning",
    "Provide Different Perspectives",
    "Reframe Negative Thoughts",
    "Share Information",
    "Normalize Experiences",
    "Promote Self-Care Practices",
    "Stress Management",
    "Others",
)
_EXTES_BY_FOLDED_NAME = {name.casefold(): name for name in EXTES_STRATEGIES}
# FailedESConv.json says speaker and listener; the JSON lines that ESConv's makers publish elsewhere say usr and sys.
_ESCONV_SPEAKERS: dict[str, Speaker] = {
    "seeker": "seeker",
    "speaker": "seeker",
    "usr": "seeker",
    "supporter": "supporter",
    "listener": "supporter",
    "sys": "supporter",
}
_ROLE_SPEAKERS: dict[str, Speaker] = {"user": "seeker", "assistant": "supporter"}
_STRATEGY_PREFIX = re.compile(r"\[([^\[\]]*)\] ?")
_MISSING: Any = object()


class _Record(NamedTuple):
    where: str  # for messages: "data.json, record 3"
    id: str
    value: Mapping[str, Any]


_Reader = Callable[[_Record, Counter[str]], Dialogue]


def load_esconv(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ESConv: ``{"dialog": [{"speaker", "content", "annotation": {"strategy"}}], "situation", ...}``.

    Also reads FailedESConv (speakers called speaker and listener) and the form with usr and sys, ``text`` and a
    ``strategy`` beside it. Older spellings of the strategies become the eight names.
    Counts ``strategies_renamed``, ``strategies_unknown`` (kept) and ``strategies_missing``.
    """
    return _load(path, counts, _esconv_dialogue)


def load_extes(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ExTES: ``{"scene", "description", "content": [{"User": text} or {"AI Strategy": name, "AI": text}, ...]}``.

    The scene becomes the problem, the description the situation. What is uneven in the full file is mended and counted:
    ``joint_turns_split`` (both sides in one turn: taken in the order of the file), ``strategies_missing`` (no key, or
    null; an empty name is normal), ``strategy_keys_mended`` (another spelling of ``AI Strategy``),
    ``strategies_renamed`` (another case of one of the 16 names), ``strategies_unknown`` (another name, kept),
    ``text_objects_unwrapped`` (an object with ``Response`` and perhaps the strategy in place of the text),
    ``turns_without_speaker_dropped``, ``extra_keys_ignored`` and ``content_keys_mended`` (the list under another key).
    """
    return _load(path, counts, _extes_dialogue)


def load_messages(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """Chat messages: ``{"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}``.

    A system message may stand first. ``[Strategy] `` before an assistant's text becomes the turn's strategy if it is
    one of ESConv's eight or an older spelling of one (``strategies_renamed``); other text in brackets stays text.
    """
    return _load(path, counts, _messages_dialogue)


def load_serveforemo(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """ServeForEmo (SweetieChat, COLING 2025), in ESConv's form or as chat messages.

    Neither the files nor a description of their format could be found publicly, so these two forms are an assumption:
    they are read as by ``load_esconv`` and ``load_messages``, and a file in any other form is refused.
    """
    return _load_sniffing(path, counts, ("ESConv", "messages"))


def load_dialogues(path: StrPath, counts: Counter[str] | None = None) -> list[Dialogue]:
    """A file in any form known here, told apart by the keys of its records: ESConv, ExTES, messages, Alpaca + history.

    All records of a file have one form; Alpaca's ``history`` pairs become the earlier turns. Raises ``FileError`` that
    lists the known forms if no record has one of them.
    """
    return _load_sniffing(path, counts, tuple(_FORMS))


def load_alpaca(path: StrPath, counts: Counter[str] | None = None) -> list[Instruction]:
    """Alpaca: ``{"instruction", "input", "output"}``, optionally ``history`` (pairs) and ``system``; or ``messages``.

    The user's message is the instruction and the input, if any, after a newline. Records without a question or without
    an answer teach nothing and are left out: ``blank_instructions_skipped``, ``blank_outputs_skipped``. Raises
    ``FileError`` also if no record is left, and for messages that do not end with the assistant's.
    """
    counts = Counter() if counts is None else counts
    instructions = []
    for record in _records(path):
        messages = _chat(record, counts)
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            _fail(record, "messages", "a list ending with a user's and an assistant's message", messages[-2:])
        if not messages[-1]["content"].strip():
            counts["blank_outputs_skipped"] += 1
        elif not messages[-2]["content"].strip():
            counts["blank_instructions_skipped"] += 1
        else:
            instructions.append(Instruction(record.id, tuple(messages)))
    if not instructions:
        raise FileError(f"{path}: no record has both an instruction and an output; is this the right file?")
    return instructions


def _load(path: StrPath, counts: Counter[str] | None, read: _Reader) -> list[Dialogue]:
    counts = Counter() if counts is None else counts
    return [read(record, counts) for record in _records(path)]


def _load_sniffing(path: StrPath, counts: Counter[str] | None, forms: Sequence[str]) -> list[Dialogue]:
    counts = Counter() if counts is None else counts
    records = _records(path)
    # The first record with a known form decides, so that one odd record is named by the reader of that form.
    for record in records:
        for form in forms:
            keys, read = _FORMS[form]
            if keys <= record.value.keys():
                return [read(each, counts) for each in records]
    known = "; ".join(f"{form} ({', '.join(sorted(_FORMS[form][0]))})" for form in forms)
    found = ", ".join(records[0].value) or "none"
    raise FileError(f"{path}: its records have no known form, with the keys {found}; the known forms are {known}")


def _records(path: StrPath) -> list[_Record]:
    records = []
    for index, (where, value) in enumerate(read_records(path)):
        if not isinstance(value, dict):
            raise FileError(f"{where}: should be an object, but is {_shown(value)}; mend or remove this record")
        records.append(_Record(where, f"{Path(path).stem}/{index}", value))
    return records


def _esconv_dialogue(record: _Record, counts: Counter[str]) -> Dialogue:
    turns = []
    for index, turn in enumerate(_list(record, "dialog")):
        field = f"dialog[{index}]"
        if not isinstance(turn, dict):
            _fail(record, field, "an object", turn)
        name = turn.get("speaker", _MISSING)
        speaker = _ESCONV_SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
        if speaker is None:
            _fail(record, f"{field}.speaker", "one of " + ", ".join(_ESCONV_SPEAKERS), name)
        key = "text" if "text" in turn and "content" not in turn else "content"
        text = _text(record, f"{field}.{key}", turn.get(key, _MISSING), counts)
        strategies: tuple[str, ...] = ()
        if speaker == "supporter":
            annotation = turn.get("annotation")
            if annotation is not None and not isinstance(annotation, dict):
                _fail(record, f"{field}.annotation", "an object", annotation)
            label = turn["strategy"] if "strategy" in turn else (annotation or {}).get("strategy")
            strategies = _strategies(record, f"{field}.strategy", label, counts, strategy_name)
        turns.append(Turn(speaker, text, strategies))
    return Dialogue(
        id=record.id,
        turns=tuple(turns),
        situation=_note(record, "situation", counts),
        emotion=_note(record, "emotion_type", counts),
        problem=_note(record, "problem_type", counts),
    )


def _extes_dialogue(record: _Record, counts: Counter[str]) -> Dialogue:
    turns: list[Turn] = []
    key = _extes_content_key(record, counts)
    for index, turn in enumerate(_list(record, key)):
        field = f"{key}[{index}]"
        if not isinstance(turn, dict):
            _fail(record, field, "an object", turn)
        turns.extend(_extes_turns(record, field, turn, counts))
    if record.value.keys() - {"scene", "description", key}:
        counts["extra_keys_ignored"] += 1
    return Dialogue(
        id=record.id,
        turns=tuple(turns),
        situation=_note(record, "description", counts),
        problem=_note(record, "scene", counts),
    )


def _extes_content_key(record: _Record, counts: Counter[str]) -> str:
    """Where the turns are: "content", or the only key with a list of turns."""
    if "content" in record.value:
        return "content"
    candidates = [
        key
        for key, value in record.value.items()
        if isinstance(value, list) and any(isinstance(turn, dict) and turn.keys() & {"User", "AI"} for turn in value)
    ]
    if len(candidates) != 1:
        _fail(record, "content", "a list of turns", _MISSING)
    counts["content_keys_mended"] += 1
    return candidates[0]


def _extes_turns(record: _Record, field: str, turn: Mapping[str, Any], counts: Counter[str]) -> list[Turn]:
    """The one turn that it should be; two if both sides are in it, none if neither is."""
    turns = []
    for key, value in turn.items():
        if key not in ("User", "AI"):
            continue
        inner: Mapping[str, Any] = {}
        if isinstance(value, dict):
            inner = value
            counts["text_objects_unwrapped"] += 1
            value = next((value[name] for name in value if name.lower() in ("response", "text", key.lower())), _MISSING)
        text = _text(record, f"{field}.{key}", value, counts)
        if key == "User":
            turns.append(Turn("seeker", text))
        else:
            label = _extes_label(turn, inner, counts)
            strategies = _strategies(record, f"{field}.AI Strategy", label, counts, _extes_strategy)
            turns.append(Turn("supporter", text, strategies))
    if len(turns) == 2:
        counts["joint_turns_split"] += 1
    if not turns:
        counts["turns_without_speaker_dropped"] += 1
    return turns


def _extes_label(turn: Mapping[str, Any], inner: Mapping[str, Any], counts: Counter[str]) -> Any:
    """The strategy beside the text or inside its object, under any spelling of the key; None if there is none."""
    for source in (turn, inner):
        for key, value in source.items():
            if key.strip().lower() in ("ai strategy", "strategy") and value is not None:
                if source is turn and key != "AI Strategy":
                    counts["strategy_keys_mended"] += 1
                return value
    return None


def _extes_strategy(name: str, counts: Counter[str]) -> str:
    known = _EXTES_BY_FOLDED_NAME.get(name.strip().casefold())
    if known is None:
        counts["strategies_unknown"] += 1
        return name
    if known != name:
        counts["strategies_renamed"] += 1
    return known


def _messages_dialogue(record: _Record, counts: Counter[str]) -> Dialogue:
    messages = _chat(record, counts)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    turns = tuple(_message_turn(message, counts) for message in messages)
    return Dialogue(id=record.id, turns=turns, system=system)


def _message_turn(message: Message, counts: Counter[str]) -> Turn:
    speaker, text = _ROLE_SPEAKERS[message["role"]], message["content"]
    prefix = _STRATEGY_PREFIX.match(text) if speaker == "supporter" else None
    if prefix is not None:
        trial: Counter[str] = Counter()
        name = strategy_name(prefix[1], trial)
        if name in ESCONV_STRATEGIES:
            counts.update(trial)
            return Turn(speaker, text[prefix.end() :], (name,))
    return Turn(speaker, text)


def _chat(record: _Record, counts: Counter[str]) -> list[Message]:
    """The messages of a record in messages form or in Alpaca's; a system message only at the start."""
    if "messages" not in record.value:
        return _alpaca_chat(record, counts)
    messages = []
    for index, message in enumerate(_list(record, "messages")):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            _fail(record, field, "an object", message)
        role = message.get("role", _MISSING)
        if role not in ("user", "assistant") and not (role == "system" and index == 0):
            _fail(record, f"{field}.role", "user or assistant (system only at the start)", role)
        text = _text(record, f"{field}.content", message.get("content", _MISSING), counts)
        messages.append({"role": role, "content": text})
    return messages


def _alpaca_chat(record: _Record, counts: Counter[str]) -> list[Message]:
    value = record.value
    messages = []
    if value.get("system"):
        messages.append({"role": "system", "content": _text(record, "system", value["system"], counts)})
    for index, pair in enumerate(_list(record, "history") if value.get("history") is not None else []):
        if not isinstance(pair, list) or len(pair) != 2:
            _fail(record, f"history[{index}]", "a pair of texts", pair)
        for role, text in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": _text(record, f"history[{index}]", text, counts)})
    question = _text(record, "instruction", value.get("instruction", _MISSING), counts)
    if value.get("input"):
        parts = (question, _text(record, "input", value["input"], counts))
        question = "\n".join(part for part in parts if part.strip())
    answer = _text(record, "output", value.get("output", _MISSING), counts)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# What the keys of a record must include, and its reader.
_FORMS: dict[str, tuple[frozenset[str], _Reader]] = {
    "ESConv": (frozenset({"dialog"}), _esconv_dialogue),
    "messages": (frozenset({"messages"}), _messages_dialogue),
    "ExTES": (frozenset({"scene", "content"}), _extes_dialogue),
    "Alpaca with history": (frozenset({"instruction", "output", "history"}), _messages_dialogue),
}


def _list(record: _Record, field: str) -> list[Any]:
    value = record.value.get(field, _MISSING)
    if not isinstance(value, list):
        _fail(record, field, "a list", value)
    return value


def _text(record: _Record, field: str, value: Any, counts: Counter[str]) -> str:
    """The text; half a surrogate pair in it, which no tokenizer takes, becomes a question mark."""
    if not isinstance(value, str):
        _fail(record, field, "text", value)
    text = value.encode(errors="replace").decode()
    if text != value:
        counts["surrogates_replaced"] += 1
    return text


def _note(record: _Record, field: str, counts: Counter[str]) -> str:
    """What the file says about a dialogue. It trains nothing, so a value that is no text is passed over."""
    value = record.value.get(field)
    if isinstance(value, str):
        return value
    if value is not None:
        counts["notes_not_text_ignored"] += 1
    return ""


def _strategies(
    record: _Record, field: str, label: Any, counts: Counter[str], rename: Callable[[str, Counter[str]], str]
) -> tuple[str, ...]:
    if label is None:
        counts["strategies_missing"] += 1
        return ()
    if not isinstance(label, str):
        _fail(record, field, "a name", label)
    return (rename(label, counts),) if label.strip() else ()


def _fail(record: _Record, field: str, expected: str, found: Any) -> NoReturn:
    if found is _MISSING:
        state = "is missing" if "[" in field else f"is missing (the keys are {', '.join(record.value) or 'none'})"
    else:
        state = f"is {_shown(found)}"
    raise FileError(f"{record.where}: {field} should be {expected}, but {state}; mend or remove this record")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
