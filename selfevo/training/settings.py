"""Settings of training; the values of Ye et al. (2025) are the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfevo.scoring import MAX_TOKENS
from selfevo.settings import option

SHUFFLES = ("dialogues", "pairs")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter that a stage trains."""

    rank: int = option(8, "LoRA rank")
    alpha: float = option(16.0, "LoRA alpha")
    dropout: float = option(0.0, "dropout on the adapters' input", name="lora_dropout")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1): {self.dropout}")


@dataclass(frozen=True)
class PreferenceSettings:
    """The loss of DPO stages (Eq. 6-8)."""

    beta: float = option(0.1, "DPO beta")
    gamma: float = option(1.0, "weight of the SFT term beside DPO; 0 is plain DPO")

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative: {self.gamma}")


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation of a stage.

    In the settings of a run ``seed`` stays 0, each stage has one derived from the run's; and ``learning_rate`` is that
    of DPO stages.
    """

    learning_rate: float = option(5e-6, "learning rate of DPO stages")
    epochs: int = option(2, "epochs of every stage")
    batch_size: int = option(4, "items of a batch")
    accumulation: int = option(2, "batches of an optimiser step")
    warmup: float = option(0.01, "share of the steps over which the learning rate rises")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    evaluations_per_epoch: int = option(4, "evaluations on held-out items for early stopping")
    patience: int = option(3, "evaluations without improvement before a stage stops early")
    max_tokens: int = option(MAX_TOKENS, "distinct tokens of one packed row; lower it where memory is short")
    shuffle: str = option(
        "dialogues", "what is shuffled: 'pairs' gives up sharing context across turns", choices=SHUFFLES
    )
    checkpoint_every: int = 50  # steps; every evaluation writes one too
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch_size", "accumulation", "evaluations_per_epoch", "patience", "max_tokens",
            "checkpoint_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        rates_fit = 0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf  # NaN fits nowhere
        if not (rates_fit and self.max_grad_norm > 0 and 0 <= self.warmup <= 1):
            raise ValueError(
                "learning_rate and max_grad_norm must be positive, weight_decay not negative, warmup within [0, 1]: "
                f"{self.learning_rate}, {self.max_grad_norm}, {self.weight_decay}, {self.warmup}"
            )
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"shuffle should be one of {', '.join(SHUFFLES)}, not {self.shuffle!r}")
