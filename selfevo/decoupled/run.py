"""A run of Decoupled ESC: planner and generator by SFT then DPO on mined pairs, the joint baseline by SFT, all scored.

A stage's result gets its final name only when it is complete; a killed run that is resumed repeats the same steps. The
reference of each DPO stage is exactly the SFT adapter before it, frozen under a fresh one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from selfevo.datasets.corpus import CorpusError, DataLog, split_human
from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.decoupled.evaluate import Scores, score_plans_of, score_replies_of
from selfevo.decoupled.mining import ErrorFinder, generator_pairs, planner_pairs
from selfevo.decoupled.planner import (
    PLANNING,
    Labelled,
    Plan,
    PlanSettings,
    generator_prompt,
    joint_prompt,
    joint_reply,
    labelled_turns,
    plan,
    planner_prompt,
    read_joint,
    respond,
)
from selfevo.dialogue import Message
from selfevo.evaluation.ask_json import Responder
from selfevo.evaluation.endpoint import Address, EndpointSettings, read_parameters
from selfevo.evaluation.folder import DECOUPLED_STAGES, diverged_stages, write_examples
from selfevo.evaluation.tables import mean_table
from selfevo.evolve.loop import warn_of
from selfevo.evolve.reflection import FREE, GUIDED, WAYS
from selfevo.evolve.run import RunConfig, load_backbone
from selfevo.evolve.run_folder import check_run, is_finished, open_run
from selfevo.files import read_jsonl, write_json, write_jsonl, write_text
from selfevo.generate.replies import Reply, ReplySettings, sample_replies
from selfevo.generate.sampling import Sampling
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.examples import encode_sft_examples
from selfevo.training.settings import PreferenceSettings
from selfevo.training.stages import is_trained, restore, train_dpo, train_sft

RESULTS = ("eval/strategies.md", "eval/replies.md", "eval/scores.json")


@dataclass(frozen=True, kw_only=True)
class DecoupledConfig(RunConfig):
    """All settings of a run, each a flag of ``examples/decoupled.py``; decoding as in Zhang et al. (2025)."""

    preference: PreferenceSettings = PreferenceSettings(gamma=0.0)
    replies: ReplySettings = ReplySettings(Sampling(temperature=0.7, top_p=0.95, top_k=0, repetition_penalty=1.0))
    planning: Annotated[
        str,
        "the strategy to follow: the likeliest of the eight, one drawn from their probabilities, or a name written "
        "token by token",
        PLANNING,
    ] = PlanSettings.planning
    judge: Annotated[str, "model that looks for errors and judges replies: an endpoint's, or a local backbone"] = ""
    judge_url: Annotated[str, "OpenAI-compatible endpoint of the judge; without it the judge is a local backbone"] = ""
    judge_parameters: Annotated[
        tuple[str, ...],
        "send the endpoint this parameter too, or in place of ours (temperature, top_p, top_k, max_tokens); NAME=omit "
        "leaves one out that a model refuses; may be given several times",
    ] = ()
    judge_answers: Annotated[
        str,
        "how a local judge's answers come to be JSON: free, as it writes it, where what is none is requested again, or "
        "guided, the decoder writing keys and punctuation",
        WAYS,
    ] = FREE

    def __post_init__(self) -> None:
        self.plans("test")  # raises ValueError for an unknown planning
        if self.judge_url and not self.judge:
            raise ValueError("judge_url needs judge: the name of the endpoint's model")
        if self.judge_parameters and not self.judge_url:
            raise ValueError("parameters of the judge are for an endpoint: give its URL, or leave them out")
        if self.judge_answers not in WAYS or (self.judge_answers == GUIDED and (self.judge_url or not self.judge)):
            raise ValueError("judge_answers is free, or guided for a local judge: one without a URL")
        if self.judge_url:
            EndpointSettings(self.judge_url, self.judge, parameters=read_parameters(self.judge_parameters))
            if Address.of(self.judge_url).url != self.judge_url:
                raise ValueError("judge_url is kept in config.json: it may have no login and no query in it")
        super().__post_init__()

    @property
    def results(self) -> tuple[str, ...]:
        return (*(f"{name}/adapter_config.json" for name in DECOUPLED_STAGES), *RESULTS)

    def plans(self, stage: str) -> PlanSettings:
        """How strategies are predicted; their seed is derived from ``stage``, which is "test" for the test turns."""
        replies = self.replies.seeded(self.seed, "plans", stage)
        return PlanSettings(self.planning, replies.sampling, replies.slots, self.training.max_tokens)


@dataclass(frozen=True)
class Turns:
    """The labelled turns of a run. The ``held_out`` ones are for early stopping, of SFT and of DPO."""

    train: list[Labelled]
    held_out: list[Labelled]
    test: list[Labelled]


@dataclass
class RunContext:
    """What the stages of a run share: one backbone, whose adapters are exchanged, data and settings."""

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

    ``find_errors`` filters the mined replies; ``judge``, if given, scores the test replies in four aspects. In the
    folder, ``planner-sft``, ``planner-dpo``, ``generator-sft``, ``generator-dpo`` and ``joint-sft`` have the adapters
    (those of DPO also pairs.jsonl and filter.json), ``eval`` has replies, plans and tables. Raises ValueError for a
    folder of another run and for data without ESConv's strategies.
    """
    config = check_run(config, resume=resume)
    if is_finished(config):
        return Path(config.out)
    log = DataLog()
    turns = read_turns(config, log)
    model, tokenizer = load_backbone(config.backbone)
    with open_run(config) as run:
        sizes = {name: len(part) for name, part in vars(turns).items()}
        write_json(run / "data.json", {"turns": sizes, "statistics": log.statistics, "rules": log.counts})
        _run_stages(RunContext(config, model, tokenizer, turns, run, find_errors, judge))
    return run


