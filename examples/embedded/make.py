"""Makes the embedded default: the dialogues in ``data/`` and the small backbone in ``backbone/``, from scratch.

    python -m examples.embedded.make --out DIR [--steps N] [--seed S] [--data-only]

``data/`` and ``backbone/`` are what ``--out examples/embedded`` makes (seed 0, 4,600 steps, 40 minutes on a busy core;
torch 2.13, whose version and processor may change the last digits of the weights); two more files of dialogues in
``data/`` are made by ``strategies.py``. The backbone is a Llama of 1.1 million parameters in float32, 4.6 MB. A killed
run continues from ``DIR/checkpoint.safetensors``.

Measured by ``measure.py --dialogues 60``: 292 turns of users that share no two facts with those it was trained on,
decoded as in the loop (temperature 0.9, top-p 0.8, top-k 50, repetition penalty 1.2), after

    a reply that is                      its own   short, general   personal   meant for another
    usable JSON                             100%             100%       100%                100%
    told facts found                        100%            99.8%       100%               99.9%
    found facts true                        100%             100%       100%               99.8%
    emotion, personality, intention         100%             100%       100%                100%
    refined reply uses a told fact          100%             100%       100%               98.3%
    refined reply has a wrong fact            0%               0%         1%                5.1%
    score 1 or 2                            100%             100%        26%                 53%
    refined over twice as long                0%             3.8%         0%                  0%

Its own replies have 28 words and none is personal; refined ones have 14. What it cannot do: tell well a personal reply
from one that is meant for somebody else (the last column's scores), or understand a word for a fact that is not in
``words.py``. It is close to faultless in its own narrow world, which a large model in the real one is not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from selfevo.models import ChatTokenizer, Transformer, load_tokenizer, save_pretrained

from . import lessons, world
from . import words as w
from .training import Settings, token_losses, train
from .vocabulary import make_tokenizer

COUNTS = {"human": 200, "synthetic": 440, "test": 80, "replay": 300}
PERSONAL = {"human": 0.35, "synthetic": 0.6}  # shares of personal replies


def _records(name: str, seed: int, one: Callable[[Random], dict[str, Any]]) -> list[dict[str, Any]]:
    return [one(Random(f"{seed}-{name}-{index}")) for index in range(COUNTS[name])]


def make_data(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The records of the four files, by name."""

    def human(split: str) -> Callable[[Random], dict[str, Any]]:
        return lambda rng: world.as_esconv(world.make_dialogue(rng, split, personal=PERSONAL["human"]))

    def synthetic(rng: Random) -> dict[str, Any]:
        return world.as_extes(world.make_dialogue(rng, "synthetic", personal=PERSONAL["synthetic"]))

    return {
        "human": _records("human", seed, human("human")),
        "synthetic": _records("synthetic", seed, synthetic),
        "test": _records("test", seed, human("test")),
        "replay": _records("replay", seed, lambda rng: lessons.instruction(rng, "human")),
    }


def write_data(folder: Path, seed: int) -> None:
    """One record a line, so that the files can be read and compared."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in make_data(seed).items():
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def make_backbone(folder: Path, settings: Settings, checkpoint: Path) -> None:
    """The tokenizer, then the model; the folder holds the newest state all along."""
    make_tokenizer(checkpoint.parent / "tokenizer", settings.seed)
    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")

    def watch(model: Transformer, step: int) -> None:
        save_pretrained(model, tokenizer, folder)
        (folder / "model.safetensors").chmod(0o644)
        short, whole = (recall(model, tokenizer, exchanges) for exchanges in (2, None))
        tqdm.write(f"step {step}: facts recalled in short dialogues {short:.2f}, in whole ones {whole:.2f}")

    train(tokenizer, settings, checkpoint, watch=watch)


@torch.no_grad()
def recall(model: Transformer, tokenizer: ChatTokenizer, exchanges: int | None, dialogues: int = 10) -> float:
    """The share of facts in reflections that the model would have written, each given the true text before it."""
    values = {tokenizer.encode(f" {value}")[0] for values in w.FACTS.values() for value in values}
    rng, right, total = Random("recall"), 0, 0
    for _ in range(dialogues):
        dialogue = world.make_dialogue(rng, "test", personal=0.3, exchanges=exchanges)
        row = lessons.encode_row(tokenizer, lessons.dialogue_row(rng, dialogue, reflections=3, replies=0))
        _, targets, guesses = token_losses(model, row)
        for target, guess in zip(targets.tolist(), guesses.tolist()):
            right += target in values and target == guess
            total += target in values
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder that gets data/ and backbone/")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of the backbone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the dialogues and of the backbone")
    parser.add_argument("--data-only", action="store_true", help="write data/ and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would train another model
    out = Path(arguments.out)
    write_data(out / "data", arguments.seed)
    if not arguments.data_only:
        settings = Settings(steps=arguments.steps, seed=arguments.seed)
        make_backbone(out / "backbone", settings, out / "checkpoint.safetensors")


if __name__ == "__main__":
    main()
