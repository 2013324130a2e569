"""An OpenAI-compatible chat endpoint that answers conversations (the optional extra ``judge``).

Every answer is kept on disk under a hash of its whole request: asking again costs nothing, and a killed run goes on
where it was. A failure is an ``Answer`` without text that says why; it is never kept.
"""

from __future__ import annotations

import json
import math
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from tqdm import tqdm

from selfevo.dialogue import Messages
from selfevo.evaluation.ask_json import Answer, request_hash
from selfevo.evaluation.completion import is_filtered, out_of_quota, read_completion, server_words
from selfevo.files import Fields, FileError, append_jsonl, resume_jsonl

KEY_VARIABLES = ("SELFEVO_API_KEY", "OPENAI_API_KEY")  # where the endpoint's key is looked up
OMIT = "omit"  # in place of a parameter's value: it is not sent
_FATAL = {401, 402, 403, 404, 405, 407}  # the address, the model, the key or the account: no request can succeed
_OWN = ("messages", "model", "stream", "n")  # what a request is made of, and what would change the form of its answer
_ITS_OWN = ("content_filter", "refusal", "empty", "cut_at_limit")  # failures that depend on the conversation
# Words about a parameter that no request may have; not those about a conversation that is too long for max_tokens.
_UNSUPPORTED = re.compile(
    r"(un|not )(supported|recognized|permitted|allowed|expected|known)|unknown (name|param|arg|field)"
    r"|unexpected keyword|does ?n[o']t (support|accept)|extra (inputs|fields)|cannot both|mutually exclusive",
    re.IGNORECASE,
)
_LONGEST = 300  # characters of a server's words


class EndpointError(ValueError):
    """An endpoint that cannot answer; the message says what was requested, what came back and what to check."""


class Address(NamedTuple):
    """The address of an endpoint in its parts. ``url`` is the one to show; what else there was is secret."""

    url: str
    login: tuple[str, str] | None
    query: dict[str, str]

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ValueError, without the URL's secrets, for one that is no HTTP address."""
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not host.isprintable() or " " in host:
            shown = url.strip() if "@" not in url and "?" not in url else "it"
            raise ValueError(f"the endpoint's URL should begin with http:// or https:// and a host, {shown!r} does not")
        name = f"[{host}]" if ":" in host else host
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        shown = urlunsplit((parts.scheme, name if port is None else f"{name}:{port}", path, "", ""))
        login = None
        if parts.username or parts.password:
            login = (unquote(parts.username or ""), unquote(parts.password or ""))
        return cls(shown, login, dict(parse_qsl(parts.query)))


