"""Emotional support by two models: a planner names the next strategy, a generator writes the reply (Zhang et al. 2025).

Both are adapters on one backbone. Here are what they read and write, how a strategy is predicted (by scoring all eight
exactly, or by writing its name), and how the two work together. The joint baseline is one model that writes
``[Strategy] reply`` in one go.

The strategy stands at the end of the seeker's last message, so prompts of all strategies share the whole conversation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
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
from selfevo.files import FileError, read_jsonl, write_jsonl
from selfevo.generate.decoder import SLOTS
from selfevo.generate.replies import Reply, ReplySettings, sample_replies
from selfevo.generate.sampling import Sampling
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.scoring import MAX_TOKENS, packed_logps
from selfevo.training.examples import SFTExample
from selfevo.training.stages import restore
from selfevo.trie.packing import pack
from selfevo.trie.trie import as_ids

PLANNING = ("likeliest", "drawn", "written")
PLAN_TOKENS = 24  # of a written plan; the longest name has far fewer
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


@dataclass(frozen=True)
class Plan:
    """A predicted strategy: one of the eight, or whatever else was written. ``logps`` are the log-probabilities of the
    eight, normalised among them, where they were scored."""

    strategy: str
    logps: tuple[float, ...] | None = None

    @property
    def known(self) -> str:
        """The strategy to follow; an unknown one counts as "Others"."""
        return self.strategy if self.strategy in ESCONV_STRATEGIES else UNKNOWN


@dataclass(frozen=True)
class PlanSettings:
    """How strategies are predicted: the likeliest of the eight, or one drawn from their probabilities, both after
    scoring them exactly; or a name written token by token, which may be none of the eight."""

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
            known = [name for name in example.golden.strategies if name in ESCONV_STRATEGIES]
            counts["labelled" if known else "without_strategy_left_out"] += 1
            counts["several_strategies"] += len(known) > 1
            if known:
                found.append(Labelled(example, known[0]))
    return found


def planner_prompt(context: Iterable[Turn]) -> list[Message]:
    """What the planner reads; its answer is the name of a strategy."""
    return to_messages(context, _PLANNER)


def generator_prompt(context: Iterable[Turn], strategy: str) -> list[Message]:
    """What the generator reads: the conversation, ending with the seeker's words and the strategy to follow."""
    *earlier, last = to_messages(context, _GENERATOR)
    return [*earlier, last | {"content": f"{last['content']}\n[{strategy}]"}]


def joint_prompt(context: Iterable[Turn]) -> list[Message]:
    """What the joint baseline reads: earlier replies stand there as it writes its own."""
    shown = [Turn(turn.speaker, _with_strategy(turn), turn.strategies) for turn in context]
    return to_messages(shown, _JOINT)


def joint_reply(strategy: str, text: str) -> str:
    return f"[{strategy}] {text}"


def _with_strategy(turn: Turn) -> str:
    known = [name for name in turn.strategies if name in ESCONV_STRATEGIES]
    return joint_reply(known[0], turn.text) if known else turn.text


def read_joint(text: str) -> tuple[Plan, str]:
    """The plan and the reply in what the joint baseline wrote; without brackets the plan is empty."""
    found = _BRACKET.match(text)
    if found is None:
        return Plan(""), text.strip()
    return Plan(strategy_name(found[1].strip(), Counter())), text[found.end() :].strip()


def planner_sft_examples(turns: Sequence[Labelled]) -> list[SFTExample]:
    return [(turn.example.dialogue, planner_prompt(turn.context), turn.strategy) for turn in turns]


def generator_sft_examples(turns: Sequence[Labelled]) -> list[SFTExample]:
    return [
        (turn.example.dialogue, generator_prompt(turn.context, turn.strategy), turn.example.golden.text)
        for turn in turns
    ]


def joint_sft_examples(turns: Sequence[Labelled]) -> list[SFTExample]:
    return [
        (turn.example.dialogue, joint_prompt(turn.context), joint_reply(turn.strategy, turn.example.golden.text))
        for turn in turns
    ]


