"""What every command does around its work: whatever goes wrong ends in one sentence, never in a traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable

from selfevo.files import one_line

# How PyTorch says on its devices that memory is used up; all are RuntimeErrors.
_NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|ALLOC_FAILED", re.IGNORECASE)
TRAINING = "lower --max-tokens or --slots, give --checkpoint-activations, or take a smaller backbone"


def program(*, memory: str, interrupted: str = "nothing was kept") -> Callable[[Callable[[], int]], Callable[[], int]]:
    """Makes a command of ``main``, which returns its exit code and raises a ValueError or OSError for its user.

    These, exhausted memory (``memory``: what to lower then) and anything unexpected, whose traceback is kept in a
    file, give one sentence on stderr and exit code 1; Ctrl-C gives ``interrupted``, or what the KeyboardInterrupt says,
    and 130; a reader of our output that has gone, as in ``| head``, ends us quietly with 141. Under torchrun rank 0
    alone runs ``main``, and whichever rank fails first says why.
    """

    def wrap(main: Callable[[], int]) -> Callable[[], int]:
        @functools.wraps(main)
        def run() -> int:
            work: Callable[[], int] = main
            should_tell = _alone
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
                from selfevo.kernels import ranks  # PyTorch, which not every command needs
                from selfevo.training import keep_freed_memory

                keep_freed_memory()  # on every rank, not only on the one that runs main
                work, should_tell = functools.partial(ranks.run, main, served=0), ranks.first_to_tell
            try:
                if work is main and not any(argument.startswith("--memory") for argument in sys.argv):
                    refuse_idle(["--shard"], "there is one process, and torchrun starts several")
                code = work()
                sys.stdout.flush()
                return code
            except KeyboardInterrupt as stop:
                if should_tell():
                    print(f"\ninterrupted; {str(stop) or interrupted}", file=sys.stderr)
                return 130
            except SystemExit:
                raise
            except BrokenPipeError:
                should_tell()
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
                return 141
            except BaseException as error:  # a panic of the tokenizers library is no Exception
                if should_tell():
                    print(f"error: {sentence(error, memory)}", file=sys.stderr)
                return 1

        return run

    return wrap


def refuse_idle(flags: Iterable[str], reason: str) -> None:
    """Raises ValueError for the first of the ``flags`` that was given: it would change nothing, for this ``reason``."""
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    for flag in flags:
        if flag in given:
            raise ValueError(f"{flag} has no effect here: {reason}; leave it out")


def _alone() -> bool:
    """Whether this process should say why the command ends: of several ranks only one does."""
    return True


def sentence(error: BaseException, memory: str) -> str:
    """One line for an error; a traceback is kept for what no user can have caused."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        text = f"the memory does not suffice; {memory}"
    elif isinstance(error, OSError) and error.strerror:  # one that nobody has put into words
        text = f"{error.filename or 'a file'}: {error.strerror}; check the path, its permissions and the free space"
    elif isinstance(error, (ValueError, OSError, FloatingPointError)):
        text = str(error)
    else:
        text = f"this is a fault of selfevo, not of yours ({type(error).__name__}: {error}); {_keep(error)}"
    return one_line(text)


def _keep(error: BaseException) -> str:
    """Writes the traceback to a file of its own; says where."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="selfevo-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        traceback.print_exception(error)
        return "the details are above, as they could not be written to a file: please report them"
    return f"please report it with the details in {path}"
