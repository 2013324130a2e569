"""Several ranks as real processes, as torchrun starts them, but in a fraction of its time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selfevo.evolve import EvolveConfig, evolve
from selfevo.kernels import ranks, watch
from selfevo.models import Transformer, load_model
from selfevo.models.sharded import own_part

# One process imports everything once; ranks are forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["selfevo.evolve", "selfevo.kernels.ranks", "program", "processes"])


@dataclass(frozen=True)
class Fault:
    """What happens to a rank: at the call of this number (from 1) of a function, it gets a signal."""

    rank: int
    module: str
    function: str
    call: int = 1
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """The exit codes and what was written to standard error, by rank."""

    codes: list[int]
    errors: list[str]

    @property
    def sentences(self) -> list[str]:
        lines = [line for text in self.errors for line in text.replace("\r", "\n").splitlines()]
        return [line for line in lines if line.startswith(("error:", "interrupted;", "Traceback"))]


def launch(size: int, folder: Path, main: Callable[..., int], *arguments: Any, fault: Fault | None = None) -> Ended:
    """Runs ``main(*arguments)``, wrapped as every command is, on so many ranks; a stopped one is killed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"stderr-{rank}" for rank in range(size)]
    started = [
        _CONTEXT.Process(target=_rank, args=(rank, size, store.port, files[rank], fault, main, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for rank, process in enumerate(started):
        if fault is None or fault.rank != rank:
            process.join(120)
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
    return Ended([process.exitcode or 0 for process in started], [file.read_text() for file in files])


def _rank(
    rank: int, size: int, port: int, errors: Path, fault: Fault | None, main: Callable[..., int], arguments: Any
) -> None:
    from program import program

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115 (until the process ends)
    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        _arrange(fault)

    @program(memory="lower --slots")
    def command() -> int:
        return main(*arguments)

    os._exit(command())


def _arrange(fault: Fault) -> None:
    module = sys.modules[fault.module]
    real, calls = getattr(module, fault.function), [0]

    def function(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == fault.call:
            os.kill(os.getpid(), fault.signal)
        return real(*arguments, **named)

    function.__module__, function.__qualname__ = fault.module, fault.function
    setattr(module, fault.function, function)


# What ranks run: functions that another process finds by name.


def run(config: EvolveConfig) -> int:
    evolve(config, resume=True)
    return 0


def call(program: str, *arguments: str) -> int:
    """One of the programs of ``examples/``, with these arguments."""
    sys.argv = [program, *arguments]
    code: int = importlib.import_module(program).main.__wrapped__()
    return code


def load_within(small: Path, large: Path) -> int:
    ranks.build(_load_within, (small, large))
    return 0


def _load_within(folders: tuple[Path, Path]) -> Transformer:
    """Loads what this rank keeps, with no more memory than for that and one tensor more."""
    small, folder = folders
    load_model(small, shared=True)  # for what is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model(folder, shared=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    parts = [own_part(parameter.detach())[1].nbytes for parameter in model.parameters()]
    largest = max(parameter.nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if not (sum(parts) < 0.51 * whole and sum(parts) * 0.9 < grown < sum(parts) + largest + 2**24):
        raise ValueError(f"of {whole} bytes this rank keeps {sum(parts)}, and used {grown} more to load them")
    return model


def refuse() -> int:
    raise ValueError("this file is wrong; mend it")


def broken_part(model: torch.nn.Module, part: int) -> int:
    if part == 1:
        raise RuntimeError("out of memory")
    return part


def deal_a_broken_part() -> int:
    ranks.deal(broken_part, torch.nn.Linear(2, 2), [0, 1, 2])
    return 0


def wait_for_nobody(model: torch.nn.Module, part: int) -> int:
    if part == 0:
        ranks.sum_on_first(torch.zeros(3))  # the other ranks take no part in it
    return part


def deal_a_part_that_waits() -> int:
    watch.LIMIT = 2.0
    ranks.deal(wait_for_nobody, torch.nn.Linear(2, 2), [0, 1])
    return 0
