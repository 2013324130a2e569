"""What a run on the embedded default changed: do the replies use what this user revealed? Plus replies side by side.

    python -m examples.embedded.show RUN

The world's vocabulary of facts is closed, so this needs no judge: a reply's facts are looked up among those that the
user has told so far; a fact that is not among them belongs to somebody else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.folder import read_examples
from selfevo.files import read_json, read_jsonl

from . import world

SAMPLES = 3
RATES = ("personalisation", "uses a fact", "wrong person")


def read_replies(run: Path) -> tuple[list[Example], dict[str, list[str]]]:
    """The test turns of a run, and every model's replies to them."""
    names = list(read_json(run / "eval" / "scores.json"))
    replies = {name: [r["text"] or "" for r in read_jsonl(run / "eval" / f"{name}.replies.jsonl")] for name in names}
    return read_examples(run / "eval"), replies


def rates(run: Path) -> dict[str, dict[str, float]]:
    """Per model, in %: facts of this user taken up among those told so far (the mean over replies), replies that take
    up at least one, and replies that mention a fact that this user has not told: somebody else's."""
    examples, replies = read_replies(run)
    contexts = [to_messages(example.context) for example in examples]
    return {name: score(texts, contexts) for name, texts in replies.items()}


def score(texts: Sequence[str], contexts: Sequence[list[dict[str, str]]]) -> dict[str, float]:
    """The rates of one model's replies, each after its context."""
    scored = [world.personalisation(text, context) for text, context in zip(texts, contexts)]
    able = [one for one in scored if one.revealed]
    values = (
        100 * sum(one.used / one.revealed for one in able) / len(able),
        100 * sum(one.used > 0 for one in able) / len(able),
        100 * sum(one.wrong > 0 for one in scored) / len(scored),
    )
    return dict(zip(RATES, values))


def describe(run: Path) -> str:
    """A Markdown table of personalisation per model, and three sample replies of each to the same users, where all of
    the models' replies differ."""
    examples, replies = read_replies(run)
    lines = [
        "| model | facts of this user taken up, of those told, % | replies that take one up, % "
        "| replies with a fact of somebody else, % |",
        "|---|---|---|---|",
    ]
    for name, values in rates(run).items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values.values()) + " |")
    differing = [i for i in range(len(examples)) if len({own[i] for own in replies.values()}) == len(replies)]
    step = max(1, len(differing) // SAMPLES)
    for index in differing[step // 2 :: step][:SAMPLES]:
        told = world.facts_revealed(to_messages(examples[index].context))
        known = ", ".join(f"{kind} {value}" for kind, value in told.items()) or "nothing yet"
        lines += ["", f"the user has told: {known}", f"user: {examples[index].context[-1].text}"]
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
