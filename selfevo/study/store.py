"""What a study has heard, in SQLite: every step of a participant is one transaction, on disk before it is acknowledged.

No name and no address is kept, and of the token that a participant holds only its hash. What may happen once, a vote
for a turn for instance, is a key of its table, so that a second one cannot be stored.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from secrets import token_hex
from typing import Any

from selfevo.dialogue import Turn
from selfevo.files import FileError
from selfevo.study.plan import MOST_TURNS, POINTWISE, SIDES, StudySettings

LOWEST, HIGHEST = 1, 5  # of a score
CHOICES = (*SIDES, "tie")
_SCHEMA = """
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE participant (id INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, consented REAL);
CREATE TABLE session (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  participant INTEGER NOT NULL REFERENCES participant ON DELETE CASCADE,
  place INTEGER NOT NULL UNIQUE,
  state TEXT NOT NULL DEFAULT 'talking' CHECK (state IN ('talking', 'rating', 'finished', 'stopped')),
  comment TEXT NOT NULL DEFAULT '', began REAL NOT NULL, ended REAL);
CREATE TABLE turn (
  session INTEGER NOT NULL REFERENCES session ON DELETE CASCADE, number INTEGER NOT NULL, text TEXT NOT NULL,
  PRIMARY KEY (session, number));
CREATE TABLE reply (
  session INTEGER NOT NULL, number INTEGER NOT NULL, side TEXT NOT NULL CHECK (side IN ('A', 'B')),
  model TEXT NOT NULL, text TEXT,
  PRIMARY KEY (session, number, side), FOREIGN KEY (session, number) REFERENCES turn ON DELETE CASCADE);
CREATE INDEX waiting ON reply (session) WHERE text IS NULL;
CREATE TABLE vote (
  session INTEGER NOT NULL, number INTEGER NOT NULL, choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'tie')),
  kept TEXT CHECK (kept IN ('A', 'B')),
  PRIMARY KEY (session, number), FOREIGN KEY (session, number) REFERENCES turn ON DELETE CASCADE);
CREATE TABLE score (
  session INTEGER NOT NULL REFERENCES session ON DELETE CASCADE, aspect TEXT NOT NULL,
  score INTEGER NOT NULL CHECK (score BETWEEN 1 AND 5), PRIMARY KEY (session, aspect));
"""


class RefusedError(ValueError):
    """A step that a participant cannot take now; nothing has changed. ``status`` is HTTP's."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Exchange:
    """One turn: what the participant said, the replies by side (None while they are written), and the vote."""

    number: int
    text: str
    models: dict[str, str] = field(default_factory=dict)
    replies: dict[str, str | None] = field(default_factory=dict)
    choice: str | None = None
    kept: str | None = None

    @property
    def answered(self) -> bool:
        return None not in self.replies.values()

    @property
    def reply(self) -> str | None:
        """The reply that the conversation goes on with, once that is known."""
        return self.replies.get(self.kept or "")


@dataclass
class Session:
    """One conversation. ``step`` says what is to be done next: say, wait, vote, keep, rate, or nothing (finished,
    stopped)."""

    id: int
    participant: int
    place: int
    state: str
    comment: str
    began: float
    ended: float | None
    turns: list[Exchange] = field(default_factory=list)
    scores: dict[str, int] = field(default_factory=dict)

    @property
    def step(self) -> str:
        if self.state != "talking":
            return "rate" if self.state == "rating" else self.state
        last = self.turns[-1] if self.turns else None
        if last is None or last.reply is not None:
            return "say"
        if not last.answered:
            return "wait"
        return "vote" if last.choice is None else "keep"

    def context(self) -> tuple[Turn, ...]:
        """What has been said, with the replies that were kept."""
        spoken: list[Turn] = []
        for turn in self.turns:
            spoken.append(Turn("seeker", turn.text))
            if turn.reply is not None:
                spoken.append(Turn("supporter", turn.reply))
        return tuple(spoken)


