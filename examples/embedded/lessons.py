"""What the backbone is taught: long general replies, reflections filled from the dialogue, and other instructions.

Like a large model it can also answer in another voice when a system prompt asks for one (``VOICES``). Under the prompts
``vanilla`` and ``strategy`` of the library it answers at length and in general; ``self-reflection``, which tells it to
understand the person first, makes it take up what it was told, inside the JSON that this prompt asks for.
A row holds several examples that share a dialogue, so that its context is computed once for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random

from selfevo.datasets.prompts import SELF_REFLECTION, prompts_of, reply_prompt
from selfevo.evolve.reflection import reflection_prompt
from selfevo.models import ChatTokenizer

from . import words as w
from . import world
from .world import KINDS, OPENERS, Dialogue

Messages = list[dict[str, str]]
Example = tuple[Messages, str]  # prompt, answer
STYLES = ("vanilla", "strategy")  # prompts for a reply that is then reflected on
OWN_REPLIES = {"long": 0.35, "short": 0.25, "personal": 0.25, "wrong": 0.15}
# System prompts that ask for another voice: a short general one, a personal one.
VOICES = (
    "You are a friend who listens. Say one or two short things.",
    "You are a friend who remembers. Take up what this person told you.",
)


def reflection(rng: Random, known: Mapping[str, str], reply: str, newest: Sequence[str]) -> str:
    """The reflection on a reply to a user of whom this is known, as JSON; the refined reply uses what it missed."""
    facts = {kind: known[kind] for kind in KINDS if kind in known}
    mentioned = {(kind, value) for kind, values in world.facts_mentioned(reply).items() for value in values}
    wrong = [kind for kind, value in sorted(mentioned) if facts.get(kind) != value]
    used = [kind for kind in facts if (kind, facts[kind]) in mentioned and kind != "day"]
    picked = world.pick_facts(rng, known, newest)
    if wrong:
        score, feedback = 1, f"It speaks of a {wrong[0]} that is not of this user."
    elif used:
        score, feedback = 3 + min(len(used), 2), f"It fits, it takes up the {' and the '.join(used)}."
    elif picked:
        score, feedback = 2, f"It is general, it leaves out the {' and the '.join(picked)}."
    else:
        score, feedback = 2, "It is general."
    understanding = {"user_profile": ", ".join(f"{kind}: {value}" for kind, value in facts.items()) or w.UNKNOWN}
    understanding |= {f"user_{name}": known.get(name, w.UNKNOWN) for name in ("emotion", "personality", "intention")}
    refined = world.personal_reply(rng, known, picked)[1]
    return json.dumps(
        {
            "understanding": understanding,
            "evaluation_score": score,
            "feedback": feedback,
            "refined_response": refined,
        }
    )


def own_reply(rng: Random, known: Mapping[str, str], newest: Sequence[str], sort: str = "") -> str:
    """A reply of a sort (by default a random one) that the model may have given before it is asked to reflect."""
    sort = sort or rng.choices(list(OWN_REPLIES), list(OWN_REPLIES.values()))[0]
    if sort == "long":
        return world.long_reply(rng)[1]
    if sort == "short":
        return world.short_reply(rng)[1]
    if sort == "wrong":
        other = world.make_user(rng, "train")
        known = other.facts | {"feeling": other.feeling}
        return world.personal_reply(rng, known, rng.sample(OPENERS, rng.randint(1, 2)))[1]
    return world.personal_reply(rng, known, world.pick_facts(rng, known, newest))[1]


def dialogue_row(rng: Random, dialogue: Dialogue, *, reflections: int, replies: int) -> list[Example]:
    """Replies and reflections at some turns of a dialogue, under one of the prompts ``STYLES``."""
    system, refine = vars(prompts_of(rng.choice(STYLES))).values()
    row: list[Example] = []
    turns = range(len(dialogue.turns))
    for turn in sorted(rng.sample(turns, min(replies, len(turns)))):
        row.append((reply_prompt(dialogue.messages(turn), system), world.long_reply(rng)[1]))
    for turn in sorted(rng.sample(turns, min(reflections, len(turns)))):
        known, newest = dialogue.known(turn), dialogue.turns[turn].reveals
        reply = own_reply(rng, known, newest)
        prompt = reflection_prompt(reply_prompt(dialogue.messages(turn), system), reply, refine)
        row.append((prompt, reflection(rng, known, reply, newest)))
    return row


def one_pass_row(rng: Random, dialogue: Dialogue, replies: int) -> list[Example]:
    """Personal replies at some turns of a dialogue, as the JSON that the prompt ``self-reflection`` asks for."""
    turns = sorted(rng.sample(range(len(dialogue.turns)), min(replies, len(dialogue.turns))))
    answers = [world.human_reply(rng, dialogue, turn, personal=1.0) for turn in turns]
    return [
        (
            reply_prompt(dialogue.messages(turn), prompts_of(SELF_REFLECTION).system),
            json.dumps({"strategy": strategy, "text": text}),
        )
        for turn, (strategy, text) in zip(turns, answers)
    ]


def voice_row(rng: Random, dialogue: Dialogue) -> list[Example]:
    """Replies at every turn of a dialogue under a system prompt that asks for another voice."""
    personal = rng.random() < 0.75  # the harder one of the two
    prompts = [
        [{"role": "system", "content": VOICES[personal]}, *dialogue.messages(i)] for i in range(len(dialogue.turns))
    ]
    return [(prompt, world.human_reply(rng, dialogue, i, personal)[1]) for i, prompt in enumerate(prompts)]


def instruction(rng: Random, split: str = "train") -> dict[str, str]:
    """An instruction of another sort, in Alpaca's schema: copy, name the next day, read a short text, write JSON."""
    sort = rng.choice(("copy", "next", "first", "last", "fact", "fact", "json", "json"))
    facts = world.make_user(rng, split).facts
    value = facts[rng.choice(KINDS)]
    if sort == "copy":
        return {"instruction": "Copy the word.", "input": f"The word is {value}.", "output": f"The word is {value}."}
    if sort == "next":
        days = w.FACTS["day"]
        after = days[(days.index(facts["day"]) + 1) % 7]
        return {
            "instruction": "Name the day after.",
            "input": f"The day is {facts['day']}.",
            "output": f"It is {after}.",
        }
    kinds = rng.sample(OPENERS, rng.randint(2, 6))
    if sort in ("first", "last"):
        values = [facts[kind] for kind in kinds]
        chosen = values[0 if sort == "first" else -1]
        return {
            "instruction": f"Name the {sort} word of the list.",
            "input": f"The list is {', '.join(values)}.",
            "output": f"It is {chosen}.",
        }
    said = [world.reveal(rng, kind, facts) for kind in kinds]
    if sort == "json":
        told = [kind for kind in KINDS if kind in kinds or (kind == "day" and "event" in kinds)]
        return {
            "instruction": "Write what this text tells as JSON.",
            "input": " ".join(said),
            "output": json.dumps({kind: facts[kind] for kind in told}),
        }
    asked = rng.choice([*kinds, *(["day"] if "event" in kinds else [])])
    return {
        "instruction": f"Which {asked} is meant in this text?",
        "input": " ".join(said),
        "output": f"The {asked} is {facts[asked]}.",
    }


