"""Servers as they are: addresses, keys, parameters, forms of answers and errors; and what may never be shown."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server, completion, made_server, raw, says

from selfevo.evaluation import bounded_http
from selfevo.evaluation.ask_json import Answer, ask_json
from selfevo.evaluation.endpoint import Address, EndpointError, EndpointSettings, read_parameters

QUESTION = [{"role": "user", "content": "hello"}]
KEY = "sk-proj-Abc123/def456+ghi789"


def questions(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": str(number)}] for number in range(count)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which are not made."""
    waited: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waited.append)
    return waited


def refusal(status: int, error: Any, **headers: str) -> Any:
    return raw(
        json.dumps({"error": error}).encode(), status, {name.replace("_", "-"): headers[name] for name in headers}
    )


# --- the address, the key and the parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "requested"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("", "/chat/completions"),
        ("/v1beta/openai/", "/v1beta/openai/chat/completions"),
        ("/api/paas/v4", "/api/paas/v4/chat/completions"),
        ("/api/v3", "/api/v3/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1#part", "/v1/chat/completions"),
        (
            "/openai/deployments/d?api-version=2024-10-21",
            "/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
    ],
)
def test_the_address_is_taken_as_given(server: Server, tmp_path: Path, path: str, requested: str) -> None:
    server.script = [says("ok")]
    url = server.url.removesuffix("/v1") + path
    assert server.endpoint(tmp_path / "c.jsonl", url=f" {url}\n").answer([QUESTION]) == [Answer("ok")]
    assert server.paths == [requested]


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1", "user:pw@host"],
)
def test_what_is_no_address_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ValueError, match="should begin with http:// or https:// and a host") as refused:
        EndpointSettings(url, "m")
    assert "pw" not in str(refused.value)


def test_a_key_may_have_white_space_around_it_but_not_inside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [says("ok")]
    monkeypatch.setenv("SELFEVO_API_KEY", " \n")
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1\r\n")
    server.endpoint(tmp_path / "c.jsonl").answer([QUESTION])
    assert server.requests[0]["authorization"] == "Bearer sk-1"
    for wrong in ("sk-1\nsk-2", "sk-ключ", "Bearer sk-1"):
        monkeypatch.setenv("SELFEVO_API_KEY", wrong)
        with pytest.raises(EndpointError, match="SELFEVO_API_KEY: holds a space, a line break") as refused:
            server.endpoint(tmp_path / "c.jsonl")
        assert wrong not in str(refused.value)


def test_parameters_are_renamed_added_and_left_out(server: Server, tmp_path: Path) -> None:
    server.script = [says("ok")]
    given = ["max_tokens=omit", "max_completion_tokens=700", "temperature=omit", "reasoning_effort=low",
             'chat_template_kwargs={"enable_thinking": false}', "top_k=5"]  # fmt: skip
    endpoint = server.endpoint(tmp_path / "c.jsonl", parameters=read_parameters(given))
    assert endpoint.answer([QUESTION]) == [Answer("ok")]
    (sent,) = server.requests
    assert sent.keys() == {
        "messages", "model", "top_p", "top_k", "max_completion_tokens", "reasoning_effort", "chat_template_kwargs",
        "authorization", "path",
    }  # fmt: skip
    assert (sent["max_completion_tokens"], sent["reasoning_effort"], sent["top_k"]) == (700, "low", 5)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    server.endpoint(tmp_path / "c.jsonl").answer([QUESTION])
    assert len(server.requests) == 2  # another request: not from the cache


@pytest.mark.parametrize("given", ["top_k", "=3", "", "model=x", "messages=[]", "stream=true", "seed=omit"])
def test_parameters_without_a_meaning_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="parameter"):
        EndpointSettings("http://host/v1", "m", parameters=read_parameters([given]))
    with pytest.raises(ValueError, match="each name once"):
        read_parameters(["a=1", "a=2"])


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "timeout"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            EndpointSettings("http://host/v1", "m", **{name: value})


# --- forms of answers -------------------------------------------------------------------------------------------------


def choice(message: Any, finish: Any = "stop") -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]}).encode()


