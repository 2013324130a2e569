"""Dialogues between a seeker and a supporter: the records, the cleaning rules of Appendix A, and the split.

A dialogue passes through here in order: ``clean_dialogue`` makes it alternate, seeker first; ``split_dialogues`` deals
whole dialogues out; ``reply_examples`` makes each supporter turn worth answering an example with all that came before
it. Nothing is changed silently: every rule adds to a ``Counter`` under a fixed key, named in its docstring.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeVar

__all__ = [
    "ESCONV_STRATEGIES",
    "OLDER_STRATEGY_NAMES",
    "Dialogue",
    "Example",
    "Instruction",
    "Message",
    "Messages",
    "Speaker",
    "Turn",
    "clean_dialogue",
    "reply_examples",
    "split_dialogues",
    "strategy_name",
    "to_messages",
]
Speaker = Literal["seeker", "supporter"]
# {"role": "system" | "user" | "assistant", "content": text}. A TypedDict would not pass as a Mapping[str, str], which
# is all that templates and prompts ask for.
Message = dict[str, str]
Messages = Sequence[Mapping[str, str]]  # a conversation that is only read
T = TypeVar("T")
ESCONV_STRATEGIES: tuple[str, ...] = (
    "Question",
    "Restatement or Paraphrasing",
    "Reflection of feelings",
    "Self-disclosure",
    "Affirmation and Reassurance",
    "Providing Suggestions",
    "Information",
    "Others",
)
# Names of the same eight in earlier copies of ESConv and among the dialogues that its makers rejected.
OLDER_STRATEGY_NAMES: dict[str, str] = {
    "Questions": "Question",
    "Other": "Others",
    "Direct Guidance": "Providing Suggestions",
    "Approval and Reassurance": "Affirmation and Reassurance",
    "Restatement": "Restatement or Paraphrasing",
}
_BY_FOLDED_NAME = {name.casefold(): name for name in ESCONV_STRATEGIES} | {
    older.casefold(): name for older, name in OLDER_STRATEGY_NAMES.items()
}
_ROLES: dict[Speaker, str] = {"seeker": "user", "supporter": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side said, with the strategies it was labelled with (usually one for a supporter, none for a seeker)."""

    speaker: Speaker
    text: str
    strategies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """The turns of one conversation and what its file says about it; "" where the file says nothing."""

    id: str
    turns: tuple[Turn, ...]
    system: str = ""
    situation: str = ""
    emotion: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Example:
    """One supporter turn (``golden``, at index ``turn`` of the cleaned dialogue) and all turns before it."""

    dialogue: str
    turn: int
    context: tuple[Turn, ...]
    golden: Turn

    @property
    def id(self) -> str:
        return f"{self.dialogue}#{self.turn}"


@dataclass(frozen=True)
class Instruction:
    """A conversation to be replayed in training, e.g. of Alpaca; the last message is the assistant's."""

    id: str
    messages: tuple[Message, ...]


def strategy_name(name: str, counts: Counter[str]) -> str:
    """The name among ``ESCONV_STRATEGIES`` that an older spelling or another case stands for; else ``name`` as it is.

    Counts ``strategies_renamed`` and ``strategies_unknown``.
    """
    known = _BY_FOLDED_NAME.get(name.strip().casefold())
    if known is None:
        counts["strategies_unknown"] += 1
        return name
    if known != name:
        counts["strategies_renamed"] += 1
    return known


def clean_dialogue(dialogue: Dialogue, counts: Counter[str]) -> Dialogue:
    """The dialogue as the paper trains on it (Appendix A): alternating, the seeker first, no blank turns.

    In this order, each with its key in ``counts`` (turns changed): white space at the ends of a text is removed
    (``whitespace_stripped``); blank turns are dropped (``blank_turns_dropped``: published files put them between two
    messages of one supporter); so are supporter turns before the first seeker turn (``leading_supporter_dropped``); a
    turn of the same speaker as the one before joins it after a newline, strategies in order and each once
    (``turns_merged``). A dialogue may end up without turns (``empty_dialogues``). Cleaning twice changes nothing more.
    """
    turns: list[Turn] = []
    for turn in dialogue.turns:
        text = turn.text.strip()
        if not text:
            counts["blank_turns_dropped"] += 1
            continue
        if text != turn.text:
            counts["whitespace_stripped"] += 1
        if not turns and turn.speaker == "supporter":
            counts["leading_supporter_dropped"] += 1
        elif turns and turns[-1].speaker == turn.speaker:
            counts["turns_merged"] += 1
            strategies = tuple(dict.fromkeys(turns[-1].strategies + turn.strategies))
            turns[-1] = Turn(turn.speaker, f"{turns[-1].text}\n{text}", strategies)
        else:
            turns.append(replace(turn, text=text))
    if not turns:
        counts["empty_dialogues"] += 1
    return replace(dialogue, turns=tuple(turns))


def reply_examples(
    dialogue: Dialogue, counts: Counter[str], *, skip_first: int = 1, skip_last: int = 2
) -> list[Example]:
    """The supporter turns of a cleaned dialogue as examples, but for the first (greeting) and the last two (farewell).

    "Drop the first turn and the last two" (Appendix A) is about targets: what is skipped remains in the contexts of the
    others. ``skip_first`` and ``skip_last`` count supporter turns. Counts ``examples``, ``first_turns_skipped`` and
    ``last_turns_skipped``. Raises ``ValueError`` if the turns do not alternate, seeker first, or for a negative skip.
    """
    if skip_first < 0 or skip_last < 0:
        raise ValueError(f"skip_first and skip_last must not be negative, got {skip_first} and {skip_last}")
    if any(turn.speaker != ("seeker", "supporter")[index % 2] for index, turn in enumerate(dialogue.turns)):
        raise ValueError(f"{dialogue.id}: the turns do not alternate, seeker first; use clean_dialogue before")
    replies = range(1, len(dialogue.turns), 2)
    first = min(skip_first, len(replies))
    last = min(skip_last, len(replies) - first)
    targets = replies[first : len(replies) - last]
    counts["first_turns_skipped"] += first
    counts["last_turns_skipped"] += last
    counts["examples"] += len(targets)
    return [Example(dialogue.id, index, dialogue.turns[:index], dialogue.turns[index]) for index in targets]


def to_messages(turns: Iterable[Turn], system: str = "") -> list[Message]:
    """Chat messages: the system text first if there is one, the seeker as user, the supporter as assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": _ROLES[turn.speaker], "content": turn.text} for turn in turns]


def split_dialogues(items: Sequence[T], fractions: Sequence[float], *, seed: int) -> list[list[T]]:
    """Deals whole items out at random into parts of the given fractions; each part keeps the order of ``items``.

    The parts share no item and together hold all of them. Sizes are rounded by the largest remainder (the earlier part
    at a tie), so a small part of few items may be empty. Depends on ``seed`` and the number of items only. The paper:
    (0.9, 0.1) for ESConv, (0.5, 0.5) for the seeds. Raises ``ValueError`` unless the fractions are positive, sum 1.
    """
    if not all(fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1):
        raise ValueError(f"the fractions must be positive and sum to 1, got {tuple(fractions)}")
    # Rounding keeps float noise out of floors and ties: 0.29 * 100 is 28.999999999999996.
    shares = [round(fraction * len(items), 6) for fraction in fractions]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda part: round(sizes[part] - shares[part], 6))
    for part in by_remainder[: len(items) - sum(sizes)]:
        sizes[part] += 1
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    ends = accumulate(sizes)
    return [[items[i] for i in sorted(order[end - size : end])] for end, size in zip(ends, sizes)]
