"""The main job: from a chat model and dialogues on disk to M0, M1, M2, a table of scores and a report.

Without arguments it runs on the embedded default, a small backbone and a small world of dialogues made by
``examples/embedded/make.py``. With arguments every path and every hyper-parameter of the paper is a flag.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from embedded import show
from program import TRAINING, program

from selfevo.evaluation.report import add_table, write_report
from selfevo.evolve import EvolveConfig, evolve, read_settings
from selfevo.evolve.settings import REQUIRED, Leaf, change, compose, leaves
from selfevo.files import FileError, locate
from selfevo.kernels import ranks
from selfevo.models.checkpoint import read_config
from selfevo.training import describe_memory, estimate_memory, keep_freed_memory

HERE = Path(__file__).resolve().parent / "embedded"
# The embedded backbone has some 10,000 times fewer parameters than the paper's, and learns at rates to match.
EMBEDDED: dict[str, Any] = {
    "backbone": str(HERE / "backbone"),
    "esconv": str(HERE / "data" / "human.json"),
    "synthetic": (str(HERE / "data" / "synthetic.json"),),
    "replay": str(HERE / "data" / "replay.json"),
    "test": str(HERE / "data" / "test.json"),
    "sft_learning_rate": 1e-3,
    "learning_rate": 3e-5,
    "max_new_tokens": 64,
    "reflection_tokens": 160,
    "repetition_penalty": 1.0,  # it would tax every fact that a personal reply takes up from the dialogue
}


def parse(arguments: list[str] | None = None) -> tuple[EvolveConfig, bool, int | None]:
    """The configuration, whether to resume, and for how many processes only to report the memory needed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for leaf in leaves(EvolveConfig).values():
        add_option(parser, leaf)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    parser.add_argument(
        "--memory", nargs="?", type=int, const=ranks.size(), metavar="PROCESSES",
        help="only report the memory that the backbone needs, with --shard that of each of so many processes",
    )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    resume, memory = given.pop("resume"), given.pop("memory")
    if resume and (run := given_run(parser, given)):
        return change(read_settings(run, EvolveConfig), **given), resume, memory
    values: dict[str, Any] = given
    if "backbone" in values or "esconv" in values:
        missing = [name for name in ("backbone", "esconv") if name not in values]
        if missing:
            parser.error(f"--{missing[0]} is needed beside the other one; without both, the embedded default runs")
    else:
        values = EMBEDDED | values
    if "out" not in values:
        name = Path(values["backbone"]).name if values["backbone"] != EMBEDDED["backbone"] else "embedded"
        values["out"] = str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    return compose(EvolveConfig, values), resume, memory


def given_run(parser: argparse.ArgumentParser, given: dict[str, Any], inside: str = "") -> Path | None:
    """The run folder to continue, --out or one ``inside`` it, whose settings hold where no others are given; None where
    nothing was begun there, which the other flags then begin."""
    if "out" not in given:
        parser.error("--resume needs --out, the run folder to continue")
    run = Path(given["out"], inside)
    if (run / "config.json").exists():
        return run
    if given.keys() == {"out"}:
        raise FileError(f"{run}: holds no run to continue (no config.json); start it with its flags, without --resume")
    return None


def add_option(parser: argparse.ArgumentParser, leaf: Leaf) -> None:
    """The flag of one of the settings; without a default of its own, so that only what was given is parsed."""
    flag, text, default = "--" + leaf.name.replace("_", "-"), leaf.help, leaf.default
    extra: dict[str, Any] = {"default": argparse.SUPPRESS}
    if default is REQUIRED:
        where = "runs/NAME-TIME" if leaf.name == "out" else "the embedded one"
        parser.add_argument(flag, metavar="PATH", help=f"{text} (default: {where})", **extra)
    elif isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=text, **extra)
    elif isinstance(default, tuple):
        parser.add_argument(flag, nargs="+", metavar="PATH", help=text, **extra)
    else:
        shown = f" (default: {default})" if default not in ("", 0) else ""
        metavar = None if leaf.choices else type(default).__name__.upper().replace("STR", "TEXT")
        parser.add_argument(
            flag, type=type(default), choices=leaf.choices or None, metavar=metavar, help=text + shown, **extra
        )  # fmt: skip


def is_embedded(config: EvolveConfig) -> bool:
    """Whether a run is tested in the embedded world, whose facts can be looked up."""
    return config.backbone.source == EMBEDDED["backbone"] and config.data.test == EMBEDDED["test"]


def tell_memory(config: EvolveConfig, processes: int) -> str:
    """What the backbone needs on each GPU, from its config.json alone."""
    if processes < 1:
        raise ValueError(f"--memory {processes}: the number of processes should be at least 1")
    backbone, row_tokens = config.backbone, config.training.max_tokens
    folder = locate(backbone.source, patterns=("config.json",), revision=backbone.revision or None)
    dtype = torch.float32 if backbone.dtype == "float32" else torch.bfloat16
    memory = estimate_memory(
        read_config(folder), iterations=config.iterations, dtype=dtype, rank=config.adapter.rank,
        row_tokens=row_tokens, slots=config.replies.slots, checkpointed=backbone.checkpoint_activations,
        shared_by=processes if backbone.shard else 1,
    )  # fmt: skip
    how = [str(dtype), f"rows of {row_tokens} tokens", f"{config.replies.slots} slots"]
    how += ["checkpointed"] * backbone.checkpoint_activations
    how += [f"each of {processes} processes{', which share the weights' * backbone.shard}"] * (processes > 1)
    return f"{backbone.source}, {', '.join(how)}:\n{describe_memory(memory)}"


@program(memory=TRAINING)
def main() -> int:
    config, resume, memory = parse()
    try:
        if memory is not None:
            print(tell_memory(config, memory))
            return 0
        print(f"selfevo: {config.backbone.source} on {config.data.esconv}, into {config.out}", flush=True)
        keep_freed_memory()
        run = evolve(config, resume=resume)
        if is_embedded(config):
            title = "Facts told so far that replies take up; replies with such a fact; with one of somebody else (%)."
            add_table(run / "eval", "personalisation", title, show.rates(run))
        report = write_report(run)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"continue with: --out {config.out} --resume") from stop
    print()
    print((run / "eval" / "table.md").read_text(encoding="utf-8"))
    if is_embedded(config):
        print(show.describe(run), end="\n\n")
    print(f"adapters, pairs, replies and scores: {run}\ntables, figures and samples to look at: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
