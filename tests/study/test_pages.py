"""What participants do and see; whatever is wrong gets a clear answer and changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from participants import Participant, together

Make = Callable[..., Any]


def said(page: str) -> str:
    """What a page tells in an alert."""
    return unescape(re.search(r'role="alert">([^<]*)<', page)[1])  # type: ignore[index]


def at(participant: Participant, step: str) -> dict[str, str]:
    """Lets a participant go on until a step, whose hidden fields are returned."""
    for _ in range(30):
        forms = participant.forms(participant.settled())
        if step in forms:
            return forms[step]
        participant.take_step()
    raise AssertionError(f"never came to {step}")


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_fifty_people_at_once_lose_no_answer(site: Make, mode: str) -> None:
    place = site(mode=mode, models=("M0", "M1", "M2"))
    people = [place.participant(f"person {number}") for number in range(50)]
    together(people)
    sessions = place.store.sessions()
    assert len(sessions) == 50
    assert {session.state for session in sessions} == {"finished"}
    units = [place.store.settings.unit(session.place) for session in sessions]
    assert {units.count(unit) for unit in set(units)} == {16, 17}  # balanced
    stored = {(turn.number, turn.text) for session in sessions for turn in session.turns}
    sent = {(int(f["number"]), f["text"]) for one in people for name, f in one.acknowledged if name == "say"}
    assert stored == sent
    assert len(sent) == 100
    for session in sessions:
        for turn in session.turns:
            assert all(text == f"I hear you: {turn.text}" for text in turn.replies.values())
            assert len(turn.replies) == (1 if mode == "pointwise" else 2)
            assert mode == "pointwise" or turn.choice == ("A", "tie", "B")[turn.number % 3]
            assert mode == "pointwise" or turn.kept == (turn.choice if turn.choice != "tie" else "B")
    expected = dict.fromkeys(place.store.settings.aspects, 4) if mode == "pointwise" else {}
    assert all(session.scores == expected and session.comment == "Fine." for session in sessions)


WRONG: dict[str, tuple[str, dict[str, str], int, str]] = {
    "a score of 6": ("rate", {"score Overall": "6"}, 400, "from 1 to 5"),
    "a score of 0": ("rate", {"score Overall": "0"}, 400, "from 1 to 5"),
    "half a score": ("rate", {"score Overall": "4.5"}, 400, "from 1 to 5"),
    "a score in other digits": ("rate", {"score Overall": "٤"}, 400, "from 1 to 5"),
    "a score of two digits": ("rate", {"score Overall": "12"}, 400, "from 1 to 5"),
    "an aspect of their own": ("rate", {"score Beauty": "4"}, 400, "from 1 to 5"),
    "no scores": ("rate", {}, 400, "from 1 to 5"),
    "nothing said": ("say", {"text": " \r\n "}, 400, "write something"),
    "control characters": ("say", {"text": "\x00\x1b"}, 400, "write something"),
    "too long a text": ("say", {"text": "x" * 2001}, 400, "at most 2000"),
    "more than fits the model": ("say", {"text": "a word beyond"}, 400, "fewer words"),
    "a turn that is not next": ("say", {"text": "x", "number": "7"}, 409, "sent already"),
    "no number": ("say", {"text": "x", "number": "x"}, 400, "which turn"),
    "a number in other digits": ("say", {"text": "x", "number": "²"}, 400, "which turn"),
    "a long number": ("say", {"text": "x", "number": "9" * 5000}, 400, "which turn"),
    "a vote for C": ("vote", {"choice": "C"}, 400, "A, B, tie"),
    "a vote for nothing": ("vote", {}, 400, "A, B, tie"),
    "a vote for an earlier turn": ("vote", {"choice": "A", "number": "0"}, 409, "vote already"),
    "to go on with C": ("keep", {"side": "C"}, 400, "one of A, B"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_form_with_wrong_values_changes_nothing(site: Make, what: str) -> None:
    step, values, status, message = WRONG[what]
    place = site(mode="pairwise" if step in ("vote", "keep") else "pointwise")
    person = place.participant()
    fields = at(person, step) | values
    before = place.content()
    found, page = person.send(step, fields)
    assert found == status
    assert message in said(page)
    assert place.content() == before
    assert step in person.forms(person.page())  # and the participant goes on


def test_a_second_vote_for_a_turn_changes_nothing(site: Make) -> None:
    place = site(mode="pairwise")
    person = place.participant()
    fields = at(person, "vote")
    assert person.send("vote", fields | {"choice": "A"})[0] == 303
    before = place.content()
    for choice in ("B", "tie", "A"):
        status, page = person.send("vote", fields | {"choice": choice})
        assert status == 409
        assert "already" in said(page)
    assert place.content() == before
    fields = at(person, "say")
    assert person.send("say", fields | {"text": "once"})[0] == 303
    assert person.send("say", fields | {"text": "once"})[0] == 303  # the answer was lost on its way
    assert person.send("say", fields | {"text": "twice"})[0] == 409
    assert [turn.text for turn in place.store.sessions()[0].turns][1:] == ["once"]


def test_a_conversation_that_is_too_short_cannot_be_ended(site: Make) -> None:
    place = site()
    person = place.participant()
    at(person, "say")
    person.take_step()
    at(person, "say")
    status, page = person.send("end", {"seal": place.pages._seal(person.token, "end")})
    assert status == 409
    assert "2 turns" in said(page)
    assert place.store.sessions()[0].state == "talking"


def test_forms_of_others_are_not_taken(site: Make) -> None:
    place = site()
    person, other = place.participant("person"), place.participant("other")
    fields, foreign = at(person, "say") | {"text": "x"}, at(other, "say")
    before = place.content()
    forged = {
        "a seal of somebody else": (fields | {"seal": foreign["seal"]}, {}),
        "the seal of another form": (fields | {"seal": place.pages._seal(person.token, "vote")}, {}),
        "no seal": ({"text": "x", "number": "1"}, {}),
        "another site": (fields, {"Origin": "https://evil.example"}),
        "a sandboxed page": (fields, {"Origin": "null"}),
        "another site, as the browser says": (fields, {"Sec-Fetch-Site": "cross-site"}),
        "a site beside ours": (fields, {"Sec-Fetch-Site": "same-site"}),
    }
    for what, (given, headers) in forged.items():
        status, page = person.request("POST", "/say", urlencode(given).encode(), **headers)
        assert status == 403, what
        assert "did not come from a page of yours" in said(page), what
    assert place.content() == before
    own = {"Origin": f"http://127.0.0.1:{place.port}", "Sec-Fetch-Site": "same-origin"}
    assert person.request("POST", "/say", urlencode(fields).encode(), Host=f"127.0.0.1:{place.port}", **own)[0] == 303


def test_a_foreign_token_opens_nothing(site: Make) -> None:
    place = site()
    person, thief = place.participant(), place.participant()
    fields = at(person, "say") | {"text": "x"}
    before = place.content()
    thief.cookie = f"{place.pages.cookie}={'0' * 32}"
    status, page = thief.send("say", fields)
    assert status == 403
    assert "not known here" in said(page)
    assert "I have read this" in thief.page()
    status, page = thief.request("GET", "/return/0000")
    assert status == 404
    assert "not known here" in said(page)
    nobody = place.participant()
    status, page = nobody.send("say", {"seal": place.pages._seal("", "say"), "text": "x", "number": "1"})
    assert status == 403
    assert "not begun" in said(page)
    assert place.content() == before


def test_a_megabyte_of_text_is_refused(site: Make) -> None:
    place = site()
    person = place.participant()
    fields = at(person, "say") | {"text": "x" * 2**20}
    before = place.content()
    status, page = person.send("say", fields)
    assert status == 413
    assert "too much" in said(page)
    status, page = person.request("POST", "/say", b"\xff&%FF=%FF" + b"&a=b" * 99)
    assert status == 400
    assert "cannot be read" in said(page)
    assert place.content() == before


def test_html_stays_text(site: Make) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\"'&amp;"
    place = site()
    person = place.participant()
    assert person.send("say", at(person, "say") | {"text": hostile})[0] == 303
    at(person, "say")
    page = person.page()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert unescape(page).count(hostile) == 2  # as it was said, and in the reply
    assert place.store.sessions()[0].turns[0].text == hostile
    _, refused = person.send("say", at(person, "say") | {"text": hostile, "number": "9"})
    assert "<script>alert" not in refused
    assert unescape(refused).count(hostile) == 1  # given back


def test_too_many_forms_in_a_minute_are_refused(site: Make) -> None:
    place = site()
    person, other = place.participant(), place.participant()
    fields = at(person, "say")
    statuses = [person.send("say", fields)[0] for _ in range(45)]
    assert set(statuses) == {400, 429}
    assert statuses.index(429) >= 35
    assert other.send("say", at(other, "say") | {"text": "x"})[0] == 303


def test_a_page_that_waits_loads_itself_again_where_there_is_no_javascript(site: Make) -> None:
    done = threading.Event()

    def respond(name: str, requests: Any, on_reply: Any) -> None:
        done.wait(60)
        on_reply(0, "there")

    place = site(respond)
    person = place.participant()
    person.send("say", at(person, "say") | {"text": "hello"})
    page = person.page()
    assert '<noscript><meta http-equiv="refresh"' in page
    assert "is writing" in page
    assert not person.forms(page)
    done.set()
    assert "there" in person.settled()
    assert "refresh" not in person.page()


def test_names_of_models_never_reach_the_browser(site: Make) -> None:
    place = site(mode="pairwise", models=("VANILLA-MODEL", "TUNED-MODEL"))
    person = place.participant()
    seen = []
    while person.take_step():
        seen += [person.page(), person.page("/state"), person.page("/leave")]
    assert len(seen) > 9
    assert not any("MODEL" in page for page in seen)


def test_what_should_always_be_in_sight_is_on_every_page(site: Make) -> None:
    place = site(pages={"most": 1})
    person = place.participant()
    pages = [person.page()]
    while person.take_step():
        pages += [person.page(), person.page("/leave"), person.send("say", {})[1]]
    pages.append(place.participant().send("begin", {"seal": place.pages._seal("", "begin")})[1])
    assert "all the participants" in said(pages[-1])
    for page in pages:
        assert "no counsellor" in page
        assert "findahelpline.com" in page
        assert 'href="/leave"' in page


def test_nothing_is_loaded_from_elsewhere(site: Make) -> None:
    place = site()
    person = place.participant()
    pages = [person.page(), person.page("/static/style.css"), person.page("/static/study.js")]
    while person.take_step():
        pages.append(person.page())
    for page in pages:
        loaded = re.findall(r"""(?:src|@import|url\(|fetch\()\s*=?\s*["']?([^"')\s>]+)""", page)
        loaded += re.findall(r'<link [^>]*href="([^"]+)"', page)
        assert all(target == "data:," or (target[0] == "/" and target[:2] != "//") for target in loaded), loaded


def test_headers_keep_the_pages_to_themselves(site: Make) -> None:
    place = site()
    person = place.participant()
    at(person, "say")
    for path in ("/talk", "/static/style.css", "/nowhere", "/state"):
        person.request("GET", path)
        connection = person.connection
        assert connection is not None
        connection.request("GET", path, headers={"Cookie": person.cookie})
        response = connection.getresponse()
        response.read()
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    fresh = place.participant()
    fresh.page()
    assert fresh.connection is not None
    body = urlencode(fresh.forms(fresh.page())["begin"])
    fresh.connection.request("POST", "/begin", body)
    cookie = fresh.connection.getresponse().headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "secure" not in cookie


def test_who_stops_is_left_alone_and_who_deletes_is_gone(site: Make) -> None:
    place = site()
    person, other = place.participant("the first"), place.participant("the second")
    at(person, "say")
    person.take_step()
    at(other, "say")
    other.take_step()
    assert person.send("stop", person.forms(person.page("/leave"))["stop"])[0] == 303
    assert "You have stopped" in person.page()
    assert [session.state for session in place.store.sessions()] == ["stopped", "talking"]
    assert person.send("say", {"seal": place.pages._seal(person.token, "say"), "number": "2", "text": "x"})[0] == 409
    cookie = person.cookie
    status, page = person.send("delete", person.forms(person.page("/leave"))["delete"])
    assert status == 200
    assert "has been deleted" in said(page)
    person.cookie = cookie
    assert "I have read this" in person.page()
    assert [session.turns[0].text[-40:] for session in place.store.sessions()] == [
        "of the second: I had a hard day at work."[-40:]
    ]
    folder = place.store.folder
    stored = b"".join(path.read_bytes() for path in folder.glob("study.db*"))
    assert b"the first" not in stored  # nor in what SQLite has freed
    assert b"the second" in stored
    newcomer = place.participant()
    at(newcomer, "say")
    assert sorted(session.place for session in place.store.sessions()) == [0, 1]  # the free place is taken


def test_only_who_is_invited_takes_part_where_that_is_asked_for(site: Make) -> None:
    place = site(pages={"is_open": False})
    (token,) = place.store.invite(1)
    stranger, guest = place.participant(), place.participant()
    assert "begin" not in stranger.forms(stranger.page())
    status, page = stranger.send("begin", {"seal": place.pages._seal("", "begin")})
    assert status == 403
    assert "invited" in said(page)
    assert guest.request("GET", f"/return/{token}")[0] == 303
    assert guest.token == token
    while guest.take_step():
        pass
    assert [session.state for session in place.store.sessions()] == ["finished"]


def test_a_participant_may_have_several_conversations_with_different_models(site: Make) -> None:
    place = site(models=("M0", "M1", "M2"), conversations=3)
    for _ in range(2):
        person = place.participant()
        while person.take_step():
            pass
    sessions = place.store.sessions()
    assert [session.state for session in sessions] == ["finished"] * 6
    for participant in (1, 2):
        own = {place.store.settings.unit(s.place) for s in sessions if s.participant == participant}
        assert len(own) == 3


def test_a_scenario_is_shown_where_the_study_has_some(site: Make) -> None:
    place = site(scenarios=("Your friend <moves> away.",))
    person = place.participant()
    at(person, "say")
    assert "Your friend &lt;moves&gt; away." in person.page()


def test_the_benchmark_counts_what_was_stored() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "participants.py"
    command = [sys.executable, str(script), "--participants", "2", "--turns", "2", "--pause", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"95th percentile \d+ ms", done.stdout)
    assert "2 of 2 finished, 4 turns stored" in done.stdout
