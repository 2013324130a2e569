"""Text, JSON and JSON lines on disk: a file is written whole or not at all, and a bad one is named in one sentence.

``Fields`` takes values out of a JSON object with their types and ranges checked. Only regular files are opened: a pipe
or a device in a file's place would be waited for, or never end.

A folder may have a ledger (``start_ledger``): every file that ``replace_file`` puts into it, or into its folders, is
entered there with its hash, so that ``check_ledger`` finds what was changed since. ``hold_folder`` keeps a folder to
one process.

Everything is UTF-8 and keeps non-ASCII characters readable. A line of JSON lines ends at a newline only: a text may
hold the other characters that Python takes for line ends (U+2028, U+0085).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import reprlib
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "Fields",
    "FileError",
    "StrPath",
    "append_jsonl",
    "check_ledger",
    "file_hash",
    "folder_hash",
    "hold_folder",
    "locate",
    "one_line",
    "read_bytes",
    "read_json",
    "read_jsonl",
    "read_object",
    "read_records",
    "read_tensor_shapes",
    "read_text",
    "replace_file",
    "resume_jsonl",
    "start_ledger",
    "write_json",
    "write_jsonl",
    "write_text",
]
StrPath = str | os.PathLike[str]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BLANK = " \t\r\n\ufeff"  # a byte order mark stands inside a file where others were joined to it
_NO_BLANK = re.compile(f"[^{_BLANK}]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust quote the system
LEDGER, LOCK = "ledger.jsonl", "lock"
_BOUND = (".json", ".jsonl", ".safetensors")  # of files that are read back; others are for people, or half written
# Bits of a number in safetensors' names for dtypes.
_BITS = {"BOOL": 8} | {name: int(re.findall(r"\d+", name)[0]) for name in (
    "F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E5M2FNUZ F8_E4M3FNUZ I16 U16 F16 BF16 I32 U32 F32 I64 U64 F64 "
    "C64").split()}  # fmt: skip
_LONGEST_HEADER, _MOST_DIMENSIONS = 100_000_000, 8
_REQUIRED = object()
_KINDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true or false"}


class FileError(ValueError):
    """A file that cannot be read or written; the message, made one line, says which file, what is wrong with it and
    what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A message without what cannot be printed (it may quote a file), and without the middle of a very long one."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-295:]}"


