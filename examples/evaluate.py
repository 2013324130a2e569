"""Objective scores of one or several models on the same test turns: values, intervals, paired tests.

    python examples/evaluate.py RUN                      the models of a run (what iterate.py made), scored again
    python examples/evaluate.py DIR --test ESConv.json --model base=Qwen/Qwen2-7B-Instruct \\
        --model M2=Qwen/Qwen2-7B-Instruct@runs/qwen/M2   any chat models; NAME=BACKBONE, or NAME=BACKBONE@ADAPTER
    python examples/evaluate.py RUN --model other=...    another model beside those of a run, on the run's test turns

DIR/eval then holds the test turns, every model's replies, its scores with their signatures, and what each reply scored.
What is there already is not sampled again, so a killed command continues; a name that stands for another model or other
settings is refused. Every score has a 95 % interval (a mean over replies by bootstrap, a score of the whole corpus by
the jackknife), and means over replies are compared with those of one model, --baseline, by a paired sign-flip test; all
draw, or leave out, whole dialogues. --prompts compares prompts (the paper's Table 3): every model answers under each.
Where chosen replies come from (Table 5) is a matter of training: see "ablate.py preferences".
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import iterate
from program import program, refuse_idle

from selfevo.datasets.corpus import load_test
from selfevo.datasets.prompts import REPLY_STYLES, SELF_REFLECTION
from selfevo.dialogue import Example
from selfevo.evaluation.columns import BERT_MODEL, CONVENTIONS, EXTRAS
from selfevo.evaluation.folder import answered_models, check_examples, check_name, read_examples
from selfevo.evaluation.score import compare_models, missing_scores, score_answers
from selfevo.evaluation.tables import interval_table, significance_table
from selfevo.evolve import BackboneSettings, DataSettings, EvolveConfig, RefineSettings, RunError, load_backbone
from selfevo.evolve.evaluate import evaluate_model, is_answered, origin_of
from selfevo.evolve.settings import compose, leaves
from selfevo.files import read_object, write_text
from selfevo.lora import load_adapter, remove_adapters
from selfevo.training import keep_freed_memory

PROMPTS = (*REPLY_STYLES, "refine")
# The settings of iterate.py that say how replies are drawn and where; a run's own are taken where it has them.
OF_REPLIES = (
    "limit", "first_speaker", "skip_greetings", "style", "prompts_file", "temperature", "top_p", "top_k",
    "repetition_penalty", "max_new_tokens", "reflection_tokens", "reflection", "tries", "slots", "seed", "dtype",
    "device", "revision", "shard", "chat_format",
)  # fmt: skip
OF_TEST_FILES = ("--limit", "--first-speaker", "--skip-greetings")


@dataclass(frozen=True)
class Entry:
    """A model to ask, ``NAME=BACKBONE[@ADAPTER]``, and under what names it answers: one for each prompt."""

    backbone: BackboneSettings
    adapter: str
    asked: list[tuple[str, RefineSettings, bool]]  # name, settings, whether it rewrites its replies

    @property
    def origin(self) -> dict[str, Any]:
        return origin_of(self.backbone, self.adapter or None)


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
    parser.add_argument(
        "--baseline", metavar="NAME",
        help="the model that every other one is compared with (default: the first row, vanilla where it is there)",
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
    path = folder / "config.json"
    stored = read_object(path).take("settings", dict) if path.is_file() else {}
    known = {name: stored[name] for name in OF_REPLIES if name in stored}
    try:
        return compose(EvolveConfig, {"backbone": "", "esconv": "", "out": str(folder), **known, **given})
    except TypeError as error:
        raise RunError(f"{path}: has a setting of the wrong kind ({error}); mend it") from error


def check_flags(own: argparse.Namespace, config: EvolveConfig) -> None:
    """Refuses every flag that would change nothing in this call."""
    if not own.model:
        of_replies = ["--" + name.replace("_", "-") for name in OF_REPLIES]
        refuse_idle(["--test", "--prompts", *of_replies], "it is for models that answer, and no --model is given")
    elif not own.test:
        refuse_idle(OF_TEST_FILES, "it selects turns of a test file, and no --test is given")
    if "BERTScore" not in ((EXTRAS if own.convention == "paper" else ()) if own.extras is None else own.extras):
        refuse_idle(["--bert-model"], "no BERTScore is computed")
    kinds = set(own.prompts or [config.replies.style])
    if kinds.isdisjoint({"refine"}):
        refuse_idle(["--tries"], "it is for the prompt refine")
        if own.prompts:
            refuse_idle(["--style"], "--prompts says how models are asked")
    if kinds.isdisjoint({"refine", SELF_REFLECTION}):
        refuse_idle(["--reflection", "--reflection-tokens"], f"it is for the prompts refine and {SELF_REFLECTION}")
    if kinds == {SELF_REFLECTION}:
        refuse_idle(["--max-new-tokens"], "--reflection-tokens bounds a reply in JSON")
    if config.replies.sampling.temperature == 0:
        refuse_idle(["--top-p", "--top-k", "--seed"], "at temperature 0 nothing is drawn")


def test_turns(folder: Path, data: DataSettings) -> list[Example]:
    """The test turns of a file, or the folder's."""
    return load_test(data) if data.test else read_examples(folder)