FORMS: dict[str, tuple[bytes, Answer]] = {
    "parts": (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), Answer("ab")),
    "a thought before": (completion([{"type": "thinking"}, {"type": "text", "text": "a"}]), Answer("a")),
    "texts": (completion(["a", "b"]), Answer("ab")),
    "a value": (completion([{"type": "output_text", "text": {"value": "a"}}]), Answer("a")),
    "no parts": (completion([]), Answer(None, "empty")),
    "odd parts": (completion([3]), Answer(None, "malformed")),
    "an object": (completion({"text": "a"}), Answer(None, "malformed")),
    "null": (completion(None), Answer(None, "empty")),
    "blank": (completion(" \n"), Answer(None, "empty")),
    "tools": (choice({"content": None, "tool_calls": []}, "tool_calls"), Answer(None, "empty")),
    "null at the limit": (completion(None, "length"), Answer(None, "cut_at_limit")),
    "cut": (completion("a", "length"), Answer("a", "cut_at_limit")),
    "filter": (completion(None, "content_filter"), Answer(None, "content_filter")),
    "filtered half-way": (completion("a", "content_filter"), Answer(None, "content_filter")),
    "sensitive": (completion("", "sensitive"), Answer(None, "content_filter")),
    "safety": (completion(None, "SAFETY"), Answer(None, "content_filter")),
    "refusal": (choice({"content": None, "refusal": "I cannot judge that."}), Answer(None, "refusal")),
    "reasons only": (choice({"content": None, "reasoning_content": "hm"}), Answer(None, "empty")),
    "no finish": (choice({"content": "a"}, None), Answer("a")),
    "odd finish": (choice({"content": "a"}, {"x": 1}), Answer("a")),
    "no message": (b'{"choices": [{"text": "a"}]}', Answer(None, "malformed")),
    "no choices": (b'{"choices": []}', Answer(None, "malformed")),
    "choices of another type": (b'{"choices": "abc"}', Answer(None, "malformed")),
    "an error": (b'{"error": "no"}', Answer(None, "error_object")),
    "an error beside": (b'{"error": {"message": "no"}, "choices": []}', Answer(None, "error_object")),
    "a list": (b"[]", Answer(None, "malformed")),
    "a web page": (b"<!DOCTYPE html><html>hi</html>", Answer(None, "not_json")),
    "events": (b'data: {"choices": []}\n\ndata: [DONE]\n\n', Answer(None, "not_json")),
    "nothing": (b"", Answer(None, "not_json")),
    "deep": (b"[" * 100_000, Answer(None, "not_json")),
    "no text": (b'{"choices": \xff\xfe}', Answer(None, "not_json")),
    "long number": (b'{"choices": ' + b"9" * 5000 + b"}", Answer(None, "not_json")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_an_answer_is_read_or_named(server: Server, tmp_path: Path, name: str) -> None:
    body, expected = FORMS[name]
    server.script = [raw(body)]
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    assert endpoint.answer([QUESTION]) == [expected]
    assert len(server.requests) == 1
    assert len(endpoint.remarks()) == (expected.text is None)


# --- what the server said ---------------------------------------------------------------------------------------------


def test_what_the_server_said_is_shown_once_with_its_count(server: Server, tmp_path: Path) -> None:
    server.script = [refusal(400, {"message": "context\nlength \x1b[31m exceeded", "code": "too_long"})]
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    assert endpoint.answer(questions(3)) == [Answer(None, "http_400")] * 3
    assert endpoint.remarks() == ["judge-1: http_400, 3 times: too_long: context length ?[31m exceeded"]


@pytest.mark.parametrize("body", [
    b'{"error": {"message": "overloaded", "type": "server_error"}}', b'{"detail": "x"}', b'"x"', b"[1, 2]", b"<html>",
    b'[{"error": {"message": "overloaded", "status": "UNAVAILABLE"}}]', b'{"error": {"message": 3}}', b'{"error": []}',
])  # fmt: skip
def test_an_unfamiliar_answer_is_tried_as_often_as_the_client_does_and_no_more(
    server: Server, tmp_path: Path, quick: list[float], body: bytes
) -> None:
    server.script = [raw(body, 503)]
    counts: Counter[str] = Counter()
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    assert ask_json(endpoint, [QUESTION], dict, counts) == [None]
    assert len(server.requests) == 6
    assert counts == {"http_503": 1, "answered": 0, "given_up": 1}


def test_an_error_in_a_success_is_tried_again_where_it_may_pass(
    server: Server, tmp_path: Path, quick: list[float]
) -> None:
    server.script = [refusal(200, {"code": 502, "message": "no provider"}), refusal(200, {"code": "429"}), says("ok")]
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer("ok")]
    assert len(quick) == 2
    server.script = [refusal(200, {"code": 401, "message": "no such user"})]
    with pytest.raises(EndpointError, match=r"HTTP 401.*no such user"):
        server.endpoint(tmp_path / "d.jsonl").answer([QUESTION])


