"""Two ranks of one thread against one rank of one thread: a stage of DPO, and replies to as many prompts.

    python benchmarks/ranks.py [--backbone DIR] [--data FILE] [--repeats 5]

Every repeat starts one process, then two under torchrun, as ``torchrun examples/iterate.py`` does; both train on the
same pairs, one per supporter turn, and answer the same turns. The first round of each is not counted. Steps are of 64
pairs, in packed rows of 512 tokens, so that there is something to deal: some ten rows a step. A step of few rows leaves
one of the ranks idle for a part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contest import spread
from shapes import dialogue_pairs, dialogue_turns

from selfevo.generate import Sampling, sample_replies
from selfevo.kernels import ranks
from selfevo.lora import inject_lora
from selfevo.models import load_model, load_tokenizer
from selfevo.training import DPOObjective, TrainSettings, keep_freed_memory, reference_logps, train

EMBEDDED = Path(__file__).resolve().parents[1] / "examples" / "embedded"
SETTINGS = TrainSettings(epochs=1, batch_size=64, accumulation=1, max_tokens=512)


def measure(backbone: str, data: str, dialogues: int) -> int:
    """Prints the seconds of training and of replies, in the second of two rounds."""
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    inject_lora(model)
    every = dialogue_pairs(data, tokenizer, 0, dialogues)
    pairs = [pair for own in every for pair in own]
    groups = [str(number) for number, own in enumerate(every) for _ in own]
    contexts = [turn.messages for own in dialogue_turns(data, 0, dialogues) for turn in own]

    def training(folder: Path) -> None:
        objective = DPOObjective(pairs, reference_logps(model, pairs, SETTINGS.max_tokens), groups)
        train(model, objective, folder, SETTINGS)

    def replies(folder: Path) -> None:
        sample_replies(model, tokenizer, contexts, folder / "replies.jsonl", sampling=Sampling(), max_new_tokens=64)

    print(json.dumps({work.__name__: seconds(work) for work in (training, replies)}), flush=True)
    return 0


def seconds(work: Callable[[Path], None]) -> float:
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            work(Path(folder))
            passed = time.perf_counter() - started
    return passed


def started(size: int) -> dict[str, float]:
    """What so many ranks have measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *sys.argv]
    done = subprocess.run(
        [*command, "--measure"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", default=str(EMBEDDED / "backbone"), help="a checkpoint (default: the embedded one)"
    )
    parser.add_argument("--data", default=str(EMBEDDED / "data" / "human.json"), help="dialogues")
    parser.add_argument("--dialogues", type=int, default=32, help="how many of them (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats (default: 5)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        keep_freed_memory()  # as the programs do, on every rank
        ranks.run(lambda: measure(options.backbone, options.data, options.dialogues), served=0)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    found = [(started(1), started(2)) for _ in range(options.repeats)]
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, {options.dialogues} dialogues, one thread a rank\n")
    print("| | one rank, s | two ranks, s | times as fast |\n|---|---|---|---|")
    for name in found[0][0]:
        one, two = ([repeat[size][name] for repeat in found] for size in (0, 1))
        print(f"| {name} | {spread(one)} | {spread(two)} | {spread([a / b for a, b in zip(one, two)])} |")


if __name__ == "__main__":
    main()