class Fields:
    """The entries of a JSON object, taken by key with their types checked; ``where`` (a file, a record) begins every
    message. Raises ``error``, a ``FileError`` unless a subclass says otherwise."""

    error: type[FileError] = FileError

    def __init__(self, values: Any, where: str) -> None:
        self.where, self.taken = where, set[str]()
        if not isinstance(values, dict):
            raise self.fail(f"should hold a JSON object, not {reprlib.repr(values)}")
        self.values: dict[str, Any] = values

    def fail(self, message: str) -> FileError:
        return self.error(f"{self.where}: {message}")

    def take(
        self, key: str, kind: type, default: Any = _REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> Any:
        """The value of ``key``, of ``kind`` dict, list, str, int (64 bits), float (finite; also an integer) or bool.

        Numbers have to be from ``low`` to ``high``. Null means absent; without a ``default`` the key is required.
        """
        self.taken.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(f"the key {key!r} is missing")
            return default
        return self._check(repr(key), value, kind, low, high)

    def take_list(self, key: str, kind: type, default: Any = _REQUIRED, **limits: float) -> Any:
        """The list at ``key``, each of its values checked as ``take`` checks one."""
        values = self.take(key, list, default)
        if self.values.get(key) is None:
            return values
        return [self._check(f"{key!r}, entry {index}", value, kind, **limits) for index, value in enumerate(values)]

    def _check(self, name: str, value: Any, kind: type, low: float = -math.inf, high: float = math.inf) -> Any:
        right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if right and kind in (int, float):
            right = low <= value <= high and abs(value) <= (2**63 - 1 if kind is int else sys.float_info.max)
        if right:
            return float(value) if kind is float else value
        limits = [f"{word} {limit:g}" for word, limit in (("from", low), ("to", high)) if math.isfinite(limit)]
        raise self.fail(f"{name} should be {' '.join([_KINDS[kind], *limits])}, not {reprlib.repr(value)}")


@contextmanager
def replace_file(path: StrPath, *, grows: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` for others to write (``save_file``); it takes the name on success.

    Parents are created, and the file may be read by whom the umask allows. If the block raises, nothing is left behind
    and a file that was there before stays as it was. ``grows``: lines will be appended, so a ledger takes no hash.
    Raises ``FileError`` if ``path`` is a folder, if the system does not let the file be written, and if the block
    wrote nothing.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"{target}: is a folder; give the name of a file to write")
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    with _writing(target):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            temporary.unlink()
            yield temporary
            if not temporary.exists():
                raise FileError(f"{target}: nothing was written; write to the temporary path that replace_file yields")
            temporary.chmod(mode)  # safetensors leaves its files to their owner alone
            # Without the sync a power cut could leave the new name on an empty file.
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            _enter(target, None if grows else temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Makes the parents of a file, and a sentence that names it of whatever the system has against its writing."""
    _check_held(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except FileError:
        raise
    except Exception as error:
        quoted = _OS_ERROR.search(str(error))
        if not (quoted or isinstance(error, OSError)):
            raise
        _check_held(target)
        why = os.strerror(int(quoted[1])) if quoted else getattr(error, "strerror", None) or error
        raise FileError(f"{target}: cannot be written ({why}); choose or free another place") from error


def start_ledger(folder: Path) -> None:
    """Gives a folder a ledger, if it has none, in which its files and all that are put into it later are entered."""
    if not (folder / LEDGER).is_file():
        files = _bound_files(folder)
        with _writing(folder / LEDGER):
            (folder / LEDGER).touch()
        for path in files:
            _enter(path, path)


def _bound_files(folder: Path) -> list[Path]:
    """The files that belong into a ledger: those that are read back, whatever has become of them."""
    return sorted(path for path in folder.rglob("*") if path.suffix in _BOUND and path.name != LEDGER)


def _enter(target: Path, written: Path | None) -> None:
    """Enters the hash of what is ``written``, None for a file that grows, before it takes the name of ``target``."""
    folder = next((parent for parent in target.parents[:3] if (parent / LEDGER).is_file()), None)
    if folder is not None and target.suffix in _BOUND and target.name != LEDGER:
        digest = None if written is None else file_hash(written)
        append_jsonl(folder / LEDGER, {"file": target.relative_to(folder).as_posix(), "sha256": digest}, sync=True)


def check_ledger(folder: Path) -> None:
    """Raises ``FileError`` for a file in ``folder`` that is not as our code wrote it: edited, cut, exchanged, foreign.

    One that is missing is left to whoever reads it; it may also be as it was at an earlier time.
    """
    path = folder / LEDGER
    known: dict[str, list[str | None]] = {}
    for line, values in enumerate(resume_jsonl(path), start=1):
        entry = Fields(values, f"{path}, line {line}")
        known.setdefault(entry.take("file", str), []).append(entry.take("sha256", str, None))
    for file in _bound_files(folder):
        digests = known.get(file.relative_to(folder).as_posix())
        if digests is None and file.parent != folder:
            raise FileError(f"{file}: is not in {LEDGER}, which has all that was written here; move the file elsewhere")
        if digests and digests[-1] is not None and file_hash(file) not in digests:
            raise FileError(f"{file}: is not as it was written; put it back as it was, or remove it to make it again")


_held: dict[str, BinaryIO] = {}  # the folders that this process holds, and their locks


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keeps ``folder``, which is created, to this process; the system ends that with the process, however it ends.

    While it is held, nothing is written into a folder that was removed or exchanged meanwhile. Raises ``FileError``
    that says which process holds it.
    """
    path = folder / LOCK
    with _writing(path):
        file = open(path, "ab+")  # noqa: SIM115 (closed below)
    try:
        _lock(file, folder)
        with _writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            file.flush()
        _held[os.path.abspath(folder)] = file
        yield
    finally:
        if _held.pop(os.path.abspath(folder), None):
            with suppress(OSError):
                file.truncate(0)
        file.close()


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).decode(errors="replace") or "another process"
        raise FileError(f"{folder}: {owner} is working in it; wait for its end, or stop it first") from None
    except (ImportError, OSError):
        pass  # a file system without locks: that nobody else works here is up to the user


def _check_held(path: StrPath) -> None:
    """Raises ``FileError`` for a path in a folder that this process holds, but that is no longer there."""
    for folder, file in _held.items():
        if os.path.abspath(path).startswith(folder + os.sep):
            try:
                there = os.path.samestat(os.stat(os.path.join(folder, LOCK)), os.fstat(file.fileno()))
            except OSError:
                there = False
            if not there:
                raise FileError(
                    f"{folder}: was removed or renamed while this process worked in it; nothing more is written there: "
                    "put it back and continue, or start anew"
                )


def write_text(path: StrPath, text: str, *, grows: bool = False) -> None:
    """Writes ``text`` as UTF-8, newlines as they are. Raises ``FileError`` if it cannot be encoded or written."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: the text has half a surrogate pair at {error.start}; replace it") from error
    with replace_file(path, grows=grows) as temporary:
        temporary.write_bytes(data)


def locate(source: StrPath, *, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint or adapter; for a hub id, the files that match ``patterns`` are downloaded unless in
    the cache. Raises ``FileError``, in the hub's own words where it refuses."""
    folder = Path(os.path.expanduser(source))
    _check_held(folder)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise FileError(f"{folder}: should be a folder (with its config in it), this is a file")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise FileError(f"{source}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for folders
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:  # gated and missing repositories are explained there
        raise FileError(f"{source}: no such folder here, and the hub says: {' '.join(str(error).split())}") from error


def file_hash(path: StrPath) -> str:
    """The SHA-256 of a file's content. Raises ``FileError`` where there is no such file."""
    digest = hashlib.sha256()
    with _open(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def folder_hash(folder: Path, patterns: Sequence[str]) -> str:
    """The SHA-256 of the names and contents of those files of a folder that match one of ``patterns``."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return hashlib.sha256("".join(f"{path.name} {file_hash(path)}\n" for path in files).encode()).hexdigest()


def write_json(path: StrPath, obj: Any) -> None:
    """Writes one JSON value, indented by two. Raises ``FileError`` for NaN and infinities, which JSON does not know."""
    write_text(path, _dumps(path, obj, indent=2) + "\n")


def write_jsonl(path: StrPath, records: Iterable[Any], *, grows: bool = False) -> None:
    """Writes one JSON value a line; no records make an empty file. ``grows``: ``append_jsonl`` will add others.

    Raises ``FileError`` as ``write_json`` does.
    """
    write_text(path, "".join(_dumps(path, record) + "\n" for record in records), grows=grows)


def read_text(path: StrPath) -> str:
    """The UTF-8 text of a file. Raises ``FileError`` (missing, no regular file, not to be read, not UTF-8)."""
    return _decode(path, read_bytes(path))


def read_object(path: StrPath) -> Fields:
    """The one JSON object in a file. Raises ``FileError`` as ``read_json`` does, and for any other value."""
    return Fields(read_json(path), str(path))


def read_json(path: StrPath) -> Any:
    """The one JSON value in a file. Raises ``FileError`` (missing, a folder, not UTF-8, empty, cut short, not JSON)."""
    return _loads(str(path), _filled(path, read_text(path)))


def read_jsonl(path: StrPath) -> list[Any]:
    """The values of a file of JSON lines; blank lines are ignored, and an empty file holds none.

    Raises ``FileError``, for a bad line with its number (counted from 1).
    """
    return [value for _, value in _json_lines(path, read_text(path))]


def read_tensor_shapes(path: StrPath) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a safetensors file, by their places in it; the numbers are not read.

    Raises ``FileError`` for another file, for one that is cut, with the first tensor that is, and for a header whose
    entries do not agree with one another and with the size of the file.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, _LONGEST_HEADER) or (head := file.read(start - 8))[:1] != b"{":
            raise FileError(
                f"{path}: is no safetensors file, or is cut near its beginning; was it downloaded completely?"
            )
    try:
        header = Fields(_loads(f"{path}, header", head.decode()), f"{path}, header")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}, header: is not UTF-8 text (byte {error.start}); the file is damaged") from error
    found: list[tuple[int, int, str, tuple[int, ...]]] = []
    for name in header.values:
        entry = Fields(header.take(name, dict), f"{path}, {name}")
        if name == "__metadata__":
            for key in entry.values:
                entry.take(key, str)
            continue
        kind, shape = entry.take("dtype", str), tuple(entry.take_list("shape", int, low=0))
        places = entry.take_list("data_offsets", int, low=0)
        if kind not in _BITS:
            raise entry.fail(f"the dtype {kind[:80]!r} is not known")
        if len(shape) > _MOST_DIMENSIONS or len(places) != 2:
            raise entry.fail(f"{len(shape)} dimensions at {len(places)} offsets cannot be; the file is damaged")
        if (places[1] - places[0]) * 8 != math.prod(shape) * _BITS[kind]:
            raise entry.fail(
                f"bytes {places[0]} to {places[1]} cannot hold {kind} of shape {shape}; the file is damaged"
            )
        found.append((places[0], places[1], name, shape))
    end = 0
    for begin, stop, name, _ in sorted(found):
        if begin != end:
            raise FileError(f"{path}, {name[:200]}: begins at byte {begin}, not at {end}; the file is damaged")
        if start + stop > size:
            raise FileError(
                f"{path}: is cut in the tensor {name[:200]}, {start + stop - size} bytes short; copy it anew"
            )
        end = stop
    if start + end != size:
        raise FileError(f"{path}: is longer than its tensors by {size - start - end} bytes; the file is damaged")
    return {name: shape for _, _, name, shape in sorted(found)}


def append_jsonl(path: StrPath, record: Any, *, sync: bool = False) -> None:
    """Adds one JSON value as a line at the end of a file, which is created with its parents where there is none.

    ``sync`` waits until it is on the disk. Raises ``FileError`` as ``write_json`` does, and leaves no half line.
    """
    data = (_dumps(path, record) + "\n").encode()
    target = Path(path)
    with _writing(target), target.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:  # a full disk may take a part of it, and say why when the rest comes
                data = data[file.write(data) :]
            if sync:
                os.fsync(file.fileno())
            if not end:
                _enter(target, None)
        except OSError:
            file.truncate(end)
            if not end:
                target.unlink()
            raise


def resume_jsonl(path: StrPath) -> list[Any]:
    """The values that ``append_jsonl`` has written to a file, none if there is no such file.

    A kill may have cut the last line short: it is removed from the file, so that appending can go on. Raises
    ``FileError`` for a complete line that is not JSON, and then leaves the file as it is.
    """
    if not os.path.exists(path):
        return []
    data = read_bytes(path)
    end = data.rfind(b"\n") + 1
    values = [value for _, value in _json_lines(path, _decode(path, data[:end]))]
    if end < len(data):  # a file that is whole stays untouched
        os.truncate(path, end)
    return values


def read_records(path: StrPath) -> list[tuple[str, Any]]:
    """The records of a JSON list or of JSON lines (told apart by content, not by the file's name), at least one.

    Objects one after the other are records however they are laid out, and a byte order mark between them, as joined
    files have, is skipped. NaN, which stands where a table has no value, is read as None. Each comes with a locator for
    messages, such as ``"data.json, record 3"`` or ``"data.jsonl, record 3 (line 4)"``. Records are counted from 0, as
    Python does; lines from 1, as editors do. Raises ``FileError`` as ``read_json`` and ``read_jsonl`` do, and for a
    file that is no list or holds no records.
    """
    text = _filled(path, read_text(path))
    if text.lstrip(_BLANK).startswith("{"):
        try:
            found = _json_lines(path, text, parse_constant=_constant)
        except FileError:
            found = _spread_objects(text)
            if not found:
                raise
            if len(found) == 1:
                raise FileError(f"{path}: holds one JSON object; expected a list of records, or one a line") from None
        return [(f"{path}, record {index} (line {line})", value) for index, (line, value) in enumerate(found)]
    values = _loads(str(path), text.lstrip("\ufeff"), parse_constant=_constant)
    if not isinstance(values, list):
        raise FileError(f"{path}: holds a single value; expected a list of records, or one record a line")
    if not values:
        raise FileError(f"{path}: the list holds no records; is this the right file?")
    return [(f"{path}, record {index}", value) for index, value in enumerate(values)]


def _spread_objects(text: str) -> list[tuple[int, Any]]:
    """The objects of a text that holds nothing else, each with its line; none where anything is wrong."""
    decoder = json.JSONDecoder(parse_constant=_constant)
    found: list[tuple[int, Any]] = []
    place, line = 0, 1
    while (start := _NO_BLANK.search(text, place)) is not None:
        line += text.count("\n", place, start.start())
        place = start.start()
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        found.append((line, value))
        line += text.count("\n", place, end)
        place = end
    return found


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _dumps(path: StrPath, obj: Any, indent: int | None = None) -> str:
    try:
        text = json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError as error:
        raise FileError(f"{path}: cannot be written as JSON ({error}); replace such values, e.g. by None") from error
    # Half a surrogate pair cannot be UTF-8, but its escape can, and reads back as the same string.
    return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def _open(path: StrPath) -> Iterator[BinaryIO]:
    """A regular file to read; what goes wrong, also while it is read, is a ``FileError``."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{path}: is a folder; give the file inside it")
        if not stat.S_ISREG(mode):
            raise FileError(f"{path}: is a pipe or a device; give a file, such as one that its content was written to")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        _check_held(path)
        raise FileError(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except FileError:
        raise
    except ValueError as error:  # a null byte, half a surrogate pair
        raise FileError(f"{str(path)!r}: cannot be the name of a file; check the path") from error


def read_bytes(path: StrPath) -> bytes:
    """The content of a file. Raises ``FileError`` (missing, no regular file, not to be read)."""
    with _open(path) as file:
        return file.read()


def _decode(path: StrPath, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: is not UTF-8 text (byte {error.start}); unpack it if it is an archive, else save it as UTF-8"
        ) from error


def _filled(path: StrPath, text: str) -> str:
    if not text.strip():
        raise FileError(f"{path}: is empty; was it written or downloaded completely?")
    return text


def _json_lines(path: StrPath, text: str, **how: Any) -> list[tuple[int, Any]]:
    lines = ((number, line.lstrip(_BLANK)) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, _loads(f"{path}, line {number}", line, **how)) for number, line in lines if line]


def _loads(where: str, text: str, **how: Any) -> Any:
    try:
        return json.loads(text, **how)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}: {_problem(text, error)}") from error
    except RecursionError as error:
        raise FileError(f"{where}: is JSON nested too deeply to be read; is this the right file?") from error
    except ValueError as error:
        raise FileError(f"{where}: holds a number too long to be read ({error}); mend it") from error


def _problem(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "the JSON ends too early; was it written or downloaded completely?"
    if text[: error.pos].strip():
        around = text[max(0, error.pos - 20) : error.pos + 20]
        place = f"line {error.lineno} column {error.colno}, near {around!r}"
        return f"is not valid JSON ({error.msg.lower()}: {place}); mend it there"
    return f"is not JSON, it begins with {text.strip()[:30]!r}; is this the right file?"
