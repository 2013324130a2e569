"""Variants of the loop over several seeds, side by side in one table.

    python examples/ablate.py WHAT --out DIR [--seeds 0 1 2] [flags of iterate.py]

WHAT is one of
  seeds        the loop itself (Table 6)
  baselines    the rows of Table 2: the vanilla backbone, SFT on ESConv without replay, SFT on the synthetic dialogues
               instead, and M0, M1, M2
  controls     what should fail if the effect is real: chosen and rejected swapped; both replies of a pair given to
               another user; only the SFT term on the chosen replies
  preferences  where chosen replies come from, from the vanilla backbone on (Table 5): HM human dialogues, HL golden
               replies of the synthetic dialogues, SR self-refinement; P is the model's first reply, the rejected one
  prompts      no training, only prompts (Table 3): vanilla, strategy and self-reflection, and refine (the model
               reflects on its reply and rewrites it), for the backbone and for the models of a run

Each run is a folder DIR/VARIANT-SEED as iterate.py makes it. What is there already is not computed again, so a killed
command continues, and commands with the same DIR share their runs. Without --backbone the embedded default runs, whose
table also has the rates of embedded/show.py. Cells are means over the seeds (smallest to largest). Every other flag is
one of iterate.py's; see its --help.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import iterate
from embedded import show
from program import TRAINING, program, refuse_idle

from selfevo.datasets.prompts import PAPER_STYLES
from selfevo.dialogue import to_messages
from selfevo.evaluation.folder import VANILLA, read_examples
from selfevo.evaluation.score import missing_scores, read_report, score_file
from selfevo.evaluation.tables import mean_table
from selfevo.evolve import BackboneSettings, EvolveConfig, evolve, load_backbone, read_settings
from selfevo.evolve.evaluate import evaluate_model, origin_of
from selfevo.evolve.settings import change
from selfevo.files import read_json, read_jsonl, write_text
from selfevo.lora import load_adapter, remove_adapters

SYNTHETIC = {"sft_data": "synthetic"}
FROM_VANILLA = {"start": VANILLA}
SFT_ONLY = {"iterations": 0, "replay": ""}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "seeds": {"SR": {}},
    "baselines": {"SFT-ESConv": SFT_ONLY, "SFT-SynESC": SFT_ONLY | SYNTHETIC, "SR": {}},
    "controls": {
        "SR": {}, "swapped": {"control": "swapped"}, "shuffled": {"control": "shuffled"},
        "sft-only": {"control": "sft-only"},
    },
    "preferences": {
        "HM-P": {"chosen": "golden", "synthetic": (), **FROM_VANILLA}, "HL-P": {"chosen": "golden", **FROM_VANILLA},
        "SR-P": FROM_VANILLA,
    },
    "prompts": {"SR": {}},
}  # fmt: skip
SET_BY_VARIANTS = {"baselines": ["--sft-data"], "controls": ["--control"], "preferences": ["--chosen", "--start"]}
OWN_COLUMNS = ("BLEU-2", "ROUGE-L", "Distinct-2", "Distinct-2 (corpus)", "Length")
COLUMNS: dict[str, tuple[str, ...]] = {
    "baselines": ("BLEU-2", "BLEU-3", "ROUGE-L", "METEOR", "BERTScore", "Distinct-2", "Distinct-3"),
    "preferences": ("BLEU-2", "BLEU-3", "ROUGE-L", "Distinct-2"),
    "prompts": ("BLEU-2", "BLEU-3", "ROUGE-L", "Distinct-3"),
}
Values = dict[str, float]


def run_variant(config: EvolveConfig) -> dict[str, Values]:
    """The scores of every model of a run, which is continued where it was, or read where it is complete, and those that
    ``evaluate.py`` has added since."""
    run = evolve(config, resume=True)
    rates = show.rates(run) if iterate.is_embedded(config) else {}
    found: dict[str, Values] = {}
    for name in read_json(run / "eval" / "scores.json"):
        scores = read_report(score_file(run / "eval", name, "paper"))["scores"]
        found[name] = rates.get(name, {}) | {column: score["value"] for column, score in scores.items()}
    return found


def compare_prompts(config: EvolveConfig) -> dict[str, Values]:
    """The scores of the backbone and of a run's models, answering under each kind of prompt."""
    run = Path(config.out)
    folder, examples = run / "prompts", read_examples(run / "eval")
    model, tokenizer = load_backbone(config.backbone)
    begun_with = read_settings(run, BackboneSettings).source  # as it was spelled then
    contexts = [to_messages(example.context) for example in examples]
    table: dict[str, Values] = {}
    for stage in (VANILLA, *config.models):
        remove_adapters(model)
        if stage != VANILLA:
            load_adapter(model, run / stage)
        for kind in (*PAPER_STYLES, "refine"):
            settings = config.test_replies if kind == "refine" else replace(config.test_replies, style=kind)
            name = f"{stage}-{kind}"
            origin = origin_of(config.backbone, None if stage == VANILLA else run / stage, f"{begun_with}@{stage}")
            values = evaluate_model(
                model, tokenizer, examples, folder, name, settings, origin=origin, refining=kind == "refine"
            )  # fmt: skip
            texts = [record["text"] or "" for record in read_jsonl(folder / f"{name}.replies.jsonl")]
            rates = show.score(texts, contexts) if iterate.is_embedded(config) else {}
            table[f"{stage}, {kind}"] = rates | values
    return table


