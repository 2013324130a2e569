"""A run of Decoupled ESC: planner and generator by SFT then DPO on mined pairs, the joint baseline by SFT, all scored.

Every stage leaves its result under its final name only when it is whole; a killed run that is resumed takes the same
road. The reference of each DPO stage is exactly the SFT adapter before it, frozen under a fresh one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfevo.datasets.corpus import CorpusError, Counts, split_human
from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.decoupled.evaluate import Scores, score_plans_of, score_replies_of, table_of
from selfevo.decoupled.mining import ErrorFinder, generator_pairs, planner_pairs
from selfevo.decoupled.planner import (
    PLANNING,
    Labelled,
    Plan,
    PlanSettings,
    generator_lessons,
    generator_prompt,
    joint_lessons,
    joint_prompt,
    labelled_turns,
    plan,
    planner_lessons,
    planner_prompt,
    read_joint,
    respond,
)
from selfevo.dialogue import Message
from selfevo.evaluation.ask_json import Responder
from selfevo.evaluation.folder import write_examples
from selfevo.evolve.run import RunConfig, check_run, load_backbone, open_run, option
from selfevo.files import read_jsonl, write_json, write_jsonl, write_text
from selfevo.generate.replies import Reply, sample_replies
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.examples import Lesson, encode_lessons
from selfevo.training.stages import is_trained, restore, train_dpo, train_sft

PLAN_SALT = 6  # one for all models: the same noise draws their plans


@dataclass(frozen=True)
class DecoupledConfig(RunConfig):
    """All settings of a run, each a flag of ``examples/decoupled.py``; decoding is that of Zhang et al. (2025)."""

    gamma: float = option(0.0, "weight of an SFT term beside DPO; 0 is plain DPO")
    temperature: float = option(0.7, "sampling temperature; 0 is greedy")
    top_p: float = option(0.95, "nucleus mass; 1 switches it off")
    top_k: int = option(0, "candidates per token; 0 switches it off")
    repetition_penalty: float = option(1.0, "repetition penalty over prompt and reply; 1 switches it off")
    planning: str = option(
        "likeliest",
        "the strategy to follow: the likeliest of the eight, one drawn from their probabilities, or a name written "
        "token by token",
        choices=PLANNING,
    )
    judge: str = option("", "model that looks for errors and judges replies: an endpoint's, or a local backbone")
    judge_url: str = option("", "OpenAI-compatible endpoint of the judge; without it the judge is a local backbone")

    def __post_init__(self) -> None:
        self.plans(0)
        if self.judge_url and not self.judge:
            raise ValueError("judge_url needs judge: the name of the endpoint's model")
        super().__post_init__()

    def plans(self, salt: int) -> PlanSettings:
        """How strategies are predicted; ``salt`` separates the stages' randomness."""
        return PlanSettings(self.planning, self.sampling(salt), self.slots, self.max_tokens)


@dataclass(frozen=True)
class Turns:
    """The labelled turns of a run; ``held_out`` ones serve early stopping, of SFT and of DPO."""

    train: list[Labelled]
    held_out: list[Labelled]
    test: list[Labelled]

    @property
    def held_out_dialogues(self) -> frozenset[str]:
        return frozenset(turn.example.dialogue for turn in self.held_out)


@dataclass
class Workshop:
    """What the stages of a run share: one backbone, on which adapters come and go."""

    config: DecoupledConfig
    model: Transformer
    tokenizer: ChatTokenizer
    turns: Turns
    run: Path
    find_errors: ErrorFinder
    judge: Responder | None


