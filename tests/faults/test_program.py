"""The last net around every command: whatever happens, one sentence and an exit code."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faulty
import pytest
import torch
from program import program

from selfevo.files import FileError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMANDS = (
    "abilities",
    "ablate",
    "chat",
    "decoupled",
    "describe",
    "evaluate",
    "export",
    "iterate",
    "judge",
    "report",
    "study",
)


def command(work: Callable[[], object]) -> Callable[[], int]:
    @program(memory="lower --slots", interrupted="the same command continues")
    def main() -> int:
        work()
        return 0

    return main


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> None:
        raise error

    return command(work)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileError("a.json: is empty; write it anew"), "a.json: is empty"),
        (FileError("two\nlines\x1b[31m"), "two lines [31m"),
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device"),
        (FloatingPointError("step 3: the loss is nan"), "step 3"),
        (MemoryError(), "lower --slots"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --slots"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --slots"),
        (FileError("x" * 10**6), "x ..."),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_sentence(error: Exception, said: str) -> None:
    faulty.assert_program_refuses(raising(error), mentions=(said,))


def test_too_much_memory_is_no_traceback() -> None:
    faulty.assert_program_refuses(command(lambda: torch.empty(2**50)), mentions=("memory", "lower --slots"))


def test_what_is_our_fault_says_so_and_where_the_details_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Panic(BaseException):
        """Like that of the tokenizers library."""

    for error in (KeyError("x"), RecursionError(), Panic("at src/lib.rs")):
        assert raising(error)() == 1
        said = capsys.readouterr().err
        assert said.startswith("error: this is a fault of selfevo")
        assert said.count("\n") == 1
        log = Path(said.split()[-1])
        assert type(error).__name__ in log.read_text()
        assert "in work" in log.read_text()
        log.unlink()


def test_ctrl_c_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command continues\n"
    assert raising(KeyboardInterrupt("with --resume"))() == 130
    assert capsys.readouterr().err == "\ninterrupted; with --resume\n"


@pytest.mark.parametrize("target", ["| head -c 1", "> /dev/full"])
def test_output_that_cannot_be_written_is_no_traceback(target: str) -> None:
    code = (
        "from program import program\n@program(memory='')\ndef main():\n for _ in range(9**5): print('line')\n"
        " return 0\nraise SystemExit(main())"
    )
    script = f'{sys.executable} -c "{code}" {target}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], cwd=EXAMPLES, capture_output=True, text=True, timeout=60)
    if "full" in target:
        assert done.returncode == 1
        faulty.check_sentence(done.stderr, "No space left on device")
    else:
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_net(name: str) -> None:
    """And refuses a flag that it does not know, or a folder that is not there, in argparse's manner or ours."""
    main = importlib.import_module(name).main
    assert main.__wrapped__
    faulty.assert_program_refuses(main, "nowhere", "--no-such-flag")


def test_no_command_is_forgotten() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py") if "def main()" in path.read_text(encoding="utf-8")}
    assert found == set(COMMANDS)