def _run_stages(context: RunContext) -> None:
    """Everything that is not there yet: SFT stages, DPO stages on mined pairs, and the tables."""
    folder = context.run / "eval"
    _train_sft(context, "planner-sft", lambda turn: (planner_prompt(turn.context), turn.strategy))
    _train_sft(context, "generator-sft", lambda turn: (generator_prompt(turn.context, turn.strategy), turn.reply))
    _train_sft(context, "joint-sft", lambda turn: (joint_prompt(turn.context), joint_reply(turn.strategy, turn.reply)))
    _train_dpo(context, "planner", _mine_plans)
    strategies = _evaluate_plans(context)
    _write_table(folder / "strategies.md", strategies)
    _train_dpo(context, "generator", _mine_replies)
    replies = _evaluate_replies(context)
    _write_table(folder / "replies.md", replies)
    write_json(folder / "scores.json", {"strategies": strategies, "replies": replies})


def _write_table(path: Path, rows: dict[str, Scores]) -> None:
    write_text(path, mean_table({name: [scores] for name, scores in rows.items()}) + "\n")


def read_turns(config: DecoupledConfig, log: DataLog) -> Turns:
    """The labelled turns of the run's dialogues, split by dialogue. Raises CorpusError if a part has none."""
    labelled: list[list[Labelled]] = []
    for name, dialogues in zip(("train", "held_out", "test"), split_human(config.data, config.seed, log)):
        counter: Counter[str] = Counter()
        labelled.append(labelled_turns(dialogues, counter))
        log.counts[f"{name}, turns"] = dict(sorted(counter.items()))
    for what, found, path in (("train", labelled[0], config.data.esconv), ("test", labelled[2], config.data.test)):
        if not found:
            raise CorpusError(
                f"{path or config.data.esconv}: no supporter turn to {what} on has one of ESConv's eight strategies "
                "(annotation.strategy, or [Strategy] before the text)"
            )
    return Turns(*labelled)


def _train_sft(context: RunContext, name: str, example: Callable[[Labelled], tuple[list[Message], str]]) -> None:
    """An SFT stage; ``example`` gives the prompt and the answer of a turn."""
    stage, window = context.config.stage(name, name, sft=True), context.model.config.max_positions
    if is_trained(stage.folder):
        return
    counts: Counter[str] = Counter()
    parts = [
        [(turn.example.dialogue, *example(turn)) for turn in part]
        for part in (context.turns.train, context.turns.held_out)
    ]
    items, held_out = (encode_sft_examples(context.tokenizer, part, window=window, counts=counts) for part in parts)
    write_json(stage.folder / "sft.json", dict(sorted(counts.items())))
    train_sft(context.model, stage, items, held_out if len(held_out) else None)
    warn_of(name, diverged_stages(context.run))


def _train_dpo(
    context: RunContext, name: str, mine: Callable[[RunContext, list[Labelled], Path, Counter[str]], list[Pair]]
) -> None:
    """A DPO stage on pairs mined from the SFT stage of the same model."""
    stage = context.config.stage(f"{name}-dpo", f"{name}-dpo", sft=False)
    folder, turns = stage.folder, context.turns
    if is_trained(folder):
        return
    restore(context.model, context.run / f"{name}-sft")
    if not (folder / "filter.json").is_file():
        counts: Counter[str] = Counter()
        mined = mine(context, [*turns.train, *turns.held_out], folder, counts)
        write_jsonl(folder / "pairs.jsonl", [pair.as_record() for pair in mined])
        write_json(folder / "filter.json", dict(sorted(counts.items())))
    pairs, held_out = read_pairs(folder / "pairs.jsonl"), {turn.example.dialogue for turn in turns.held_out}
    train_dpo(context.model, context.tokenizer, stage, pairs, held_out, context.config.preference)
    warn_of(folder.name, diverged_stages(context.run))