QUOTA = {
    "OpenAI": (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
    "payment": (402, {"message": "Insufficient Balance"}),
    "Zhipu": (429, {"code": "1113", "message": "您的账户已欠费，请充值后重试。"}),
    "Moonshot": (429, {"message": "check your plan", "type": "exceeded_current_quota_error"}),
    "a day's": (429, {"message": "quota", "details": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}),
}


@pytest.mark.parametrize("name", QUOTA)
def test_an_empty_account_ends_it_at_once_and_a_rate_limit_does_not(
    server: Server, tmp_path: Path, quick: list[float], name: str
) -> None:
    server.script = [refusal(*QUOTA[name])]
    with pytest.raises(EndpointError, match="no quota left"):
        server.endpoint(tmp_path / "c.jsonl", concurrency=1).answer(questions(9))
    assert len(server.requests) <= 2
    server.script = [
        refusal(429, {"message": "Rate limit reached, 3 requests a minute", "code": "rate_limit"}),
        says("ok"),
    ]
    server.met.clear()
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer("ok")]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "content_filter", "message": "The response was filtered by Azure's content management policy"}),
        (403, {"message": "openai/gpt requires moderation. Your input was flagged for self-harm"}),
        (400, {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}),
    ],
)
def test_a_conversation_that_a_filter_stops_is_one_failure(
    server: Server, tmp_path: Path, status: int, error: dict[str, str]
) -> None:
    server.script = [refusal(status, error)]
    counts: Counter[str] = Counter()
    assert ask_json(server.endpoint(tmp_path / "c.jsonl", concurrency=1), questions(4), dict, counts) == [None] * 4
    assert counts == {"content_filter": 4, "answered": 0, "given_up": 4}
    assert len(server.requests) == 4


def test_many_failures_in_a_row_end_it_with_the_words_of_the_server(server: Server, tmp_path: Path) -> None:
    for body, said in ((b'{"error": "no such task"}', "no such task"), (b"<html>busy</html>", "a web page")):
        server.script = [raw(body, 400 if b"task" in body else 200)]
        with pytest.raises(EndpointError, match=rf"4 requests in a row .*{said}.*; check its parts"):
            server.endpoint(tmp_path / "c.jsonl", concurrency=2).answer(questions(50))
    assert len(server.requests) < 24


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
        ("temperature", "Unsupported value: 'temperature' does not support 0.8 with this model."),
        ("top_p", "`temperature` and `top_p` cannot both be specified for this model"),
        ("max_tokens", "max_tokens: Extra inputs are not permitted"),
    ],
)
def test_a_parameter_that_is_refused_is_named_at_once_with_the_flag(
    server: Server, tmp_path: Path, name: str, said: str
) -> None:
    server.script = [refusal(400, {"message": said})]
    parameters = {"temperature": "omit"} if name == "top_p" else {}
    with pytest.raises(EndpointError, match=rf"leave {name} out by --judge-parameter {name}=omit"):
        server.endpoint(tmp_path / "c.jsonl", concurrency=1, parameters=parameters).answer(questions(9))
    assert len(server.requests) <= 2


def test_a_conversation_too_long_for_its_limit_is_a_failure_of_its_own(server: Server, tmp_path: Path) -> None:
    said = "This model's maximum context length is 8192 tokens, please reduce the messages or max_tokens."
    server.script = [refusal(400, {"message": said})]
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer(None, "http_400")]


def test_an_answer_kept_from_an_earlier_run_that_cannot_be_used_is_asked_anew(server: Server, tmp_path: Path) -> None:
    server.script = [says("no JSON")]
    counts: Counter[str] = Counter()
    assert ask_json(server.endpoint(tmp_path / "c.jsonl"), questions(2), dict, counts) == [None] * 2
    server.script = [says('{"a": 1}')]
    server.requests.clear()
    assert ask_json(server.endpoint(tmp_path / "c.jsonl"), questions(2), dict, counts) == [{"a": 1}] * 2
    assert len(server.requests) == 2
    assert ask_json(server.endpoint(tmp_path / "c.jsonl"), questions(2), dict, counts) == [{"a": 1}] * 2
    assert len(server.requests) == 2


# --- bounds -----------------------------------------------------------------------------------------------------------


def chunks(parts: Iterator[bytes], pause: float = 0.0, **headers: str) -> Any:
    def behave(handler: Any) -> None:
        handler.send_response(200)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.close_connection = True
        try:
            for part in parts:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                handler.server.selfevo.release.wait(pause)
        except OSError:
            handler.server.selfevo.met["gone"] += 1

    return behave


