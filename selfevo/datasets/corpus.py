"""The dialogues of a run: what is trained on, held out, used as seeds and tested on, and how turns become examples."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selfevo.datasets.readers import load_alpaca, load_dialogues
from selfevo.dialogue import (
    Dialogue,
    Example,
    Instruction,
    clean_dialogue,
    reply_examples,
    split_dialogues,
)

Counts = dict[str, dict[str, int]]  # per file, what cleaning changed


class CorpusError(ValueError):
    """Files that leave a stage without data; the message says which."""


@dataclass(frozen=True)
class SeedPart:
    """The seed turns of one iteration; pairs of the ``held_out`` dialogues (by id) serve early stopping."""

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
        """Sizes and rule counts, for the run folder."""
        sizes = {
            "train_dialogues": len(self.train),
            "held_out_dialogues": len(self.held_out),
            "replay_instructions": len(self.replay),
            "seed_examples": [len(part.examples) for part in self.seeds],
            "test_examples": len(self.test),
        }
        return {"sizes": sizes, "rules": self.counts}


def load_corpus(
    *,
    esconv: str,
    synthetic: Sequence[str],
    replay: str,
    test: str,
    iterations: int,
    limit: int,
    replay_count: int,
    seed: int,
) -> Corpus:
    """Reads and cleans all files and splits them by dialogue, as the seed says.

    ESConv is split 9:1. The tenth is the test set, or, where ``test`` names a file, what SFT is held out against;
    without such a file a tenth of the training dialogues serves for that. Seeds, from ``synthetic`` or else from the
    training dialogues, are split into one part per iteration. ``limit`` bounds the records taken of each file (0: all).
    """
    counts: Counts = {}
    train, held_out, tested = split_human(esconv, test, limit, seed, counts)
    sources = [dialogue for path in synthetic for dialogue in _dialogues(path, limit, counts)] or train
    parts = split_dialogues(sources, (1 / iterations,) * iterations, seed=seed + 2)
    test_counts = _counter(counts, test or esconv, "targets")
    corpus = Corpus(
        train=train,
        held_out=held_out,
        replay=_replay(replay, limit, replay_count, seed, counts),
        seeds=[_seed_part(part, seed, _counter(counts, "seeds", f"targets_{i}")) for i, part in enumerate(parts, 1)],
        test=[example for dialogue in tested for example in reply_examples(dialogue, test_counts)],
        counts={name: dict(rules) for name, rules in counts.items()},
    )
    _check(corpus, esconv, synthetic, test)
    return corpus


def split_human(
    esconv: str, test: str, limit: int, seed: int, counts: Counts
) -> tuple[list[Dialogue], list[Dialogue], list[Dialogue]]:
    """Cleaned dialogues to train on, to hold out and to test on, dealt out as ``load_corpus`` says."""
    train, held_out = split_dialogues(_dialogues(esconv, limit, counts), (0.9, 0.1), seed=seed)
    if test:
        return train, held_out, _dialogues(test, limit, counts)
    train, early = split_dialogues(train, (0.9, 0.1), seed=seed + 1)
    return train, early, held_out


def load_test(path: str, limit: int = 0) -> list[Example]:
    """The test turns of a file, cleaned as those of a run are; ``limit`` bounds the dialogues (0: all)."""
    counts: Counts = {}
    rules = _counter(counts, path, "targets")
    return [example for dialogue in _dialogues(path, limit, counts) for example in reply_examples(dialogue, rules)]


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


def _replay(
    path: str, limit: int, replay_count: int, seed: int, counts: dict[str, dict[str, int]]
) -> list[Instruction]:
    if not path or not replay_count:
        return []
    instructions = load_alpaca(path, _counter(counts, path, "instructions"))
    wanted = min(len(instructions), replay_count, limit or replay_count)
    return random.Random(seed).sample(instructions, wanted)


def _seed_part(dialogues: list[Dialogue], seed: int, counts: Counter[str]) -> SeedPart:
    _, held_out = split_dialogues(dialogues, (0.9, 0.1), seed=seed + 3)
    examples = [example for dialogue in dialogues for example in reply_examples(dialogue, counts)]
    return SeedPart(examples, frozenset(dialogue.id for dialogue in held_out))


def _check(corpus: Corpus, esconv: str, synthetic: Sequence[str], test: str) -> None:
    if not corpus.train:
        raise CorpusError(f"{esconv}: no dialogue is left to train on")
    for number, part in enumerate(corpus.seeds, 1):
        if not part.examples:
            source = ", ".join(synthetic) or esconv
            raise CorpusError(
                f"{source}: no supporter turn is left as a seed of iteration {number} (too few dialogues?)"
            )
    if not corpus.test:
        raise CorpusError(f"{test or esconv}: no supporter turn is left to test on (too few or too short dialogues)")
