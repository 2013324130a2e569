"""What every run consists of: its settings, its folder, its backbone, and the two kinds of training stage.

A stage leaves its adapter under its final name only when it is whole, and starts from what is on disk: a killed run
that is resumed takes the same road and ends with the same adapters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfevo.evolve.run import RunConfig

from selfevo.datasets.pairs import Pair
from selfevo.files import FileError
from selfevo.lora import freeze_adapter, inject_lora, load_adapter, remove_adapters
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.examples import encode_pairs
from selfevo.training.loop import train
from selfevo.training.objectives import DPOObjective, SFTObjective
from selfevo.training.reference import stored_reference


def is_trained(folder: Path) -> bool:
    """Whether a stage's adapter is whole: its configuration is written last, then the checkpoint is removed."""
    return (folder / "adapter_config.json").is_file() and not (folder / "checkpoint.pt").is_file()


def restore(model: Transformer, folder: Path) -> None:
    """Puts exactly a stage's adapter on the backbone, whose weights stay loaded; always from disk, so that a resumed
    run computes with the same numbers."""
    remove_adapters(model)
    load_adapter(model, folder)


def train_sft(
    config: RunConfig,
    model: Transformer,
    items: SFTObjective,
    held_out: SFTObjective | None,
    folder: Path,
    label: str,
) -> None:
    """An SFT stage: a fresh adapter on the bare backbone."""
    remove_adapters(model)
    inject_lora(model, config.rank, config.alpha, config.lora_dropout, seed=config.seed)
    settings = config.training(config.sft_learning_rate)
    train(model, items, folder, settings, held_out=held_out, base_model=config.backbone, label=label)


def train_dpo(
    config: RunConfig,
    model: Transformer,
    tokenizer: ChatTokenizer,
    pairs: list[Pair],
    held_out: Collection[str],
    folder: Path,
    label: str,
    *,
    salt: int = 0,
    preferring: bool = True,
) -> None:
    """A DPO stage: the adapter that is on the model becomes the frozen reference, and a fresh one on top is trained.

    Pairs of the ``held_out`` dialogues (by id) serve early stopping. Without ``preferring`` only the SFT term on the
    chosen replies is left. Raises FileError where no pair is left.
    """
    kept, ids = encode_pairs(tokenizer, pairs, model.config.max_positions)
    if not ids:
        raise FileError(f"{folder}: no preference pair was left; {folder / 'filter.json'} says what became of them")
    seed = config.seed + salt
    freeze_adapter(model, rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout, seed=seed)
    reference = stored_reference(model, ids, folder / "reference.json", config.max_tokens)
    held = [i for i, pair in enumerate(kept) if pair.dialogue in held_out]
    trained = [i for i, pair in enumerate(kept) if pair.dialogue not in held_out]
    if not trained:
        held, trained = [], held

    def objective(members: list[int]) -> DPOObjective | SFTObjective:
        own, groups = [ids[i] for i in members], [kept[i].dialogue for i in members]
        if not preferring:
            return SFTObjective([(pair.prompt, pair.chosen) for pair in own], groups, config.max_tokens)
        return DPOObjective(own, reference[members], groups, config.max_tokens, config.beta, config.gamma)

    train(
        model,
        objective(trained),
        folder,
        replace(config.training(config.learning_rate), seed=seed),
        held_out=objective(held) if held else None,
        base_model=config.backbone,
        label=label,
    )