def forever(part: bytes) -> Iterator[bytes]:
    while True:
        yield part


def dripping_headers(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.close_connection = True
    try:
        for part in forever(b"X-Header: more\r\n"):
            handler.wfile.write(part)
            handler.wfile.flush()
            handler.server.selfevo.release.wait(0.05)
    except OSError:
        handler.server.selfevo.met["gone"] += 1


@pytest.mark.parametrize("behaviour", [chunks(forever(b" "), 0.05), dripping_headers], ids=["body", "headers"])
def test_an_answer_that_never_ends_is_cut_off(server: Server, tmp_path: Path, behaviour: Any) -> None:
    server.script = [behaviour]
    endpoint = server.endpoint(tmp_path / "c.jsonl", timeout=0.2)
    begin = time.monotonic()
    assert endpoint.answer([QUESTION]) == [Answer(None, "timeout")]
    assert time.monotonic() - begin < 20  # for ever, otherwise
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", [
    "inf", "Infinity", "nan", "1e999", "-3", "99999999999", "Fri, 01 Jan 2199 00:00:00 GMT",
    "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "", "9" * 5000,
])  # fmt: skip
@pytest.mark.parametrize("header", ["Retry-After", "Retry-After-Ms"])
def test_no_pause_is_longer_than_two_minutes(
    server: Server, tmp_path: Path, quick: list[float], header: str, value: str
) -> None:
    server.script = [raw(b"{}", 429, {header: value})]
    assert server.endpoint(tmp_path / "c.jsonl", tries=3).answer([QUESTION]) == [Answer(None, "http_429")]
    assert all(0 <= pause <= 120 for pause in quick)


def bomb(size: int, packing: int) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, packing)
    return b"".join([pack.compress(b" " * 2**20) for _ in range(size)] + [pack.flush()])


LARGE = {
    "body": chunks(forever(b" " * 2**16)),
    "declared": raw(b" " * (2**22 + 1)),
    "gzip bomb": raw(bomb(64, 31), headers={"Content-Encoding": "gzip"}),
    "deflate bomb": raw(bomb(64, 15), headers={"Content-Encoding": "deflate"}),
    "error": raw(b" " * (2**22 + 1), 400),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_answer_is_given_up(server: Server, tmp_path: Path, name: str) -> None:
    server.script = [LARGE[name]]
    endpoint = server.endpoint(tmp_path / "c.jsonl", timeout=20)
    assert endpoint.answer([QUESTION]) == [Answer(None, "too_large")]
    assert "more than 4194304 bytes" in endpoint.remarks()[0]


def test_a_packed_answer_is_unpacked_and_an_unknown_packing_named(server: Server, tmp_path: Path) -> None:
    server.script = [raw(gzip.compress(completion("ok")), headers={"Content-Encoding": "gzip"})]
    assert server.endpoint(tmp_path / "a.jsonl").answer([QUESTION]) == [Answer("ok")]
    for packing, body in (("br", b"x"), ("gzip, gzip", gzip.compress(b"x")), ("gzip", b"x")):
        server.script = [raw(body, headers={"Content-Encoding": packing})]
        assert server.endpoint(tmp_path / "b.jsonl").answer([QUESTION]) == [Answer(None, "malformed")]


def test_a_redirect_to_another_server_is_refused_and_nothing_sent_there(server: Server, tmp_path: Path) -> None:
    for status in (301, 302, 303, 307, 308):
        with made_server() as other:
            other.script = [says("caught")]
            server.script = [raw(b"", status, {"Location": other.url.replace("//", "//me:secret@") + "?token=secret"})]
            with pytest.raises(EndpointError, match=f"redirects to {other.url}, where nothing is sent") as refused:
                server.endpoint(tmp_path / "c.jsonl").answer([QUESTION])
            assert not other.requests
            assert "secret" not in str(refused.value)


def test_a_redirect_within_a_server_is_followed_but_not_in_a_circle(server: Server, tmp_path: Path) -> None:
    server.script = [raw(b"", 307, {"Location": "/other/chat/completions"}), says("ok")]
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer("ok")]
    assert server.paths == ["/v1/chat/completions", "/other/chat/completions"]
    server.script = [raw(b"", 308, {"Location": "/v1/chat/completions"})]
    with pytest.raises(EndpointError, match="redirects to itself, in a circle"):
        server.endpoint(tmp_path / "d.jsonl").answer([QUESTION])


