"""What a server may answer, and what a model may write: bounded, counted or refused in one sentence."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import decoupled
import faulty
import pytest
from chat_server import Server, completion, cut_off, example, hang_up, raw, server

from selfevo.evaluation.ask_json import Answer, ask_json
from selfevo.evaluation.endpoint import EndpointError, read_parameters
from selfevo.evaluation.judge import Aspect, judge_replies
from selfevo.evolve.json_repair import json_object_end, salvage_json
from selfevo.evolve.reflection import REFINED, parse_reflection

__all__ = ["server"]
QUESTION = [{"role": "user", "content": "hello"}]
KEY = "sk-proj-Abc123-def456"
GOOD = json.loads(completion("fine"))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)


class Checker:
    """One endpoint for many cases, each a conversation of its own."""

    def __init__(self, server: Server, cache: Path) -> None:
        self.server, self.cache = server, cache
        self.endpoint = server.endpoint(cache, tries=2, timeout=2, concurrency=10**6)

    def check(self, behaviour: Any, kind: str) -> None:
        """One answer, or a failure with a reason, or one sentence; never the key, never more requests than tries."""
        before = len(self.server.requests)
        self.server.script = [behaviour]
        conversation = [{"role": "user", "content": f"question {before}"}]

        def right(answers: list[Answer]) -> None:
            (answer,) = answers
            assert answer.text is None or isinstance(answer.text, str)
            assert answer.text or answer.error
            assert KEY not in repr(answer)
            for remark in self.endpoint.remarks():
                faulty.check_sentence(remark, "judge-1: ")
                assert KEY not in remark

        sentence = faulty.assert_one_sentence(lambda: self.endpoint.answer([conversation]), kind=kind, check=right)
        assert KEY not in sentence
        assert len(self.server.requests) <= before + 3
        assert not self.cache.exists() or KEY not in self.cache.read_text()


@pytest.fixture
def checker(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checker:
    monkeypatch.setattr("selfevo.evaluation.endpoint.ThreadPoolExecutor", lambda count: ThreadPoolExecutor(1))
    monkeypatch.setenv("SELFEVO_API_KEY", KEY)
    return Checker(server, tmp_path / "answers.jsonl")


BODIES: dict[str, bytes] = {
    "empty": b"", "blank": b" \n", "null": b"null", "number": b"3", "text": b'"no"', "list": b"[]", "object": b"{}",
    "zeros": bytes(300), "binary": bytes(range(256)), "not UTF-8": b'{"error": "\xff\xfe"}',
    "UTF-16": '{"error": "no"}'.encode("utf-16"),
    "half": completion("fine")[:40], "twice": completion("fine") * 2, "deep": b'{"error":' * 50_000,
    "HTML": b"<html>busy</html>",
    "long number": b'{"error": {"code": ' + b"9" * 5000 + b"}}",
    "key": json.dumps({"error": {"message": KEY}}).encode(),
    "newlines": b'{"error": {"message": "a\\nb\\u001b[31m"}}',
    "long": b'{"error": {"message": "' + b"x" * 10**6 + b'"}}',
}  # fmt: skip


def test_any_body_with_any_status_is_one_answer_or_one_sentence(checker: Checker) -> None:
    for status in (200, 206, 300, 400, 401, 404, 429, 500, 599):
        for body in BODIES.values():
            checker.check(raw(body, status), "responses")
    for status in (204, 304):
        checker.check(raw(b"", status), "responses")


def test_a_completion_with_anything_anywhere_is_one_answer_or_one_sentence(checker: Checker) -> None:
    for rng in faulty.rounds(18, 100):
        checker.check(raw(faulty.mutate_json(GOOD, rng).encode()), "completions")


ERRORS: list[Any] = [
    {"message": "no", "type": "x", "param": None, "code": None}, {"message": None}, {"message": ["a"]},
    {"code": 500}, {"code": "500"}, {"code": 10**30}, {"code": -1}, {"metadata": {"raw": "upstream"}},
    {"metadata": 3, "message": "x"}, [], "", 3, None, True, {},
]  # fmt: skip


def test_an_error_of_any_form_is_one_answer_or_one_sentence(checker: Checker) -> None:
    for status in (200, 400, 429):
        for error in ERRORS:
            checker.check(raw(json.dumps({"error": error}).encode(), status), "errors")


HEADERS: list[dict[str, str]] = [
    {"Retry-After": "inf"}, {"Retry-After": "-1"}, {"X-Should-Retry": "true"},
    {"Content-Type": "text/plain; charset=x"}, {"Content-Encoding": "br"},
    {"Content-Type": "application/json; charset=utf-32"}, {"Content-Encoding": "gzip"},
    {"Content-Encoding": "gzip, gzip"},
    {"Location": "http://127.0.0.1:1/"}, {"Location": "//[::1"}, {"Location": "javascript:0"},
    {"Location": "ftp://x/"}, {"Location": "/" + "a" * 5000},
    {"Set-Cookie": "a=b"}, {"X-Request-Id": KEY}, {"Connection": "close"},
]  # fmt: skip


def test_headers_are_not_believed(checker: Checker) -> None:
    for status in (200, 307, 429):
        for headers in HEADERS:
            checker.check(raw(completion("fine"), status, headers), "headers")


def test_a_connection_that_breaks_is_one_sentence(checker: Checker) -> None:
    def garbage(data: bytes) -> Any:
        def behave(handler: Any) -> None:
            handler.wfile.write(data)
            handler.close_connection = True

        return behave

    broken = [cut_off, hang_up, *map(garbage, (
        b"", b"SSH-2.0-x\r\n", b"HTTP/1.1", b"HTTP/1.1 2x0 OK\r\n\r\n", b"\x16\x03\x01",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"\x00" * 10**5,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50, b"HTTP/1.1 200 OK\r\nA: " + b"b" * 10**6,
    ))]  # fmt: skip
    for behaviour in broken:
        checker.check(behaviour, "connections")


@pytest.mark.parametrize(
    "given", ["", "=", "a", "=1", "messages=1", "model=x", "stream=1", "n=2", "x=omit", "a=1\na=2"]
)
def test_parameters_that_mean_nothing_are_one_sentence(server: Server, tmp_path: Path, given: str) -> None:
    def make() -> None:
        server.endpoint(tmp_path / "c.jsonl", parameters=read_parameters(given.split("\n")))

    faulty.assert_one_sentence(make, "parameter", kind="parameters")


@pytest.mark.parametrize("name", [*faulty.BROKEN])
def test_a_broken_cache_is_one_sentence_or_asked_anew(server: Server, tmp_path: Path, name: str) -> None:
    path = tmp_path / "answers.jsonl"
    server.script = [raw(completion("fine"))]
    server.endpoint(path).answer([QUESTION, [{"role": "user", "content": "again"}]])
    faulty.BROKEN[name](path)
    call = lambda: server.endpoint(path).answer([QUESTION])  # noqa: E731
    faulty.assert_one_sentence(call, kind="caches", check=lambda answers: answers == [Answer("fine")])


JUDGEMENT = {"explanation": "It asks what hurts.", "score": 4}
ASPECT = Aspect("Wit", "", {1: "no", 5: "yes"})


def test_a_mutated_judgement_is_the_right_one_or_none(server: Server, tmp_path: Path) -> None:
    """A score from 1 to 5 is never read where the text does not hold it."""
    made = server.endpoint(tmp_path / "answers.jsonl")
    for number, rng in enumerate(faulty.rounds(19, 80)):
        text = faulty.mutate_json(JUDGEMENT, rng)
        text = rng.choice([text, f"```json\n{text}\n```", f"<think>{text}</think>{text}", f"So: {text}", text + text])
        server.script = [raw(completion(text))]

        def judge(number: int = number) -> Any:
            return judge_replies(made, [(example("a"), f"reply {number}")], Counter(), aspects=[ASPECT])

        def right(judged: Any, text: str = text) -> bool:
            return (
                judged[0].scores in ({}, {"Wit": 4}) or f'"score": {judged[0].scores["Wit"]}' in text or '"3"' in text
            )

        faulty.assert_one_sentence(judge, kind="judgements", check=right)


REFLECTION = json.dumps({
    "understanding": {"user_profile": "a nurse, “tired”", "user_emotion": "sad"}, "evaluation_score": 2,
    "feedback": "It is {generic}.", REFINED: "Night shifts wear \"anyone\" out.\nWhat helps you rest?",
})  # fmt: skip


def mutated(rng: random.Random) -> str:
    text = REFLECTION
    for _ in range(rng.randrange(1, 5)):
        place, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        part = text[place:end][:40]
        text = rng.choice([
            text[:place] + text[end:][:2000], text[:place] + part + text[place:], text[:end], text[place:] or text,
            text.replace('"', "'"),
            text[:place] + rng.choice("{}[]\"'`\\,:;，：“”<>\n") + text[place:], text.replace("_", "\\_"),
            json.dumps(text)[:4000],
            f"<think>{part}</think>{text}", f"```json\n{text}\n```", text.replace(": ", "："), f"{part}\n{text}",
            text.replace('"', '"""'),
        ]) or REFLECTION  # fmt: skip
    return text