def score_plans(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    *,
    joint: bool = False,
    max_tokens: int = MAX_TOKENS,
    label: str = "plans",
) -> list[Plan | None]:
    """The likeliest of the eight strategies for each prompt, all eight scored exactly; None where a prompt is too long.

    The eight answers branch off one conversation, which is computed once for all of them. With ``joint`` what is scored
    is ``[Strategy]``, as the joint baseline begins its reply; else the whole answer with its stop id.
    """
    answers = [_answer_ids(tokenizer, name, joint) for name in ESCONV_STRATEGIES]
    room = model.config.max_positions - max(map(len, answers))
    fitted = [fit_prompt(tokenizer, prompt, room).ids for prompt in prompts]
    asked = [index for index, ids in enumerate(fitted) if ids is not None]
    plans: list[Plan | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(asked), desc=label, unit="plan") as bar:
            items = [[as_ids([*(fitted[index] or ()), *answer]) for answer in answers] for index in asked]
            for members in pack(items, max_tokens):
                own = [asked[member] for member in members]
                examples = [(fitted[index] or [], answer) for index in own for answer in answers]
                sums, _ = packed_logps(model, examples)
                for index, row in zip(own, sums.view(len(own), -1).log_softmax(dim=1).cpu()):
                    plans[index] = Plan(ESCONV_STRATEGIES[int(row.argmax())], tuple(row.tolist()))
                bar.update(len(own))
    finally:
        model.train(was_training)
    return plans


def _answer_ids(tokenizer: ChatTokenizer, name: str, joint: bool) -> list[int]:
    return tokenizer.encode_reply(f"[{name}]")[:-1] if joint else tokenizer.encode_reply(name)


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
    """A strategy written for each prompt, kept in ``path``; None where a prompt is too long."""
    texts = sample_replies(
        model, tokenizer, prompts, path, sampling=sampling, max_new_tokens=PLAN_TOKENS, slots=slots, label=label
    )
    return [None if text.text is None else Plan(strategy_name(text.text.strip(" []."), Counter())) for text in texts]


def draw_plans(plans: Sequence[Plan | None], sampling: Sampling) -> list[Plan | None]:
    """Strategies drawn from the exact probabilities of scored plans, each by its index; as sampling names would draw
    them if nothing but the eight could be written. The repetition penalty has no meaning here."""
    known = [index for index, found in enumerate(plans) if found is not None]
    if not known:
        return list(plans)
    keys = torch.tensor(known)
    logps = torch.tensor([found.logps for found in plans if found is not None])
    chosen = replace(sampling, repetition_penalty=1.0).sample(logps.t(), keys[:, None], keys, torch.zeros_like(keys))
    drawn = dict(zip(known, chosen.tolist()))
    return [found and Plan(ESCONV_STRATEGIES[drawn[index]], found.logps) for index, found in enumerate(plans)]


def plan(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    path: Path,
    settings: PlanSettings,
    *,
    joint: bool = False,
    label: str = "plans",
) -> list[Plan | None]:
    """Plans as the settings say; what the model computed is kept in ``path``, and is not computed again."""
    if settings.planning == "written":
        return sample_plans(
            model, tokenizer, prompts, path, sampling=settings.sampling, slots=settings.slots, label=label
        )
    if not path.is_file():
        scored = score_plans(model, tokenizer, prompts, joint=joint, max_tokens=settings.max_tokens, label=label)
        write_jsonl(path, [None if found is None else asdict(found) for found in scored])
    records = read_jsonl(path)
    if len(records) != len(prompts):
        raise FileError(f"{path}: holds {len(records)} plans where {len(prompts)} are wanted; it is of another run")
    plans = [None if record is None else Plan(record["strategy"], tuple(record["logps"])) for record in records]
    return draw_plans(plans, settings.sampling) if settings.planning == "drawn" else plans


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

    Both are folders in PEFT's format; the weights of the backbone stay where they are. What is in the two files already
    is not computed again.
    """
    restore(model, planner)
    plans = plan(model, tokenizer, [planner_prompt(c) for c in contexts], plans_path, settings, label=plans_path.stem)
    restore(model, generator)
    prompts = [generator_prompt(c, found.known if found else UNKNOWN) for c, found in zip(contexts, plans)]
    texts = sample_replies(
        model, tokenizer, prompts, replies_path,
        sampling=replies.sampling, max_new_tokens=replies.max_new_tokens, slots=replies.slots,
        label=replies_path.stem,
    )  # fmt: skip
    return list(zip(plans, texts))
