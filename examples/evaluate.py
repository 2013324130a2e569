"""Objective scores of one or several models on the same test turns: values, intervals, paired tests.

    python examples/evaluate.py RUN                      the models of a run (what iterate.py made), scored again
    python examples/evaluate.py DIR --test ESConv.json --model base=Qwen/Qwen2-7B-Instruct \\
        --model M2=Qwen/Qwen2-7B-Instruct@runs/qwen/M2   any chat models; NAME=BACKBONE, or NAME=BACKBONE@ADAPTER
    python examples/evaluate.py RUN --model other=...    another model beside those of a run, on the run's test turns

DIR/eval then holds the test turns, every model's replies, its scores with their signatures, and what each reply scored.
What is there already is not sampled again, so a killed command continues. Every score has a 95 % interval (a mean over
replies by bootstrap, a score of the whole corpus by the jackknife), and means over replies are compared with those of
the model before by a paired sign-flip test; all draw, or leave out, whole dialogues. --prompts compares prompts (the
paper's Table 3): every model answers under each. Where chosen replies come from (Table 5) is a matter of training: see
"ablate.py preferences".
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import iterate
from program import program

from selfevo.datasets.corpus import load_test
from selfevo.datasets.prompts import REPLY_STYLES
from selfevo.dialogue import Example
from selfevo.evaluation.columns import BERT_MODEL, CONVENTIONS, EXTRAS
from selfevo.evaluation.folder import answered_models, read_examples
from selfevo.evaluation.score import compare_models, missing_scores, score_answers
from selfevo.evaluation.tables import interval_table, significance_table
from selfevo.evolve import DataSettings, EvolveConfig, RunError, load_backbone
from selfevo.evolve.evaluate import evaluate_model, is_answered
from selfevo.evolve.settings import compose, leaves
from selfevo.files import read_json, write_text
from selfevo.lora import load_adapter, remove_adapters
from selfevo.training import keep_freed_memory

_NAME = re.compile(r"\w[\w .+-]*")  # names become names of files and cells of tables
PROMPTS = (*REPLY_STYLES, "refine")
# The settings of iterate.py that say how replies are drawn and where; a run's own are taken where it has them.
OF_REPLIES = (
    "limit", "first_speaker", "skip_greetings", "style", "prompts_file", "temperature", "top_p", "top_k",
    "repetition_penalty", "max_new_tokens", "reflection_tokens", "reflection", "tries", "slots", "seed", "dtype",
    "device", "revision", "chat_format",
)  # fmt: skip


def parse() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Our own options, and those of ``EvolveConfig`` that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="a run folder, or a folder to make")
    parser.add_argument("--test", metavar="PATH", help="test dialogues, where the folder has none yet")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=BACKBONE[@ADAPTER]", help="a model to ask"
    )
    parser.add_argument(
        "--prompts", nargs="+", choices=PROMPTS, metavar="STYLE",
        help=f"prompts to ask under, of {', '.join(PROMPTS)}; refine lets a model reflect on its reply and rewrite it "
        "(default: --style)",
    )  # fmt: skip
    parser.add_argument("--convention", choices=CONVENTIONS, default="paper", help="how to count (default: paper)")
    parser.add_argument(
        "--extras", nargs="*", choices=EXTRAS, help="scores that need other packages (default: those that are there)"
    )
    parser.add_argument(
        "--bert-model", default="", metavar="TEXT",
        help=f"model of BERTScore, a name to fetch or a folder (default: {BERT_MODEL}, if it was fetched before)",
    )  # fmt: skip
    known = leaves(EvolveConfig)
    for name in OF_REPLIES:
        iterate.add_option(parser, known[name])
    given = vars(parser.parse_args())
    own = {name: given.pop(name) for name in list(given) if name not in OF_REPLIES}
    return argparse.Namespace(**own), given


def settings_of(folder: Path, given: dict[str, Any]) -> EvolveConfig:
    """How replies are drawn: as in the folder's run, where it is one, but for what was given."""
    stored = read_json(folder / "config.json")["settings"] if (folder / "config.json").is_file() else {}
    known = {name: stored[name] for name in OF_REPLIES if name in stored}
    return compose(EvolveConfig, {"backbone": "", "esconv": "", "out": str(folder), **known, **given})


def test_turns(folder: Path, data: DataSettings) -> list[Example]:
    """The test turns of a file, or the folder's."""
    return load_test(data) if data.test else read_examples(folder)


def ask(entry: str, prompts: list[str], config: EvolveConfig, examples: list[Example], folder: Path) -> None:
    """Lets one model answer under every prompt."""
    name, _, source = entry.partition("=")
    backbone, _, adapter = source.partition("@")
    if not name or not backbone:
        raise RunError(f"--model {entry}: expected NAME=BACKBONE or NAME=BACKBONE@ADAPTER")
    if not _NAME.fullmatch(name):
        raise RunError(f"--model {entry}: a name may have letters, digits, spaces and . _ + -, not {name!r}")
    asked = []
    for prompt in prompts:
        settings = config.test_replies if prompt == "refine" else replace(config.test_replies, style=prompt)
        asked.append((name if len(prompts) == 1 else f"{name}-{prompt}", settings, prompt == "refine"))
    answered = [is_answered(folder, named, settings, source, refining) for named, settings, refining in asked]
    if all(answered):
        return
    model, tokenizer = load_backbone(replace(config.backbone, source=backbone))
    remove_adapters(model)
    if adapter:
        load_adapter(model, adapter)
    for named, settings, refining in asked:
        evaluate_model(model, tokenizer, examples, folder, named, settings, source=source, refining=refining)


@program(memory="lower --slots or take a smaller backbone", interrupted="the same command continues")
def main() -> int:
    own, given = parse()
    folder = Path(own.folder) / "eval"
    if own.test and not own.model:
        raise RunError("--test goes with --model: the models in the folder have answered its own test turns")
    config = settings_of(Path(own.folder), given)
    if own.model:
        keep_freed_memory()
        examples = test_turns(folder, replace(config.data, test=own.test or ""))
        for entry in own.model:
            ask(entry, own.prompts or [config.replies.style], config, examples, folder)
    names = answered_models(folder)
    for name in names:
        score_answers(folder, name, convention=own.convention, extras=own.extras, bert_model=own.bert_model)
    table = interval_table(folder, names, convention=own.convention)
    if own.convention == "paper":
        table += "".join(f"\n\n{sentence}" for sentence in missing_scores(folder, names))
    if len(names) > 1:
        pairs = {f"{b} - {a}": compare_models(folder, a, b, convention=own.convention) for a, b in pairwise(names)}
        table += "\n\n" + significance_table(pairs)
    path = folder / f"table-{own.convention}.md"
    write_text(path, table + "\n")
    print(f"\n{table}\n\nintervals and p-values are not corrected for the number of columns; also in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