class Store:
    """``STUDY/study.db``. May be used from several threads; a second process may read beside the one that serves."""

    def __init__(self, folder: Path, settings: StudySettings | None = None) -> None:
        """Opens a study; with ``settings`` it is made where there is none, and takes them while nobody has begun.
        Raises FileError where there is no study, or one that was begun with other settings, named."""
        self.folder, path = folder, folder / "study.db"
        if settings is None and not path.is_file():
            raise FileError(f"{folder}: holds no study (it has no study.db); give a folder that study.py serve made")
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self.settings = self._settings(path, settings)
            self.secret = bytes.fromhex(self._setting("secret"))
        except sqlite3.Error as error:
            raise FileError(f"{path}: is no study that can be opened ({error}); choose another folder") from error

    def _settings(self, path: Path, wanted: StudySettings | None) -> StudySettings:
        with self._write():
            if wanted is not None and not self._rows("SELECT 1 FROM sqlite_master"):
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO setting VALUES ('secret', ?)", (token_hex(32),))
            if wanted is not None and not self._rows("SELECT 1 FROM session"):
                self._db.execute("REPLACE INTO setting VALUES ('settings', ?)", (json.dumps(asdict(wanted)),))
        try:
            values: dict[str, Any] = json.loads(self._setting("settings"))
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            found = StudySettings(**values)
        except (TypeError, ValueError) as error:
            raise FileError(f"{path}: its settings cannot be read ({error}); is it of this version?") from error
        for name, value in asdict(wanted).items() if wanted else ():
            if (was := getattr(found, name)) != value:
                raise FileError(
                    f"{path.parent}: was begun with {name} {was!r}, now it is {value!r}; choose another --out"
                )
        return found

    def _setting(self, name: str) -> str:
        return str(self._rows("SELECT value FROM setting WHERE name = ?", name)[0][0])

    @contextmanager
    def _write(self) -> Iterator[None]:
        """A transaction: all of it is on disk afterwards, or, if the block raises, nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def invite(self, number: int) -> list[str]:
        """The tokens of so many new participants, who have not consented yet."""
        with self._write():
            return [self._invite() for _ in range(number)]

    def _invite(self) -> str:
        token = token_hex(16)
        self._db.execute("INSERT INTO participant (token) VALUES (?)", (_hash(token),))
        return token

    def participant(self, token: str) -> int | None:
        """Who holds a token; None if nobody does."""
        rows = self._rows("SELECT id FROM participant WHERE token = ?", _hash(token))
        return rows[0][0] if rows else None

    def invited(self) -> int:
        """How many participants there are, those included who have not consented yet."""
        return self._rows("SELECT count(*) FROM participant")[0][0]

    def begin(self, token: str | None, most: int) -> str:
        """A participant consents, and the first conversation begins; the token. Who has none is a new participant,
        unless there are ``most`` already."""
        with self._write():
            if token is None:
                if self.invited() >= most:
                    raise RefusedError(
                        "This study has all the participants that it needs. Thank you for your interest."
                    )
                token = self._invite()
            participant = self.participant(token)
            first = "UPDATE participant SET consented = ? WHERE id = ? AND consented IS NULL"
            if self._db.execute(first, (time.time(), participant)).rowcount:
                self._start(participant)
        return token

    def next_conversation(self, participant: int) -> None:
        """Begins the next conversation of a participant who has finished the one before."""
        with self._write():
            session = self._last(participant)
            if session.state != "finished" or not self.more(participant):
                raise RefusedError("There is no further conversation for you to begin now.")
            self._start(participant)

    def more(self, participant: int) -> bool:
        """Whether a participant may have another conversation."""
        (had,) = self._rows("SELECT count(*) FROM session WHERE participant = ?", participant)
        return had[0] < self.settings.conversations

    def _start(self, participant: int | None) -> None:
        """Takes the first free place; of those of the next block, one whose models the participant has not met."""
        places = self._rows("SELECT place, participant FROM session")
        taken, units = {place for place, _ in places}, len(self.settings.units)
        met = {self.settings.unit(place) for place, other in places if other == participant}
        free = list(islice((place for place in count() if place not in taken), units))
        place = next((place for place in free if self.settings.unit(place) not in met), free[0])
        values = (participant, place, time.time())
        self._db.execute("INSERT INTO session (participant, place, began) VALUES (?, ?, ?)", values)

    def session(self, participant: int) -> Session | None:
        """The last conversation of a participant; None before consent."""
        with self._lock:
            found = self._sessions("WHERE participant = ? ORDER BY id DESC LIMIT 1", participant)
        return found[0] if found else None

    def _last(self, participant: int) -> Session:
        session = self.session(participant)
        if session is None:
            raise RefusedError("Please read the first page and give your consent before you go on.", 403)
        return session

    def sessions(self) -> list[Session]:
        """All conversations, in the order in which they were begun."""
        with self._lock:
            return self._sessions("ORDER BY id")

    def _sessions(self, which: str, *values: object) -> list[Session]:
        columns = "id, participant, place, state, comment, began, ended"
        found = {row[0]: Session(*row) for row in self._rows(f"SELECT {columns} FROM session {which}", *values)}
        only = f"WHERE session IN (SELECT id FROM session {which})"
        turns: dict[tuple[int, int], Exchange] = {}
        for session, number, text in self._rows(f"SELECT * FROM turn {only} ORDER BY session, number", *values):
            turns[session, number] = Exchange(number, text)
            found[session].turns.append(turns[session, number])
        for session, number, side, model, text in self._rows(f"SELECT * FROM reply {only} ORDER BY side", *values):
            turn = turns[session, number]
            turn.models[side], turn.replies[side] = model, text
            if self.settings.mode == POINTWISE:
                turn.kept = side
        for session, number, choice, kept in self._rows(f"SELECT * FROM vote {only}", *values):
            turns[session, number].choice, turns[session, number].kept = choice, kept
        for session, aspect, score in self._rows(f"SELECT * FROM score {only} ORDER BY rowid", *values):
            found[session].scores[aspect] = score
        return list(found.values())

    @contextmanager
    def _step(self, participant: int, step: str, message: str) -> Iterator[Session]:
        """A transaction in which a participant takes a step, if it is the one to be taken."""
        with self._write():
            session = self._last(participant)
            if session.step != step:
                raise RefusedError(message)
            yield session

    def say(self, participant: int, number: int, text: str) -> None:
        """A participant's turn, to be answered. The same again changes nothing."""
        session = self._last(participant)
        if any(turn.number == number and turn.text == text for turn in session.turns):
            return
        with self._step(participant, "say", "This turn has been sent already; nothing was changed.") as session:
            if number != len(session.turns) + 1:
                raise RefusedError("This turn has been sent already; nothing was changed.")
            if number > MOST_TURNS:
                raise RefusedError("The conversation is as long as it can be; please end it.")
            self._db.execute("INSERT INTO turn VALUES (?, ?, ?)", (session.id, number, text))
            for side, model in self.settings.sides(session.place, number).items():
                self._db.execute("INSERT INTO reply VALUES (?, ?, ?, ?, NULL)", (session.id, number, side, model))

    def waiting(self) -> list[tuple[Session, str]]:
        """The conversations that wait for a reply, each with the side that it is to be on."""
        with self._lock:
            sessions = self._sessions("WHERE id IN (SELECT session FROM reply WHERE text IS NULL) ORDER BY id")
        return [
            (session, side) for session in sessions for side, text in session.turns[-1].replies.items() if text is None
        ]

    def answer(self, session: int, number: int, side: str, text: str) -> None:
        """Keeps a reply; one that is there already stays as it is, and for a deleted conversation there is none."""
        where = "session = ? AND number = ? AND side = ? AND text IS NULL"
        with self._write():
            self._db.execute(f"UPDATE reply SET text = ? WHERE {where}", (text, session, number, side))

    def vote(self, participant: int, number: int, choice: str) -> None:
        """Which reply of a turn is the better one: A, B or tie."""
        message = "This turn has its vote already; nothing was changed."
        if choice not in CHOICES:
            raise RefusedError(f"A vote is one of {', '.join(CHOICES)}.", 400)
        with self._step(participant, "vote", message) as session:
            if number != len(session.turns):
                raise RefusedError(message)
            kept = choice if choice in SIDES else None
            self._db.execute("INSERT INTO vote VALUES (?, ?, ?, ?)", (session.id, number, choice, kept))

    def keep(self, participant: int, number: int, side: str) -> None:
        """After a tie: the reply that the conversation goes on with."""
        message = "For this turn it is settled which reply the conversation goes on with; nothing was changed."
        if side not in SIDES:
            raise RefusedError(f"The conversation goes on with one of {', '.join(SIDES)}.", 400)
        with self._step(participant, "keep", message) as session:
            if number != len(session.turns):
                raise RefusedError(message)
            self._db.execute("UPDATE vote SET kept = ? WHERE session = ? AND number = ?", (side, session.id, number))

    def end(self, participant: int) -> None:
        """Ends a conversation of enough turns; what is left is to rate it."""
        with self._step(participant, "say", "The conversation cannot be ended at this point.") as session:
            if len(session.turns) < self.settings.turns:
                raise RefusedError(f"Please go on until you have had {self.settings.turns} turns, or stop at any time.")
            self._db.execute("UPDATE session SET state = 'rating' WHERE id = ?", (session.id,))

    def rate(self, participant: int, scores: Mapping[str, int], comment: str) -> None:
        """The scores of all aspects, in a pairwise study of none, and a comment; the conversation is finished."""
        wanted = self.settings.aspects if self.settings.mode == POINTWISE else ()
        if set(scores) != set(wanted) or not all(LOWEST <= score <= HIGHEST for score in scores.values()):
            raise RefusedError(f"Please give each of {', '.join(wanted)} a score from {LOWEST} to {HIGHEST}.", 400)
        with self._step(participant, "rate", "This conversation is not waiting to be rated; nothing was changed.") as s:
            self._db.executemany("INSERT INTO score VALUES (?, ?, ?)", [(s.id, *score) for score in scores.items()])
            done = "UPDATE session SET state = 'finished', comment = ?, ended = ? WHERE id = ?"
            self._db.execute(done, (comment, time.time(), s.id))

    def stop(self, participant: int) -> None:
        """A participant stops; what has been said is kept until it is deleted."""
        with self._write():
            session = self._last(participant)
            if session.state in ("talking", "rating"):
                self._db.execute("DELETE FROM reply WHERE session = ? AND text IS NULL", (session.id,))
                done = "UPDATE session SET state = 'stopped', ended = ? WHERE id = ?"
                self._db.execute(done, (time.time(), session.id))

    def delete(self, participant: int) -> None:
        """Removes a participant and all that they said, from the file itself too; their places are free again."""
        with self._lock:
            with self._write():
                self._db.execute("DELETE FROM participant WHERE id = ?", (participant,))
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()
