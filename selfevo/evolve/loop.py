"""The loop: M0 by SFT with replay, then M(t+1) from M(t)'s own reflections, all scored on the test dialogues."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tqdm import tqdm

from selfevo.datasets.corpus import Corpus, DataSettings, load_corpus
from selfevo.datasets.pairs import Pair
from selfevo.datasets.prompts import SELF_REFLECTION
from selfevo.dialogue import Dialogue, Instruction
from selfevo.evaluation.folder import VANILLA, diverged_stages, failed_reflections, used_reflections
from selfevo.evaluation.score import missing_scores
from selfevo.evaluation.tables import comparison_table
from selfevo.evolve.controls import CONTROLS, controlled
from selfevo.evolve.evaluate import evaluate_model, origin_of
from selfevo.evolve.refine import RefineSettings, check_form, make_pairs
from selfevo.evolve.run import RunConfig, RunError, load_backbone
from selfevo.evolve.run_folder import check_run, is_finished, open_run, other_versions
from selfevo.files import write_json, write_text
from selfevo.lora import remove_adapters
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.examples import sft_objective
from selfevo.training.objectives import SFTObjective
from selfevo.training.stages import is_trained, restore, train_dpo, train_sft

STARTS = ("M0", VANILLA)


@dataclass(frozen=True, kw_only=True)
class EvolveConfig(RunConfig):
    """All settings of a run; the paper's values are the defaults. Each leaf is a flag of ``examples/iterate.py``."""

    data: DataSettings
    replies: RefineSettings = RefineSettings()
    iterations: Annotated[int, "self-evolution iterations; 0 ends with M0, and a run can be continued with more"] = 2
    seed_parts: Annotated[
        int, "parts that the seed dialogues are dealt into, which iterations take in turn; 0: one for each iteration"
    ] = 0
    start: Annotated[str, "what the first iteration starts from: M0, or the vanilla backbone (Table 5)", STARTS] = "M0"
    control: Annotated[
        str,
        "an experiment that should fail: chosen and rejected swapped, replies shuffled between users, or no DPO term",
        CONTROLS,
    ] = "none"
    grows: ClassVar[tuple[str, ...]] = ("iterations", "seed_parts")

    def __post_init__(self) -> None:
        if self.seed_parts < 0:
            raise ValueError(f"seed_parts must not be negative: {self.seed_parts}")
        least = int(self.start == VANILLA)
        if self.iterations < least:
            raise ValueError(f"iterations must be at least {least}, not {self.iterations}")
        for name, known in (("control", CONTROLS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.replies.style == SELF_REFLECTION:
            raise ValueError("style self-reflection asks for JSON; it is for evaluation, not for training")
        super().__post_init__()

    @property
    def models(self) -> tuple[str, ...]:
        """M0, M1, ..: the stages of the run and the names of its trained models."""
        return tuple(f"M{iteration}" for iteration in range(int(self.start == VANILLA), self.iterations + 1))

    @property
    def results(self) -> tuple[str, ...]:
        trained = [f"{name}/adapter_config.json" for name in self.models]
        return (*trained, *(f"eval/{name}.json" for name in self.models), "eval/scores.json", "eval/table.md")

    def continued(self, stored: Mapping[str, Any]) -> EvolveConfig:
        """With more iterations the seed dialogues stay dealt as they were: further iterations take the same parts."""
        begun = int(stored.get("iterations", self.iterations))
        parts = int(stored.get("seed_parts", 0)) or begun
        for name, was, now in (("iterations", begun, self.iterations), ("seed_parts", parts, self.seed_parts)):
            if now < was if name == "iterations" else now not in (0, was):
                raise RunError(
                    f"{self.out}: holds a run with other settings ({name} was {was}, now {now}); only iterations can "
                    "grow; choose another --out"
                )
        return self if parts in (0, self.iterations) else replace(self, seed_parts=parts)

    @property
    def test_replies(self) -> RefineSettings:
        """How the test turns are answered: with the same draws for every model."""
        return self.replies.seeded(self.seed, "replies", "test")


@dataclass
class RunContext:
    """What the stages of a run share: one backbone, on which adapters come and go."""

    config: EvolveConfig
    model: Transformer
    tokenizer: ChatTokenizer
    corpus: Corpus
    run: Path


def evolve(config: EvolveConfig, *, resume: bool = False) -> Path:
    """Runs, or with ``resume`` continues, the whole loop; returns the run folder (its layout is in the README)."""
    config = check_run(config, resume=resume)
    if is_finished(config):
        return Path(config.out)
    corpus = read_corpus(config)
    model, tokenizer = load_backbone(config.backbone)
    check_form(model, tokenizer, config.replies)
    with open_run(config) as run:
        write_json(run / "data.json", corpus.report())
        context = RunContext(config, model, tokenizer, corpus, run)
        scores = {VANILLA: _evaluate(context, VANILLA)}
        for before, name in pairwise((VANILLA, *config.models)):
            if name == "M0":
                _acquire(context, name)
            else:
                _improve(context, before, name)
            scores[name] = _evaluate(context, name)
        sentences = missing_scores(run / "eval", list(scores)) + failed_reflections(run) + diverged_stages(run)
        notices = "".join(f"\n{sentence}\n" for sentence in sentences + other_versions(run))
        write_text(run / "eval" / "table.md", comparison_table(scores) + "\n" + notices)
        write_json(run / "eval" / "scores.json", scores)
    return run


def read_corpus(config: EvolveConfig) -> Corpus:
    """The dialogues of a run, read, cleaned and split."""
    return load_corpus(config.data, iterations=config.seed_parts or config.iterations, seed=config.seed)


def _acquire(context: RunContext, name: str) -> None:
    """Phase 1: experience acquisition, SFT with replay."""
    stage = context.config.stage(name, f"{name}: learning from human dialogues", sft=True)
    if is_trained(stage.folder):
        return
    counts: Counter[str] = Counter()

    def objective(dialogues: list[Dialogue], replay: list[Instruction]) -> SFTObjective:
        window, system = context.model.config.max_positions, context.config.replies.prompts.system
        return sft_objective(context.tokenizer, dialogues, replay, system=system, window=window, counts=counts)

    corpus = context.corpus
    items = objective(corpus.train, corpus.replay)
    held_out = objective(corpus.held_out, []) if corpus.held_out else None
    write_json(stage.folder / "sft.json", dict(sorted(counts.items())))
    train_sft(context.model, stage, items, held_out)
    warn_of(name, diverged_stages(context.run))


def _improve(context: RunContext, before: str, name: str) -> None:
    """Phase 2, one iteration: pairs from the reflections of the model before, then DPO + gamma * SFT against it."""
    config, model = context.config, context.model
    stage = config.stage(name, f"{name}: preferring refined replies", sft=False)
    if is_trained(stage.folder):
        return
    _put_on(context, before)
    part = context.corpus.seeds[(int(name[1:]) - 1) % len(context.corpus.seeds)]
    settings = config.replies.seeded(config.seed, "replies", name)
    pairs = make_pairs(model, context.tokenizer, part.examples, stage.folder, settings)
    if config.replies.chosen == "refined":
        _tell_reflections(context.run, name, pairs)
    preference = None if config.control == "sft-only" else config.preference
    train_dpo(model, context.tokenizer, stage, controlled(pairs, config.control), part.held_out, preference)
    warn_of(name, diverged_stages(context.run))


def _tell_reflections(run: Path, name: str, pairs: list[Pair]) -> None:
    """Says on the screen how many reflections could be used; warns where most could not."""
    usable, total = used_reflections(run / name)
    golden = sum(pair.source == "golden" for pair in pairs)
    tqdm.write(
        f"{name}: {usable} of {total} reflections usable; the chosen reply is the golden one in {golden} of "
        f"{len(pairs)} pairs",
        file=sys.stderr,
    )
    warn_of(name, failed_reflections(run))


def warn_of(stage: str, sentences: Iterable[str]) -> None:
    """Shows those of the sentences that are about a stage."""
    for sentence in sentences:
        if sentence.startswith(f"{stage}:"):
            tqdm.write(f"warning: {sentence}", file=sys.stderr)


def _put_on(context: RunContext, name: str) -> None:
    """Makes the backbone one of the run's models."""
    if name == VANILLA:
        remove_adapters(context.model)
    else:
        restore(context.model, context.run / name)


def _evaluate(context: RunContext, name: str) -> dict[str, float]:
    folder = context.run / "eval"
    if not (folder / f"{name}.json").is_file():
        _put_on(context, name)
    config, adapter = context.config, None if name == VANILLA else context.run / name
    origin = origin_of(config.backbone, adapter, config.backbone.known_as + ("" if adapter is None else f"@{name}"))
    return evaluate_model(
        context.model, context.tokenizer, context.corpus.test, folder, name, config.test_replies, origin=origin
    )
