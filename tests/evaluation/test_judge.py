"""The judge against a real HTTP server that misbehaves, and against a local backbone; strict parsing; the cache."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server, completion, cut_off, example, hang_up, raw, says

from selfevo.evaluation.ask_json import Answer, UnusableAnswerError, ask_json, json_object
from selfevo.evaluation.endpoint import Endpoint, EndpointError, EndpointSettings
from selfevo.evaluation.judge import (
    Aspect,
    Judgement,
    judge_prompt,
    judge_replies,
    load_aspects,
    read_judgement,
    summarise,
)
from selfevo.evaluation.local_responder import LocalResponder
from selfevo.files import FileError, read_jsonl, write_json
from selfevo.generate import Sampling
from selfevo.models import load_model, load_tokenizer

ASPECTS = load_aspects("paper")
GOOD = json.dumps({aspect.name: {"reason": "so", "score": 3} for aspect in ASPECTS})
QUESTION = [{"role": "user", "content": "hello"}]


def test_answers_come_in_order_and_requests_carry_the_papers_decoding(server: Server, tmp_path: Path) -> None:
    def echo(handler: Any) -> None:
        raw(completion("re: " + server.requests[-1]["messages"][0]["content"]))(handler)

    server.script = [echo]
    conversations = [[{"role": "user", "content": str(i)}] for i in range(20)]
    answers = server.endpoint(tmp_path / "c.jsonl", concurrency=1).answer(conversations)
    assert answers == [Answer(f"re: {i}") for i in range(20)]
    assert {(r["model"], r["temperature"], r["top_p"], r["max_tokens"]) for r in server.requests} == {
        ("judge-1", 0.8, 0.95, 768)
    }


def test_requests_run_side_by_side_up_to_the_limit(server: Server, tmp_path: Path) -> None:
    barrier = threading.Barrier(4, timeout=5)

    def together(handler: Any) -> None:
        barrier.wait()  # would break if fewer than four requests were under way at once
        says("yes")(handler)

    server.script = [together]
    conversations = [[{"role": "user", "content": str(i)}] for i in range(12)]
    answers = server.endpoint(tmp_path / "c.jsonl", concurrency=4, timeout=10).answer(conversations)
    assert [a.text for a in answers] == ["yes"] * 12
    assert server.most_running == 4


TRANSIENT = {
    "500": (raw(b"oops", 500), "http_500"),
    "503": (raw(b"{}", 503), "http_503"),
    "429": (raw(b"slow down", 429, {"Retry-After": "0.02"}), "http_429"),
    "429-date": (raw(b"slow down", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), "http_429"),
    "cut-off": (cut_off, "connection"),
    "hang-up": (hang_up, "connection"),
    "slow": (lambda handler: handler.server.selfevo_release.wait(5), "timeout"),
}
BROKEN = {
    "html": (raw(b"<html>busy</html>"), "not_json"),
    "html-typed": (raw(b"<html>busy</html>", 200, {"Content-Type": "text/html"}), "not_json"),
    "no-choices": (raw(b'{"choices": []}'), "malformed"),
    "list": (raw(b"[]"), "malformed"),
    "none": (says(None), "empty"),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which are not made."""
    waited: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_may_pass_is_tried_again_and_reported_when_it_does_not(
    server: Server, tmp_path: Path, quick: list[float], name: str
) -> None:
    failure, reason = TRANSIENT[name]
    server.http.selfevo_release = server.release  # type: ignore[attr-defined]
    server.script = [failure, says("at last")]
    assert server.endpoint(tmp_path / "a.jsonl").answer([QUESTION]) == [Answer("at last")]
    assert len(server.requests) == 2
    server.met.clear()
    server.script = [failure]
    endpoint = server.endpoint(tmp_path / "b.jsonl", tries=2)
    if reason == "connection":
        with pytest.raises(EndpointError, match="'connection'"):
            endpoint.answer([QUESTION])
    else:
        assert endpoint.answer([QUESTION]) == [Answer(None, reason)]
    assert len(server.requests) == 4
    assert not (tmp_path / "b.jsonl").exists()  # a failure is never kept


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_of_another_form_is_a_failure(server: Server, tmp_path: Path, name: str) -> None:
    failure, reason = BROKEN[name]
    server.script = [failure, says("{}")]
    endpoint = server.endpoint(tmp_path / "a.jsonl")
    assert endpoint.answer([QUESTION]) == [Answer(None, reason)]
    assert not (tmp_path / "a.jsonl").exists()
    counts: Counter[str] = Counter()
    server.met.clear()
    assert ask_json(endpoint, [QUESTION], dict, counts) == [{}]  # which asks again
    assert counts == {reason: 1, "answered": 1, "given_up": 0}


