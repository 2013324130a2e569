"""Many participants of a study at once: how long pages take that wait for no model, and how long replies take.

    python benchmarks/participants.py STUDY_URL [--participants 8]      against a study that is being served
    python benchmarks/participants.py                                   50 and a responder that answers at once

A participant is a browser without JavaScript: it fills in the forms that it is shown, until it is thanked. Against a
study with a model, one participant alone comes first, then as many as are asked for at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import random
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlencode, urlsplit

import uvicorn

from selfevo.study.answer import Answerer, Request
from selfevo.study.pages import Pages
from selfevo.study.plan import POINTWISE, StudySettings
from selfevo.study.store import Store
from selfevo.study.texts import read_texts

LOOK = 0.5  # seconds; the pages' script looks every 0.7
FORM = re.compile(
    r'<form method="post" action="/(\w+)">\s*<input type="hidden" name="seal" value="(\w+)">\s*'
    r'(?:<input type="hidden" name="number" value="(\d+)">)?'
)


@dataclass
class Participant:
    """Somebody with a browser. ``acknowledged`` are the steps that the server has accepted, with their fields."""

    host: str
    port: int
    name: str = "somebody"
    cookie: str = ""  # name=token
    acknowledged: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each request
    waits: list[float] = field(default_factory=list)  # for each reply, or pair of them
    pause: float = 0.0  # seconds at most before each step, at random
    look: float = 0.05  # seconds between two looks whether a reply is there
    connection: http.client.HTTPConnection | None = None

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
        """The status and the text of an answer; the cookie is kept. Raises OSError or HTTPException where the server
        is away."""
        headers |= {"Cookie": self.cookie} if self.cookie else {}
        if self.connection is None:
            self.connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        started = time.perf_counter()
        try:
            self.connection.request(method, path, body or None, headers)
            response = self.connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise
        self.seconds.append(time.perf_counter() - started)
        cookie = re.match(r"[\w-]+=\w*", response.headers.get("set-cookie", ""))
        self.cookie = cookie[0] if cookie else self.cookie
        return response.status, text

    @property
    def token(self) -> str:
        return self.cookie.partition("=")[2]

    def page(self, path: str = "/talk") -> str:
        """A page, redirections followed."""
        status, text = self.request("GET", path)
        return self.page("/") if status == 303 and path != "/" else text

    def settled(self) -> str:
        """The page of the conversation once no reply is waited for."""
        while 'data-waits="yes"' in (page := self.page()):
            time.sleep(self.look)
        return page

    def forms(self, page: str) -> dict[str, dict[str, str]]:
        """The hidden fields of the forms of a page, by name."""
        return {
            name: {"seal": seal} | ({"number": number} if number else {}) for name, seal, number in FORM.findall(page)
        }

    def send(self, name: str, fields: dict[str, str]) -> tuple[int, str]:
        status, text = self.request("POST", f"/{name}", urlencode(fields).encode())
        if status == 303:
            self.acknowledged.append((name, fields))
        return status, text

    def take_step(self) -> bool:
        """Fills in the first form of the page, or ends the conversation where that is offered; False once thanked."""
        started = time.perf_counter()
        page = self.settled()
        forms = self.forms(page)
        if not forms:
            return False
        waited = time.perf_counter() - started
        if self.pause:
            time.sleep(random.uniform(0, self.pause))
            if self.connection is not None:  # the server closes connections that rest, and a browser opens another one
                self.connection.close()
                self.connection = None
        if self.acknowledged and self.acknowledged[-1][0] == "say":
            self.waits.append(waited)
        name = "end" if "end" in forms else next(iter(forms))
        fields = dict(forms[name])
        if name == "say":
            fields["text"] = f"This is turn {fields['number']} of {self.name}: I had a hard day at work."
        elif name == "vote":
            fields["choice"] = ("A", "tie", "B")[int(fields["number"]) % 3]
        elif name == "keep":
            fields["side"] = "B"
        elif name == "rate":
            fields |= dict.fromkeys(re.findall(r'name="(score \w+)"', page), "4") | {"comment": "Fine."}
        self.send(name, fields)
        return True


def together(participants: Sequence[Participant]) -> None:
    """All of them from consent to thanks, at the same time."""

    def go(participant: Participant) -> None:
        time.sleep(random.uniform(0, participant.pause))  # they do not all arrive in the same millisecond
        while participant.take_step():
            pass

    threads = [threading.Thread(target=go, args=(participant,)) for participant in participants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def serving(pages: Pages, answerer: Answerer) -> Iterator[int]:
    """Serves pages from a thread, on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(pages.app(), access_log=False, log_level="warning", server_header=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    answerer.start()
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        answerer.end()


def answer_at_once(name: str, requests: Sequence[Request], on_reply: Callable[[int, str], None]) -> None:
    for index, request in enumerate(requests):
        on_reply(index, f"I hear you: {request.context[-1].text}")


def percentile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def tell(participants: Sequence[Participant], what: str) -> None:
    seconds = [value for one in participants for value in one.seconds]
    waits = [value for one in participants for value in one.waits]
    print(
        f"{what}: {len(seconds)} requests, 95th percentile {1000 * percentile(seconds, 95):.0f} ms, median "
        f"{1000 * percentile(seconds, 50):.0f} ms; {len(waits)} replies, waited for {percentile(waits, 50):.2f} s "
        f"(median), {percentile(waits, 95):.2f} s (95th percentile)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", metavar="STUDY_URL", help="a study that is being served")
    parser.add_argument("--participants", type=int, help="at once (default: 8, without a study 50)")
    parser.add_argument("--turns", type=int, default=8, help="of each, without a study (default: 8)")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds at most before each step (default: 10)")
    options = parser.parse_args()
    if options.url:
        address = urlsplit(options.url)
        host, port = address.hostname or "", address.port or 80
        for number in (1, options.participants or 8):
            group = [Participant(host, port, f"p{n}", pause=options.pause, look=LOOK) for n in range(number)]
            together(group)
            tell(group, f"{number} participants")
        return
    number = options.participants or 50
    with tempfile.TemporaryDirectory() as folder:
        texts = read_texts(Path(folder) / "texts")
        store = Store(Path(folder), StudySettings(POINTWISE, ("M0", "M1"), options.turns, tuple(texts.aspects), ""))
        answerer = Answerer(store, answer_at_once)
        with serving(Pages(store, texts, answerer.wake, lambda text: True, most=number), answerer) as port:
            group = [Participant("127.0.0.1", port, f"p{n}", pause=options.pause, look=LOOK) for n in range(number)]
            together(group)
        tell(group, f"{number} participants, answered at once")
        finished = sum(session.state == "finished" for session in store.sessions())
        print(f"{finished} of {number} finished, {sum(len(s.turns) for s in store.sessions())} turns stored")


if __name__ == "__main__":
    main()