def instruction_row(rng: Random, count: int) -> list[Example]:
    row = []
    for _ in range(count):
        record = instruction(rng)
        message = {"role": "user", "content": f"{record['instruction']}\n{record['input']}"}
        row.append(([message], record["output"]))
    return row


def encode_row(tokenizer: ChatTokenizer, row: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer ids, as the library builds them."""
    return [(tokenizer.encode_chat(prompt), tokenizer.encode_reply(answer)) for prompt, answer in row]


def make_row(rng: Random, progress: float) -> list[Example]:
    """The row to learn from when a share ``progress`` of the training has passed: short dialogues come first."""
    if rng.random() < 0.1:
        return instruction_row(rng, 6)
    personal = rng.choice((0.0, 0.3, 1.0))
    whole = rng.random() < min(1.0, max(0.0, 2.5 * (progress - 0.1)))
    (kind,) = rng.choices(("reflect", "one pass", "voice"), (0.63, 0.1, 0.27))
    row: list[Example] = []
    for _ in range(1 if whole else 2):
        exchanges = None if whole else rng.randint(1, 2)
        dialogue = world.make_dialogue(rng, "train", personal=personal, exchanges=exchanges)
        if kind == "voice":
            row += voice_row(rng, dialogue)
        elif kind == "one pass":
            row += one_pass_row(rng, dialogue, replies=4)
        elif whole:
            row += dialogue_row(rng, dialogue, reflections=4, replies=2)
        else:
            row += dialogue_row(rng, dialogue, reflections=1, replies=rng.randrange(2))
    return row
