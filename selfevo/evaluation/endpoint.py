"""Answers to conversations from an outside model: an OpenAI-compatible endpoint, or a local backbone.

Whatever was answered is kept on disk under a hash of the whole request, so asking again costs nothing and a killed run
goes on where it was. What fails is told, never guessed: an ``Answer`` without text says why.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled
from tqdm import tqdm

from selfevo.dialogue import Messages
from selfevo.evaluation.ask_json import Answer, request_hash
from selfevo.files import FileError

KEY_VARIABLES = ("SELFEVO_API_KEY", "OPENAI_API_KEY")  # where the endpoint's key is looked up
_AGAIN = {408, 409, 425, 429}  # statuses that may pass, besides those of 500 and above
_FATAL = {401, 403, 404, 405}  # the address, the model or the key is wrong: no request will do better
_LONGEST_PAUSE = 60.0  # seconds
_HTTP_ERROR: type[BaseException] = InferenceTimeoutError.__bases__[0]  # of the HTTP library below, whichever it is


class EndpointError(ValueError):
    """An endpoint that answers nothing; the message says what was asked and what came back."""


@dataclass(frozen=True)
class EndpointSettings:
    """The decoding values are the paper's for its judge. ``pause`` seconds, doubled each time, lie between tries."""

    url: str
    model: str
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 768
    concurrency: int = 8
    tries: int = 6
    timeout: float = 120.0
    pause: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint's URL should begin with http:// or https://, not {self.url!r}")


class Endpoint:
    """An OpenAI-compatible chat endpoint, such as ``https://api.openai.com/v1`` or a vLLM server, with its cache.

    The key is taken from SELFEVO_API_KEY or OPENAI_API_KEY. Requests run ``concurrency`` at a time; those that may
    succeed later (timeouts, broken connections, 429, 5xx, answers that are no JSON) are tried again after a pause that
    doubles, or as long as Retry-After says. Raises EndpointError where nothing can succeed: the address, the key or the
    model is refused, or no request at all got through.
    """

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        self.settings = settings
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        self._client = InferenceClient(base_url=settings.url, api_key=key or "none", timeout=settings.timeout)
        self._cache = AnswerCache(cache)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._succeeded = False
        self._failed = 0

    @property
    def name(self) -> str:
        return self.settings.model

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        keys = [self._key(messages, attempt) for messages in conversations]
        missing = {key: messages for key, messages in zip(keys, conversations) if self._cache.get(key) is None}
        failed: dict[str, Answer] = {}
        with tqdm(total=len(keys), initial=len(keys) - len(missing), desc=label or self.name, unit="answer") as bar:
            pool = ThreadPoolExecutor(self.settings.concurrency)
            try:
                futures = {pool.submit(self._ask, messages): key for key, messages in missing.items()}
                for future in as_completed(futures):
                    answer, key = future.result(), futures[future]
                    if answer.text is None:
                        failed[key] = answer
                    else:
                        self._cache.put(key, answer)
                    bar.update()
            finally:
                self._stopping.set()  # wakes those that pause, where an error or the user ends it all
                pool.shutdown(wait=True, cancel_futures=True)
                self._stopping.clear()
        return [self._cache.get(key) or failed[key] for key in keys]

    def _key(self, messages: Messages, attempt: int) -> str:
        decoding = {name: value for name, value in asdict(self.settings).items() if name not in _OF_TRANSPORT}
        return request_hash({"messages": [dict(m) for m in messages], "attempt": attempt} | decoding)

    def _ask(self, messages: Messages) -> Answer:
        """One conversation, tried until it is answered or the tries are used up."""
        answer = Answer(None, "not_asked")
        for number in range(self.settings.tries):
            answer, wait = self._ask_once(messages)
            self._watch(answer)
            if answer.text is not None or wait is None or number + 1 == self.settings.tries:
                break
            doubled = self.settings.pause * 2**number * random.uniform(0.5, 1.5)
            if self._stopping.wait(min(_LONGEST_PAUSE, max(wait, doubled))):
                break
        return answer

    def _ask_once(self, messages: Messages) -> tuple[Answer, float | None]:
        """An answer, and the least pause in seconds before another try; None where another try is of no use."""
        own = self.settings
        try:
            output = self._client.chat_completion(
                [dict(message) for message in messages], model=own.model, temperature=own.temperature,
                top_p=own.top_p, max_tokens=own.max_tokens,
            )  # fmt: skip
            choice = output.choices[0]
            text = choice.message.content
        except HfHubHTTPError as error:
            return self._refused(error)
        except OfflineModeIsEnabled as error:
            raise EndpointError(f"{own.url}: HF_HUB_OFFLINE=1 closes endpoints off, too; unset it") from error
        except TimeoutError:
            return Answer(None, "timeout"), 0.0
        except json.JSONDecodeError:
            return Answer(None, "not_json"), 0.0
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Answer(None, "malformed"), 0.0
        except (_HTTP_ERROR, OSError):
            return Answer(None, "connection"), 0.0
        if not isinstance(text, str):
            return Answer(None, "malformed"), 0.0
        return Answer(text, "cut_at_limit" if choice.finish_reason == "length" else ""), None

    def _refused(self, error: HfHubHTTPError) -> tuple[Answer, float | None]:
        status = error.response.status_code
        if status in _FATAL:
            hint = "check the URL, the model's name and the key (" + " or ".join(KEY_VARIABLES) + ")"
            raise EndpointError(f"{self.settings.url} refuses {self.settings.model} (HTTP {status}): {hint}") from error
        if status in _AGAIN or status >= 500:
            return Answer(None, f"http_{status}"), _retry_after(error.response.headers.get("retry-after", ""))
        return Answer(None, f"http_{status}"), None

    def _watch(self, answer: Answer) -> None:
        """Gives the endpoint up where nothing has ever come back, soon if there is no connection at all."""
        with self._lock:
            self._succeeded |= answer.text is not None
            self._failed += answer.text is None
            patience = 2 if answer.error == "connection" else self.settings.tries
            hopeless = not self._succeeded and self._failed >= patience * self.settings.concurrency
        if hopeless:
            raise EndpointError(
                f"{self.settings.url}: no answer to {self._failed} requests, the last with {answer.error!r}; "
                "is the server running?"
            )


_OF_TRANSPORT = ("concurrency", "tries", "timeout", "pause")  # settings that do not change an answer


def _retry_after(value: str) -> float:
    """Seconds; 0 for a date or nonsense, which the doubling pause then covers."""
    try:
        return max(0.0, float(value))
    except ValueError:
        return 0.0


class AnswerCache:
    """Answers by key, one line each, appended as they come; a last line that a kill has torn is forgotten.

    Raises FileError for a file of another kind, which is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        *lines, torn = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines, start=1):
            try:
                record: dict[str, Any] = json.loads(line)
                self._answers[record["key"]] = Answer(record["text"], record["error"])
            except (ValueError, KeyError, TypeError) as error:
                raise FileError(f"{path}, line {number}: is no cached answer; move the file away") from error
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        line = json.dumps({"key": key, "text": answer.text, "error": answer.error}) + "\n"
        with self._lock:
            self._answers[key] = answer
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
