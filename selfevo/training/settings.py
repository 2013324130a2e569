"""Settings of training; the values of Ye et al. (2025) are the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from selfevo.scoring import MAX_TOKENS

SHUFFLES = ("dialogues", "pairs")
SCHEDULES = ("constant", "linear", "cosine")
SFT_TERMS = ("mean", "sum")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter that a stage trains."""

    rank: Annotated[int, "LoRA rank"] = 8
    alpha: Annotated[float, "LoRA alpha"] = 16.0
    dropout: Annotated[float, "dropout on the adapters' input", "lora_dropout"] = 0.0

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

    beta: Annotated[float, "DPO beta"] = 0.1
    gamma: Annotated[float, "weight of the SFT term beside DPO; 0 is plain DPO"] = 1.0
    # A sum weighs replies by their lengths, and outweighs the DPO term, which begins at ln 2, some hundred times. The
    # mean is what LLaMA-Factory computes, which the paper trained with.
    sft_term: Annotated[str, "SFT term beside DPO: mean over a reply's tokens, or their sum (Eq. 7)", SFT_TERMS] = (
        "mean"
    )

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, not {self.beta}")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be finite and not negative: {self.gamma}")
        if self.sft_term not in SFT_TERMS:
            raise ValueError(f"sft_term should be one of {', '.join(SFT_TERMS)}, not {self.sft_term!r}")


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation of a stage.

    In the settings of a run ``seed`` stays 0, each stage has one derived from the run's; and ``learning_rate`` is that
    of DPO stages.
    """

    learning_rate: Annotated[float, "learning rate of DPO stages"] = 5e-6
    epochs: Annotated[int, "epochs of every stage"] = 2
    batch_size: Annotated[int, "items of a batch"] = 4
    accumulation: Annotated[int, "batches of an optimiser step"] = 2
    warmup: Annotated[float, "share of the steps over which the learning rate rises"] = 0.01
    schedule: Annotated[str, "learning rate after the warm-up: constant, or falling to 0", SCHEDULES] = "constant"
    weight_decay: Annotated[float, "AdamW weight decay"] = 0.0
    max_grad_norm: Annotated[float, "gradient clipping"] = 1.0
    evaluations_per_epoch: Annotated[int, "evaluations on held-out items for early stopping"] = 4
    patience: Annotated[int, "evaluations without improvement before a stage stops early"] = 3
    max_tokens: Annotated[int, "distinct tokens of one packed row; lower it where memory is short"] = MAX_TOKENS
    shuffle: Annotated[str, "what is shuffled: 'pairs' gives up sharing context across turns", SHUFFLES] = "dialogues"
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
        for name, known in (("shuffle", SHUFFLES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, not {getattr(self, name)!r}")
