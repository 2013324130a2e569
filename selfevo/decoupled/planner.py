"""Emotional support by two models: a planner names the next strategy, a generator writes the reply (Zhang et al. 2025).

Both are adapters on one backbone. This file has their prompts and answers, the prediction of a strategy (by exact
log-probabilities of all eight, or by generating a name), and the inference with both. The joint baseline is one model
that writes ``[Strategy] reply``.

The strategy stands at the end of the seeker's last message, so prompts of all strategies share the whole conversation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfevo.datasets.encoding import fit_prompt
from selfevo.decoupled.strategy_metrics import UNKNOWN
from selfevo.dialogue import (
    ESCONV_STRATEGIES,
    Dialogue,
    Example,
    Message,
    Turn,
    reply_examples,
    strategy_name,
    to_messages,
)
from selfevo.files import Fields, FileError, read_jsonl, write_jsonl
from selfevo.generate.decoder import SLOTS
from selfevo.generate.replies import Reply, ReplySettings, sample_replies
from selfevo.generate.sampling import Sampling
from selfevo.kernels import ranks
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.scoring import MAX_TOKENS, packed_logps
from selfevo.training.stages import restore
from selfevo.trie.packing import pack
from selfevo.trie.trie import as_ids

PLANNING = ("likeliest", "drawn", "written")
PLAN_TOKENS = 24  # most tokens of a written plan; the longest name has far fewer
_NAMES = "; ".join(ESCONV_STRATEGIES)
_PLANNER = (
    "You guide an emotional supporter. Say which strategy the next reply should follow. Answer with one of these names "
    f"and nothing else: {_NAMES}."
)
_GENERATOR = (
    "You are a warm and attentive emotional supporter. Answer the person in one or two short, natural sentences, with "
    "the strategy named in brackets after their last message."
)
_JOINT = (
    "You are a warm and attentive emotional supporter. Name a strategy in brackets, then answer the person in one or "
    f"two short, natural sentences that follow it. The strategies: {_NAMES}."
)
_BRACKET = re.compile(r"\s*\[([^\[\]]*)\]\s*")


@dataclass(frozen=True)
class Labelled:
    """A supporter turn with the strategy that the human supporter followed, one of ESConv's eight."""

    example: Example
    strategy: str

    @property
    def context(self) -> tuple[Turn, ...]:
        return self.example.context

    @property
    def reply(self) -> str:
        """What the human supporter said."""
        return self.example.golden.text


@dataclass(frozen=True)
class Plan:
    """A predicted strategy: one of the eight, or whatever else was written. ``logps``, if they were computed, are the
    log-probabilities of the eight, normalised over these."""

    strategy: str
    logps: tuple[float, ...] | None = None

    @property
    def known(self) -> str:
        """The strategy to follow; an unknown one counts as "Others"."""
        return self.strategy if self.strategy in ESCONV_STRATEGIES else UNKNOWN


@dataclass(frozen=True)
class PlanSettings:
    """How strategies are predicted: ``likeliest`` of the eight or ``drawn`` from their exact probabilities, or
    ``written`` token by token, which may be none of the eight."""

    planning: str = "likeliest"
    sampling: Sampling = Sampling()
    slots: int = SLOTS
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        if self.planning not in PLANNING:
            raise ValueError(f"planning should be one of {', '.join(PLANNING)}, not {self.planning!r}")


def labelled_turns(dialogues: Iterable[Dialogue], counts: Counter[str]) -> list[Labelled]:
    """Every supporter turn that has one of the eight strategies; of several in a merged turn, the first.

    Counts ``labelled``, ``without_strategy_left_out`` and ``several_strategies``.
    """
    found = []
    for dialogue in dialogues:
        for example in reply_examples(dialogue, Counter(), skip_first=0, skip_last=0):
            known = _known_strategies(example.golden)
            counts["labelled" if known else "without_strategy_left_out"] += 1
            counts["several_strategies"] += len(known) > 1
            if known:
                found.append(Labelled(example, known[0]))
    return found