def test_mutated_output_of_a_model_crashes_nothing_and_makes_nothing_up() -> None:
    for rng in faulty.rounds(20, 400):
        text = mutated(rng)

        def right(found: Any, text: str = text) -> None:
            if found is not None:
                assert found.refined.strip()
                escaped = {chr(int(code, 16)) for code in re.findall(r"\\u([0-9a-fA-F]{4})", text)}
                assert set(found.refined) <= set(text) | escaped | set("\n\t\r\b\f\ufffd")
            end = json_object_end(text, REFINED)
            salvaged = salvage_json(text, REFINED)
            assert end is None or (salvaged is not None and salvaged.complete)

        faulty.assert_one_sentence(lambda text=text: parse_reflection(text), kind="model outputs", check=right)


def test_a_server_that_only_refuses_is_one_sentence_after_few_requests(server: Server, tmp_path: Path) -> None:
    conversations = [[{"role": "user", "content": str(number)}] for number in range(100)]
    for status in (400, 404, 418, 429, 500, 503):
        server.script = [raw(b'{"error": {"message": "no"}}', status)]
        server.requests.clear()
        endpoint = server.endpoint(tmp_path / f"{status}.jsonl", tries=2, concurrency=2)
        faulty.assert_one_sentence(
            lambda endpoint=endpoint: ask_json(endpoint, conversations, dict, Counter()), "no", endpoint.url,
            kind="refusals",
        )  # fmt: skip
        assert len(server.requests) <= 16


def test_decoupled_asks_its_judge_before_it_trains(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFEVO_API_KEY", KEY)
    run, url = tmp_path / "run", server.url.replace("//", "//me:passw0rd@")
    for status, said in ((401, "check the URL"), (402, "no quota left"), (404, "check the URL")):
        server.script = [raw(json.dumps({"error": {"message": f"wrong: {KEY} passw0rd"}}).encode(), status)]
        text = faulty.assert_program_refuses(
            decoupled.main, "--judge", "m", "--judge-url", url, "--out", run,
            mentions=(said, f"HTTP {status}", "wrong:"),
        )  # fmt: skip
        assert KEY not in text
        assert "passw0rd" not in text
        assert not run.exists()
    for flags in (["--judge-parameter", "a"], ["--judge-answers", "guided"], ["--judge-parameter", "model=x"]):
        asked = ["--judge", "m", "--judge-url", url, "--out", run, *flags]
        assert "passw0rd" not in faulty.assert_program_refuses(decoupled.main, *asked)


def test_the_error_of_an_endpoint_is_a_value_error() -> None:
    assert issubclass(EndpointError, ValueError)  # which the net around every command makes a sentence of