def test_a_retry_after_is_waited_for_and_pauses_grow(server: Server, tmp_path: Path, quick: list[float]) -> None:
    server.script = [raw(b"", 429, {"Retry-After": "7"}), raw(b"", 500), raw(b"", 500), says("ok")]
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer("ok")]
    assert quick[0] == 7.0
    assert 0 < quick[1] < quick[2] < 10


def test_a_request_that_is_itself_wrong_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.script = [raw(b'{"error": "context too long"}', 400)]
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer(None, "http_400")]
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_model_or_address_ends_it_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.script = [raw(b"no", status)]
    with pytest.raises(EndpointError, match=rf'judge-1 \(HTTP {status}: "no"\): check the URL'):
        server.endpoint(tmp_path / "c.jsonl", concurrency=1).answer([[{"role": "user", "content": c}] for c in "abc"])
    assert len(server.requests) <= 2


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path, quick: list[float]) -> None:
    settings = EndpointSettings("http://127.0.0.1:9/v1", "m", concurrency=2, tries=2, timeout=0.5)
    with pytest.raises(EndpointError, match=r"4 requests in a row without an answer.*is the server running"):
        Endpoint(settings, tmp_path / "c.jsonl").answer([[{"role": "user", "content": str(i)}] for i in range(50)])


def test_a_few_requests_are_enough_where_nobody_listens(tmp_path: Path, quick: list[float]) -> None:
    endpoint = Endpoint(EndpointSettings("http://127.0.0.1:9/v1", "m", timeout=0.5), tmp_path / "c.jsonl")
    with pytest.raises(EndpointError, match=r"1 requests in a row without an answer, the last with 'connection'"):
        endpoint.answer([QUESTION])
    assert len(quick) == 5


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match=r"pip install 'selfevo\[judge\]'"):
        Endpoint(EndpointSettings("http://127.0.0.1:9/v1", "m"), tmp_path / "c.jsonl")


def test_the_key_of_the_environment_is_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    server.script = [says("ok")]
    server.endpoint(tmp_path / "c.jsonl").answer([QUESTION])
    assert server.requests[0]["authorization"] == "Bearer sk-1"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_asking_again_costs_nothing_and_another_attempt_asks_anew(server: Server, tmp_path: Path) -> None:
    server.script = [says("first"), says("second")]
    path = tmp_path / "c.jsonl"
    assert server.endpoint(path).answer([QUESTION, QUESTION]) == [Answer("first")] * 2
    assert server.endpoint(path, concurrency=1, timeout=9).answer([QUESTION]) == [Answer("first")]
    assert len(server.requests) == 1
    assert server.endpoint(path).answer([QUESTION], attempt=2) == [Answer("second")]
    assert server.endpoint(path, temperature=0.1).answer([QUESTION]) == [Answer("second")]
    assert len(server.requests) == 3


def test_answers_before_a_failure_are_kept(server: Server, tmp_path: Path) -> None:
    server.script = [says("kept")]
    endpoint = server.endpoint(tmp_path / "c.jsonl", concurrency=1)
    endpoint.answer([QUESTION])
    server.script = [raw(b"", 401)]
    with pytest.raises(EndpointError):
        endpoint.answer([QUESTION, [{"role": "user", "content": "other"}]])
    assert server.endpoint(tmp_path / "c.jsonl").answer([QUESTION]) == [Answer("kept")]


