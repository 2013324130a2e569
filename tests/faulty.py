"""The frame of the fault catalogue (tests/faults/): broken files, and what has to become of them.

A case is a call on an input that is wrong. It may give a value that the test then checks, as some damage changes
nothing, or refuse in one sentence that names the file and the place. A traceback, a hang and a wrong value fail.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

COUNTS: Counter[str] = Counter()  # cases by kind, of this process
HANG = 10  # seconds
# What Python, PyTorch and others say of their own insides, which no user can act on.
RAW = re.compile(
    r"\[Errno|object (is not|has no|cannot be|at 0x)|has no attribute|unhashable|not supported between|unpack \(|"
    r"positional argument|indices must be|argument must be|must be (str|int|a string|real number), not|<class |"
    r"Traceback|KeyError|TypeError|NoneType|unsupported operand|codec can't|Expecting value|size mismatch for|panicked"
)


class Hang(BaseException):
    """Nothing had come back after ``HANG`` seconds."""


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"a hang: nothing after {HANG} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_sentence(text: str, *mentions: str) -> None:
    """One line that begins with words of ours, mentions what it should and quotes no insides."""
    assert text.strip(), "an error without a word"
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    assert len(text) < 1500, f"{len(text)} characters: {text[:300]!r}"
    assert not RAW.search(text), f"raw: {text!r}"
    for mention in mentions:
        assert mention in text, f"{mention!r} is not mentioned: {text!r}"


def assert_one_sentence(
    call: Callable[[], Any], *mentions: str, kind: str, check: Callable[[Any], object] | None = None
) -> str:
    """Runs ``call`` and counts it under ``kind``: it has to refuse in one sentence with all ``mentions``, or, with a
    ``check``, to give a value that the check accepts: it asserts, or returns whether the value is right. Returns the
    sentence, empty for a value."""
    COUNTS[kind] += 1
    try:
        with alarm():
            value = call()
    except (ValueError, OSError, FloatingPointError) as error:
        check_sentence(str(error), *mentions)
        return str(error)
    except Exception as error:
        raise AssertionError(f"a traceback: {type(error).__name__}: {error}") from error
    assert check is not None, f"accepted: {value!r}"
    assert check(value) is not False, f"a wrong value: {value!r}"
    return ""


def assert_program_refuses(
    main: Callable[[], int],
    *argv: object,
    mentions: tuple[str, ...] = (),
    kind: str = "commands",
    may_succeed: bool = False,
) -> str:
    """Runs a command's ``main`` here, with these arguments: it has to end with exit code 1, or argparse's 2, and one
    ``error: ...`` on stderr. ``may_succeed`` also allows exit code 0. Returns what was written on stderr."""
    COUNTS[kind] += 1
    out, err = io.StringIO(), io.StringIO()
    arguments = mock.patch.object(sys, "argv", [main.__module__, *map(str, argv)])
    with arguments, alarm(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main()
        except SystemExit as stop:
            code = stop.code
    text = err.getvalue()
    if code == 0 and may_succeed:
        return text
    assert code in (1, 2), f"exit code {code}: {text}"
    assert "Traceback" not in text, text
    assert "fault of selfevo" not in text, text
    errors = [line for line in text.splitlines() if re.match(r"([\w.]+( \w+)?: )?error: ", line)]
    assert len(errors) == 1, text
    check_sentence(errors[0].partition("error: ")[2], *mentions)
    return text


def output(main: Callable[[], int], *argv: object) -> str:
    """What a command that has to succeed writes on stdout, run here with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    arguments = mock.patch.object(sys, "argv", [main.__module__, *map(str, argv)])
    with arguments, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main() == 0, err.getvalue()
    return out.getvalue()


def rounds(seed: int, count: int) -> Iterator[random.Random]:
    """``count`` generators of a fixed seed, each for one case; with SELFEVO_FUZZ_SECONDS, new ones for so long."""
    seconds = float(os.environ.get("SELFEVO_FUZZ_SECONDS", "0"))
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until if seconds else number < count:
        yield random.Random(f"{seed} {number}")
        number += 1