def read_entry(entry: str, prompts: list[str], config: EvolveConfig) -> Entry:
    """A ``--model`` in its parts, under the prompts that it is to answer under."""
    name, _, source = entry.partition("=")
    backbone, _, adapter = (source, "", "") if Path(source).is_dir() else source.partition("@")
    if not backbone or (not adapter and source.endswith("@")):
        raise RunError(f"--model {entry}: expected NAME=BACKBONE or NAME=BACKBONE@ADAPTER")
    try:
        check_name(name)
    except ValueError as error:
        raise RunError(f"--model {entry}: {error}") from error
    if Path(backbone).is_dir():
        refuse_idle(["--revision"], f"{backbone} is a folder, revisions are of the hub")
    asked = []
    for prompt in prompts:
        settings = config.test_replies if prompt == "refine" else replace(config.test_replies, style=prompt)
        asked.append((name if len(prompts) == 1 else f"{name}-{prompt}", settings, prompt == "refine"))
    return Entry(replace(config.backbone, source=backbone), adapter, asked)


def ask(entries: list[Entry], examples: list[Example], folder: Path) -> None:
    """Lets the models answer; what is there already is not sampled again. Nothing is sampled before everything that was
    asked for is known to be possible."""
    twice = [name for name, count in Counter(name for e in entries for name, _, _ in e.asked).items() if count > 1]
    if twice:
        raise RunError(f"--model and --prompts give the name {twice[0]} twice; every model needs a name of its own")
    check_examples(folder, examples)
    answered = [[is_answered(folder, n, how, entry.origin, r) for n, how, r in entry.asked] for entry in entries]
    for entry in (entry for entry, there in zip(entries, answered) if not all(there)):
        model, tokenizer = load_backbone(entry.backbone)
        remove_adapters(model)
        if entry.adapter:
            load_adapter(model, entry.adapter)
        for name, settings, refining in entry.asked:
            evaluate_model(
                model, tokenizer, examples, folder, name, settings, origin=entry.origin, refining=refining
            )  # fmt: skip


def compare_with(folder: Path, names: list[str], baseline: str, convention: str) -> str:
    """The table of differences between every model and one of them."""
    others = [name for name in names if name != baseline]
    pairs = {f"{name} - {baseline}": compare_models(folder, baseline, name, convention=convention) for name in others}
    return significance_table(pairs)


@program(memory="lower --slots or take a smaller backbone", interrupted="the same command continues")
def main() -> int:
    own, given = parse()
    folder = Path(own.folder) / "eval"
    config = settings_of(Path(own.folder), given)
    check_flags(own, config)
    if own.model:
        keep_freed_memory()
        entries = [read_entry(entry, own.prompts or [config.replies.style], config) for entry in own.model]
        ask(entries, test_turns(folder, replace(config.data, test=own.test or "")), folder)
    names = answered_models(folder)
    baseline = own.baseline or names[0]
    if baseline not in names:
        raise RunError(f"--baseline {baseline}: {folder} has no such model; it has {', '.join(names)}")
    if len(names) == 1:
        refuse_idle(["--baseline"], f"{names[0]} is the only model")
    for name in names:
        score_answers(folder, name, convention=own.convention, extras=own.extras, bert_model=own.bert_model)
    table = interval_table(folder, names, convention=own.convention)
    if own.convention == "paper":
        table += "".join(f"\n\n{sentence}" for sentence in missing_scores(folder, names))
    if len(names) > 1:
        table += "\n\n" + compare_with(folder, names, baseline, own.convention)
    path = folder / f"table-{own.convention}.md"
    write_text(path, table + "\n")
    print(f"\n{table}\n\nintervals and p-values are not corrected for the number of columns; also in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