def _mine_plans(context: RunContext, turns: list[Labelled], folder: Path, counts: Counter[str]) -> list[Pair]:
    """Pairs from drawn plans, as published. The likeliest plans would not do: where the human chose otherwise, the
    likeliest strategy would always be the rejected one, also where it is the human choice in most such turns."""
    prompts = [planner_prompt(turn.context) for turn in turns]
    settings = context.config.plans("planner-dpo")
    if settings.planning == "likeliest":
        settings = replace(settings, planning="drawn")
    plans = plan(context.model, context.tokenizer, prompts, folder / "plans.jsonl", settings)
    return planner_pairs(turns, plans, counts)


def _mine_replies(context: RunContext, turns: list[Labelled], folder: Path, counts: Counter[str]) -> list[Pair]:
    prompts = [generator_prompt(turn.context, turn.strategy) for turn in turns]
    replies = _replies(context, prompts, folder / "replies.jsonl", "generator-dpo")
    return generator_pairs(turns, replies, context.find_errors, counts)


def _replies(context: RunContext, prompts: Sequence[list[Message]], path: Path, stage: str) -> list[Reply]:
    settings = context.config.replies.seeded(context.config.seed, "replies", stage)
    label = f"replies, {path.parent.name}/{path.stem}"
    return sample_replies(context.model, context.tokenizer, prompts, path, **vars(settings), label=label)


def _evaluate_plans(context: RunContext) -> dict[str, Scores]:
    """Scores of strategies: the most frequent one for every turn, the joint baseline's, the planners'."""
    folder, turns = context.run / "eval", context.turns.test
    write_examples(folder, [turn.example for turn in turns])
    majority = Counter(turn.strategy for turn in context.turns.train).most_common(1)[0][0]
    plans: dict[str, Sequence[Plan | None]] = {"majority": [Plan(majority)] * len(turns)}
    prompts = [joint_prompt(turn.context) for turn in turns]
    restore(context.model, context.run / "joint-sft")
    written = _replies(context, prompts, folder / "joint-sft" / "written.jsonl", "test")
    plans["joint-sft written"] = [None if reply.text is None else read_joint(reply.text)[0] for reply in written]
    plans |= _plans(context, "joint-sft", prompts)
    for name in ("planner-sft", "planner-dpo"):
        plans |= _plans(context, name, [planner_prompt(turn.context) for turn in turns])
    return {
        name: score_plans_of(turns, found, folder / f"{name.replace(' ', '-')}.strategies.json")
        for name, found in plans.items()
    }


def _plans(context: RunContext, name: str, prompts: Sequence[list[Message]]) -> dict[str, list[Plan | None]]:
    """A model's likeliest and drawn plans; with ``planning="written"`` also those that a planner writes."""
    restore(context.model, context.run / name)
    joint, settings = name.startswith("joint"), context.config.plans("test")
    found = {}
    for planning in PLANNING:
        if planning != "written" or (settings.planning == "written" and not joint):
            path, own = _plan_file(context.run, name, planning), replace(settings, planning=planning)
            found[f"{name} {planning}"] = plan(context.model, context.tokenizer, prompts, path, own, joint=joint)
    return found


def _plan_file(run: Path, name: str, planning: str) -> Path:
    return run / "eval" / f"{name}.{'written' if planning == 'written' else 'plans'}.jsonl"


def _evaluate_replies(context: RunContext) -> dict[str, Scores]:
    """Scores of replies: of the joint baseline, and of planner and generator together, after SFT and after DPO."""
    run, turns, config = context.run, context.turns.test, context.config
    records = read_jsonl(run / "eval" / "joint-sft" / "written.jsonl")
    read = [(Plan(""), None) if record["text"] is None else read_joint(record["text"]) for record in records]
    replies = [record | {"text": text} for record, (_, text) in zip(records, read)]
    write_jsonl(run / "eval" / "joint-sft.replies.jsonl", replies)
    systems = {"joint-sft": [(found.known, text) for found, text in read]}
    for stage in ("sft", "dpo"):
        answers = respond(
            context.model, context.tokenizer, [turn.context for turn in turns],
            _plan_file(run, f"planner-{stage}", config.planning), run / "eval" / f"decoupled-{stage}.replies.jsonl",
            config.plans("test"), planner=run / f"planner-{stage}", generator=run / f"generator-{stage}",
            replies=config.replies.seeded(config.seed, "replies", "test"),
        )  # fmt: skip
        systems[f"decoupled-{stage}"] = [((found or Plan("")).known, reply.text) for found, reply in answers]
    return {
        name: score_replies_of(turns, found, run / "eval" / f"{name}.support.json", context.find_errors, context.judge)
        for name, found in systems.items()
    }
