"""The HTTP client of an endpoint: answers bounded in time and size, and no address but the one that was given.

Imported only where the ``openai`` client is there, which brings httpx2.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import httpx2
import openai

from selfevo.evaluation.completion import out_of_quota, real_status

LARGEST_BODY = 2**22  # bytes of an answer, as it is sent and unpacked: a thousand times those of a judgement
PATIENCE = 2  # an answer may take so many times the time-out, while something comes


class OutOfBoundsError(openai.OpenAIError):
    """An answer that is given up; ``reason`` in a word, and in the message perhaps more. The client does not repeat
    such requests."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(said)
        self.reason = reason


class BoundedClient(httpx2.Client):
    """Reads every answer whole, before the openai client sees it.

    A connection is used once, so that it can be cut: by ``PATIENCE * timeout`` seconds, or by ``abort``. Redirects are
    followed within the same server only, and where the request stays what it is (307 and 308). An answer that says so
    in its body alone gets the status of the error it tells of, and one without quota is marked not to be repeated.
    """

    def __init__(self, *, timeout: float, auth: tuple[str, str] | None) -> None:
        super().__init__(
            timeout=timeout,
            auth=auth,
            headers={"Accept-Encoding": "identity"},
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        self._patience = PATIENCE * timeout
        self._under_way: set[_Watch] = set()
        self.aborted = False

    def abort(self) -> None:
        """Cuts all connections: what is under way fails at once, and is not repeated."""
        self.aborted = True
        for watch in list(self._under_way):
            watch.cut()

    def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        watch = _Watch()
        self._under_way.add(watch)
        timer = threading.Timer(self._patience, watch.cut)
        timer.daemon = True
        timer.start()
        try:
            return self._send(request, watch)
        except httpx2.TransportError as error:
            if self.aborted or watch.is_cut:
                raise OutOfBoundsError("stopped" if self.aborted else "timeout") from error
            raise
        finally:
            timer.cancel()
            self._under_way.discard(watch)

    def _send(self, request: httpx2.Request, watch: _Watch) -> httpx2.Response:
        for _ in range(3):
            request.extensions = {**request.extensions, "trace": watch.trace}
            response = super().send(request, stream=True, follow_redirects=False)
            try:
                body = _bounded_body(response)
            finally:
                response.close()
            following = response.next_request
            if following is None:
                return _amended(response, body)
            if following.method != request.method or not _same_server(request.url, following.url):
                raise OutOfBoundsError("redirect", str(following.url.copy_with(userinfo=b"", query=None)))
            request = following
        raise OutOfBoundsError("redirect", "itself, in a circle")


class _Watch:
    """The connection of one request."""

    def __init__(self) -> None:
        self.is_cut = False
        self._stream: Any = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpx around every step: the last stream made is the one that is read."""
        stream = info.get("return_value")
        if hasattr(stream, "get_extra_info"):
            self._stream = stream
        if self.is_cut:
            self.cut()

    def cut(self) -> None:
        """Ends what the connection waits for, in whatever thread: closing it would not."""
        self.is_cut = True
        made = None if self._stream is None else self._stream.get_extra_info("socket")
        if made is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(made, socket.SHUT_RDWR)


def _same_server(own: httpx2.URL, other: httpx2.URL) -> bool:
    if own.host != other.host:
        return False
    upgraded = (own.scheme, other.scheme) == ("http", "https") and own.port is other.port is None
    return upgraded or (own.scheme, own.port) == (other.scheme, other.port)


def _bounded_body(response: httpx2.Response) -> bytes:
    """The body, unpacked. Raises OutOfBoundsError where it is too large, or packed in a way that is not known."""
    parts, size = [], 0
    for part in response.iter_raw():
        parts.append(part)
        size += len(part)
        if size > LARGEST_BODY:
            raise OutOfBoundsError("too_large", f"more than {LARGEST_BODY} bytes")
    body, packing = b"".join(parts), response.headers.get("Content-Encoding", "").strip().lower()
    if packing in ("", "identity") or not body:
        return body
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise OutOfBoundsError("malformed", f"Content-Encoding: {packing}")
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        body = unpack.decompress(body, LARGEST_BODY + 1)
    except zlib.error as error:
        raise OutOfBoundsError("malformed", f"not {packing}, as it says ({error})") from error
    if len(body) > LARGEST_BODY:
        raise OutOfBoundsError("too_large", f"more than {LARGEST_BODY} bytes when unpacked")
    if not unpack.eof:
        raise OutOfBoundsError("malformed", f"{packing} that ends too early")
    return body


def _amended(response: httpx2.Response, body: bytes) -> httpx2.Response:
    """The same answer with its body read."""
    unpacked = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in unpacked]
    status = real_status(response.status_code, body)
    if status == 429 and out_of_quota(body):
        headers.append(("X-Should-Retry", "false"))
    return httpx2.Response(status, headers=headers, content=body, request=response.request)
