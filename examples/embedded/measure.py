"""How well a backbone does what the loop asks of it, on users that share no two facts with those it was trained on.

    python -m examples.embedded.measure --backbone examples/embedded/backbone --dialogues 40

Columns: greedy; sampled as in the loop, under the prompts strategy and vanilla; then sampled reflections on
replies that are given: short general ones, personal ones, and personal ones meant for somebody else.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

import torch

from selfevo.datasets.prompts import prompts_of, reply_prompt
from selfevo.evolve.refine import LENGTH_RATIO
from selfevo.evolve.reflection import Reflection, parse_reflection, reflection_prompt
from selfevo.generate import Sampling, generate
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer

from . import lessons, world
from . import words as w
from .world import Dialogue

HERE = Path(__file__).parent
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)
LOOP = Sampling()  # the paper's


def held_out(count: int, seed: int = 1) -> list[tuple[Dialogue, int]]:
    """Turns of new dialogues with users of the test split, greetings and farewells left out."""
    rng = Random(f"{seed}-measure")
    cases = []
    for _ in range(count):
        dialogue = world.make_dialogue(rng, "test", personal=rng.choice((0.3, 1.0)))
        cases += [(dialogue, turn) for turn in range(1, len(dialogue.turns) - 1)]
    return cases


def measure(
    model: Transformer,
    tokenizer: ChatTokenizer,
    cases: list[tuple[Dialogue, int]],
    *,
    style: str = "strategy",
    greedy: bool = False,
    given: str = "",
) -> dict[str, float]:
    """Plain replies, then reflections on them: rates between 0 and 1, and the mean number of words.

    With ``given`` the replies are of that sort and not the model's: short, personal or wrong (of another person).
    """
    stops, how = tokenizer.stop_ids, vars(GREEDY if greedy else LOOP)

    def answer(prompts: list[list[dict[str, str]]], limit: int) -> list[str]:
        ids = [tokenizer.encode_chat(prompt) for prompt in prompts]
        replies = generate(model, ids, max_new_tokens=limit, stop_ids=stops, progress="measuring", **how)
        return [tokenizer.decode(reply) for reply in replies]

    prompts = [reply_prompt(dialogue.messages(turn), prompts_of(style).system) for dialogue, turn in cases]
    if given:
        rng = Random(f"{given}-measure")
        replies = [lessons.own_reply(rng, d.known(turn), d.turns[turn].reveals, given) for d, turn in cases]
    else:
        replies = answer(prompts, 64)
    thoughts = answer(
        [reflection_prompt(prompt, reply, prompts_of(style).refine) for prompt, reply in zip(prompts, replies)], 200
    )
    counts: Counter[str] = Counter()
    for (dialogue, turn), reply, thought in zip(cases, replies, thoughts):
        personal = world.personalisation(reply, dialogue.messages(turn))
        counts += Counter(
            replies=1, words=len(reply.split()), personal=personal.used > 0, wrong=personal.wrong > 0,
        )  # fmt: skip
        counts += Counter(strict_json=_is_json(thought))
        understood = parse_reflection(thought)
        if understood is not None:
            counts["parsed"] += 1
            counts += _compare(understood, dialogue, turn)
            counts["too_long"] += len(understood.refined.split()) > LENGTH_RATIO * len(reply.split())
            counts["low"] += understood.score in (1, 2)
    return _rates(counts)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _compare(understood: Reflection, dialogue: Dialogue, turn: int) -> Counter[str]:
    """What a reflection has right about a user, in counts."""
    known, facts = dialogue.known(turn), dialogue.facts(turn)
    listed = {tuple(entry.split(": ", 1)) for entry in understood.understanding["profile"].split(", ")}
    listed.discard((w.UNKNOWN,))
    right = listed & set(facts.items())
    counts = Counter(facts=len(facts), listed=len(listed), right=len(right))
    for aspect in ("emotion", "personality", "intention"):
        counts[aspect] += understood.understanding[aspect] == known.get(aspect, w.UNKNOWN)
    refined = world.personalisation(understood.refined, dialogue.messages(turn))
    counts["refined_words"] += len(understood.refined.split())
    if facts:
        counts += Counter(chances=1, refined_personal=refined.used > 0)
    counts["refined_wrong"] += refined.wrong > 0
    return counts


def _rates(counts: Counter[str]) -> dict[str, float]:
    over = {
        "plain: words": ("words", "replies"), "plain: personal": ("personal", "replies"),
        "plain: wrong person": ("wrong", "replies"), "reflection: strict JSON": ("strict_json", "replies"),
        "reflection: usable": ("parsed", "replies"), "facts: told and found": ("right", "facts"),
        "facts: found and true": ("right", "listed"), "emotion": ("emotion", "parsed"),
        "personality": ("personality", "parsed"), "intention": ("intention", "parsed"),
        "score 1 or 2": ("low", "parsed"), "refined: too long a pair": ("too_long", "parsed"),
        "refined: words": ("refined_words", "parsed"), "refined: uses a fact": ("refined_personal", "chances"),
        "refined: wrong person": ("refined_wrong", "parsed"),
    }  # fmt: skip
    rates = {name: counts[part] / max(1, counts[whole]) for name, (part, whole) in over.items()}
    return {name: round(rate, 3) for name, rate in rates.items()} | {"turns": counts["replies"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=str(HERE / "backbone"), help="folder in Hugging Face layout")
    parser.add_argument("--dialogues", type=int, default=40, help="held-out dialogues")
    parser.add_argument("--out", help="also write the rates to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.backbone), load_tokenizer(arguments.backbone)
    cases = held_out(arguments.dialogues)
    table = {
        "greedy": measure(model, tokenizer, cases, greedy=True),
        "sampled": measure(model, tokenizer, cases),
        "vanilla": measure(model, tokenizer, cases, style="vanilla"),
    }
    table |= {sort: measure(model, tokenizer, cases, given=sort) for sort in ("short", "personal", "wrong")}
    print(" " * 26, *(f"{column:>8}" for column in table))
    for name in table["greedy"]:
        print(f"{name:26}", *(f"{rates[name]:8}" for rates in table.values()))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
