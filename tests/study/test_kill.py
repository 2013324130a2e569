"""SIGKILL of the server at random moments: what was acknowledged is stored, and every participant goes on."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvicorn
from participants import Participant

from selfevo.study.answer import Answerer
from selfevo.study.pages import Pages
from selfevo.study.plan import StudySettings
from selfevo.study.store import Store
from selfevo.study.texts import read_texts

PEOPLE, TURNS, KILLS = 6, 6, 10  # in each mode


def serve(folder: Path, mode: str, port: int) -> None:
    """The server, with a responder that takes its time."""

    def respond(name: str, requests: Any, on_reply: Any) -> None:
        for index, request in enumerate(requests):
            time.sleep(0.02)
            on_reply(index, f"{request.key} {request.context[-1].text}")

    texts = read_texts(folder / "texts")
    store = Store(folder, StudySettings(mode, ("M0", "M1"), TURNS, tuple(texts.aspects), ""))
    answerer = Answerer(store, respond)
    answerer.start()
    app = Pages(store, texts, answerer.wake, lambda text: True).app()
    listener = socket.create_server(("127.0.0.1", port))
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="critical")).run(sockets=[listener])


def start_when_asked(folder: str, mode: str, port: str) -> None:
    """Loads all modules once; each line of input then forks a server, whose process id is printed."""
    for _ in sys.stdin:
        if not (server := os.fork()):
            serve(Path(folder), mode, int(port))
            os._exit(0)
        print(server, flush=True)
        os.waitpid(server, 0)


def take_part(person: Participant) -> None:
    """From consent to thanks, with a server that is away now and then."""
    while True:
        try:
            if not person.take_step():
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.02)


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_kills_lose_no_acknowledged_answer(tmp_path: Path, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path), mode, str(port)]
    starter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert starter.stdin is not None
    assert starter.stdout is not None
    people = [Participant("127.0.0.1", port, f"person {number}") for number in range(PEOPLE)]
    threads = [threading.Thread(target=take_part, args=(person,), daemon=True) for person in people]
    rng, kills = Random(mode), 0

    def steps() -> int:
        return sum(len(person.acknowledged) for person in people)

    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        starter.stdin.write("\n")
        starter.stdin.flush()
        server = int(starter.stdout.readline())
        before, wanted = steps(), rng.randrange(1, 6) if kills < KILLS else 10**9
        while steps() < before + wanted and any(thread.is_alive() for thread in threads):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))  # in the midst of something
        os.kill(server, signal.SIGKILL)
        kills += 1
    starter.stdin.close()
    assert starter.wait(60) == 0
    assert kills > KILLS

    store = Store(tmp_path)
    sessions = {session.participant: session for session in store.sessions()}
    assert sum(session.state == "finished" for session in sessions.values()) == PEOPLE
    for person in people:
        number = store.participant(person.token)
        assert number is not None
        session = sessions[number]
        assert session.state == "finished"
        said = {turn.number: turn.text for turn in session.turns}
        votes = {turn.number: turn.choice for turn in session.turns}
        kept = {turn.number: turn.kept for turn in session.turns}
        assert len(said) == TURNS
        for name, fields in person.acknowledged:
            turn = int(fields.get("number", 0))
            if name == "say":
                assert said[turn] == fields["text"]
            elif name == "vote":
                assert votes[turn] == fields["choice"]
            elif name == "keep":
                assert kept[turn] == fields["side"]
        # Replies are those of their turn, with the draws of their place: one that was lost was written again as it was.
        for exchange in session.turns:
            texts = list(exchange.replies.values())
            assert all(text is not None and text.endswith(exchange.text) for text in texts)
            assert len(set(texts)) == len(texts)
        if mode == "pointwise":
            assert set(session.scores.values()) == {4}
        assert session.comment == "Fine."
    store.close()


if __name__ == "__main__":
    start_when_asked(*sys.argv[1:])
