"""Contenders side by side: each in a process of its own, rounds in turn, the time and peak memory of each measured."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
Work = Callable[[Any], dict[str, float]]  # does one job, returns what it counted
Prepare = Callable[..., Work]


@dataclass(frozen=True)
class Result:
    """One round: ``peak`` and ``resting`` are bytes, the highest so far and before the first round."""

    seconds: float
    peak: int
    resting: int
    counts: dict[str, float]


class Contender:
    """A process that prepares once (loads its model) and then does jobs when asked to."""

    def __init__(self, name: str, prepare: Prepare, **settings: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, prepare, settings), daemon=True)
        self._process.start()
        self._receive()

    def work(self, job: Any) -> Result:
        self._connection.send(job)
        result = self._receive()
        assert isinstance(result, Result)
        return result

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: its process died (out of memory?)") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=30)
        self._process.terminate()


def compete(
    contenders: Sequence[Contender], jobs: Sequence[Any], tell: Callable[[Result], str]
) -> dict[str, list[Result]]:
    """Every contender's results, in turn, job by job; the first job warms up and is not counted. ``tell`` words one."""
    results: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
    for number, job in enumerate(jobs):
        for contender in contenders:
            result = contender.work(job)
            note = "" if number else "  (not counted)"
            print(f"round {number}: {contender.name}: {tell(result)}{note}", flush=True)
            if number:
                results[contender.name].append(result)
    return results


@contextmanager
def busy_process() -> Iterator[None]:
    """Beside another process that keeps one processor busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _serve(connection: Connection, prepare: Prepare, settings: dict[str, Any]) -> None:
    try:
        work = prepare(**settings)
        connection.send(None)
        resting = None
        while True:
            job = connection.recv()
            gc.collect()
            if resting is None:  # once: a processor's memory that is given back is mapped afresh in the next round
                resting = _start_peak()
            started = time.perf_counter()
            counts = work(job)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            connection.send(Result(time.perf_counter() - started, _peak(), resting, counts))
    except EOFError:
        pass
    except Exception:
        connection.send(traceback.format_exc())


def _start_peak() -> int:
    """Forgets earlier peaks; returns the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return 0


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if platform.system() == "Linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process, in bytes on macOS


def _status(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {entry}")


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    if len(values) == 1:
        return f"{values[0]:.3g} (one round)"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def product_seconds(rows: int, size: int, out: int, dtype: torch.dtype, device: torch.device, tries: int = 5) -> float:
    """The best time of a plain (rows, size) x (size, out) product here."""
    x = torch.randn(rows, size, dtype=dtype, device=device)
    weight = torch.randn(out, size, dtype=dtype, device=device)
    target = torch.empty(rows, out, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(tries + 1):
        started = time.perf_counter()
        torch.mm(x, weight.t(), out=target)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
