"""The dialogues of a run: which are trained on, held out, used as seeds and tested on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from selfevo.datasets.readers import load_alpaca, load_dialogues
from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Dialogue, Example, Instruction, clean_dialogue, reply_examples, split_dialogues

Counts = dict[str, dict[str, int]]  # what each rule changed, for each file


class CorpusError(ValueError):
    """Files that leave a stage without data; the message names them."""


@dataclass(frozen=True)
class HumanData:
    """Human dialogues to train on and to test on."""

    esconv: Annotated[str, "human dialogues to train on (ESConv.json); split 9:1 by dialogue"]
    test: Annotated[str, "test dialogues; without any, the tenth of ESConv that is held out"] = ""
    limit: Annotated[int, "at most this many records of every file, for a quick try; 0 takes all"] = 0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit must not be negative: {self.limit}")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return tuple(name for name in (self.esconv, self.test) if name)


@dataclass(frozen=True)
class DataSettings(HumanData):
    """All data of the loop: human dialogues, seed dialogues for phase 2, and instructions to replay."""

    synthetic: Annotated[
        tuple[str, ...], "seed dialogues for phase 2 (ExTES, ServeForEmo, ...); without any, ESConv"
    ] = ()
    replay: Annotated[str, "general instructions to replay in phase 1 (Alpaca)"] = ""
    replay_count: Annotated[int, "instructions to replay"] = 500

    def __post_init__(self) -> None:
        if self.replay_count < 0:
            raise ValueError(f"replay_count must not be negative: {self.replay_count}")
        super().__post_init__()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for name in (self.esconv, *self.synthetic, self.replay, self.test) if name)


@dataclass(frozen=True)
class SeedPart:
    """The seed turns of one iteration; pairs of the ``held_out`` dialogues (ids) are for early stopping."""

    examples: list[Example]
    held_out: frozenset[str]


@dataclass(frozen=True)
class Corpus:
    train: list[Dialogue]
    held_out: list[Dialogue]
    replay: list[Instruction]
    seeds: list[SeedPart]
    test: list[Example]
    counts: Counts

    def report(self) -> dict[str, object]:
        """Sizes and rule counts, as ``data.json`` of the run folder has them."""
        sizes = {
            "train_dialogues": len(self.train),
            "held_out_dialogues": len(self.held_out),
            "replay_instructions": len(self.replay),
            "seed_examples": [len(part.examples) for part in self.seeds],
            "test_examples": len(self.test),
        }
        return {"sizes": sizes, "rules": self.counts}


def load_corpus(data: DataSettings, *, iterations: int, seed: int) -> Corpus:
    """Reads and cleans all files and splits them by dialogue; the splits depend on ``seed``.

    ESConv is split 9:1. The tenth is the test set or, if ``data.test`` names a file, the held-out set of SFT; without
    such a file a tenth of the training dialogues is held out. Seeds, from ``data.synthetic`` or else from the training
    dialogues, are split into one part per iteration. Raises ``CorpusError`` if nothing is left to train on, to test on
    or as the seeds of an iteration.
    """
    counts: Counts = {}
    train, held_out, tested = split_human(data, seed, counts)
    if not train:
        raise CorpusError(f"{data.esconv}: no dialogue is left to train on")
    sources = [dialogue for path in data.synthetic for dialogue in _dialogues(path, data.limit, counts)] or train
    test_file = data.test or data.esconv
    test = _examples(tested, _counter(counts, test_file, "targets"))
    replay = _replay(data, seed, counts)
    seeds = []
    parts = split_dialogues(sources, (1 / iterations,) * iterations, seed=derive_seed(seed, "split", "seeds"))
    for number, part in enumerate(parts, 1):
        examples = _examples(part, _counter(counts, "seeds", f"targets_{number}"))
        if not examples:
            source = ", ".join(data.synthetic) or data.esconv
            raise CorpusError(
                f"{source}: no supporter turn is left as a seed of iteration {number} (too few dialogues?)"
            )
        split_seed = derive_seed(seed, "split", "seeds", number, "held-out")
        _, tenth = split_dialogues(part, (0.9, 0.1), seed=split_seed)
        seeds.append(SeedPart(examples, frozenset(dialogue.id for dialogue in tenth)))
    if not test:
        raise CorpusError(f"{test_file}: no supporter turn is left to test on (too few or too short dialogues)")
    return Corpus(train, held_out, replay, seeds, test, counts)


def split_human(data: HumanData, seed: int, counts: Counts) -> tuple[list[Dialogue], list[Dialogue], list[Dialogue]]:
    """Cleaned dialogues to train on, to hold out and to test on, split as ``load_corpus`` says."""
    human = _dialogues(data.esconv, data.limit, counts)
    train, held_out = split_dialogues(human, (0.9, 0.1), seed=derive_seed(seed, "split", "test"))
    if data.test:
        return train, held_out, _dialogues(data.test, data.limit, counts)
    train, early = split_dialogues(train, (0.9, 0.1), seed=derive_seed(seed, "split", "held-out"))
    return train, early, held_out


def load_test(path: str, limit: int = 0) -> list[Example]:
    """The test turns of a file, cleaned as in a run; at most ``limit`` dialogues are read (0: all)."""
    return _examples(_dialogues(path, limit, {}), Counter())


def _examples(dialogues: list[Dialogue], counts: Counter[str]) -> list[Example]:
    return [example for dialogue in dialogues for example in reply_examples(dialogue, counts)]


def _counter(counts: Counts, path: str, what: str) -> Counter[str]:
    counter: Counter[str] = Counter()
    counts[f"{path}, {what}"] = counter
    return counter


def _dialogues(path: str, limit: int, counts: Counts) -> list[Dialogue]:
    counter = _counter(counts, path, "dialogues")
    dialogues = load_dialogues(path, counter)
    cleaned = [clean_dialogue(dialogue, counter) for dialogue in (dialogues[:limit] if limit else dialogues)]
    kept = [dialogue for dialogue in cleaned if dialogue.turns]
    counter["dialogues"] = len(kept)
    return kept


def _replay(data: DataSettings, seed: int, counts: Counts) -> list[Instruction]:
    if not data.replay or not data.replay_count:
        return []
    instructions = load_alpaca(data.replay, _counter(counts, data.replay, "instructions"))
    wanted = min(len(instructions), data.replay_count, data.limit or data.replay_count)
    return random.Random(derive_seed(seed, "replay")).sample(instructions, wanted)