def test_ctrl_c_does_not_wait_for_the_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [says("ok"), chunks(forever(b" "), 0.05)]
    endpoint = server.endpoint(tmp_path / "c.jsonl", timeout=300)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("selfevo.evaluation.endpoint.append_jsonl", interrupt)
    server.met[json.dumps(questions(2)[1])] = 1  # this one meets the answer that never ends
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        endpoint.answer(questions(2))
    assert time.monotonic() - begin < 60


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_login_in_the_address_is_used_and_shown_nowhere(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.script = [says("ok")]
    url = server.url.replace("//", "//me:p%40ssword@") + "?key=query-secret"
    endpoint = server.endpoint(tmp_path / "c.jsonl", url=url)
    endpoint.answer([QUESTION])
    assert server.requests[0]["authorization"] == "Basic bWU6cEBzc3dvcmQ="
    assert server.paths == ["/v1/chat/completions?key=query-secret"]
    assert endpoint.url == server.url
    server.script = [raw(b"me:p@ssword p%40ssword Basic bWU6cEBzc3dvcmQ= query-secret", 401)]
    with pytest.raises(EndpointError, match="HTTP 401") as refused:
        server.endpoint(tmp_path / "c.jsonl", url=url).answer(questions(1))
    shown = (str(refused.value), repr(endpoint.settings), (tmp_path / "c.jsonl").read_text())
    for secret in ("ssword", "bWU6cEBzc3dvcmQ"):
        assert secret not in "".join((*shown, *caplog.messages))
    assert "query-secret" not in "".join(shown)


def test_a_key_that_the_server_sends_back_is_not_shown_and_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = [KEY, KEY.replace("/", "%2F").replace("+", "%2B"), KEY[:12] + "****", "x" * 290 + KEY]
    for text in echo:
        server.script = [says(f"{text} is it")]
        (answer,) = server.endpoint(tmp_path / "c.jsonl", model=text[:5]).answer([QUESTION])
        assert answer.text is not None
        assert "[secret]" in answer.text
        server.script = [refusal(400, {"message": f"Incorrect key {text}"})]
        endpoint = server.endpoint(tmp_path / "d.jsonl", model=text[:5])
        endpoint.answer([QUESTION])
        shown = "".join((*endpoint.remarks(), (tmp_path / "c.jsonl").read_text(), *caplog.messages, answer.text))
        assert KEY[:8] not in shown
        server.script = [refusal(401, {"message": f"Incorrect key {text}"})]
        with pytest.raises(EndpointError) as refused:
            endpoint.answer(questions(1))
        assert KEY[:8] not in str(refused.value)


def test_an_endpoint_is_checked_by_one_request_that_is_not_kept(
    server: Server, tmp_path: Path, quick: list[float]
) -> None:
    for behaviour in (says("yes"), says(None), refusal(400, "no")):
        server.script = [behaviour]
        server.endpoint(tmp_path / "c.jsonl").check()
    assert len(server.requests) == 3
    assert not (tmp_path / "c.jsonl").exists()
    with pytest.raises(EndpointError, match="is the server running"):
        server.endpoint(tmp_path / "c.jsonl", url="http://127.0.0.1:9/v1").check()


def test_a_token_in_place_of_a_name_is_secret(server: Server, tmp_path: Path) -> None:
    server.script = [raw(b"no such user: token-12345", 401)]
    endpoint = server.endpoint(tmp_path / "c.jsonl", url=server.url.replace("//", "//token-12345@"))
    with pytest.raises(EndpointError, match=r"no such user: \[secret\]"):
        endpoint.check()


def test_the_address_is_taken_apart() -> None:
    assert Address.of("https://a.b:8/c/") == ("https://a.b:8/c", None, {})
    assert Address.of("http://u:p%3Aw@[::1]:80/v1?x=1") == ("http://[::1]:80/v1", ("u", "p:w"), {"x": "1"})
    assert Address.of("http://token@h") == ("http://h", ("token", ""), {})


def test_redirects_stay_on_the_same_server() -> None:
    import httpx2

    def same(own: str, other: str) -> bool:
        return bounded_http._same_server(httpx2.URL(own), httpx2.URL(other))

    assert same("http://a/v1", "http://a/v2")
    assert same("http://a/v1", "https://a/v1")
    assert not same("https://a/v1", "http://a/v1")
    assert not same("http://a:8000/v1", "https://a/v1")
    assert not same("http://a/v1", "http://a:8000/v1")
    assert not same("http://a/v1", "http://a.b/v1")
