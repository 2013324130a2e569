"""Variants of the loop over several seeds, side by side in one table.

    python examples/ablate.py WHAT --out DIR [--seeds 0 1 2] [flags of iterate.py]

WHAT is one of
  seeds        the loop itself
  controls     what should fail if the effect is real: chosen and rejected swapped; both replies of a pair given to
               another user; only the SFT term on the chosen replies
  preferences  where chosen replies come from (Table 5): HM human dialogues, HL golden replies of the synthetic
               dialogues, SR self-refinement
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
from pathlib import Path
from typing import Any

import iterate
from embedded import show

from selfevo.dialogue import to_messages
from selfevo.evaluation.folder import read_examples
from selfevo.evaluation.tables import mean_table
from selfevo.evolve import EvolveConfig, evolve, load_backbone
from selfevo.evolve.evaluate import evaluate_model
from selfevo.evolve.run import check_run
from selfevo.evolve.settings import change
from selfevo.files import read_json, read_jsonl, write_text
from selfevo.lora import load_adapter, remove_adapters

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "seeds": {"SR": {}},
    "controls": {
        "SR": {}, "swapped": {"control": "swapped"}, "shuffled": {"control": "shuffled"},
        "sft-only": {"control": "sft-only"},
    },
    "preferences": {"HM": {"chosen": "golden", "synthetic": ()}, "HL": {"chosen": "golden"}, "SR": {}},
    "prompts": {"SR": {}},
}  # fmt: skip
PAPER_PROMPTS = ("vanilla", "strategy", "self-reflection", "refine")
COLUMNS = ("BLEU-2", "ROUGE-L", "Distinct-2", "Distinct-2 (corpus)", "Length")
Values = dict[str, float]


def run_variant(config: EvolveConfig) -> dict[str, Values]:
    """The scores of every model of a run, which is continued where it was, or read where it is complete."""
    run = Path(config.out)
    if (run / "eval" / "scores.json").is_file():
        check_run(config, resume=True)
    else:
        evolve(config, resume=True)
    scores: dict[str, Values] = read_json(run / "eval" / "scores.json")
    rates = show.rates(run) if iterate.is_embedded(config) else {}
    return {name: rates.get(name, {}) | {c: values[c] for c in COLUMNS} for name, values in scores.items()}


def compare_prompts(config: EvolveConfig) -> dict[str, Values]:
    """The scores of the backbone and of a run's models, answering under each kind of prompt."""
    run = Path(config.out)
    folder, examples = run / "prompts", read_examples(run / "eval")
    model, tokenizer = load_backbone(config.backbone)
    contexts = [to_messages(example.context) for example in examples]
    # The embedded backbone knows the prompts of version 0.1.
    kinds = ("plain", "strategies", "refine") if config.replies.style in ("plain", "strategies") else PAPER_PROMPTS
    table: dict[str, Values] = {}
    for stage in ("backbone", *config.models):
        remove_adapters(model)
        if stage != "backbone":
            load_adapter(model, run / stage)
        for kind in kinds:
            settings = config.test_replies if kind == "refine" else replace(config.test_replies, style=kind)
            name = f"{stage}-{kind}"
            values = evaluate_model(model, tokenizer, examples, folder, name, settings, refining=kind == "refine")
            texts = [record["text"] or "" for record in read_jsonl(folder / f"{name}.replies.jsonl")]
            rates = show.score(texts, contexts) if iterate.is_embedded(config) else {}
            table[f"{stage}, {kind}"] = rates | {c: values[c] for c in COLUMNS}
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=list(VARIANTS), metavar="WHAT", help=", ".join(VARIANTS))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    own, others = parser.parse_known_args()
    out = Path(own.out)
    runs: dict[str, list[Values]] = {}
    try:
        base = iterate.parse([*others, "--out", own.out])[0]
        for name, changes in VARIANTS[own.what].items():
            for seed in own.seeds:
                config = change(base, out=str(out / f"{name}-{seed}"), seed=seed, **changes)
                print(f"{name}, seed {seed}: {config.out}", flush=True)
                for model, values in run_variant(config).items():
                    runs.setdefault(f"{name} {model}", []).append(values)
        if own.what == "prompts":
            runs = {}
            for seed in own.seeds:
                for model, values in compare_prompts(replace(base, out=str(out / f"SR-{seed}"), seed=seed)).items():
                    runs.setdefault(model, []).append(values)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    table = mean_table(runs, digits=1)
    write_text(out / f"{own.what}.md", table + "\n")
    print(f"\n{table}\n\nalso in {out / own.what}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