def decouple(
    config: DecoupledConfig, find_errors: ErrorFinder, *, judge: Responder | None = None, resume: bool = False
) -> Path:
    """Runs, or with ``resume`` continues, the whole of Decoupled ESC; returns the run folder.

    ``find_errors`` is the filter of mined replies; ``judge``, if given, scores the test replies in four aspects. The
    folder has a stage each in ``planner-sft``, ``planner-dpo``, ``generator-sft``, ``generator-dpo`` and ``joint-sft``
    (adapters; for DPO also pairs.jsonl and filter.json), and replies, plans and tables in ``eval``.
    """
    check_run(config, resume=resume)
    counts: Counts = {}
    turns = read_turns(config, counts)
    model, tokenizer = load_backbone(config)
    run = open_run(config)
    write_json(run / "data.json", {"turns": {name: len(part) for name, part in vars(turns).items()}, "rules": counts})
    shop = Workshop(config, model, tokenizer, turns, run, find_errors, judge)
    for name, lessons in (("planner", planner_lessons), ("generator", generator_lessons), ("joint", joint_lessons)):
        _learn(shop, f"{name}-sft", lessons)
    _prefer(shop, "planner", 1, _mine_plans)
    strategies = _evaluate_plans(shop)
    write_text(run / "eval" / "strategies.md", table_of(strategies) + "\n")
    _prefer(shop, "generator", 2, _mine_replies)
    replies = _evaluate_replies(shop)
    write_text(run / "eval" / "replies.md", table_of(replies) + "\n")
    write_json(run / "eval" / "scores.json", {"strategies": strategies, "replies": replies})
    return run


def read_turns(config: DecoupledConfig, counts: Counts) -> Turns:
    """The labelled turns of the run's dialogues, split by dialogue. Raises CorpusError where a part has none."""
    parts = split_human(config.esconv, config.test, config.limit, config.seed, counts)
    labelled: list[list[Labelled]] = []
    for name, dialogues in zip(("train", "held_out", "test"), parts):
        counter: Counter[str] = Counter()
        labelled.append(labelled_turns(dialogues, counter))
        counts[f"{name}, turns"] = dict(sorted(counter.items()))
    for what, found, path in (("train", labelled[0], config.esconv), ("test", labelled[2], config.test)):
        if not found:
            raise CorpusError(
                f"{path or config.esconv}: no supporter turn to {what} on has one of ESConv's eight strategies "
                "(annotation.strategy, or [Strategy] before the text)"
            )
    return Turns(*labelled)


def _learn(shop: Workshop, name: str, lessons: Callable[[Sequence[Labelled]], list[Lesson]]) -> None:
    """An SFT stage on human strategies or replies."""
    folder, config = shop.run / name, shop.config
    if is_trained(folder):
        return
    counts: Counter[str] = Counter()
    items, held_out = (
        encode_lessons(
            shop.tokenizer, lessons(part), window=shop.model.config.max_positions, max_tokens=config.max_tokens,
            counts=counts,
        )
        for part in (shop.turns.train, shop.turns.held_out)
    )  # fmt: skip
    write_json(folder / "sft.json", dict(sorted(counts.items())))
    train_sft(config, shop.model, items, held_out if len(held_out) else None, folder, name)


def _prefer(
    shop: Workshop, name: str, salt: int, mine: Callable[[Workshop, list[Labelled], Path, Counter[str]], list[Pair]]
) -> None:
    """A DPO stage on pairs mined from the SFT stage of the same model."""
    start, folder = shop.run / f"{name}-sft", shop.run / f"{name}-dpo"
    if is_trained(folder):
        return
    restore(shop.model, start)
    if not (folder / "filter.json").is_file():
        counts: Counter[str] = Counter()
        pairs = mine(shop, [*shop.turns.train, *shop.turns.held_out], folder, counts)
        write_jsonl(folder / "pairs.jsonl", [pair.as_record() for pair in pairs])
        write_json(folder / "filter.json", dict(sorted(counts.items())))
    pairs = read_pairs(folder / "pairs.jsonl")
    held_out = shop.turns.held_out_dialogues
    train_dpo(shop.config, shop.model, shop.tokenizer, pairs, held_out, folder, f"{name}-dpo", salt=salt)


def _mine_plans(shop: Workshop, turns: list[Labelled], folder: Path, counts: Counter[str]) -> list[Pair]:
    """Predictions are drawn, as published. Were they the likeliest ones, what a model holds likely would be rejected
    wherever the human chose otherwise, be it rarely: the pairs would teach that the likeliest is wrong."""
    prompts = [planner_prompt(turn.context) for turn in turns]
    settings, label = shop.config.plans(3), "planner-dpo: the SFT planner's own plans"
    if settings.planning == "likeliest":
        settings = replace(settings, planning="drawn")
    plans = plan(shop.model, shop.tokenizer, prompts, folder / "plans.jsonl", settings, label=label)
    return planner_pairs(turns, plans, counts)


