"""Dialogues and pairs as ids to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.pairs import Pair
from selfevo.datasets.prompts import reply_prompt
from selfevo.dialogue import (
    Dialogue,
    Instruction,
    Message,
    reply_examples,
    to_messages,
)
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.scoring import Example as ScoredExample
from selfevo.training.objectives import PairIds, SFTObjective

SFTExample = tuple[str, Sequence[Message], str]  # the dialogue's id, the conversation, the reply to it


def sft_objective(
    tokenizer: ChatTokenizer,
    dialogues: Sequence[Dialogue],
    replay: Sequence[Instruction],
    *,
    system: str,
    window: int,
    counts: Counter[str],
) -> SFTObjective:
    """Every supporter turn in its context under a ``system`` prompt, and the replayed instructions, as ids.

    A context longer than the window loses its oldest turns; an example that cannot fit even so is left out. Both are
    counted.
    """

    def conversations() -> Iterator[SFTExample]:
        for dialogue in dialogues:
            for example in reply_examples(dialogue, Counter(), skip_first=0, skip_last=0):
                yield dialogue.id, reply_prompt(to_messages(example.context), system), example.golden.text
        for instruction in replay:
            *messages, answer = [dict(message) for message in instruction.messages]
            yield instruction.id, messages, answer["content"]

    return encode_sft_examples(tokenizer, conversations(), window=window, counts=counts)


def encode_sft_examples(
    tokenizer: ChatTokenizer, conversations: Iterable[SFTExample], *, window: int, counts: Counter[str]
) -> SFTObjective:
    """Conversations and the replies to them as ids.

    Raises ``ChatError`` that names a conversation which the chat format cannot write. Counts ``examples``,
    ``context_cut``, ``too_long_left_out`` and ``empty_reply_left_out``.
    """
    examples: list[ScoredExample] = []
    groups: list[str] = []
    for group, messages, reply in conversations:
        if not reply.strip():
            counts["empty_reply_left_out"] += 1
            continue
        response = [] if tokenizer.least_tokens(reply) > window else tokenizer.encode_reply(reply)
        prompt = fit_prompt(tokenizer, messages, window - len(response), name=group)
        if prompt.ids is None or not response:
            counts["too_long_left_out"] += 1
            continue
        counts["context_cut"] += bool(prompt.turns_dropped)
        counts["examples"] += 1
        examples.append((prompt.ids, response))
        groups.append(group)
    return SFTObjective(examples, groups)


def encode_pairs(tokenizer: ChatTokenizer, pairs: list[Pair], window: int) -> tuple[list[Pair], list[PairIds]]:
    """Pairs as ids; one that cannot fit into the window even without its older turns is left out."""
    kept, ids = [], []
    for pair in pairs:
        if max(map(tokenizer.least_tokens, (pair.chosen, pair.rejected))) > window:
            continue
        chosen, rejected = tokenizer.encode_reply(pair.chosen), tokenizer.encode_reply(pair.rejected)
        if pair.rejected_cut:  # the model did not choose to end it
            rejected.pop()
        prompt = fit_prompt(tokenizer, pair.prompt, window - max(len(chosen), len(rejected)), name=pair.id)
        if prompt.ids is not None:
            kept.append(pair)
            ids.append(PairIds(prompt.ids, chosen, rejected))
    return kept, ids