def _known_strategies(turn: Turn) -> list[str]:
    return [name for name in turn.strategies if name in ESCONV_STRATEGIES]


def planner_prompt(context: Iterable[Turn]) -> list[Message]:
    """The planner's prompt; its answer is the name of a strategy."""
    return to_messages(context, _PLANNER)


def generator_prompt(context: Iterable[Turn], strategy: str) -> list[Message]:
    """The generator's prompt: the conversation, with the strategy to follow after the seeker's last words."""
    *earlier, last = to_messages(context, _GENERATOR)
    return [*earlier, last | {"content": f"{last['content']}\n[{strategy}]"}]


def joint_prompt(context: Iterable[Turn]) -> list[Message]:
    """The joint baseline's prompt; earlier replies have the form in which it writes its own."""
    known = [(turn, _known_strategies(turn)) for turn in context]
    shown = [replace(turn, text=joint_reply(names[0], turn.text)) if names else turn for turn, names in known]
    return to_messages(shown, _JOINT)


def joint_reply(strategy: str, text: str) -> str:
    return f"[{strategy}] {text}"


def read_joint(text: str) -> tuple[Plan, str]:
    """The plan and the reply in what the joint baseline wrote; without brackets the plan is empty."""
    found = _BRACKET.match(text)
    if found is None:
        return Plan(""), text.strip()
    return Plan(strategy_name(found[1].strip(), Counter())), text[found.end() :].strip()


def score_plans(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    *,
    joint: bool = False,
    max_tokens: int = MAX_TOKENS,
    label: str = "plans",
) -> list[Plan | None]:
    """The likeliest of the eight strategies for each prompt, by exact log-probabilities; None if a prompt is too long.

    The eight answers branch off one conversation, which is computed once for all of them. With ``joint`` an answer is
    ``[Strategy]``, as the joint baseline begins its reply; else it is the name and the stop id. An empty ``label``
    shows no progress bar.
    """
    encode = tokenizer.encode_reply
    answers = [encode(f"[{name}]")[:-1] if joint else encode(name) for name in ESCONV_STRATEGIES]
    window = model.config.max_positions - max(map(len, answers))
    fitted = [(index, fit_prompt(tokenizer, prompt, window).ids) for index, prompt in enumerate(prompts)]
    asked = [(index, ids) for index, ids in fitted if ids is not None]
    items = [[as_ids([*ids, *answer]) for answer in answers] for _, ids in asked]
    packs = pack(items, max_tokens)
    shares = ranks.share_out([sum(len(items[place][0]) for place in members) for members in packs])
    parts = [_Part([[asked[place] for place in packs[number]] for number in share], answers, label) for share in shares]
    plans: list[Plan | None] = [None] * len(prompts)
    for found in ranks.deal(_scored, model, parts):
        for index, row in found.items():
            plans[index] = Plan(ESCONV_STRATEGIES[int(row.argmax())], tuple(row.tolist()))
    return plans


@dataclass(frozen=True)
class _Part:
    """What one rank scores: packs of prompts, each with its index, and the answers to every one of them."""

    packs: list[list[tuple[int, Sequence[int]]]]
    answers: list[list[int]]
    label: str


@torch.no_grad()
def _scored(model: Transformer, part: _Part) -> dict[int, Tensor]:
    """The log-probabilities of the eight for each prompt, by its index, normalised over these: (8,) on the CPU."""
    was_training = model.training
    model.eval()
    rows: dict[int, Tensor] = {}
    silent = not part.label or ranks.rank() > 0
    try:
        with tqdm(total=sum(map(len, part.packs)), desc=part.label, unit="plan", disable=silent) as bar:
            for own in part.packs:
                sums, _ = packed_logps(model, [(ids, answer) for _, ids in own for answer in part.answers])
                found = sums.view(len(own), -1).log_softmax(dim=1).cpu()
                rows |= {index: row.clone() for (index, _), row in zip(own, found)}
                bar.update(len(own))
        model.keep_pace()
    finally:
        model.train(was_training)
    return rows


