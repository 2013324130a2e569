"""The two kinds of training stage.

A stage leaves its adapter under its final name only when it is whole, and starts from what is on disk: a killed run
that is resumed repeats the same steps and ends with the same adapters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from selfevo.datasets.pairs import Pair
from selfevo.datasets.seeds import derive_seed
from selfevo.files import FileError
from selfevo.lora import freeze_adapter, inject_lora, load_adapter, lora_parameters, remove_adapters
from selfevo.models import ChatTokenizer, Transformer
from selfevo.training.checkpoint import NAME as CHECKPOINT
from selfevo.training.examples import encode_pairs
from selfevo.training.loop import train
from selfevo.training.objectives import DPOObjective, SFTObjective
from selfevo.training.reference import stored_reference
from selfevo.training.settings import AdapterSettings, PreferenceSettings, TrainSettings


@dataclass(frozen=True)
class Stage:
    """A stage's folder, its settings, and the name of the backbone, which its adapter notes."""

    folder: Path
    label: str  # of its progress bar
    backbone: str
    adapter: AdapterSettings
    training: TrainSettings

    @property
    def adapter_seed(self) -> int:
        return derive_seed(self.training.seed, "adapter")


def is_trained(folder: Path) -> bool:
    """Whether a stage's adapter is whole: its configuration is written last, then the checkpoint is removed."""
    return (folder / "adapter_config.json").is_file() and not (folder / CHECKPOINT).is_file()


def restore(model: Transformer, folder: Path) -> None:
    """Puts exactly a stage's adapter on the backbone, whose weights stay loaded; always from disk, so that a resumed
    run computes with the same numbers."""
    remove_adapters(model)
    load_adapter(model, folder)


def train_sft(model: Transformer, stage: Stage, items: SFTObjective, held_out: SFTObjective | None) -> None:
    """An SFT stage: a fresh adapter on the bare backbone."""
    remove_adapters(model)
    adapter = stage.adapter
    inject_lora(model, adapter.rank, adapter.alpha, adapter.dropout, seed=stage.adapter_seed)
    train(
        model, items, stage.folder, stage.training,
        held_out=held_out, base_model=stage.backbone, label=stage.label,
    )  # fmt: skip


def train_dpo(
    model: Transformer,
    tokenizer: ChatTokenizer,
    stage: Stage,
    pairs: list[Pair],
    held_out: Collection[str],
    preference: PreferenceSettings | None,
) -> None:
    """A DPO stage: the model as it is, with its adapter or without one, is the frozen reference, and a fresh adapter on
    top is trained.

    Pairs of the ``held_out`` dialogues (by id) serve early stopping. Without a ``preference`` only the SFT term on the
    chosen replies is left. Raises FileError where no pair is left.
    """
    folder, adapter = stage.folder, stage.adapter
    kept, ids = encode_pairs(tokenizer, pairs, model.config.max_positions)
    if not ids:
        raise FileError(f"{folder}: no preference pair was left; {folder / 'filter.json'} says what became of them")
    add_adapter = freeze_adapter if lora_parameters(model) else inject_lora
    add_adapter(model, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, seed=stage.adapter_seed)
    reference = stored_reference(model, ids, folder / "reference.json", stage.training.max_tokens)
    held = [i for i, pair in enumerate(kept) if pair.dialogue in held_out]
    trained = [i for i, pair in enumerate(kept) if pair.dialogue not in held_out]
    if not trained:
        held, trained = [], held

    def objective(members: list[int]) -> DPOObjective | SFTObjective:
        own, groups = [ids[i] for i in members], [kept[i].dialogue for i in members]
        if preference is None:
            return SFTObjective([(pair.prompt, pair.chosen) for pair in own], groups)
        return DPOObjective(own, reference[members], groups, **vars(preference))

    train(
        model, objective(trained), folder, stage.training,
        held_out=objective(held) if held else None, base_model=stage.backbone, label=stage.label,
    )  # fmt: skip
