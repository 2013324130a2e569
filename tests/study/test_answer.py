"""Replies: as the run samples them, of each model, in one batch; and the command that serves a study."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from participants import Participant, together

from selfevo.dialogue import Turn, to_messages
from selfevo.evolve import EvolveConfig, load_backbone, read_settings
from selfevo.generate import generate
from selfevo.lora import load_adapter
from selfevo.study.answer import Models, Request
from selfevo.study.store import Store

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "data" / "run-0.1"  # of the embedded backbone, with models M0 and M1


def test_each_model_answers_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = read_settings(RUN, EvolveConfig)
    settings = config.replies.seeded(0, "study")
    system = config.replies.prompts.system
    adapters = {"vanilla": None, "M0": RUN / "M0", "M1": RUN / "M1"}
    models = Models(*load_backbone(config.backbone), adapters, settings, system)
    talks = [(Turn("seeker", text),) for text in ("I feel sad.", "I lost my job.", "My cat is ill.")]
    for name in ("M0", "vanilla", "M1", "M0"):
        found: dict[int, str] = {}
        models.respond(name, [Request(talk, 7 + n) for n, talk in enumerate(talks)], found.__setitem__)
        model, tokenizer = load_backbone(config.backbone)
        if adapters[name] is not None:
            load_adapter(model, adapters[name])  # type: ignore[arg-type]
        for place, talk in enumerate(talks):
            prompt = tokenizer.encode_chat(to_messages(talk, system))
            (ids,) = generate(
                model, [prompt], max_new_tokens=settings.max_new_tokens, stop_ids=tokenizer.stop_ids, keys=[7 + place],
                **vars(settings.sampling),
            )  # fmt: skip
            assert found[place] == tokenizer.decode(ids).strip()


def test_what_leaves_no_room_for_a_reply_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = read_settings(RUN, EvolveConfig)
    models = Models(*load_backbone(config.backbone), {}, config.replies, config.replies.prompts.system)
    assert models.fits("I feel sad.")
    assert not models.fits("𝔵" * 2000)


def test_those_who_wait_for_one_model_are_answered_in_one_batch(site: Callable[..., Any]) -> None:
    batches: list[int] = []

    def respond(name: str, requests: Sequence[Request], on_reply: Callable[[int, str], None]) -> None:
        while not batches and len(place.store.waiting()) < 8:  # at first all the others arrive meanwhile
            time.sleep(0.01)
        batches.append(len(requests))
        for index in range(len(requests)):
            on_reply(index, f"{name} {requests[index].key}")

    place = site(respond, models=("M0",))
    together([place.participant(str(number)) for number in range(8)])
    assert sum(batches) == 16
    assert batches[0] + batches[1] == 8
    replies = [turn.replies["A"] for session in place.store.sessions() for turn in session.turns]
    assert len(set(replies)) == 16  # each with a key of its own


def test_an_error_of_the_model_is_told_and_the_reply_written_again(
    site: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("selfevo.study.answer.RETRY", 0.05)
    errors = [RuntimeError("out of memory")]

    def respond(name: str, requests: Sequence[Request], on_reply: Callable[[int, str], None]) -> None:
        if errors:
            raise errors.pop()
        on_reply(0, "there")

    place = site(respond)
    together([place.participant()])
    assert [session.state for session in place.store.sessions()] == ["finished"]
    assert "out of memory" in capsys.readouterr().err


def test_the_command_serves_a_run_and_goes_on_with_its_study(tmp_path: Path) -> None:
    def serve(mode: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "examples/study.py", "serve", str(RUN), "--mode", mode, "--models", "M0", "M1"]
        command += ["--out", str(tmp_path / mode), "--port", "0", "--turns", "2", *more]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
        )  # fmt: skip

    for mode in ("pointwise", "pairwise"):
        process = serve(mode, *(["--invitations", "--participants", "2"] if mode == "pairwise" else []))
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.rpartition(":")[2])
        people = [Participant("127.0.0.1", port, str(number)) for number in range(2)]
        if mode == "pairwise":
            links = (tmp_path / mode / "invitations.txt").read_text().split()
            for person, link in zip(people, links, strict=True):
                assert person.request("GET", link.partition(str(port))[2])[0] == 303
        assert (tmp_path / mode).stat().st_mode & 0o077 == 0  # for the researcher alone
        together(people)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        store = Store(tmp_path / mode)
        assert [session.state for session in store.sessions()] == ["finished"] * 2
        assert all(text for s in store.sessions() for turn in s.turns for text in turn.replies.values())
        store.close()
    refused = serve("pairwise", "--seed", "1")
    assert refused.wait(60) == 1
    assert refused.stderr is not None
    assert "was begun with seed 0, now it is 1" in refused.stderr.read()
