"""Inferential Preference Mining (Zhang et al. 2025): pairs for DPO from what the SFT planner and generator do wrong.

A wrong prediction of the planner is rejected and the human strategy chosen; a reply of the generator in which a filter
finds a psychological error is rejected and the human reply, if the filter finds none in it, chosen. The filter is any
``ErrorFinder``; ``find_errors`` asks a language model. The kinds of error are those of the paper, the prompt is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfevo.datasets.pairs import Pair
from selfevo.decoupled.planner import Labelled, Plan, generator_prompt, planner_prompt
from selfevo.dialogue import ESCONV_STRATEGIES, Message, to_messages
from selfevo.evaluation.ask_json import TRIES, Responder, UnusableAnswerError, ask_json
from selfevo.generate.replies import Reply

ERRORS: dict[str, str] = {
    "lack_of_empathy": "the reply passes over what the person feels",
    "early_advice": "the reply turns to advice or to solving the problem while the person still needs to be heard",
    "template_like": "the reply could be given to anybody; it takes up nothing of what this person said",
}


@dataclass(frozen=True)
class Case:
    """A reply to check: the conversation before it (chat messages), the strategy it was to follow, and its text."""

    context: list[Message]
    strategy: str
    reply: str


# For each case the names of the psychological errors in its reply, or None without a verdict, which it counts.
ErrorFinder = Callable[[Sequence[Case], Counter[str]], list[frozenset[str] | None]]


def planner_pairs(turns: Sequence[Labelled], plans: Sequence[Plan | None], counts: Counter[str]) -> list[Pair]:
    """The planner's own predictions (rejected) against the human strategies (chosen), where they differ.

    A prediction that is another of the strategies of a merged turn is not wrong. Counts ``agreed``,
    ``unknown_rejected``, ``prompt_too_long_dropped``, ``empty_dropped`` and ``pairs``.
    """
    pairs = []
    for turn, plan in zip(turns, plans, strict=True):
        if plan is None:
            counts["prompt_too_long_dropped"] += 1
        elif not plan.strategy:
            counts["empty_dropped"] += 1
        elif plan.strategy in turn.example.golden.strategies:
            counts["agreed"] += 1
        else:
            counts["unknown_rejected"] += plan.strategy not in ESCONV_STRATEGIES
            pairs.append(_pair(turn, planner_prompt(turn.context), turn.strategy, plan.strategy))
    counts["pairs"] = len(pairs)
    return pairs


def generator_pairs(
    turns: Sequence[Labelled], replies: Sequence[Reply], find_errors: ErrorFinder, counts: Counter[str]
) -> list[Pair]:
    """The generator's own replies under the human strategy (rejected) against the human replies (chosen).

    Only pairs with errors in the first and none in the second. Counts ``ERROR_rejected`` for each kind of error,
    ``no_error_dropped``, ``human_error_dropped``, ``no_verdict_dropped``, ``prompt_too_long_dropped``,
    ``empty_dropped``, ``identical_dropped`` and ``pairs``.
    """
    sampled: list[tuple[Labelled, Reply]] = []
    for turn, reply in zip(turns, replies, strict=True):
        if reply.text is None:
            counts["prompt_too_long_dropped"] += 1
        elif not reply.text:
            counts["empty_dropped"] += 1
        elif reply.text == turn.reply.strip():
            counts["identical_dropped"] += 1
        else:
            sampled.append((turn, reply))
    faulty: list[tuple[Labelled, Reply, frozenset[str]]] = []
    cases = [case_of(turn, reply.text or "") for turn, reply in sampled]
    for (turn, reply), errors in zip(sampled, find_errors(cases, counts)):
        if errors:
            faulty.append((turn, reply, errors))
        else:
            counts["no_verdict_dropped" if errors is None else "no_error_dropped"] += 1
    pairs = []
    verdicts = find_errors([case_of(turn, turn.reply) for turn, _, _ in faulty], counts)
    for (turn, reply, errors), human_errors in zip(faulty, verdicts):
        if human_errors is None or human_errors:
            counts["no_verdict_dropped" if human_errors is None else "human_error_dropped"] += 1
        else:
            counts.update(f"{error}_rejected" for error in errors)
            prompt = generator_prompt(turn.context, turn.strategy)
            pairs.append(_pair(turn, prompt, turn.reply, reply.text or "", reply.cut))
    counts["pairs"] = len(pairs)
    return pairs


def case_of(turn: Labelled, reply: str, strategy: str = "") -> Case:
    """A reply to a turn as a case, with the human strategy unless another one is given."""
    return Case(to_messages(turn.context), strategy or turn.strategy, reply)


def _pair(turn: Labelled, prompt: list[Message], chosen: str, rejected: str, cut: bool = False) -> Pair:
    example = turn.example
    return Pair(example.id, example.dialogue, prompt, chosen, rejected, chosen, "golden", rejected_cut=cut)


def find_errors(
    responder: Responder, cases: Sequence[Case], counts: Counter[str], *, tries: int = TRIES
) -> list[frozenset[str] | None]:
    """The errors (names of ``ERRORS``) in each reply; None without a usable verdict, for reasons in ``counts``."""
    conversations = [error_prompt(case) for case in cases]
    return ask_json(responder, conversations, read_errors, counts, tries=tries, label="psychological errors")


def error_prompt(case: Case) -> list[dict[str, str]]:
    """One request: the conversation, the strategy, the reply, and what each error means."""
    names = {"user": "Person", "assistant": "Supporter"}
    messages = [message for message in case.context if message["role"] in names]
    spoken = "\n".join(f"{names[message['role']]}: {message['content']}" for message in messages)
    listed = "\n".join(f"- {name}: {meaning}" for name, meaning in ERRORS.items())
    form = ", ".join(f'"{name}": false' for name in ERRORS)
    system = "You check replies of emotional supporters for psychological errors. Name an error only if it is there."
    request = (
        f"The conversation so far:\n{spoken}\n\nThe strategy of the reply: {case.strategy}\n\nThe reply to check:\n"
        f"{case.reply}\n\nThe errors:\n{listed}\n\nSay true for each error that the reply makes, else false. Answer "
        f"with one JSON object and nothing else:\n{{{form}}}"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": request}]


def read_errors(value: Mapping[str, Any]) -> frozenset[str]:
    """The errors that are true; raises UnusableAnswerError unless each is given as true or false, and nothing else."""
    if set(value) != set(ERRORS):
        raise UnusableAnswerError("other_errors_than_asked")
    if not all(isinstance(found, bool) for found in value.values()):
        raise UnusableAnswerError("neither_true_nor_false")
    return frozenset(name for name, found in value.items() if found)
