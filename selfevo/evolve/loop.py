"""The loop: M0 by SFT with replay, then M(t+1) from M(t)'s own reflections, each scored on the test dialogues."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from selfevo.datasets.corpus import Corpus, load_corpus
from selfevo.datasets.prompts import REPLY_STYLES
from selfevo.dialogue import Dialogue, Instruction
from selfevo.evaluation.tables import comparison_table
from selfevo.evolve.controls import CONTROLS, controlled
from selfevo.evolve.evaluate import evaluate_model
from selfevo.evolve.refine import SOURCES, RefineSettings, make_pairs
from selfevo.evolve.run import RunConfig, check_run, load_backbone, open_run, option
from selfevo.files import write_json, write_text
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.examples import sft_objective
from selfevo.training.objectives import SFTObjective
from selfevo.training.stages import is_trained, restore, train_dpo, train_sft


@dataclass(frozen=True)
class EvolveConfig(RunConfig):
    """All settings of a run; the paper's values are the defaults. Each field is a flag of ``examples/iterate.py``."""

    synthetic: tuple[str, ...] = option((), "seed dialogues for phase 2 (ExTES, ServeForEmo, ...); without any, ESConv")
    replay: str = option("", "general instructions to replay in phase 1 (Alpaca)")
    iterations: int = option(2, "self-evolution iterations")
    style: str = option("strategies", "system prompt of replies", choices=REPLY_STYLES)
    chosen: str = option(
        "refined", "where chosen replies come from: the model's refinement, or the seed dialogues", choices=SOURCES
    )
    control: str = option(
        "none",
        "an experiment that should fail: chosen and rejected swapped, replies shuffled between users, or no DPO term",
        choices=CONTROLS,
    )
    replay_count: int = option(500, "instructions to replay")
    reflection_tokens: int = option(384, "longest reflection, in tokens")
    tries: int = option(3, "tries for a usable reflection before the golden reply is used")

    def __post_init__(self) -> None:
        for name in ("iterations", "reflection_tokens", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.replay_count < 0:
            raise ValueError(f"replay_count must not be negative: {self.replay_count}")
        for name, known in (("style", REPLY_STYLES), ("chosen", SOURCES), ("control", CONTROLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, not {getattr(self, name)!r}")
        super().__post_init__()

    @property
    def data_files(self) -> tuple[str, ...]:
        return tuple(name for name in (self.esconv, *self.synthetic, self.replay, self.test) if name)

    def replies(self, salt: int) -> RefineSettings:
        """How replies and reflections are drawn; ``salt`` separates the stages' randomness."""
        return RefineSettings(
            self.sampling(salt), self.max_new_tokens, self.reflection_tokens, self.tries, self.style, self.chosen,
            self.slots,
        )  # fmt: skip


def evolve(config: EvolveConfig, *, resume: bool = False) -> Path:
    """Runs, or with ``resume`` continues, the whole loop; returns the run folder (its layout is in the README)."""
    check_run(config, resume=resume)
    corpus = read_corpus(config)
    model, tokenizer = load_backbone(config)
    run = open_run(config)
    write_json(run / "data.json", corpus.report())
    _acquire(config, model, tokenizer, corpus, run / "M0")
    scores = {"M0": _evaluate(config, model, tokenizer, corpus, run, "M0")}
    for iteration in range(1, config.iterations + 1):
        _improve(config, model, tokenizer, corpus, run, iteration)
        name = f"M{iteration}"
        scores[name] = _evaluate(config, model, tokenizer, corpus, run, name)
    table = comparison_table(scores)
    write_text(run / "eval" / "table.md", table + "\n")
    write_json(run / "eval" / "scores.json", scores)
    return run


def read_corpus(config: EvolveConfig) -> Corpus:
    """The dialogues of a run, read, cleaned and split."""
    return load_corpus(
        esconv=config.esconv, synthetic=config.synthetic, replay=config.replay, test=config.test,
        iterations=config.iterations, limit=config.limit, replay_count=config.replay_count, seed=config.seed,
    )  # fmt: skip


def _acquire(config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, folder: Path) -> None:
    """Phase 1: experience acquisition, SFT with replay."""
    if is_trained(folder):
        return
    counts: Counter[str] = Counter()

    def objective(dialogues: list[Dialogue], replay: list[Instruction]) -> SFTObjective:
        window = model.config.max_positions
        return sft_objective(
            tokenizer, dialogues, replay, style=config.style, window=window, max_tokens=config.max_tokens, counts=counts
        )

    items = objective(corpus.train, corpus.replay)
    held_out = objective(corpus.held_out, []) if corpus.held_out else None
    write_json(folder / "sft.json", dict(sorted(counts.items())))
    train_sft(config, model, items, held_out, folder, "M0: learning from human dialogues")


def _improve(
    config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, run: Path, iteration: int
) -> None:
    """Phase 2, one iteration: pairs from the model's own reflections, then DPO + gamma * SFT against itself."""
    start, folder = run / f"M{iteration - 1}", run / f"M{iteration}"
    if is_trained(folder):
        return
    restore(model, start)
    part = corpus.seeds[iteration - 1]
    pairs = make_pairs(model, tokenizer, part.examples, folder, config.replies(iteration))
    train_dpo(
        config, model, tokenizer, controlled(pairs, config.control), part.held_out, folder,
        f"M{iteration}: preferring refined replies", salt=iteration, preferring=config.control != "sft-only",
    )  # fmt: skip


def _evaluate(
    config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, run: Path, name: str
) -> dict[str, float]:
    folder = run / "eval"
    if not (folder / f"{name}.json").is_file():
        restore(model, run / name)
    return evaluate_model(model, tokenizer, corpus.test, folder, name, config.replies(0))
