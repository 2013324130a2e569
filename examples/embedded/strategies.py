"""Embedded dialogues whose strategies can be learnt: seekers say what they need, supporters mostly heed it.

    python -m examples.embedded.strategies --out DIR [--seed S]

writes ``strategies.json`` and ``strategies_test.json`` (ESConv's schema) in a second; ``data/`` holds those of seed 0.
Seekers are those of ``world.py``, who here end most turns with a need; some needs are rarer than others. A need calls
for a strategy (``called_for``). The supporter follows it, but in a HABIT share of the turns does what supporters do out
of habit, which favours few strategies: no planner can foresee that. A reply is an opening that takes up what this
person told, then a sentence of the strategy; a GENERAL share of the replies has a general opening, or none.
``find_errors`` reads psychological errors off the phrases: the stand-in for a language model.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from selfevo.decoupled.mining import Case

from . import words as w
from . import world
from .world import OPENERS, Dialogue, Reply, SeekerTurn

COUNTS = {"strategies": 200, "strategies_test": 60}
SPLITS = {"strategies": "human", "strategies_test": "test"}
HABIT = 0.25
HABITS = {"Question": 4, "Affirmation and Reassurance": 3, "Providing Suggestions": 2, "Reflection of feelings": 1}
GENERAL = 0.35
# What a seeker may ask for at the end of a turn, how often, and the strategy it calls for.
NEEDS: dict[str, tuple[int, str]] = {
    "wants to be heard": (6, "Reflection of feelings"),
    "wants advice": (5, "Providing Suggestions"),
    "wants reassurance": (4, "Affirmation and Reassurance"),
    "wants distraction": (3, "Question"),
    "wants courage": (2, "Self-disclosure"),
    "wants a plan": (2, "Information"),
}
NO_NEED = 4
_STRATEGY_OF = {phrase: strategy for need, (_, strategy) in NEEDS.items() for phrase in w.WISHES[need]}
_ADVICE = {*w.SHORT["Providing Suggestions"], *w.LONG_ADVICE}
_WARM = {*w.SHORT["Reflection of feelings"], *w.SHORT["Restatement or Paraphrasing"], *w.LONG_OPENINGS}
_FEELING_WORDS = {word for words in w.EMOTIONS.values() for word in words}


def called_for(turn: SeekerTurn) -> str:
    """The strategy that the last sentence of the seeker's words calls for."""
    if turn.text in w.BYES:
        return "Others"
    if not turn.reveals:
        return "Question"
    last = re.split(r"(?<=[.!?]) +", turn.text)[-1]
    return _STRATEGY_OF.get(last, "Restatement or Paraphrasing")


def ask(rng: Random, turn: SeekerTurn) -> SeekerTurn:
    """The turn with a need at its end, or none; greetings and farewells stay as they are."""
    if not turn.reveals:
        return turn
    need = rng.choices([*NEEDS, ""], [*(weight for weight, _ in NEEDS.values()), NO_NEED])[0]
    return SeekerTurn(f"{turn.text} {rng.choice(w.WISHES[need])}", turn.reveals) if need else turn


def supporter_reply(rng: Random, dialogue: Dialogue, index: int) -> Reply:
    """What a supporter of this world says at a turn, and with which strategy."""
    turn = dialogue.turns[index]
    if turn.text in w.BYES:
        return "Others", rng.choice(w.FAREWELLS)
    if index == 0 and not turn.reveals:
        return "Question", rng.choice(w.WELCOMES)
    strategy = called_for(turn)
    if rng.random() < HABIT:
        strategy = rng.choices(list(HABITS), list(HABITS.values()))[0]
    sentence = rng.choice(w.SHORT[strategy])
    if rng.random() < GENERAL:
        return strategy, f"{rng.choice(w.SHORT['Others'])} {sentence}" if rng.random() < 0.5 else sentence
    return strategy, f"{_opening(rng, dialogue, index)} {sentence}"


def _opening(rng: Random, dialogue: Dialogue, index: int) -> str:
    """A sentence that takes up the newest of what the seeker told, a fact or the feeling."""
    known = dialogue.known(index)
    fresh = [kind for kind in OPENERS if kind in dialogue.turns[index].reveals]
    told = fresh or [kind for kind in OPENERS if kind in known]
    if told and ("feeling" not in known or rng.random() < 0.6):
        kind = rng.choice(told)
        return world.fill(rng.choice(w.REMARKS[kind]), known[kind])
    return rng.choice(w.WITH_FEELING).format(f=known["feeling"])


def find_errors(cases: Sequence[Case], counts: Counter[str]) -> list[frozenset[str] | None]:
    """The errors in each reply, by the phrases of this world; farewells and greetings make none.

    ``lack_of_empathy``: it names no feeling or trouble, and takes up no fact. ``early_advice``: it gives advice though
    the strategy is another one. ``template_like``: the seeker has told something, and it takes up nothing of that.
    """
    return [_errors(case) for case in cases]


def _errors(case: Case) -> frozenset[str]:
    if case.context[-1]["content"] in (*w.BYES, *w.HELLOS):
        return frozenset()
    sentences = re.split(r"(?<=[.!?]) +", case.reply)
    used = world.personalisation(case.reply, case.context)
    feelings = _FEELING_WORDS & set(re.findall(r"[a-z]+", case.reply)) & _said(case.context)
    told = used.revealed or _FEELING_WORDS & _said(case.context)
    found = set()
    if not (used.used or feelings or _WARM & set(sentences)):
        found.add("lack_of_empathy")
    if case.strategy != "Providing Suggestions" and _ADVICE & set(sentences):
        found.add("early_advice")
    if told and not (used.used or feelings):
        found.add("template_like")
    return frozenset(found)


def _said(context: Sequence[Mapping[str, str]]) -> set[str]:
    """The words of the seeker."""
    said = " ".join(message["content"] for message in context if message["role"] == "user")
    return set(re.findall(r"[a-z]+", said))


def make_record(rng: Random, split: str) -> dict[str, Any]:
    dialogue = world.make_dialogue(rng, split, personal=0.0)
    dialogue.turns[:] = [ask(rng, turn) for turn in dialogue.turns]
    dialogue.replies[:] = [supporter_reply(rng, dialogue, index) for index in range(len(dialogue.turns))]
    return world.as_esconv(dialogue)


def make_data(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The records of both files, by name."""
    return {
        name: [make_record(Random(f"{seed}-{name}-{index}"), SPLITS[name]) for index in range(count)]
        for name, count in COUNTS.items()
    }


def write_data(folder: Path, seed: int) -> None:
    """One record a line, so that the files can be read and compared."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in make_data(seed).items():
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder that gets both files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the dialogues")
    arguments = parser.parse_args()
    write_data(Path(arguments.out), arguments.seed)


if __name__ == "__main__":
    main()