def test_a_torn_last_line_is_asked_again_and_another_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.script = [says("one — ü")]
    path = tmp_path / "c.jsonl"
    server.endpoint(path).answer([QUESTION])
    path.write_bytes(path.read_bytes()[:-3])
    server.script = [says("again")]
    server.met.clear()
    assert server.endpoint(path).answer([QUESTION]) == [Answer("again")]
    assert [record["text"] for record in read_jsonl(path)] == ["again"]
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text('{"note": 1}\n{"no')
    with pytest.raises(FileError, match=r"notes\.jsonl: holds no answers of an endpoint"):
        server.endpoint(foreign)


# --- judging ----------------------------------------------------------------------------------------------------------


def test_every_way_of_answering_wrongly_is_counted_and_asked_again(server: Server, tmp_path: Path) -> None:
    values = {aspect.name: {"reason": "", "score": 4} for aspect in ASPECTS}
    server.script = [
        says("I would say 4."),
        says(json.dumps(values | {"Empathy": {"score": 6}})),
        says(f"```json\n{json.dumps(values)}\n```"),
    ]
    counts: Counter[str] = Counter()
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    (judged,) = judge_replies(endpoint, [(example("a"), "reply")], counts, aspects=ASPECTS, joint=True)
    assert judged.scores == {aspect.name: 4 for aspect in ASPECTS}
    assert counts == {"not_json": 1, "score_out_of_range": 1, "answered": 1, "given_up": 0, "mended_fence": 1}
    summary = summarise([judged], ["d"], counts)
    assert summary["failures"] == {"given_up": 0, "not_json": 1, "score_out_of_range": 1}
    assert summary["mended"] == {"mended_fence": 1}


