"""The pages of a study (Starlette): forms made on the server, which work without JavaScript.

What a page shows follows from the database alone, so a reload, another tab or a restart of the server shows the same.
Names of models never reach the browser. Nothing is loaded from elsewhere, and no form is taken from another site.
"""

from __future__ import annotations

import hmac
import time
import unicodedata
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfevo.study.plan import MOST_TURNS, POINTWISE, SIDES
from selfevo.study.store import HIGHEST, LOWEST, RefusedError, Session, Store
from selfevo.study.texts import Texts

Fields = Mapping[str, str]  # of a form
COOKIE_AGE = 180 * 24 * 3600  # seconds
MOST_CHARACTERS = 2000  # of what a participant writes at once
MOST_BYTES = 32 * 1024  # of a form, in which a character may take 12
MOST_DISCARDED = 8 * 2**20  # read of a form that is too large, so that the browser gets to hear of it
RATE, PERIOD = 40, 60.0  # forms that a participant may send in so many seconds
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass
class Pages:
    """The pages over a store. ``wake`` is called when somebody waits for a reply, ``fits`` says whether a text leaves
    room for one. Unless the study ``is_open`` only those who were invited take part; ``most`` limits how many there
    are. ``url`` is the address that participants open; where it begins with https, their cookies are encrypted ones."""

    store: Store
    texts: Texts
    wake: Callable[[], None]
    fits: Callable[[str], bool]
    is_open: bool = True
    most: int = 50
    url: str = "http://127.0.0.1:8000"
    _sent: dict[int, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Browsers send cookies to all ports of a host, so that two studies there need two names.
        self.cookie = f"study-{sha256(self.store.secret).hexdigest()[:8]}"
        self._templates = Environment(
            loader=PackageLoader("selfevo.study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._templates.policies["urlize.rel"] = "noopener noreferrer"

    def app(self) -> ASGIApp:
        steps = {
            "say": self.say, "vote": self.vote, "keep": self.keep, "end": self.end, "rate": self.rate,
            "next": self.next, "stop": self.stop,
        }  # fmt: skip
        routes: list[Route | Mount] = [
            Route("/", self.home),
            Route("/talk", self.talk),
            Route("/state", self.state),
            Route("/leave", self.leave),
            Route("/return/{token}", self.come_back),
            Route("/begin", self.begin, methods=["POST"]),
            Route("/delete", self.delete, methods=["POST"]),
            *(Route(f"/{name}", self._form(name, step), methods=["POST"]) for name, step in steps.items()),
            Mount("/static", StaticFiles(packages=[("selfevo.study", "static")])),
        ]
        handlers: Any = {HTTPException: _no_page, RefusedError: self._refused, Exception: self._failed}
        return _with_headers(Starlette(routes=routes, exception_handlers=handlers))

    # What is shown

    def home(self, request: Request) -> Response:
        _, participant = self._who(request)
        if participant is not None and self.store.session(participant) is not None:
            return RedirectResponse("/talk", 303)
        return self._page(request, "consent.html", may_begin=self.is_open or participant is not None)

    def talk(self, request: Request) -> Response:
        _, participant = self._who(request)
        session = None if participant is None else self.store.session(participant)
        if participant is None or session is None:
            return RedirectResponse("/", 303)
        settings = self.store.settings
        return self._page(
            request, "talk.html", session=session, version=_version(session), settings=settings,
            scenario=settings.scenario(session.place), more=self.store.more(participant),
            pointwise=settings.mode == POINTWISE, sides=SIDES, scale=range(LOWEST, HIGHEST + 1), most_turns=MOST_TURNS,
        )  # fmt: skip

    def state(self, request: Request) -> Response:
        """What an open page waits to see change."""
        _, participant = self._who(request)
        session = None if participant is None else self.store.session(participant)
        return JSONResponse({"version": "" if session is None else _version(session)})

    def leave(self, request: Request) -> Response:
        _, participant = self._who(request)
        session = None if participant is None else self.store.session(participant)
        may_stop = session is not None and session.state in ("talking", "rating")
        return self._page(request, "leave.html", known=participant is not None, may_stop=may_stop)

    def come_back(self, request: Request) -> Response:
        """An invitation, or a participant's own link, on this device or another one."""
        token = request.path_params["token"]
        if self.store.participant(token) is None:
            raise RefusedError("This link is not known here. Was it copied in full? Have its data been deleted?", 404)
        return self._with_cookie(token, "/")

    # What participants do: each step gets the fields of its form, and page and browser go on from what is stored

    async def begin(self, request: Request) -> Response:
        token, participant, _ = await self._checked(request, "begin")
        if participant is None and not self.is_open:
            raise RefusedError("Only who is invited can take part. Please open the link that you were sent.", 403)
        given = None if participant is None else token
        return self._with_cookie(await run_in_threadpool(self.store.begin, given, self.most), "/talk")

    async def delete(self, request: Request) -> Response:
        _, participant, _ = await self._checked(request, "delete")
        await run_in_threadpool(self.store.delete, self._known(participant))
        response = self._message(request, "Deleted", "All that you wrote and chose has been deleted.", 200)
        response.delete_cookie(self.cookie)
        return response

    def say(self, participant: int, fields: Fields) -> None:
        text = _text(fields, "text")
        if not text:
            raise RefusedError("Please write something first.", 400)
        if not self.fits(text):
            raise RefusedError("The program cannot take in so much at once. Please say it in fewer words.", 400)
        self.store.say(participant, _number(fields), text)
        self.wake()

    def vote(self, participant: int, fields: Fields) -> None:
        self.store.vote(participant, _number(fields), fields.get("choice", ""))

    def keep(self, participant: int, fields: Fields) -> None:
        self.store.keep(participant, _number(fields), fields.get("side", ""))

    def end(self, participant: int, fields: Fields) -> None:
        self.store.end(participant)

    def rate(self, participant: int, fields: Fields) -> None:
        given = {name.removeprefix("score "): value for name, value in fields.items() if name.startswith("score ")}
        scores = {aspect: int(score) if score in "12345" and score else 0 for aspect, score in given.items()}
        self.store.rate(participant, scores, _text(fields, "comment"))

    def next(self, participant: int, fields: Fields) -> None:
        self.store.next_conversation(participant)

    def stop(self, participant: int, fields: Fields) -> None:
        self.store.stop(participant)

    # How requests are checked and answered

    def _who(self, request: Request) -> tuple[str, int | None]:
        """The token that a browser holds, and whose it is: "" and None where it is nobody's."""
        token = request.cookies.get(self.cookie, "")
        participant = self.store.participant(token) if token else None
        return ("", None) if participant is None else (token, participant)

    def _seal(self, token: str, name: str) -> str:
        """What a form carries so that no other site can have made it: bound to the participant and to the form."""
        return hmac.new(self.store.secret, f"{name} {token}".encode(), "sha256").hexdigest()

    async def _checked(self, request: Request, name: str) -> tuple[str, int | None, Fields]:
        """Token, participant and fields of a form that came from our own page, is of a bounded size, and does not come
        too often. Raises RefusedError otherwise."""
        body = await _body(request)
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        hosts = (request.headers.get("host"), urlsplit(self.url).netloc)
        own = origin is None or urlsplit(origin).netloc in hosts
        try:
            parsed = parse_qs(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=32)
        except ValueError as error:
            raise RefusedError("This form cannot be read; nothing was changed.", 400) from error
        fields = {key: values[0] for key, values in parsed.items()}
        token, participant = await run_in_threadpool(self._who, request)
        if name != "begin" and self.cookie in request.cookies and not token:
            raise RefusedError("You are not known here; have your data been deleted? Nothing was changed.", 403)
        sealed = hmac.compare_digest(fields.get("seal", "").encode(), self._seal(token, name).encode())
        if not (own and sealed and site in ("same-origin", "none")):
            raise RefusedError("This form did not come from a page of yours here; nothing was changed.", 403)
        if participant is not None and self._too_often(participant):
            raise RefusedError("That was a lot at once. Please wait a minute; nothing was changed.", 429)
        return token, participant, fields

    def _too_often(self, participant: int) -> bool:
        now, sent = time.monotonic(), self._sent.setdefault(participant, deque())
        while sent and now - sent[0] > PERIOD:
            sent.popleft()
        sent.append(now)
        return len(sent) > RATE

    def _known(self, participant: int | None) -> int:
        if participant is None:
            raise RefusedError("You have not begun yet, or your data have been deleted.", 403)
        return participant

    def _form(self, name: str, step: Callable[[int, Fields], None]) -> Callable[[Request], Awaitable[Response]]:
        """The handler of one form."""

        async def handle(request: Request) -> Response:
            _, participant, fields = await self._checked(request, name)
            try:
                await run_in_threadpool(step, self._known(participant), fields)
            except RefusedError as error:  # what was written is given back
                written = fields.get("text", fields.get("comment", ""))
                return self._message(request, "Not accepted", str(error), error.status, written)
            return RedirectResponse("/talk#now", 303)

        return handle

    def _page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        token, _ = self._who(request)
        html = self._templates.get_template(name).render(
            texts=self.texts, seal=lambda form: self._seal(token, form), most_characters=MOST_CHARACTERS,
            link=f"{self.url}/return/{token}" if token else "", **values,
        )  # fmt: skip
        return HTMLResponse(html, status)

    def _message(self, request: Request, heading: str, message: str, status: int, written: str = "") -> Response:
        return self._page(request, "message.html", status, heading=heading, message=message, written=written)

    def _with_cookie(self, token: str, target: str) -> Response:
        response = RedirectResponse(target, 303)
        secure = self.url.startswith("https:")
        response.set_cookie(self.cookie, token, max_age=COOKIE_AGE, httponly=True, samesite="lax", secure=secure)
        return response

    async def _refused(self, request: Request, error: RefusedError) -> Response:
        return await run_in_threadpool(self._message, request, "Not accepted", str(error), error.status)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return PlainTextResponse("Something went wrong here. What was stored is still there: please load /talk.", 500)


def _version(session: Session) -> str:
    """Changes whenever the page of a conversation does."""
    return f"{session.id} {len(session.turns)} {session.step}"


def _number(fields: Fields) -> int:
    number = fields.get("number", "")
    if not (number.isascii() and number.isdigit() and len(number) < 4):
        raise RefusedError("This form does not say which turn it is about; nothing was changed.", 400)
    return int(number)


def _text(fields: Fields, name: str) -> str:
    """What was written, with plain line ends and no control characters. Raises RefusedError where it is too long."""
    text = fields.get(name, "").replace("\r\n", "\n")
    text = "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cs")).strip()
    if len(text) > MOST_CHARACTERS:
        raise RefusedError(f"Please write at most {MOST_CHARACTERS} characters; these are {len(text)}.", 400)
    return text


async def _body(request: Request) -> bytes:
    """The body of a request. Raises RefusedError where it is too large, once it has been read, up to a bound."""
    kept, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MOST_BYTES:
            kept += chunk
        elif size > MOST_DISCARDED:
            break
    if size > MOST_BYTES:
        raise RefusedError("That is far too much text; nothing was changed. Please send less.", 413)
    return bytes(kept)


async def _no_page(request: Request, error: HTTPException) -> Response:
    return PlainTextResponse("There is no such page here.", error.status_code)


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def with_headers(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await app(scope, receive, send_with_headers)

    return with_headers
