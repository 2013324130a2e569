"""The dialogues of a run: which are trained on, held out, used as seeds and tested on."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from selfevo.datasets.readers import load_alpaca, load_dialogues
from selfevo.datasets.seeds import derive_seed
from selfevo.datasets.statistics import Statistics, describe_dialogues
from selfevo.dialogue import (
    FIRST_SPEAKERS,
    Dialogue,
    Example,
    Instruction,
    clean_dialogue,
    reply_examples,
    split_dialogues,
)

SFT_DATA = ("esconv", "synthetic")
# What is left out of a file, by the rule that counts it; named on stderr where it is more than a few.
_DROPS = {
    "system_messages_dropped": "system messages (replies are made under the run's own, see --prompts-file)",
    "leading_supporter_dropped": "supporter turns before the seeker's first (see --first-speaker)",
    "blank_turns_dropped": "blank turns",
    "turns_without_speaker_dropped": "turns without a speaker",
    "empty_dialogues": "dialogues without turns",
    "blank_outputs_skipped": "instructions without an answer",
    "blank_instructions_skipped": "instructions without a question",
}
_FEW = 3


@dataclass
class DataLog:
    """What was found in the files: rules that cleaning applied, by file and step, and each file's statistics."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def counter(self, path: str, step: str) -> Counter[str]:
        """A counter for one step of reading a file."""
        counter: Counter[str] = Counter()
        self.counts[f"{path}, {step}"] = counter
        return counter


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for each file: its stem or, where another file has that already, as much of its path as it takes."""
    names: dict[str, str] = {}
    taken: dict[str, str] = {}  # name -> full path
    for path in paths:
        full = os.path.realpath(path)
        parts = Path(full).parts
        longer = ("/".join(parts[-depth:]) for depth in range(2, len(parts) + 1))
        names[path] = next(name for name in (Path(path).stem, *longer) if taken.setdefault(name, full) == full)
    return names


def _tell_drops(path: str, counts: Counter[str]) -> None:
    found = ", ".join(f"{counts[rule]:,} {what}" for rule, what in _DROPS.items() if counts[rule] > _FEW)
    if found:
        tqdm.write(f"{path}: left out are {found}", file=sys.stderr)


class CorpusError(ValueError):
    """Files that leave a stage without data; the message names them."""


@dataclass(frozen=True)
class HumanData:
    """Human dialogues to train on and to test on."""

    esconv: Annotated[str, "human dialogues to train on (ESConv.json); split 9:1 by dialogue"]
    test: Annotated[str, "test dialogues; without any, the tenth of ESConv that is held out"] = ""
    first_speaker: Annotated[
        str, "where a supporter speaks first: drop that, or take whoever speaks first for the seeker", FIRST_SPEAKERS
    ] = "drop"
    skip_greetings: Annotated[bool, "leave the first and the last two supporter turns out of the test turns"] = False
    hold_out: Annotated[bool, "without --test: hold a tenth of the training dialogues out for early stopping"] = False
    limit: Annotated[int, "at most this many records of every file, for a quick try; 0 takes all"] = 0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit must not be negative: {self.limit}")
        if self.first_speaker not in FIRST_SPEAKERS:
            known = " or ".join(FIRST_SPEAKERS)
            raise ValueError(f"first_speaker should be {known}, not {self.first_speaker!r}")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return tuple(name for name in (self.esconv, self.test) if name)

    @property
    def names(self) -> dict[str, str]:
        """What ids of each file's records begin with; the test file's do not depend on the other files."""
        return distinct_names(sorted(self.files, key=lambda path: path != self.test))


@dataclass(frozen=True)
class DataSettings(HumanData):
    """All data of the loop: human dialogues, seed dialogues for phase 2, and instructions to replay."""

    synthetic: Annotated[
        tuple[str, ...], "seed dialogues for phase 2 (ExTES, ServeForEmo, ...); without any, ESConv"
    ] = ()
    replay: Annotated[str, "general instructions to replay in phase 1 (Alpaca)"] = ""
    replay_count: Annotated[int, "instructions to replay"] = 500
    sft_data: Annotated[str, "dialogues of phase 1: ESConv, or the synthetic ones (SFT-SynESC)", SFT_DATA] = "esconv"

    def __post_init__(self) -> None:
        if self.sft_data not in SFT_DATA:
            raise ValueError(f"sft_data should be one of {', '.join(SFT_DATA)}, not {self.sft_data!r}")
        if self.sft_data == "synthetic" and not self.synthetic:
            raise ValueError("sft_data synthetic needs synthetic dialogues: give their files with --synthetic")
        full = [os.path.realpath(path) for path in self.synthetic]
        if twice := [path for path, own in zip(self.synthetic, full) if full.count(own) > 1]:
            raise ValueError(f"synthetic has the same file twice: {', '.join(twice)}; give it once")
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
    log: DataLog

    def report(self) -> dict[str, object]:
        """Sizes, the files' statistics (Table 1) and rule counts, for the run folder."""
        sizes = {
            "train_dialogues": len(self.train),
            "held_out_dialogues": len(self.held_out),
            "replay_instructions": len(self.replay),
            "seed_examples": [len(part.examples) for part in self.seeds],
            "test_examples": len(self.test),
        }
        rules = {step: dict(counter) for step, counter in self.log.counts.items()}
        return {"sizes": sizes, "statistics": self.log.statistics, "rules": rules}