def row_name(variant: str, model: str, changes: dict[str, Any]) -> str:
    """What a model is called in a table: those of the loop itself, and the vanilla backbone, need no variant."""
    if variant == "SR" or model == VANILLA:
        return model
    return variant if changes.get("iterations") == 0 else f"{variant} {model}"


def make_table(what: str, seeds: list[int], base: EvolveConfig) -> str:
    """Runs what is not there yet; a row for each model, and a sentence for each score that is missing."""
    out, rows, sentences = Path(base.out), dict[str, list[Values]](), dict[str, None]()
    before: dict[str, str] = {}
    for name, changes in VARIANTS[what].items():
        for seed in seeds:
            config = change(base, out=str(out / f"{name}-{seed}"), seed=seed, **changes)
            print(f"{name}, seed {seed}: {config.out}", flush=True)
            found = run_variant(config)
            sentences |= dict.fromkeys(missing_scores(Path(config.out) / "eval", list(found)))
            if what == "prompts":
                found = compare_prompts(config)
            names = {model: model if what == "prompts" else row_name(name, model, changes) for model in found}
            before |= {names[model]: names[earlier] for earlier, model in pairwise(found)}
            for model, values in found.items():
                own = rows.setdefault(names[model], [])
                if len(own) < len(seeds):  # the vanilla backbone is part of every variant
                    own.append(values)
    columns = COLUMNS.get(what, OWN_COLUMNS)
    rates = show.RATES if iterate.is_embedded(base) else ()
    table = mean_table(
        rows, columns=(*rates, *columns), digits=1, before=before if what == "preferences" else {}
    )  # fmt: skip
    return "\n\n".join([table, *(s for s in sentences if s.startswith(columns))])


@program(memory=TRAINING, interrupted="the same command continues")
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=list(VARIANTS), metavar="WHAT", help=", ".join(VARIANTS))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    own, others = parser.parse_known_args()
    refuse_idle(["--seed"], "--seeds says which ones are run")
    refuse_idle(["--resume"], "what is there already is always continued")
    refuse_idle(["--memory"], "it is of iterate.py")
    refuse_idle(SET_BY_VARIANTS.get(own.what, ()), f"the variants of {own.what} set it")
    if len(set(own.seeds)) < len(own.seeds):
        raise ValueError("--seeds: a seed is given twice; give each once")
    path = Path(own.out) / f"{own.what}.md"
    table = make_table(own.what, own.seeds, iterate.parse([*others, "--out", own.out])[0])
    write_text(path, table + "\n")
    print(f"\n{table}\n\nalso in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
