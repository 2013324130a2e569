"""Decoupled ESC: a strategy planner and a response generator, each SFT then DPO on mined pairs, beside a joint model.

Without arguments it runs on the embedded default: dialogues with strategies from examples/embedded/strategies.py, and a
rule of that world in place of the language model that looks for psychological errors. With --backbone and --esconv it
runs on real files: ESConv.json, or the published [Strategy] messages (ESC_sft_*.json). Those need a judge, as in
judge.py: a model behind an OpenAI-compatible endpoint (--judge NAME --judge-url URL; its key in SELFEVO_API_KEY or
OPENAI_API_KEY), or a local backbone (--judge FOLDER).

    python examples/decoupled.py
    python examples/decoupled.py --seeds 0 1 2 --out runs/decoupled
    python examples/decoupled.py --backbone DIR --esconv ESC_sft_train.json --test ESC_sft_test.json --judge DIR

A run folder has planner-sft, planner-dpo, generator-sft, generator-dpo and joint-sft (adapters in PEFT's format; pairs
and what became of the others under -dpo) and eval (plans, replies, scores, strategies.md, replies.md). With several
seeds there is one run folder seed-N for each, and the table has means and ranges.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import iterate
from embedded import strategies
from program import TRAINING, program

from selfevo.datasets.seeds import derive_seed
from selfevo.decoupled import DecoupledConfig, decouple
from selfevo.decoupled.mining import ErrorFinder, find_errors
from selfevo.evaluation.ask_json import Responder
from selfevo.evaluation.endpoint import Address, Endpoint, EndpointSettings, read_parameters
from selfevo.evaluation.local_responder import LocalResponder
from selfevo.evaluation.origin import backbone_hash
from selfevo.evaluation.report import write_report
from selfevo.evaluation.tables import mean_table
from selfevo.evolve import load_backbone, read_settings
from selfevo.evolve.reflection import GUIDED
from selfevo.evolve.run_folder import check_run, is_finished
from selfevo.evolve.settings import change, compose, leaves
from selfevo.files import read_json, write_text
from selfevo.generate import Sampling
from selfevo.training import keep_freed_memory

EMBEDDED: dict[str, Any] = {
    "backbone": str(iterate.HERE / "backbone"),
    "esconv": str(iterate.HERE / "data" / "strategies.json"),
    "test": str(iterate.HERE / "data" / "strategies_test.json"),
    "sft_learning_rate": 3e-3,
    "accumulation": 1,
    "learning_rate": 5e-5,
    "max_new_tokens": 48,
}


def parse(arguments: list[str] | None = None) -> tuple[DecoupledConfig, list[int], bool, str]:
    """The configuration, the seeds (none: the configuration's own), whether to resume, and the judge's URL as given:
    a login in it is for no file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for leaf in leaves(DecoupledConfig).values():
        if leaf.name == "judge_parameters":
            parser.add_argument(
                "--judge-parameter", dest=leaf.name, action="append", metavar="NAME=VALUE", default=argparse.SUPPRESS,
                help=leaf.help,
            )  # fmt: skip
        else:
            iterate.add_option(parser, leaf)
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="INT", help="several runs, in OUT/seed-INT")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    values = vars(parser.parse_args(arguments))
    resume, seeds = values.pop("resume"), values.pop("seeds")
    if seeds and "seed" in values:
        parser.error("--seed and --seeds exclude each other")
    judge_url = values.get("judge_url", "")
    if judge_url:
        values["judge_url"] = Address.of(judge_url).url
    if resume and (run := iterate.given_run(parser, values, f"seed-{seeds[0]}" if seeds else "")):
        config = change(read_settings(run, DecoupledConfig), **values)
        return config, seeds, resume, judge_url or config.judge_url
    if "backbone" in values or "esconv" in values:
        missing = [name for name in ("backbone", "esconv") if name not in values]
        if missing:
            parser.error(f"--{missing[0]} is needed beside the other one; without both, the embedded default runs")
        if not values.get("judge"):
            parser.error("real files need a judge of psychological errors: --judge, for an endpoint with --judge-url")
    elif "test" in values:
        parser.error("--test goes with --backbone and --esconv: the embedded default is tested in its own world")
    else:
        values = EMBEDDED | values
    if "out" not in values:
        values["out"] = str(Path("runs") / f"decoupled-{datetime.now():%Y%m%d-%H%M%S}")
    return compose(DecoupledConfig, values), seeds, resume, judge_url


def make_judge(config: DecoupledConfig, judge_url: str) -> Responder | None:
    """The endpoint or the local model that was requested; its answers are kept in the run folder."""
    folder = Path(config.out) / "judge"
    if judge_url:
        settings = EndpointSettings(judge_url, config.judge, parameters=read_parameters(config.judge_parameters))
        return Endpoint(settings, folder / "answers.jsonl")
    if config.judge:
        model, tokenizer = load_backbone(replace(config.backbone, source=config.judge, revision="", chat_format=""))
        seed = derive_seed(config.seed, "judge")
        sampling = Sampling(temperature=0.8, top_p=0.95, top_k=0, repetition_penalty=1.0, seed=seed)
        guided, content = config.judge_answers == GUIDED, backbone_hash(config.judge)
        return LocalResponder(model, tokenizer, config.judge, folder, sampling=sampling, guided=guided, content=content)
    return None


def run_one(config: DecoupledConfig, judge_url: str, *, resume: bool) -> dict[str, Any]:
    """The scores of one run: strategies and replies, by model."""
    check_run(config, resume=resume)
    judge = make_judge(config, judge_url)
    if isinstance(judge, Endpoint) and not is_finished(config):
        judge.check()  # rather than after the first stages are trained
    finder: ErrorFinder = strategies.find_errors if judge is None else partial(find_errors, judge)
    run = decouple(config, finder, judge=judge, resume=resume)
    tables = [(run / "eval" / f"{name}.md").read_text(encoding="utf-8") for name in ("strategies", "replies")]
    report = write_report(run)
    if isinstance(judge, Endpoint):
        print(*judge.remarks(), sep="\n", file=sys.stderr)
    print("", *tables, f"adapters, pairs, replies and scores: {run}\ntables and samples: {report}", sep="\n")
    scores: dict[str, Any] = read_json(run / "eval" / "scores.json")
    return scores


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """Both tables with the mean over the seeds and the range of every cell."""
    tables = [{name: [run[kind][name] for run in runs] for name in runs[0][kind]} for kind in runs[0]]
    return "\n\n".join(map(mean_table, tables))


@program(memory=TRAINING)
def main() -> int:
    config, seeds, resume, judge_url = parse()
    try:
        print(f"selfevo: {config.backbone.source} on {config.data.esconv}, into {config.out}", flush=True)
        keep_freed_memory()
        if not seeds:
            run_one(config, judge_url, resume=resume)
            return 0
        runs = []
        for seed in seeds:
            folder = Path(config.out) / f"seed-{seed}"
            own = replace(config, seed=seed, out=str(folder))
            runs.append(run_one(own, judge_url, resume=resume))
        table = summary(runs)
        write_text(Path(config.out) / "table.md", table + "\n")
    except KeyboardInterrupt as stop:
        again = " ".join(map(str, ["--seeds", *seeds] if seeds else []))
        raise KeyboardInterrupt(f"continue with: --out {config.out} --resume {again}".rstrip()) from stop
    print(f"\nmeans over seeds {', '.join(map(str, seeds))} (smallest to largest):\n\n{table}")
    print(f"\nalso in {Path(config.out) / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
