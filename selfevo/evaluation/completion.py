"""What chat servers send back: an answer or an error, in the forms that are met."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from selfevo.evaluation.ask_json import Answer

# Of a 429: no request can succeed before somebody pays. Other ones pass with time.
_NO_QUOTA = re.compile(
    r"insufficient[_ ](quota|balance|credit|funds)|exceeded_current_quota|billing_(hard_limit|not_active)|PerDay"
    r"|balance (is )?(too low|insufficient)|AccountOverdue|余额不足|欠费",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content[_ ]?(filter|management|policy)|moderation|flagged|data_inspection_failed|prohibited_content|safety",
    re.IGNORECASE,
)
_SENSITIVE = ("sensitive", "safety", "recitation", "prohibited_content", "blocklist")  # finish reasons of a filter
_MARKUP = re.compile(rb"<(!doctype|html)", re.IGNORECASE)


def read_completion(body: bytes) -> Answer:
    """The answer in the body of a response with status 200.

    A content may be a text or a list of parts, of which those that are thoughts are left out. Reasons for none are
    "cut_at_limit", "content_filter", "refusal", "empty", and, from what is no completion: "not_json", "malformed" and
    "error_object", which is ``final``: another request would end likewise.
    """
    value = _loads(body)
    if value is None:
        said = "a web page" if _MARKUP.search(body[:1000]) else _one_line(body.decode(errors="replace"))
        return Answer(None, "not_json", said)
    try:
        (choice, *_) = value["choices"]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (LookupError, TypeError, ValueError, AttributeError):
        error = isinstance(value, dict) and "error" in value
        return Answer(None, "error_object" if error else "malformed", server_words(body), final=error)
    text = content_text(content)
    if text is None:
        return Answer(None, "malformed", server_words(body))
    if isinstance(finish, str) and ("filter" in finish.lower() or finish.lower() in _SENSITIVE):
        return Answer(None, "content_filter", f"finish_reason {finish}")
    if finish == "length":
        return Answer(text, "cut_at_limit") if text else Answer(None, "cut_at_limit", "the limit came before any text")
    if not text.strip():
        if isinstance(refusal, str) and refusal.strip():
            return Answer(None, "refusal", _one_line(refusal))
        return Answer(None, "empty", f"finish_reason {_one_line(str(finish))}")
    return Answer(text)


def content_text(content: Any) -> str | None:
    """The text of a message's content, "" for null, None for what is no content."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in ("text", "output_text", None):
            part = part.get("text")
            part = part.get("value") if isinstance(part, Mapping) else part
        elif isinstance(part, Mapping):
            continue  # a thought, an image
        if not isinstance(part, str):
            return None
        texts.append(part)
    return "".join(texts)


def server_words(body: bytes) -> str:
    """What a server says in an error, in one line; "" for nothing."""
    value = _loads(body)
    if isinstance(value, list) and len(value) == 1:  # as Gemini puts it
        value = value[0]
    if value is None:
        return "a web page" if _MARKUP.search(body[:1000]) else _one_line(body.decode(errors="replace"))
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        # Codes tell more than the message, which may be in any language; a number repeats the status.
        codes = [str(error[name]) for name in ("code", "type", "status") if isinstance(error.get(name), str)]
        words = next((error[n] for n in ("message", "msg", "detail") if isinstance(error.get(n), str)), None)
        raw = error["metadata"].get("raw") if isinstance(error.get("metadata"), dict) else None  # of OpenRouter
        parts = [words or json.dumps(error), *([raw] if isinstance(raw, str) else [])]
        return _one_line(": ".join([*codes[:1], *parts]))
    return _one_line(error if isinstance(error, str) else json.dumps(error))


def real_status(status: int, body: bytes) -> int:
    """The status of a response: that of the error in it where it comes as a success (OpenRouter)."""
    if status == 200 and b'"error"' in body and b'"choices"' not in body:
        value = _loads(body)
        error = value.get("error") if isinstance(value, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        code = int(code) if isinstance(code, str) and code.isdecimal() and len(code) == 3 else code
        if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
            return code
    return status


def out_of_quota(body: bytes) -> bool:
    """Whether a refusal for too many requests is one for lack of money."""
    value = _loads(body)
    text = body.decode(errors="replace") if value is None else json.dumps(value, ensure_ascii=False)
    return _NO_QUOTA.search(text) is not None


def is_filtered(status: int, said: str) -> bool:
    """Whether a refusal is for what a conversation is about."""
    return status in (400, 403, 422) and _FILTERED.search(said) is not None


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def _loads(body: bytes) -> Any:
    """The JSON value of a body, None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