@dataclass(frozen=True)
class EndpointSettings:
    """The decoding values are the paper's for its judge; ``timeout`` is in seconds, for each of the ``tries``.

    ``parameters`` are sent with every request as they are, and replace those of the same name here; ``"omit"`` leaves
    one out.
    """

    url: str = field(repr=False)
    model: str
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50  # 0 does not send it; a server that refuses it is asked without
    max_tokens: int = 768
    concurrency: int = 8
    tries: int = 6
    timeout: float = 120.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, least in (("temperature", 0), ("top_p", 0), ("top_k", 0), ("timeout", 0.001)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ValueError(f"{name} must be a number of at least {least}, not {getattr(self, name)}")
        Address.of(self.url)
        for name, value in self.parameters.items():
            if name in _OWN:
                raise ValueError(f"the parameter {name} is not free: it would change what is asked, or the answer")
            if value == OMIT and name not in ("temperature", "top_p", "top_k", "max_tokens"):
                raise ValueError(f"the parameter {name} is not sent anyway; omit leaves out what is")

    @property
    def body(self) -> dict[str, Any]:
        """What every request holds besides its messages."""
        own = {name: getattr(self, name) for name in ("model", "temperature", "top_p", "max_tokens")}
        own |= {"top_k": self.top_k} if self.top_k else {}
        return {name: value for name, value in (own | dict(self.parameters)).items() if value != OMIT}


def read_parameters(given: Sequence[str]) -> dict[str, Any]:
    """Parameters given as ``NAME=VALUE``; a value is JSON where it can be, else a text. Raises ValueError."""
    found: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        name = name.strip()
        if not equals or not name or name in found:
            raise ValueError(f"a parameter is NAME=VALUE or NAME={OMIT}, each name once, not {entry!r}")
        try:
            found[name] = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            found[name] = value.strip()
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class Endpoint:
    """A chat endpoint, such as ``https://api.openai.com/v1`` or a vLLM server, with its cache of answers.

    The key is read from SELFEVO_API_KEY or OPENAI_API_KEY, a login from the URL; neither is ever shown or kept.
    ``concurrency`` requests run at a time. The ``openai`` client repeats what may succeed later (time-outs, broken
    connections, 408, 409, 429 and 5xx), after pauses that double or as long as Retry-After says, up to two minutes.
    Raises EndpointError where no request can succeed: the client is not installed, the address, the key, the account
    or the model is refused, the server redirects to another one, or too many requests in a row fail.
    """

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        try:
            import openai

            from selfevo.evaluation.bounded_http import BoundedClient
        except ImportError as error:
            raise EndpointError("an endpoint needs the openai client: pip install 'selfevo[judge]'") from error
        address, key = Address.of(settings.url), _key()
        self.settings, self.url = settings, address.url
        self._secrets = _secrets(key, address)
        try:
            self._http = BoundedClient(timeout=settings.timeout, auth=address.login)
            self._client = openai.OpenAI(
                base_url=address.url, api_key=key or "none", timeout=settings.timeout, max_retries=settings.tries - 1,
                default_query=address.query, http_client=self._http,
            )  # fmt: skip
        except (ValueError, ImportError, OSError) as error:  # a proxy of the environment, certificates
            raise EndpointError(f"{self.url}: no client can be made ({self._shown(str(error))})") from None
        self._body = settings.body
        self._kinds: dict[str, tuple[int, str]] = {}  # failures: how many, and the server's words for the first
        self._failed_in_a_row = 0
        self._cache = cache
        self._answers: dict[str, Answer] = {}
        for index, record in enumerate(resume_jsonl(cache)):
            try:
                fields = Fields(record, f"record {index}")
                answer = Answer(fields.take("text", str), fields.take("error", str), kept=True)
                self._answers[fields.take("key", str)] = answer
            except FileError as error:
                raise FileError(f"{cache}: holds no answers of an endpoint ({error}); move the file away") from error

    @property
    def name(self) -> str:
        return self.settings.model

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        """An answer to each conversation, in order; another ``attempt`` does not take what earlier ones have kept."""
        keys = [self._key(messages, attempt) for messages in conversations]
        missing = {key: messages for key, messages in zip(keys, conversations) if key not in self._answers}
        failed: dict[str, Answer] = {}
        self._http.aborted = False
        with (
            tqdm(total=len(keys), initial=len(keys) - len(missing), desc=label or self.name, unit="answer") as bar,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
        ):
            futures = {pool.submit(self._ask, messages): key for key, messages in missing.items()}
            try:
                for count, future in enumerate(as_completed(futures), start=1):
                    key, answer = futures[future], future.result()
                    if answer.text is None:
                        failed[key] = answer
                        self._note(answer, nobody_listens=len(failed) == count == len(futures))
                    else:
                        self._failed_in_a_row = 0
                        append_jsonl(self._cache, {"key": key, "text": answer.text, "error": answer.error})
                        self._answers[key] = answer
                    bar.update()
            except BaseException:  # an error or the user ends it: what has not begun is not sent, the rest is cut
                pool.shutdown(wait=False, cancel_futures=True)
                self._http.abort()
                raise
        return [self._answers.get(key) or failed[key] for key in keys]

    def check(self) -> None:
        """A short request before long work that needs the endpoint: raises EndpointError where no other can succeed."""
        answer = self._ask([{"role": "user", "content": "Answer with yes."}])
        if answer.text is None:
            self._note(answer, nobody_listens=True)

    def remarks(self) -> list[str]:
        """A sentence for each kind of failure so far: how often, and what the server said at the first of them."""
        found = [
            f"{self.name}: {kind}, {count} {'time' if count == 1 else 'times'}{f': {said}' if said else ''}"
            for kind, (count, said) in self._kinds.items()
        ]
        if "top_k" in self.settings.body and "top_k" not in self._body:
            found.append(f"{self.name}: asked without top_k, which the server refuses")
        return found

    def _note(self, answer: Answer, *, nobody_listens: bool) -> None:
        """Counts a failure. Raises EndpointError where the next requests would fail likewise."""
        kind = answer.error
        count, said = self._kinds.get(kind, (0, answer.said))
        self._kinds[kind] = (count + 1, said)
        if kind in _ITS_OWN:
            return
        self._failed_in_a_row += 1
        if (nobody_listens and kind == "connection") or self._failed_in_a_row >= 2 * self.settings.concurrency:
            check = "check its parts (servers differ: /v1, /api/v3, ...), the model's name and the parameters"
            if kind in ("connection", "timeout"):
                check = "is the server running, and is this its address?"
            raise EndpointError(
                f"{self.url}: {self._failed_in_a_row} requests in a row without an answer, the last with {kind!r}"
                f"{self._quoted(answer.said)}; {check}"
            )

    def _key(self, messages: Messages, attempt: int) -> str:
        asked = {"messages": [dict(message) for message in messages], "attempt": attempt, "url": self.url}
        return request_hash(asked | self.settings.body)

    def _ask(self, messages: Messages) -> Answer:
        import httpx2
        import openai

        from selfevo.evaluation.bounded_http import OutOfBoundsError

        sent = self._body
        try:
            body = {"messages": [dict(message) for message in messages], **sent}
            answer = read_completion(self._client.post("/chat/completions", cast_to=httpx2.Response, body=body).content)
        except openai.APIStatusError as error:
            status, said = error.status_code, server_words(error.response.content)
            if status in (400, 422) and "top_k" in said and "top_k" in sent and "top_k" not in self.settings.parameters:
                self._body = {name: value for name, value in sent.items() if name != "top_k"}
                return self._ask(messages)  # OpenAI's own servers do not know it
            answer = self._refused(status, said, error.response.content)
        except openai.APITimeoutError:
            answer = Answer(None, "timeout", f"nothing within {self.settings.timeout:g} seconds", final=True)
        except openai.APIConnectionError as error:
            answer = Answer(None, "connection", str(error.__cause__ or ""), final=True)
        except OutOfBoundsError as error:
            if error.reason == "redirect":
                raise EndpointError(
                    f"{self.url}: the server redirects to {self._shown(str(error))}, where nothing is sent; give that "
                    "address if it is the right one"
                ) from None
            answer = Answer(None, error.reason, str(error), final=True)
        except UnicodeEncodeError:
            answer = Answer(None, "half_a_surrogate_pair", "the conversation is no text", final=True)
        text = None if answer.text is None else self._hidden(answer.text)
        return replace(answer, text=text, said=self._shown(answer.said))

    def _refused(self, status: int, said: str, body: bytes) -> Answer:
        if is_filtered(status, said):
            return Answer(None, "content_filter", said, final=True)
        check = ""
        if status in _FATAL:
            check = f"check the URL, the model's name and the key ({' or '.join(KEY_VARIABLES)})"
        if status == 402 or (status == 429 and out_of_quota(body)):
            check = "the account has no quota left; the same command continues when it has"
        if status in (400, 422) and _UNSUPPORTED.search(said):
            named = [name for name in self._body if name not in _OWN and re.search(rf"\b{re.escape(name)}\b", said)]
            if named:
                check = f"leave {named[0]} out by --judge-parameter {named[0]}={OMIT}, or name another by NAME=VALUE"
        if check:
            raise EndpointError(
                f"{self.url} refuses {self.settings.model} (HTTP {status}{self._quoted(self._shown(said))}): {check}"
            )
        return Answer(None, f"http_{status}", said, final=True)

    def _quoted(self, said: str) -> str:
        return f': "{said}"' if said else ""

    def _shown(self, said: str) -> str:
        said = self._hidden(said)
        return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."

    def _hidden(self, text: str) -> str:
        """A text without the key and the login, which a server may send back."""
        return self._secrets.sub("[secret]", text)


def _key() -> str:
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if not key:
            continue
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise EndpointError(f"{name}: holds a space, a line break or a letter that no key has; set it anew")
        return key
    return ""


def _secrets(key: str, address: Address) -> re.Pattern[str]:
    """Matches what may not be shown, also percent-encoded, and the beginning of a long one."""
    whole = [key, *address.query.values()]
    if address.login is not None:
        name, password = address.login
        whole += [password or name, b64encode(":".join(address.login).encode()).decode()]
    found = {text for secret in whole for text in (secret, quote(secret, safe="")) if len(text) > 3}
    begun = {text[:8] for text in found if len(text) >= 16}
    patterns = [re.escape(text) for text in sorted(found, key=len, reverse=True)]
    patterns += [rf"{re.escape(text)}[\w*.-]*" for text in sorted(begun)]
    return re.compile("|".join(patterns) or r"(?!)")
