"""Watching the other ranks: one that has died or hangs ends all of them, with one sentence, in less than a minute."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 1.0  # seconds between two signs of life
LIMIT = 20.0  # seconds without one, or with every rank waiting for another, after which all is over
START = 300.0  # seconds until the first one
AGAIN = "start the same command again, with --resume where it has that flag: it goes on where it was"


class Watch:
    """A thread that shows this rank's signs of life in ``store`` and looks for those of the others: rank 0 for all, the
    others for rank 0.

    It goes on while the main thread is held in a collective, where Python runs no signal handler, and so it also sees
    that the process is asked to end (SIGTERM), as torchrun asks all others when one has died.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank = store, rank
        self.watched = range(1, size) if rank == 0 else range(1)
        self.turn = 0  # counts the collectives; odd while in one
        self._stopped, self._own_word = threading.Event(), threading.Lock()
        self._told = False
        self._signals, written = socket.socketpair()
        written.setblocking(False)
        self._written = written
        signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def first_to_tell(self) -> bool:
        """Whether no rank has said yet why the command ends, so that this one should."""
        with self._own_word:
            if not self._told:
                self._told = True
                return self._say_so()
        return False

    def _say_so(self) -> bool:
        try:
            return bool(self.store.add("told", 1) == 1)
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def stop(self) -> None:
        self._stopped.set()
        self._written.send(b"\0")  # it need not wait
        self._thread.join()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _run(self) -> None:
        seen: dict[object, tuple[object, float]] = {}
        try:
            while not self._stopped.is_set():
                self.store.set(f"beat {self.rank}", f"{time.monotonic()} {self.turn}")
                if self.store.check(["told"]) and not self._told:
                    os._exit(1)  # somebody else has said why
                self._look(seen)
                if self._is_asked_to_end():
                    self._end("this process was asked to end, or another rank has died")
        except RuntimeError:
            if not self._stopped.is_set():
                self._end("the process that started the ranks has died")

    def _look(self, seen: dict[object, tuple[object, float]]) -> None:
        """Ends everything where a rank gives no more signs of life, or all wait for one another."""
        turns = [self.turn]
        for rank in self.watched:
            name = f"beat {rank}"
            beat = self.store.get(name).decode() if self.store.check([name]) else "0 0"
            turns.append(int(beat.split()[1]))
            limit = START if beat == "0 0" else LIMIT
            if _unchanged(seen, rank, beat) > limit:
                self._end(f"rank {rank} has given no sign of life for {limit:.0f} seconds")
        if _unchanged(seen, "turns", turns) > LIMIT and self.rank == 0 and all(turn % 2 for turn in turns):
            self._end(f"every rank has waited for the others for {LIMIT:.0f} seconds")

    def _is_asked_to_end(self) -> bool:
        """Waits for the time between two beats, or until a signal comes."""
        ready, _, _ = select.select([self._signals], [], [], BEAT)
        return bool(ready) and signal.SIGTERM in self._signals.recv(64)

    def _end(self, why: str) -> None:
        if self.first_to_tell():
            print(f"\nerror: {why}; {AGAIN}", file=sys.stderr, flush=True)  # not at the end of a progress bar
        os._exit(1)


def _unchanged(seen: dict[object, tuple[object, float]], name: object, value: object) -> float:
    """For how many seconds a value has been what it is."""
    now = time.monotonic()
    before, since = seen.setdefault(name, (value, now))
    if value != before:
        seen[name] = value, now
        return 0.0
    return now - since
