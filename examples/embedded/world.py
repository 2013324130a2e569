"""A small world of emotional support dialogues: users, what they reveal turn by turn, and replies of several kinds.

Every random choice comes from the generator passed in. Users of different splits share not even a pair of facts: see
:func:`make_user`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import words as w

KINDS = tuple(w.FACTS)
OPENERS = tuple(w.REVEALS)  # the kinds that are revealed by a phrase of their own; the day comes with the event
COLOURS = 7  # a prime, and more than the largest distance between two kinds
STRIDES: dict[str, tuple[int, ...]] = {"test": (0,), "synthetic": (1,), "human": (2,), "train": (3, 4, 5, 6)}
_KIND_OF = {value.lower(): (kind, value) for kind, values in w.FACTS.items() for value in values}
Reply = tuple[str, str]  # strategy, text


@dataclass(frozen=True)
class User:
    facts: dict[str, str]
    emotion: str
    feeling: str  # the user's own word for the emotion
    personality: str
    intention: str
    problem: str


@dataclass(frozen=True)
class SeekerTurn:
    text: str
    reveals: tuple[str, ...] = ()  # kinds of fact, "emotion", "personality", "intention"


@dataclass(frozen=True)
class Dialogue:
    """Seeker turns and the supporter's replies to them, as many of one as of the other."""

    user: User
    situation: str
    turns: list[SeekerTurn]
    replies: list[Reply]

    def known(self, turn: int) -> dict[str, str]:
        """What the seeker has revealed up to and including a turn: facts by kind, and the aspects of the user."""
        seen = {name for spoken in self.turns[: turn + 1] for name in spoken.reveals}
        user = self.user
        told = {kind: value for kind, value in user.facts.items() if kind in seen}
        if "emotion" in seen:
            told |= {"emotion": user.emotion, "feeling": user.feeling}
        return told | {name: getattr(user, name) for name in ("personality", "intention") if name in seen}

    def facts(self, turn: int) -> dict[str, str]:
        """The facts revealed up to and including a turn."""
        return {kind: value for kind, value in self.known(turn).items() if kind in KINDS}

    def messages(self, turn: int) -> list[dict[str, str]]:
        """The conversation up to and including the seeker's words of a turn."""
        messages = []
        for spoken, (_, reply) in zip(self.turns[:turn], self.replies):
            messages.append({"role": "user", "content": spoken.text})
            messages.append({"role": "assistant", "content": reply})
        return [*messages, {"role": "user", "content": self.turns[turn].text}]


def facts_mentioned(text: str) -> dict[str, set[str]]:
    """The facts that a text mentions: kind -> values. Exact, since a fact's word has no other use in this world."""
    found: dict[str, set[str]] = {}
    for word in re.findall(r"[A-Za-z]+", text):
        if word.lower() in _KIND_OF:
            kind, value = _KIND_OF[word.lower()]
            found.setdefault(kind, set()).add(value)
    return found


