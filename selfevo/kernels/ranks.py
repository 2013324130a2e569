"""Several processes under torchrun: rank 0 runs the program, alone it writes and shows progress, and it deals parts of
the work on its models to all ranks, itself included.

A part is a function of a model and of something that can be pickled; the other ranks serve, with mirrors of the models.
A model may also be built by all ranks, each with a part of the weights. Without torchrun there is one rank, which does
everything itself.
"""

from __future__ import annotations

import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfevo.kernels.mirror import Changes, Original, follow, transfer
from selfevo.kernels.watch import AGAIN, Watch

M = TypeVar("M", bound=nn.Module)
G = TypeVar("G")
P = TypeVar("P")
R = TypeVar("R")
_FOR_EVER = timedelta(days=7)  # how long a rank may wait for another that shows signs of life


_PEER = re.compile(r"gloo|NCCL|closed by peer|Connection reset")  # in the error of a collective


class RankError(OSError):
    """Another rank cannot be reached any more; the message says what to do."""


def _of_peer(error: RuntimeError) -> RankError:
    return RankError(f"another rank has died ({str(error).splitlines()[0]}); {AGAIN}")


@dataclass(frozen=True)
class _Build:
    """What all ranks are asked to build."""

    number: int  # of the model
    make: Callable[[Any], nn.Module]
    given: Any


@dataclass(frozen=True)
class _Parts:
    """What all ranks are asked to do with a model that has changed in some ways; ``alive`` are the models in use."""

    function: Callable[[Any, Any], Any]
    number: int
    changes: Changes
    alive: set[int]
    parts: Sequence[Any]


class _World:
    """The ranks of this command, and what this one knows of the models."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store
        self.watch = Watch(_store(self.rank == 0 and not agent), self.rank, self.size)
        self.originals: weakref.WeakKeyDictionary[nn.Module, tuple[int, Original]] = weakref.WeakKeyDictionary()
        self.counted = 0  # models
        self.mirrors: dict[int, nn.Module] = {}

    def connect(self) -> None:
        gpus = torch.cuda.device_count()
        if self.local < gpus:
            torch.cuda.set_device(self.local)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        with self._waiting():
            store = _store(False)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_FOR_EVER)

    def build(self, make: Callable[[G], M], given: G) -> M:
        self._broadcast_object(_Build(self.counted, make, given))
        model, original = make(given), Original()
        original.changes(model)  # none: all ranks have built the same
        self.originals[model] = self.counted, original
        self.counted += 1
        return model

    def deal(self, function: Callable[[M, P], R], model: M, parts: Sequence[P]) -> list[R]:
        number, original = self.originals.get(model) or (self.counted, Original())
        self.counted = max(self.counted, number + 1)
        self.originals[model] = number, original
        changes, tensors = original.changes(model)
        alive = {number for number, _ in self.originals.values()}
        self._broadcast_object(_Parts(function, number, changes, alive, parts))
        transfer(tensors, self._send, first=True)
        own = self._do(function, model, parts[0])
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.gather_object(None, found)
        return [own, *found[1:]]

    def serve(self) -> None:
        """Does what rank 0 asks for, until it needs no more."""
        while (job := self._broadcast_object(None)) is not None:
            if isinstance(job, _Build):
                self.mirrors[job.number] = job.make(job.given)
                continue
            model, tensors = follow(self.mirrors.get(job.number), job.changes, self._device)
            transfer(tensors, self._send, first=False)
            self.mirrors = {known: mirror for known, mirror in self.mirrors.items() if known in job.alive}
            self.mirrors[job.number] = model
            result = self._do(job.function, model, job.parts[self.rank])
            with self._waiting():
                dist.gather_object(result)

    def _do(self, function: Callable[[M, P], R], model: M, part: P) -> R:
        """A part, in which weights may be gathered from all ranks."""
        try:
            return function(model, part)
        except RuntimeError as error:
            if _PEER.search(str(error)):
                raise _of_peer(error) from error
            raise

    def end(self) -> None:
        """Lets the other ranks go; called by all of them."""
        if self.rank == 0:
            self._broadcast_object(None)
        self.watch.stop()
        dist.destroy_process_group()

    def reduce(self, tensor: Tensor) -> None:
        with self._waiting():
            dist.reduce(tensor, 0)

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        with self._waiting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def _send(self, tensor: Tensor) -> None:
        with self._waiting():
            dist.broadcast(tensor, 0)

    def _broadcast_object(self, job: Any) -> Any:
        box = [job]
        with self._waiting():
            dist.broadcast_object_list(box)
        return box[0]

    def _device(self, kind: str) -> torch.device:
        if kind == "cuda" and self.local >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs for process {self.local} of this machine; lower "
                "--nproc-per-node of torchrun"
            )
        return torch.device(kind, self.local) if kind == "cuda" else torch.device(kind)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around everything that takes all ranks."""
        self.watch.turn += 1
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a peer has closed the connection
            raise _of_peer(error) from error
        finally:
            self.watch.turn += 1


def _store(is_master: bool) -> dist.Store:  # type: ignore[name-defined]
    """A connection to what all ranks can read and write; each thread needs one of its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False)  # type: ignore[attr-defined]
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"selfevo {start}", store)  # type: ignore[attr-defined]


_world: _World | None = None


def rank() -> int:
    return 0 if _world is None else _world.rank


def size() -> int:
    return 1 if _world is None else _world.size


def run(main: Callable[[], R], served: R) -> R:
    """Runs ``main`` on rank 0, while the other ranks do the parts that it deals and then return ``served``."""
    global _world
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return main()
    _world = _World()
    try:
        _world.connect()
        result = served
        if _world.rank == 0:
            result = main()
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says what is to be said, and ends all
            _world.serve()
    except SystemExit:  # of a parser of flags, before anything was dealt
        _world.end()
        raise
    _world.end()
    _world = None
    return result


def first_to_tell() -> bool:
    """Whether this rank is the one that should say why the command ends."""
    return _world is None or _world.watch.first_to_tell()


def deal(function: Callable[[M, P], R], model: M, parts: Sequence[P]) -> list[R]:
    """The results of ``function(model, part)`` for each part, one for each rank, in their order.

    Rank r does part r, with a mirror of the model. A result is pickled, so it should hold no tensor of a GPU.
    """
    assert len(parts) == size()
    return [function(model, parts[0])] if _world is None else _world.deal(function, model, parts)


def build(make: Callable[[G], M], given: G) -> M:
    """The model ``make(given)``, built by every rank, each of which may keep another part of its weights (as DTensors);
    what is not shared out, and adapters that come and go, is kept the same on all ranks when parts are dealt."""
    return make(given) if _world is None else _world.build(make, given)


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any rank; to be called by all of them."""
    return flag if _world is None else _world.any(flag)


def sum_on_first(tensor: Tensor) -> None:
    """Inside a part that every rank does: adds the tensors of all ranks up, in place on rank 0."""
    if _world is not None:
        _world.reduce(tensor)


def share_out(costs: Sequence[int]) -> list[list[int]]:
    """The numbers of some jobs for each rank, such that their costs are about the same: the most costly job goes first,
    always to the rank that has least to do."""
    shares: list[list[int]] = [[] for _ in range(size())]
    loads = [0] * size()
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += costs[number]
    return [sorted(share) for share in shares]
