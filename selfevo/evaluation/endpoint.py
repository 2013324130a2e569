"""An OpenAI-compatible chat endpoint that answers conversations (the optional extra ``judge``).

Every answer is kept on disk under a hash of its whole request: asking again costs nothing, and a killed run goes on
where it was. A failure is an ``Answer`` without text that says why; it is never kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from selfevo.dialogue import Messages
from selfevo.evaluation.ask_json import Answer, request_hash
from selfevo.files import FileError, append_jsonl, resume_jsonl

if TYPE_CHECKING:
    import openai

KEY_VARIABLES = ("SELFEVO_API_KEY", "OPENAI_API_KEY")  # where the endpoint's key is looked up
_FATAL = {401, 403, 404, 405}  # the address, the model or the key is wrong: no other request can succeed


class EndpointError(ValueError):
    """An endpoint that cannot answer; the message says what was requested, what came back and what to check."""


@dataclass(frozen=True)
class EndpointSettings:
    """The decoding values are the paper's for its judge; ``timeout`` is in seconds, for each of the ``tries``."""

    url: str
    model: str
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50  # 0 does not send it; a server that refuses it is asked without
    max_tokens: int = 768
    concurrency: int = 8
    tries: int = 6
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint's URL should begin with http:// or https://, not {self.url!r}")


class Endpoint:
    """A chat endpoint, such as ``https://api.openai.com/v1`` or a vLLM server, with its cache of answers.

    The key is read from SELFEVO_API_KEY or OPENAI_API_KEY. ``concurrency`` requests run at a time. The ``openai``
    client repeats what may succeed later (time-outs, broken connections, 408, 409, 429 and 5xx), after pauses that
    double or as long as Retry-After says. Raises EndpointError where no request can succeed: the client is not
    installed, the address, the key or the model is refused, or the first requests all fail.
    """

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        try:
            import openai
        except ImportError as error:
            raise EndpointError("an endpoint needs the openai client: pip install 'selfevo[judge]'") from error
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "none")
        self.settings = settings
        self._client = openai.OpenAI(
            base_url=settings.url, api_key=key, timeout=settings.timeout, max_retries=settings.tries - 1
        )
        self._sends_top_k = settings.top_k > 0
        self._cache = cache
        try:
            self._answers = {r["key"]: Answer(r["text"], r["error"]) for r in resume_jsonl(cache)}
        except (KeyError, TypeError) as error:
            raise FileError(f"{cache}: holds no answers of an endpoint; move the file away") from error

    @property
    def name(self) -> str:
        return self.settings.model

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        """An answer to each conversation, in order; another ``attempt`` does not take what earlier ones have kept."""
        keys = [self._key(messages, attempt) for messages in conversations]
        missing = {key: messages for key, messages in zip(keys, conversations) if key not in self._answers}
        failed: dict[str, Answer] = {}
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
                        no_connection = answer.error == "connection" and count == len(futures)
                        if len(failed) == count and (no_connection or count >= 2 * self.settings.concurrency):
                            raise EndpointError(
                                f"{self.settings.url}: no answer to the first {count} requests, the last with "
                                f"{answer.error!r}; is the server running?"
                            )
                    else:
                        append_jsonl(self._cache, {"key": key, **asdict(answer)})
                        self._answers[key] = answer
                    bar.update()
            except BaseException:  # an error or the user ends it: what has not begun is not sent
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._answers.get(key) or failed[key] for key in keys]

    def _key(self, messages: Messages, attempt: int) -> str:
        own = self.settings
        return request_hash({
            "messages": [dict(message) for message in messages], "attempt": attempt, "url": own.url, "model": own.model,
            "temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k, "max_tokens": own.max_tokens,
        })  # fmt: skip

    def _ask(self, messages: Messages) -> Answer:
        import openai

        own, sends_top_k = self.settings, self._sends_top_k
        try:
            output = self._client.chat.completions.create(
                messages=[dict(message) for message in messages], model=own.model, temperature=own.temperature,  # type: ignore[misc]
                top_p=own.top_p, max_tokens=own.max_tokens, extra_body={"top_k": own.top_k} if sends_top_k else {},
            )  # fmt: skip
            choice = output.choices[0]
            text = choice.message.content
        except openai.BadRequestError as error:
            if sends_top_k and "top_k" in str(error):  # OpenAI's own servers do not know it
                self._sends_top_k = False
                return self._ask(messages)
            return Answer(None, f"http_{error.status_code}")
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APITimeoutError:
            return Answer(None, "timeout")
        except openai.APIConnectionError:
            return Answer(None, "connection")
        except json.JSONDecodeError:
            return Answer(None, "not_json")
        except (LookupError, TypeError, AttributeError):  # the client does not check the form of an answer
            return Answer(None, "malformed")
        if not isinstance(text, str):
            return Answer(None, "malformed")
        return Answer(text, "cut_at_limit" if choice.finish_reason == "length" else "")

    def _refused(self, error: openai.APIStatusError) -> Answer:
        if error.status_code in _FATAL:
            raise EndpointError(
                f"{self.settings.url} refuses {self.settings.model} (HTTP {error.status_code}): check the URL, the "
                f"model's name and the key ({' or '.join(KEY_VARIABLES)})"
            ) from error
        return Answer(None, f"http_{error.status_code}")