def facts_revealed(messages: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The facts that the user of a conversation has told so far."""
    said = " ".join(message["content"] for message in messages if message["role"] == "user")
    return {kind: values.pop() for kind, values in facts_mentioned(said).items() if len(values) == 1}


@dataclass(frozen=True)
class Personalisation:
    """``used``: revealed facts that a reply takes up; ``wrong``: facts in it that this user has not told."""

    used: int
    wrong: int
    revealed: int


def personalisation(reply: str, messages: Iterable[Mapping[str, str]]) -> Personalisation:
    """How a reply uses what the user of the conversation before it has revealed."""
    revealed = facts_revealed(messages)
    pairs = {(kind, value) for kind, values in facts_mentioned(reply).items() for value in values}
    right = {(kind, value) for kind, value in pairs if revealed.get(kind) == value}
    return Personalisation(used=len(right), wrong=len(pairs - right), revealed=len(revealed))


def make_user(rng: Random, split: str) -> User:
    """A user of a split.

    The values of each kind have colours 0..6 in turn, and the i-th kind of a user has the colour base + stride * i
    (mod 7). Two kinds i and j then differ in colour by stride * (i - j), which no other stride gives, 7 being prime. So
    splits of different strides share no two facts that occur together in one user.
    """
    stride, base = rng.choice(STRIDES[split]), rng.randrange(COLOURS)
    facts = {kind: rng.choice(w.FACTS[kind][(base + stride * i) % COLOURS :: COLOURS]) for i, kind in enumerate(KINDS)}
    emotion = rng.choice(list(w.EMOTIONS))
    return User(
        facts=facts,
        emotion=emotion,
        feeling=rng.choice(w.EMOTIONS[emotion]),
        personality=rng.choice(list(w.TRAITS)),
        intention=rng.choice(list(w.WISHES)),
        problem=rng.choice(list(w.PROBLEMS)),
    )


def fill(phrase: str, value: str, day: str = "") -> str:
    """A phrase about a fact with the fact, its article and the day in place."""
    article = "an" if value[0].lower() in "aeiou" else "a"
    return phrase.format(v=value, a=article, A=article.capitalize(), d=day)


def reveal(rng: Random, kind: str, facts: Mapping[str, str]) -> str:
    """A sentence in which a seeker tells a fact."""
    return fill(rng.choice(w.REVEALS[kind]), facts[kind], facts["day"])


def make_turns(rng: Random, user: User, exchanges: int) -> tuple[str, list[SeekerTurn]]:
    """The situation in a sentence and what the seeker says: the feeling first, then fact by fact, then goodbye."""
    situation = rng.choice(w.PROBLEMS[user.problem])
    greets = exchanges > 3 and rng.random() < 0.5
    first, last = int(greets), exchanges - 1 if exchanges > 2 else exchanges
    said: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in range(exchanges)]
    feeling = rng.choice(w.FEELINGS).format(f=user.feeling)
    said[first] += [(feeling, ("emotion",)), (situation, ())]
    kinds = rng.sample(OPENERS, rng.randint(4, 6)) if exchanges > 3 else rng.sample(OPENERS, rng.randint(1, 3))
    for place, kind in enumerate(kinds):
        phrase = reveal(rng, kind, user.facts)
        turn = first + place if place < last - first else rng.randrange(first, last)
        said[turn].append((phrase, (kind, "day") if kind == "event" else (kind,)))
    said[rng.randrange(first, last)].append((rng.choice(w.TRAITS[user.personality]), ("personality",)))
    said[rng.randrange(first, last)].append((rng.choice(w.WISHES[user.intention]), ("intention",)))
    turns = [SeekerTurn(rng.choice(w.HELLOS))] if greets else []
    for index in range(first, last):
        sentences = said[index]
        rng.shuffle(sentences)
        if index > first and (not sentences or rng.random() < 0.4):
            sentences.insert(0, (rng.choice(w.FILLERS), ()))
        elif index == first and not greets and rng.random() < 0.5:
            sentences.insert(0, (rng.choice(w.HELLOS), ()))
        reveals = tuple(name for _, names in sentences for name in names)
        turns.append(SeekerTurn(" ".join(text for text, _ in sentences), reveals))
    if last < exchanges:
        turns.append(SeekerTurn(rng.choice(w.BYES)))
    return situation, turns


def short_reply(rng: Random) -> Reply:
    """A short reply that would fit anybody."""
    strategies = rng.sample(list(w.SHORT), 2 if rng.random() < 0.8 else 3)
    return strategies[-1], " ".join(rng.choice(w.SHORT[strategy]) for strategy in strategies)


def long_reply(rng: Random) -> Reply:
    """A long reply that would fit anybody, as the untrained backbone gives it."""
    return "Others", f"{rng.choice(w.LONG_OPENINGS)} {rng.choice(w.LONG_ADVICE)}"


def pick_facts(rng: Random, facts: Mapping[str, str], newest: Sequence[str]) -> list[str]:
    """One or two kinds to take up: one of the newest where there is one, and perhaps an earlier one."""
    kinds = [kind for kind in OPENERS if kind in facts]
    fresh = [kind for kind in kinds if kind in newest]
    if not kinds:
        return []
    first = rng.choice(fresh or kinds)
    others = [kind for kind in kinds if kind != first]
    return [first, rng.choice(others)] if others and rng.random() < 0.6 else [first]


def personal_reply(rng: Random, known: Mapping[str, str], picked: Sequence[str]) -> Reply:
    """A short reply that takes up the ``picked`` facts; without any it takes up the feeling, if that is known."""
    strategy = rng.choice(w.PERSONAL_STRATEGIES)
    values = {kind: known[kind] for kind in picked}
    if "event" in values and "day" in known and rng.random() < 0.6:
        values["event"] += f" on {known['day']}"
    step = rng.random() < 0.7
    if len(picked) > 1:
        opening = fill(rng.choice(w.REMARKS[picked[0]]), values[picked[0]])
        closing = fill(rng.choice(w.STEPS[picked[1]]), values[picked[1]])
    elif picked and (step or "feeling" not in known):
        opening = _feel(rng, known)
        closing = fill(rng.choice(w.STEPS[picked[0]]), values[picked[0]])
    elif picked:
        opening = fill(rng.choice(w.REMARKS[picked[0]]), values[picked[0]])
        closing = rng.choice(w.SHORT["Question"])
    else:
        opening, closing = _feel(rng, known), rng.choice(w.SHORT["Question"])
    return strategy, f"{opening} {closing}"


def _feel(rng: Random, known: Mapping[str, str]) -> str:
    if "feeling" in known:
        return rng.choice(w.WITH_FEELING).format(f=known["feeling"])
    return rng.choice(w.SHORT["Reflection of feelings"])


def make_dialogue(rng: Random, split: str, *, personal: float, exchanges: int | None = None) -> Dialogue:
    """A dialogue whose supporter gives a share ``personal`` of personal replies, and short general ones otherwise."""
    user = make_user(rng, split)
    situation, turns = make_turns(rng, user, rng.randint(5, 8) if exchanges is None else exchanges)
    dialogue = Dialogue(user, situation, turns, [])
    for index in range(len(turns)):
        dialogue.replies.append(human_reply(rng, dialogue, index, personal))
    return dialogue


def human_reply(rng: Random, dialogue: Dialogue, index: int, personal: float) -> Reply:
    """What a supporter says at a turn: personal with the given probability, unless it is time to greet or to part."""
    turn = dialogue.turns[index]
    if not turn.reveals and turn.text in w.BYES:
        return "Others", rng.choice(w.FAREWELLS)
    if index == 0 and not turn.reveals:
        return "Question", rng.choice(w.WELCOMES)
    if rng.random() < personal:
        known = dialogue.known(index)
        return personal_reply(rng, known, pick_facts(rng, known, turn.reveals))
    return short_reply(rng)


def as_esconv(dialogue: Dialogue) -> dict[str, Any]:
    """The schema of ESConv.json, and beside it what is true of the user."""
    spoken = []
    for turn, (strategy, text) in zip(dialogue.turns, dialogue.replies):
        spoken.append({"speaker": "seeker", "annotation": {}, "content": turn.text})
        spoken.append({"speaker": "supporter", "annotation": {"strategy": strategy}, "content": text})
    user = dialogue.user
    return {
        "emotion_type": user.emotion, "problem_type": user.problem, "situation": dialogue.situation, "dialog": spoken,
        "facts": user.facts,
    }  # fmt: skip


def as_extes(dialogue: Dialogue) -> dict[str, Any]:
    """The schema of ExTES, and beside it what is true of the user."""
    content: list[dict[str, str]] = []
    for turn, (strategy, text) in zip(dialogue.turns, dialogue.replies):
        content += [{"User": turn.text}, {"AI Strategy": w.EXTES_NAMES[strategy], "AI": text}]
    user = dialogue.user
    return {"scene": user.problem, "description": dialogue.situation, "content": content, "facts": user.facts}
