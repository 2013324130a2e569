"""What a run on the embedded default changed: do the replies use what this user revealed? Plus replies side by side.

    python examples/embedded/show.py RUN

The world's vocabulary of facts is closed, so this needs no judge: a reply's facts are looked up among those that the
user has told so far; a fact that is not among them belongs to somebody else.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import world

from selfevo.datasets import load_dialogues
from selfevo.dialogue import Example, clean_dialogue, reply_examples, to_messages
from selfevo.files import read_json, read_jsonl

SAMPLES = 3


def read_replies(run: Path) -> tuple[list[Example], dict[str, list[str]]]:
    """The test turns of a run, and every model's replies to them."""
    settings = read_json(run / "config.json")["settings"]
    records = load_dialogues(settings["test"])[: settings["limit"] or None]
    dialogues = [clean_dialogue(dialogue, Counter()) for dialogue in records]
    examples = [example for dialogue in dialogues for example in reply_examples(dialogue, Counter())]
    names = list(read_json(run / "eval" / "scores.json"))
    replies = {name: [r["text"] or "" for r in read_jsonl(run / "eval" / f"{name}.replies.jsonl")] for name in names}
    return examples, replies


def describe(run: Path) -> str:
    """A Markdown table of personalisation per model, and three sample replies of each to the same users."""
    examples, replies = read_replies(run)
    contexts = [to_messages(example.context) for example in examples]
    lines = ["| model | replies that use a fact of this user, % | that mention somebody else's, % |", "|---|---|---|"]
    for name, texts in replies.items():
        scored = [world.personalisation(text, context) for text, context in zip(texts, contexts)]
        able = [score for score in scored if score.revealed]
        used = 100 * sum(score.used > 0 for score in able) / len(able)
        wrong = 100 * sum(score.wrong > 0 for score in scored) / len(scored)
        lines.append(f"| {name} | {used:.1f} | {wrong:.1f} |")
    step = max(1, len(examples) // SAMPLES)
    for index in range(step // 2, len(examples), step)[:SAMPLES]:
        lines += ["", f"user: {examples[index].context[-1].text}"]
        lines += [f"  {name}: {texts[index]}" for name, texts in replies.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of examples/iterate.py on the embedded default")
    try:
        print(describe(parser.parse_args().run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