def load_corpus(data: DataSettings, *, iterations: int, seed: int) -> Corpus:
    """Reads and cleans all files and splits them by dialogue; the splits depend on ``seed``.

    ESConv is split 9:1. The tenth is the test set, or, where ``data.test`` names a file, what is held out for early
    stopping of SFT; without such a file nothing is, unless ``data.hold_out`` takes a tenth of the training dialogues
    for it. With ``data.sft_data`` "synthetic" all synthetic dialogues are trained on instead, or nine tenths of them
    where a tenth would be held out. Test turns are all supporter turns, but for those that ``data.skip_greetings``
    leaves out. Seeds, from ``data.synthetic`` or else from the training dialogues, are split into one part per
    iteration. Raises ``CorpusError`` if nothing is left to train on, to test on or as the seeds of an iteration.
    """
    log = DataLog()
    train, held_out, tested = split_human(data, seed, log)
    synthetic = [dialogue for path in data.synthetic for dialogue in _read(path, data, log)]
    sources = synthetic or train
    if data.sft_data == "synthetic":
        train, held_out = synthetic, []
        if data.test or data.hold_out:
            train, held_out = split_dialogues(synthetic, (0.9, 0.1), seed=derive_seed(seed, "split", "held-out"))
    if not train:
        raise CorpusError(f"{data.esconv}: no dialogue is left to train on")
    test_file = data.test or data.esconv
    test = _test_turns(tested, data.skip_greetings, log.counter(test_file, "targets"))
    replay = _replay(data, seed, log)
    seeds = []
    parts: list[list[Dialogue]] = []
    if iterations:
        parts = split_dialogues(sources, (1 / iterations,) * iterations, seed=derive_seed(seed, "split", "seeds"))
    for number, part in enumerate(parts, 1):
        counter = log.counter("seeds", f"targets_{number}")
        examples = [example for dialogue in part for example in reply_examples(dialogue, counter)]
        if not examples:
            source = ", ".join(data.synthetic) or data.esconv
            raise CorpusError(
                f"{source}: no supporter turn is left as a seed of iteration {number} (too few dialogues?)"
            )
        _, tenth = split_dialogues(part, (0.9, 0.1), seed=derive_seed(seed, "split", "seeds", number, "held-out"))
        seeds.append(SeedPart(examples, frozenset(dialogue.id for dialogue in tenth)))
    if not test:
        raise CorpusError(f"{test_file}: no supporter turn is left to test on (too few or too short dialogues)")
    return Corpus(train, held_out, replay, seeds, test, log)


def split_human(data: HumanData, seed: int, log: DataLog) -> tuple[list[Dialogue], list[Dialogue], list[Dialogue]]:
    """Cleaned dialogues to train on, to hold out and to test on, split as ``load_corpus`` says."""
    human = _read(data.esconv, data, log)
    train, held_out = split_dialogues(human, (0.9, 0.1), seed=derive_seed(seed, "split", "test"))
    if data.test:
        return train, held_out, _read(data.test, data, log)
    if not data.hold_out:
        return train, [], held_out
    train, early = split_dialogues(train, (0.9, 0.1), seed=derive_seed(seed, "split", "held-out"))
    return train, early, held_out


def load_test(data: HumanData) -> list[Example]:
    """The test turns of ``data.test``, cleaned as those of a run are."""
    return _test_turns(_read(data.test, data, DataLog()), data.skip_greetings, Counter())


def _test_turns(dialogues: list[Dialogue], skip_greetings: bool, counts: Counter[str]) -> list[Example]:
    first, last = (1, 2) if skip_greetings else (0, 0)
    return [e for one in dialogues for e in reply_examples(one, counts, skip_first=first, skip_last=last)]


def read_dialogues(
    path: str, limit: int = 0, log: DataLog | None = None, *, first_speaker: str = "drop", name: str = ""
) -> list[Dialogue]:
    """The cleaned dialogues of a file that have turns left, of the first ``limit`` ones (0: all).

    What is left out is counted, ``system_messages_dropped`` included, and told on stderr where it is more than a few.
    """
    log = DataLog() if log is None else log
    counter = log.counter(path, "dialogues")
    dialogues = load_dialogues(path, counter, name=name)
    dialogues = dialogues[:limit] if limit else dialogues
    cleaned = [clean_dialogue(dialogue, counter, first_speaker=first_speaker) for dialogue in dialogues]
    kept = [dialogue for dialogue in cleaned if dialogue.turns]
    if systems := sum(bool(dialogue.system) for dialogue in kept):
        counter["system_messages_dropped"] = systems
    _tell_drops(path, counter)
    counter["dialogues"] = len(kept)
    log.statistics[path] = describe_dialogues(kept)
    return kept


def _read(path: str, data: HumanData, log: DataLog) -> list[Dialogue]:
    return read_dialogues(path, data.limit, log, first_speaker=data.first_speaker, name=data.names[path])


def _replay(data: DataSettings, seed: int, log: DataLog) -> list[Instruction]:
    if not data.replay or not data.replay_count:
        return []
    counter = log.counter(data.replay, "instructions")
    instructions = load_alpaca(data.replay, counter, name=data.names[data.replay])
    _tell_drops(data.replay, counter)
    wanted = min(len(instructions), data.replay_count, data.limit or data.replay_count)
    return random.Random(derive_seed(seed, "replay")).sample(instructions, wanted)