def test_what_cannot_be_judged_is_given_up_and_told(server: Server, tmp_path: Path) -> None:
    def by_content(handler: Any) -> None:
        asked = server.requests[-1]["messages"][1]["content"]
        behave = says(GOOD) if "good reply" in asked else says(GOOD, "length") if "xxlong" in asked else raw(b"", 400)
        behave(handler)

    server.script = [by_content]
    counts: Counter[str] = Counter()
    answers = [(example("a"), "good reply"), (example("b"), "xxlong"), (example("c"), "bad")]
    endpoint = server.endpoint(tmp_path / "c.jsonl", concurrency=1)
    judged = judge_replies(endpoint, answers, counts, aspects=ASPECTS, joint=True)
    assert [bool(j.scores) for j in judged] == [True, False, False]
    assert counts == {"cut_at_limit": 3, "http_400": 1, "answered": 1, "given_up": 2}
    summary = summarise(judged, [e.dialogue for e, _ in answers], counts)
    assert summary["answered"] == 1
    assert summary["failures"] == {"cut_at_limit": 3, "given_up": 2, "http_400": 1}
    assert summary["scores"]["Empathy"] == {"mean": 3.0, "interval": [3.0, 3.0], "replies": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not_json"),
        ("I would say 4.", "not_json"),
        (GOOD[:-1], "not_json"),
        ("{" + GOOD[:-1], "not_json"),
        (GOOD + GOOD.replace('"score": 3', '"score": 4', 1), "ambiguous"),
        (GOOD.replace('"score": 3', '"score": 3, "score": 4', 1), "ambiguous"),
        (GOOD.replace('"score": 3', '"score": 3, "Score": 4', 1), "ambiguous"),
        ("<think>" + GOOD, "not_json"),
        (f"<think>{GOOD}</think><think>{GOOD}", "not_json"),
        ('{"draft": ' + GOOD + ", oops}", "not_json"),
        ("[1]", "not_an_object"),
        (GOOD.replace('"score": 3', '"score": 0', 1), "score_out_of_range"),
        (GOOD.replace('"score": 3', '"score": 6', 1), "score_out_of_range"),
        (GOOD.replace('"score": 3', '"score": 3.5', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": 45', 1), "score_out_of_range"),
        (GOOD.replace('"score": 3', '"score": 1e999', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": NaN', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": "4.5/5"', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": "3/10"', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": "3-4"', 1), "score_not_a_whole_number"),
        (GOOD.replace('"score": 3', '"score": "45"', 1), "score_out_of_range"),
        (GOOD.replace('"score": 3', '"score": ' + "3" * 5000, 1), "not_json"),
        (GOOD.replace('"score": 3', '"score": true', 1), "score_not_a_whole_number"),
        (GOOD.replace('"Empathy"', '"Empathie"'), "score_missing"),
        (GOOD[:-1] + ', "Humour": {"score": 3}}', "unknown_aspect"),
    ],
)
def test_judgements_are_read_strictly(text: str, reason: str) -> None:
    with pytest.raises(UnusableAnswerError, match=f"^{reason}$"):
        read_judgement(json_object(text), ASPECTS)


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        (GOOD, {}),
        (f"<think>Maybe {GOOD.replace('3', '1')}?</think>\n{GOOD}", {"mended_thoughts": 1}),
        (f"so I would give 2.</think>{GOOD}", {"mended_thoughts": 1}),
        (f"[THINK]hm[/THINK] {GOOD}", {"mended_thoughts": 1}),
        (f"```json\n{GOOD}\n```", {"mended_fence": 1}),
        (f"``` {GOOD}```", {"mended_fence": 1}),
        (f"Scores for {{this}} reply: {GOOD} I hope it helps.", {"mended_prose": 1}),
        (f"Scores:\n```json\n{GOOD}\n```\nAgain:\n```json\n{GOOD}\n```", {"mended_prose": 1}),
        (f"<think>?</think>```json\n{GOOD}\n```", {"mended_thoughts": 1, "mended_fence": 1}),
        (GOOD.replace('"score": 3', '"score": 3.0', 1), {"mended_score": 1}),
        (GOOD.replace('"score": 3', '"score": "3"'), {"mended_score": 7}),
        (GOOD.replace('"score": 3', '"score": " 3 / 5"', 1), {"mended_score": 1}),
        (GOOD.replace('"score": 3', '"score": "3.0/5"', 1), {"mended_score": 1}),
        (GOOD.replace('"score": 3', '"score": "3 out of 5"', 1), {"mended_score": 1}),
    ],
)
def test_what_is_mended_in_a_judgement_is_counted(
    server: Server, tmp_path: Path, text: str, mended: dict[str, int]
) -> None:
    server.script = [says(text)]
    counts: Counter[str] = Counter()
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    (judged,) = judge_replies(endpoint, [(example("a"), "reply")], counts, aspects=ASPECTS, joint=True)
    assert judged.scores == {aspect.name: 3 for aspect in ASPECTS}
    assert counts == {"answered": 1, "given_up": 0, **mended}


def test_each_aspect_is_a_request_of_its_own(server: Server, tmp_path: Path) -> None:
    def by_aspect(handler: Any) -> None:
        asked = server.requests[-1]["messages"][1]["content"]
        (place,) = [i for i, aspect in enumerate(ASPECTS) if f"\n{aspect.name}. " in asked]
        says("?" if place == 1 else json.dumps({"Explanation": "so", "Score": 1 + place % 5}))(handler)

    server.script = [by_aspect]
    counts: Counter[str] = Counter()
    endpoint = server.endpoint(tmp_path / "c.jsonl")
    (judged,) = judge_replies(endpoint, [(example("a"), "reply")], counts, aspects=ASPECTS)
    expected = {aspect.name: 1 + place % 5 for place, aspect in enumerate(ASPECTS) if place != 1}
    assert judged == Judgement(expected, dict.fromkeys(expected, "so"))
    assert counts == {"not_json": 3, "answered": 6, "given_up": 1}
    assert summarise([judged], ["d"], counts)["scores"].keys() == expected.keys()


def test_a_server_that_refuses_top_k_is_asked_without_it(server: Server, tmp_path: Path) -> None:
    def openai(handler: Any) -> None:
        known = "top_k" not in server.requests[-1]
        (says("ok") if known else raw(b'{"error": {"message": "Unknown parameter: top_k"}}', 400))(handler)

    server.script = [openai]
    conversations = [[{"role": "user", "content": str(i)}] for i in range(6)]
    answers = server.endpoint(tmp_path / "c.jsonl", concurrency=3).answer(conversations)
    assert answers == [Answer("ok")] * 6
    assert "top_k" not in server.requests[-1]


def test_a_request_shows_the_conversation_the_reply_and_every_criterion() -> None:
    context = [{"role": "system", "content": "SYS"}, *QUESTION, {"role": "assistant", "content": "hi"}, *QUESTION]
    system, request = judge_prompt(context, "my reply", ASPECTS)
    assert system["role"] == "system"
    assert "User: hello\nSupporter: hi\nUser: hello" in request["content"]
    assert "my reply" in request["content"]
    assert "SYS" not in request["content"]
    for aspect in ASPECTS:
        parts = (aspect.name, aspect.question, *aspect.levels.values(), *aspect.caps)
        assert all(part in request["content"] for part in parts)


def test_the_papers_aspects_have_five_levels_and_caps() -> None:
    assert [aspect.name for aspect in ASPECTS] == [
        "Coherence", "Understanding", "Empathy", "Engagement", "Informativeness", "Helpfulness", "Overall",
    ]  # fmt: skip
    assert all(set(aspect.levels) == {1, 2, 3, 4, 5} and len(aspect.caps) >= 3 for aspect in ASPECTS)
    assert [aspect.name for aspect in load_aspects("personalisation")] == ["Personalisation"]
    assert len(load_aspects("decoupled")) == 4


def test_aspects_can_come_from_a_file_also_in_the_form_of_0_1(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [{"name": "Wit", "levels": {"1": "dull", "5": "bright"}}])
    expected = (Aspect("Wit", "", {1: "dull", 5: "bright"}),)
    assert load_aspects(tmp_path / "a.json") == expected
    write_json(tmp_path / "a.json", [{"name": "Wit", "lowest": "dull", "highest": "bright"}])
    assert load_aspects(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    "bad",
    [{"name": "Wit"}, {"levels": {"1": "x"}}, {"name": "Wit", "levels": {"6": "x"}}, {"name": "Wit", "levels": []}, 3],
)
def test_a_bad_aspect_is_named(tmp_path: Path, bad: Any) -> None:
    write_json(tmp_path / "b.json", [bad])
    with pytest.raises(FileError, match=r"b.json, entry 0"):
        load_aspects(tmp_path / "b.json")


# --- a local judge ----------------------------------------------------------------------------------------------------


def test_a_local_backbone_answers_from_its_cache_the_second_time(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "models" / "story"
    model, tokenizer = load_model(folder), load_tokenizer(folder, chat_format="plain")

    def responder() -> LocalResponder:
        return LocalResponder(model, tokenizer, "story", tmp_path, sampling=Sampling(0.8, 0.95, 50, 1.0, 0),
                              max_new_tokens=8)  # fmt: skip

    counts: Counter[str] = Counter()
    assert ask_json(responder(), [QUESTION], lambda value: value, counts, tries=2) == [None]
    assert counts["given_up"] == 1
    assert counts["cut_at_limit"] + counts["not_json"] == 2
    first = responder().answer([QUESTION])
    monkeypatch.setattr("selfevo.generate.replies.generate", None)
    assert responder().answer([QUESTION]) == first
    assert first[0].text


@pytest.mark.parametrize("joint", [False, True])
def test_a_guided_local_judge_always_gives_a_judgement(tmp_path: Path, joint: bool) -> None:
    folder = Path(__file__).parents[2] / "examples" / "embedded" / "backbone"
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def judge(tokens: int) -> LocalResponder:
        sampling = Sampling(0.8, 0.95, 50, 1.0, 0)
        return LocalResponder(
            model, tokenizer, "story", tmp_path, sampling=sampling, max_new_tokens=tokens, guided=True
        )  # fmt: skip

    aspects = [Aspect(name, "", {1: "no", 5: "yes"}) for name in ("Wit", "Ease")]
    counts: Counter[str] = Counter()
    judged = judge_replies(judge(100), [(example("a"), "b"), (example("c"), "d")], counts, aspects=aspects, joint=joint)
    assert all(set(found.scores) == {"Wit", "Ease"} and all(found.reasons.values()) for found in judged)
    assert counts == {"answered": 2 if joint else 4, "given_up": 0}
    with pytest.raises(ValueError, match="8 tokens are too few"):
        judge(8).answer([[{"role": "user", "content": 'Answer:\n{"explanation": "", "score": 0}'}]])
    with pytest.raises(ValueError, match="needs requests that show one JSON object"):
        judge(100).answer([QUESTION])