# JSON texts that are wrong wherever an object with other content is expected, and often wherever a scalar is.
WRONG_VALUES: dict[str, str] = {
    "null": "null", "true": "true", "false": "false", "zero": "0", "minus one": "-1", "half": "0.5",
    "empty text": '""', "text": '"x"', "path": '"../../x"', "newline": '"a\\nb"', "surrogate": '"\\ud800"',
    "number as text": '"3"', "list": "[]", "list of lists": "[[]]", "list of objects": "[{}]", "object": "{}",
    "nested object": '{"a": {"b": []}}', "NaN": "NaN", "infinity": "Infinity", "minus infinity": "-Infinity",
    "beyond float": "1e999", "large float": "1e300", "tiny": "1e-320", "huge": "9" * 30, "minus huge": "-" + "9" * 30,
    "beyond int64": str(2**63), "large": str(10**9), "too long": "9" * 5000, "deep": "[" * 100_000 + "]" * 100_000,
}  # fmt: skip


def _special(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Puts something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


# Damage to a whole text file (JSON or JSON lines) in place: nothing of its content can be read any more.
BROKEN: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": _rewritten(lambda data: b""),
    "blank": _rewritten(lambda data: b" \n\t\n"),
    "half": _rewritten(lambda data: data[: len(data) // 2]),
    "first byte": _rewritten(lambda data: data[:1]),
    "zeros": _rewritten(lambda data: bytes(len(data))),
    "not UTF-8": _rewritten(lambda data: data[: len(data) // 2] + b"\xff\xfe\x80" + data[len(data) // 2 :]),
    "UTF-16": _rewritten(lambda data: data.decode().encode("utf-16")),
    "binary": _rewritten(lambda data: bytes(range(256)) * 4),
    "a zip": _rewritten(lambda data: b"PK\x03\x04" + data),
    "deep lists": _rewritten(lambda data: b"[" * 100_000),
    "deep objects": _rewritten(lambda data: b'{"a":' * 100_000),
    "long number": _rewritten(lambda data: b"9" * 5000),
    "a list": _rewritten(lambda data: b"[]"),
    "null": _rewritten(lambda data: b"null"),
    "a text": _rewritten(lambda data: b'"text"'),
    "a number": _rewritten(lambda data: b"3"),
    "NaN": _rewritten(lambda data: b"NaN"),
    "trailing": _rewritten(lambda data: data + b"}"),
    "twice": _rewritten(lambda data: data + data),
    "HTML": _rewritten(lambda data: b"<!DOCTYPE html><html>Not found</html>"),
    "LFS pointer": _rewritten(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "fifo": _special(os.mkfifo),
    "folder": _special(Path.mkdir),
    "device": _special(lambda path: path.symlink_to("/dev/zero")),
    "terminal": _special(lambda path: path.symlink_to("/dev/tty")),
    "loop": _special(lambda path: path.symlink_to(path.name)),
    "dangling": _special(lambda path: path.symlink_to("nowhere")),
}
# Damage that may leave the content as it is, or refuse.
ODD: dict[str, Callable[[Path], None]] = {
    "BOM": _rewritten(lambda data: b"\xef\xbb\xbf" + data),
    "CRLF": _rewritten(lambda data: data.replace(b"\n", b"\r\n")),
    "symlink": lambda path: path.rename(path.with_name("moved")) and path.symlink_to("moved"),
}


def flip_bits(data: bytes, rng: random.Random, count: int = 1) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> str:
    """The JSON text of ``value`` with one place, at any depth, replaced, removed, renamed or repeated."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                visit(inner[key])

    visit(value)
    holder, key = rng.choice(places)
    kind = rng.choice(("value", "value", "value", "value", "remove", "rename", "repeat", "wrap"))
    if kind == "value" or (isinstance(holder, list) and kind in ("rename", "remove")):
        mark = "\ufdd0 the mutated place"
        holder[key] = mark
        return json.dumps(value).replace(json.dumps(mark), rng.choice(list(WRONG_VALUES.values())))
    if kind == "remove":
        del holder[key]
    elif kind == "rename":
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "repeat":
        holder[key] = [holder[key]] * 3
    else:
        holder[key] = {"value": holder[key]}
    return json.dumps(value)


def no_space(*_: object, **__: object) -> None:
    """In place of a function that writes: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def copy_of(folder: Path, target: Path) -> Path:
    """A fresh copy of a valid folder to break; what was at ``target`` is removed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target
