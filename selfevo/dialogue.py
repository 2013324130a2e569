"""Dialogues between a seeker and a supporter: the records, the cleaning rules of Appendix A, and the split.

In this order: ``clean_dialogue`` makes the speakers alternate, the seeker first; ``split_dialogues`` splits a list of
dialogues at random; ``reply_examples`` turns supporter turns into examples, each with all turns before it. Every rule
counts what it changes in a ``Counter``, under the keys that its docstring names.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

Speaker = Literal["seeker", "supporter"]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Messages = Sequence[Mapping[str, str]]  # a conversation that is only read
T = TypeVar("T")
FIRST_SPEAKERS = ("drop", "seeker")
ESCONV_STRATEGIES: tuple[str, ...] = (
    "Question", "Restatement or Paraphrasing", "Reflection of feelings", "Self-disclosure",
    "Affirmation and Reassurance", "Providing Suggestions", "Information", "Others",
)  # fmt: skip
# Names of the same eight in earlier copies of ESConv and in FailedESConv, the dialogues that its authors rejected.
OLDER_STRATEGY_NAMES: dict[str, str] = {
    "Questions": "Question",
    "Other": "Others",
    "Direct Guidance": "Providing Suggestions",
    "Approval and Reassurance": "Affirmation and Reassurance",
    "Restatement": "Restatement or Paraphrasing",
}
STRATEGY_BY_FOLDED_NAME: dict[str, str] = {name.casefold(): name for name in ESCONV_STRATEGIES} | {
    older.casefold(): name for older, name in OLDER_STRATEGY_NAMES.items()
}


@dataclass(frozen=True)
class Turn:
    """What one speaker said, with its strategy labels: usually one for a supporter, none for a seeker."""

    speaker: Speaker
    text: str
    strategies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """The turns of one conversation, and its fields in the file; a field that the file does not have is ""."""

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
    """A conversation that is replayed in training, e.g. from Alpaca; the last message is the assistant's."""

    id: str
    messages: tuple[Message, ...]


def strategy_name(name: str, counts: Counter[str], by_folded_name: Mapping[str, str] = STRATEGY_BY_FOLDED_NAME) -> str:
    """The standard name of a strategy, whatever its case and the white space around it; an unknown name is kept.

    ``by_folded_name`` gives the standard names by ``casefold()``; the default knows ESConv's eight and their older
    names. Counts ``strategies_renamed`` and ``strategies_unknown``.
    """
    known = by_folded_name.get(name.strip().casefold())
    if known is None:
        counts["strategies_unknown"] += 1
        return name
    if known != name:
        counts["strategies_renamed"] += 1
    return known


def clean_dialogue(dialogue: Dialogue, counts: Counter[str], *, first_speaker: str = "drop") -> Dialogue:
    """The dialogue as the paper trains on it (Appendix A): alternating, the seeker first, no blank turns.

    The rules in their order, each with its key in ``counts`` (the number of turns it changed): white space at the ends
    of a text is removed (``whitespace_stripped``); blank turns are dropped (``blank_turns_dropped``: published files
    have them between two messages of a supporter); supporter turns before the first seeker turn are dropped
    (``leading_supporter_dropped``), or with ``first_speaker`` "seeker" whoever speaks first is the seeker: both
    speakers of such a dialogue exchange their roles (``roles_exchanged``); consecutive turns of one speaker are joined
    by a newline, and so are their strategies, without repetitions (``turns_merged``). A dialogue may end up without
    turns (``empty_dialogues``). Cleaning a second time changes nothing.
    """
    turns: list[Turn] = []
    texts: list[list[str]] = []  # of each turn: joined at the end, as many small pieces would take quadratic time
    opened = next((turn.speaker for turn in dialogue.turns if turn.text.strip()), "seeker")
    exchanged = first_speaker == "seeker" and opened == "supporter"
    for turn in dialogue.turns:
        if exchanged:
            turn = replace(turn, speaker="supporter" if turn.speaker == "seeker" else "seeker")
            counts["roles_exchanged"] += 1
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
            if turn.strategies:
                strategies = tuple(dict.fromkeys(turns[-1].strategies + turn.strategies))
                turns[-1] = Turn(turn.speaker, "", strategies)
            texts[-1].append(text)
        else:
            turns.append(turn)
            texts.append([text])
    if not turns:
        counts["empty_dialogues"] += 1
    joined = (replace(turn, text="\n".join(own)) for turn, own in zip(turns, texts))
    return replace(dialogue, turns=tuple(joined))


def reply_examples(
    dialogue: Dialogue, counts: Counter[str], *, skip_first: int = 1, skip_last: int = 2
) -> list[Example]:
    """The supporter turns of a cleaned dialogue as examples, except the first (greeting) and the last two (farewell).

    "Drop the first turn and the last two" (Appendix A) is about targets: skipped turns remain in the contexts of later
    examples. ``skip_first`` and ``skip_last`` are numbers of supporter turns. Counts ``examples``,
    ``first_turns_skipped`` and ``last_turns_skipped``. Raises ``ValueError`` if the turns do not alternate, seeker
    first, or if a number is negative.
    """
    if skip_first < 0 or skip_last < 0:
        raise ValueError(f"skip_first and skip_last must not be negative, got {skip_first} and {skip_last}")
    if any(turn.speaker != ("seeker", "supporter")[index % 2] for index, turn in enumerate(dialogue.turns)):
        raise ValueError(f"{dialogue.id}: the turns do not alternate, seeker first; call clean_dialogue first")
    replies = range(1, len(dialogue.turns), 2)
    first = min(skip_first, len(replies))
    last = min(skip_last, len(replies) - first)
    targets = replies[first : len(replies) - last]
    counts["first_turns_skipped"] += first
    counts["last_turns_skipped"] += last
    counts["examples"] += len(targets)
    return [Example(dialogue.id, index, dialogue.turns[:index], dialogue.turns[index]) for index in targets]


def to_messages(turns: Iterable[Turn], system: str = "") -> list[Message]:
    """Turns as chat messages, the system text first if there is one; seeker becomes user, supporter assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = {"seeker": "user", "supporter": "assistant"}
    return messages + [{"role": roles[turn.speaker], "content": turn.text} for turn in turns]


def split_dialogues(items: Sequence[T], fractions: Sequence[float], *, seed: int) -> list[list[T]]:
    """Splits items at random into parts of the given fractions; each part keeps the order of ``items``.

    The parts share no item and together hold all of them. Sizes are rounded down; each item that is left goes to the
    part with the next largest remainder, at a tie to the earlier one. A part may be empty if there are few items. The
    split depends only on ``seed`` and the number of items. The paper: (0.9, 0.1) for ESConv, (0.5, 0.5) for the seeds.
    Raises ``ValueError`` unless the fractions are positive and sum to 1.
    """
    if not all(fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1):
        raise ValueError(f"the fractions must be positive and sum to 1, got {tuple(fractions)}")
    shares = [round(fraction * len(items), 6) for fraction in fractions]  # 0.29 * 100 is 28.999999999999996
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: round(sizes[part] - shares[part], 6))
    for part in by_remainder[: len(items) - sum(sizes)]:
        sizes[part] += 1
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    ends = itertools.accumulate(sizes)
    return [[items[index] for index in sorted(order[end - size : end])] for size, end in zip(sizes, ends)]