def sample_plans(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    path: Path,
    *,
    sampling: Sampling,
    slots: int = SLOTS,
    label: str = "plans",
) -> list[Plan | None]:
    """A strategy written for each prompt, kept in ``path``; None if a prompt is too long."""
    replies = sample_replies(
        model, tokenizer, prompts, path, sampling=sampling, max_new_tokens=PLAN_TOKENS, slots=slots, label=label
    )
    texts = [reply.text for reply in replies]
    return [None if text is None else Plan(strategy_name(text.strip(" []."), Counter())) for text in texts]


def draw_plans(plans: Sequence[Plan | None], sampling: Sampling) -> list[Plan | None]:
    """Strategies drawn from the exact probabilities of scored plans: ``sampling`` over a vocabulary of the eight, with
    a plan's index as its key and without the repetition penalty, which has no meaning here."""
    known = {index: found.logps for index, found in enumerate(plans) if found is not None}
    if not known:
        return list(plans)
    keys, logps = torch.tensor(list(known)), torch.tensor(list(known.values()))
    _, chosen = replace(sampling, repetition_penalty=1.0).sample(logps.t(), keys[:, None], keys, torch.zeros_like(keys))
    drawn = dict(zip(known, chosen))
    return [found and Plan(ESCONV_STRATEGIES[drawn[index]], found.logps) for index, found in enumerate(plans)]


def plan(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    path: Path,
    settings: PlanSettings,
    *,
    joint: bool = False,
) -> list[Plan | None]:
    """A plan for each prompt, by ``settings``. The model's results are kept in ``path`` and not computed again."""
    label, sampling = f"plans, {path.parent.name}/{path.stem}", settings.sampling
    if settings.planning == "written":
        return sample_plans(model, tokenizer, prompts, path, sampling=sampling, slots=settings.slots, label=label)
    if not path.is_file():
        scored = score_plans(model, tokenizer, prompts, joint=joint, max_tokens=settings.max_tokens, label=label)
        write_jsonl(path, [None if found is None else asdict(found) for found in scored])
    records = read_jsonl(path)
    if len(records) != len(prompts):
        raise FileError(f"{path}: holds {len(records)} plans where {len(prompts)} are needed; it is of another run")
    plans = [_read_plan(values, f"{path}, plan {index}") for index, values in enumerate(records)]
    return draw_plans(plans, sampling) if settings.planning == "drawn" else plans


def _read_plan(values: Any, where: str) -> Plan | None:
    if values is None:
        return None
    record = Fields(values, where)
    strategy, logps = record.take("strategy", str), record.take_list("logps", float)
    if strategy not in ESCONV_STRATEGIES or len(logps) != len(ESCONV_STRATEGIES):
        raise record.fail(
            f"{strategy!r} with {len(logps)} numbers is no plan for one of the eight strategies; remove it"
        )
    return Plan(strategy, tuple(logps))


def respond(
    model: Transformer,
    tokenizer: ChatTokenizer,
    contexts: Sequence[Sequence[Turn]],
    plans_path: Path,
    replies_path: Path,
    settings: PlanSettings,
    *,
    planner: Path,
    generator: Path,
    replies: ReplySettings,
) -> list[tuple[Plan | None, Reply]]:
    """Decoupled inference: plans under the ``planner`` adapter, then replies under the ``generator`` adapter.

    Both adapters are folders in PEFT's format; the backbone stays loaded. Results that are in the two files are not
    computed again.
    """
    restore(model, planner)
    plans = plan(model, tokenizer, [planner_prompt(c) for c in contexts], plans_path, settings)
    restore(model, generator)
    prompts = [generator_prompt(c, found.known if found else UNKNOWN) for c, found in zip(contexts, plans)]
    answers = sample_replies(model, tokenizer, prompts, replies_path, **vars(replies), label=replies_path.stem)
    return list(zip(plans, answers))
