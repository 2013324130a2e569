"""Reflections as the model writes them against reflections in a form: how many can be used, their tokens and seconds.

    python benchmarks/reflections.py --backbone CHECKPOINT --synthetic ExTES.json --out FOLDER

One backbone replies once to the first ``--turns`` supporter turns and reflects on these replies both ways, with the
library's own ``make_pairs``: ``free``, up to ``--tries`` times where JSON cannot be used, and ``guided``. ``--out``
keeps, for each way, ``pairs.jsonl`` to read, ``filter.json`` and every reflection.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from selfevo.datasets.corpus import read_dialogues
from selfevo.datasets.prompts import reply_prompt
from selfevo.dialogue import reply_examples, to_messages
from selfevo.evolve.refine import RefineSettings, make_pairs
from selfevo.evolve.reflection import WAYS
from selfevo.files import read_json, read_jsonl, write_jsonl
from selfevo.generate import Sampling
from selfevo.generate.replies import sample_replies
from selfevo.models import load_model, load_tokenizer
from selfevo.training import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder or hub id of a checkpoint")
    parser.add_argument("--synthetic", required=True, help="seed dialogues, e.g. ExTES.json")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for what is written")
    parser.add_argument("--turns", type=int, default=32, help="supporter turns (default: 32)")
    parser.add_argument("--tries", type=int, default=3, help="tries at each reflection (default: 3)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest reply (default: 128)")
    parser.add_argument("--reflection-tokens", type=int, default=384, help="longest reflection (default: 384)")
    parser.add_argument("--repetition-penalty", type=float, default=1.2, help="of sampling (default: 1.2)")
    parser.add_argument("--slots", type=int, default=96, help="replies decoded at a time (default: 96)")
    options = parser.parse_args()
    keep_freed_memory()  # as examples/iterate.py does
    model, tokenizer = load_model(options.backbone, dtype=torch.float32), load_tokenizer(options.backbone)
    dialogues = read_dialogues(options.synthetic)
    examples = [example for one in dialogues for example in reply_examples(one, Counter())][: options.turns]
    settings = RefineSettings(
        sampling=Sampling(repetition_penalty=options.repetition_penalty), max_new_tokens=options.max_new_tokens,
        slots=options.slots, reflection_tokens=options.reflection_tokens, tries=options.tries,
    )  # fmt: skip
    options.out.mkdir(parents=True)
    sample_replies(
        model, tokenizer, [reply_prompt(to_messages(one.context), settings.prompts.system) for one in examples],
        options.out / "replies.jsonl", sampling=settings.sampling, max_new_tokens=settings.max_new_tokens,
        slots=settings.slots,
    )  # fmt: skip
    rows = []
    for way in WAYS:
        folder = options.out / way
        folder.mkdir()
        write_jsonl(folder / "replies.jsonl", read_jsonl(options.out / "replies.jsonl"))
        started = time.perf_counter()
        make_pairs(model, tokenizer, examples, folder, replace(settings, reflection=way))
        seconds = time.perf_counter() - started
        counts = read_json(folder / "filter.json")
        usable = len(examples) - counts.get("golden_for_missing_reflection", 0) - counts.get("empty_reply_dropped", 0)
        tokens = [record["tokens"] for path in folder.glob("reflections-*.jsonl") for record in read_jsonl(path)]
        rows.append(
            f"| {way} | {usable} of {len(examples)} | {counts.get('kept_refined', 0)} | {len(tokens)} | "
            f"{sum(tokens) / len(examples):.0f} | {seconds / len(examples):.1f} |"
        )
    print(
        f"\n{options.backbone}, {torch.get_num_threads()} threads; tokens and seconds are of all tries at a reply's\n"
    )
    print("| reflection | usable | chosen replies refined | tries | new tokens | seconds |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