def _mine_replies(shop: Workshop, turns: list[Labelled], folder: Path, counts: Counter[str]) -> list[Pair]:
    prompts = [generator_prompt(turn.context, turn.strategy) for turn in turns]
    return generator_pairs(turns, _replies(shop, prompts, folder / "replies.jsonl", 4), shop.find_errors, counts)


def _replies(shop: Workshop, prompts: Sequence[list[Message]], path: Path, salt: int) -> list[Reply]:
    config = shop.config
    return sample_replies(
        shop.model, shop.tokenizer, prompts, path, sampling=config.sampling(salt),
        max_new_tokens=config.max_new_tokens, slots=config.slots, label=f"replies, {path.parent.name}/{path.stem}",
    )  # fmt: skip


def _evaluate_plans(shop: Workshop) -> dict[str, Scores]:
    """Strategies: always the commonest one; the joint baseline's, as it writes them and scored; the planners'."""
    folder, turns = shop.run / "eval", shop.turns.test
    write_examples(folder, [turn.example for turn in turns])
    commonest = Counter(turn.strategy for turn in shop.turns.train).most_common(1)[0][0]
    plans: dict[str, Sequence[Plan | None]] = {"majority": [Plan(commonest)] * len(turns)}
    prompts = [joint_prompt(turn.context) for turn in turns]
    restore(shop.model, shop.run / "joint-sft")
    written = _replies(shop, prompts, folder / "joint-sft" / "written.jsonl", 5)
    plans["joint-sft written"] = [None if reply.text is None else read_joint(reply.text)[0] for reply in written]
    plans |= _scored(shop, "joint-sft", prompts)
    for name in ("planner-sft", "planner-dpo"):
        plans |= _scored(shop, name, [planner_prompt(turn.context) for turn in turns])
    return {
        name: score_plans_of(turns, found, folder / f"{name.replace(' ', '-')}.strategies.json")
        for name, found in plans.items()
    }


def _scored(shop: Workshop, name: str, prompts: Sequence[list[Message]]) -> dict[str, list[Plan | None]]:
    """A model's plans in every way: likeliest and drawn, after one scoring; a planner's also written, if asked for."""
    restore(shop.model, shop.run / name)
    joint, settings = name.startswith("joint"), shop.config.plans(PLAN_SALT)
    plans = {}
    for planning in PLANNING:
        if planning != "written" or (shop.config.planning == planning and not joint):
            own, path = replace(settings, planning=planning), _plan_file(shop.run, name, planning)
            plans[f"{name} {planning}"] = plan(
                shop.model, shop.tokenizer, prompts, path, own, joint=joint, label=f"plans of {name}"
            )
    return plans


def _plan_file(run: Path, name: str, planning: str) -> Path:
    return run / "eval" / f"{name}.{'written' if planning == 'written' else 'plans'}.jsonl"


def _evaluate_replies(shop: Workshop) -> dict[str, Scores]:
    """Replies: of the joint baseline, and of planner and generator together, after SFT and after DPO."""
    folder, turns, config = shop.run / "eval", shop.turns.test, shop.config
    records = read_jsonl(folder / "joint-sft" / "written.jsonl")
    read = [(Plan(""), None) if record["text"] is None else read_joint(record["text"]) for record in records]
    replies = [record | {"text": text} for record, (_, text) in zip(records, read)]
    write_jsonl(folder / "joint-sft.replies.jsonl", replies)
    systems = {"joint-sft": [(found.known, text) for found, text in read]}
    for stage in ("sft", "dpo"):
        answers = respond(
            shop.model, shop.tokenizer, [turn.context for turn in turns],
            _plan_file(shop.run, f"planner-{stage}", config.planning), folder / f"decoupled-{stage}.replies.jsonl",
            config.plans(PLAN_SALT),
            planner=shop.run / f"planner-{stage}", generator=shop.run / f"generator-{stage}",
            sampling=config.sampling(5), max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        systems[f"decoupled-{stage}"] = [((found or Plan("")).known, reply.text) for found, reply in answers]
    return {
        name: score_replies_of(turns, answers, folder / f"{name}.support.json", shop.find_errors, shop.judge)
        for name, answers in systems.items()
    }
