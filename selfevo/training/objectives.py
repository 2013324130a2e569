"""What training minimises: the mean of a loss over items, SFT or DPO + gamma * SFT. The one loop is in ``loop.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from selfevo.losses import dpo_sft_loss
from selfevo.models.transformer import Transformer
from selfevo.scoring import Example, packed_logps
from selfevo.training.settings import PreferenceSettings
from selfevo.trie.trie import Ids, as_ids

Statistics = Mapping[str, Tensor | float]  # float64 numbers on the model's device, which nobody waits for


class Objective(Protocol):
    """Items to train on; ``groups`` names the dialogue of each, so that items with a shared prefix stay together."""

    @property
    def groups(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def sequences(self, index: int) -> list[Ids]:
        """The token sequences of one item, which stay in one pack."""
        ...

    def part(self, indices: Sequence[int]) -> Objective:
        """The same objective on some of the items, for another process."""
        ...

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, Statistics]:
        """The loss summed over the items of one pack, to differentiate, and statistics summed over them."""
        ...


@dataclass(frozen=True)
class SFTObjective:
    """Mean over replies of the mean negative log-probability of each reply's tokens, stop id included."""

    examples: Sequence[Example]
    groups: Sequence[str]

    def __len__(self) -> int:
        return len(self.examples)

    def sequences(self, index: int) -> list[Ids]:
        prompt, response = self.examples[index]
        return [as_ids([*prompt, *response])]

    def part(self, indices: Sequence[int]) -> SFTObjective:
        return SFTObjective([self.examples[i] for i in indices], [self.groups[i] for i in indices])

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, Statistics]:
        sums, lengths = packed_logps(model, [self.examples[i] for i in indices])
        loss = -(sums / lengths).sum()
        return loss, {"loss": loss.detach().double(), "tokens": lengths.sum().double()}


@dataclass(frozen=True)
class PairIds:
    """One preference pair as ids: the generation prompt and both replies with their stop ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class DPOObjective:
    """DPO + gamma * SFT (Eq. 6-8) against stored reference log-probabilities, (N, 2) float32: chosen, rejected."""

    pairs: Sequence[PairIds]
    reference: Tensor
    groups: Sequence[str]
    beta: float = PreferenceSettings.beta
    gamma: float = PreferenceSettings.gamma
    sft_term: str = PreferenceSettings.sft_term  # "mean" over a reply's tokens, or their "sum"

    def __len__(self) -> int:
        return len(self.pairs)

    def sequences(self, index: int) -> list[Ids]:
        pair = self.pairs[index]
        return [as_ids([*pair.prompt, *pair.chosen]), as_ids([*pair.prompt, *pair.rejected])]

    def part(self, indices: Sequence[int]) -> DPOObjective:
        pairs, groups = [self.pairs[i] for i in indices], [self.groups[i] for i in indices]
        return replace(self, pairs=pairs, reference=self.reference[list(indices)], groups=groups)

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, Statistics]:
        count = len(indices)
        pairs = [self.pairs[i] for i in indices]
        sums, lengths = packed_logps(model, both_sides(pairs))
        reference = self.reference[list(indices)].to(sums.device)
        chosen, rejected = sums[:count], sums[count:]
        result = dpo_sft_loss(
            chosen, rejected, reference[:, 0], reference[:, 1],
            lengths[:count] if self.sft_term == "mean" else None,
            beta=self.beta, gamma=self.gamma,
        )  # fmt: skip
        per_token = sums.detach() / lengths
        statistics = {
            "loss": result.loss.detach().double() * count,
            "dpo": result.dpo.detach().double() * count,
            "sft": result.sft.detach().double() * count,
            "accuracy": (result.chosen_rewards > result.rejected_rewards).sum(),
            "chosen_reward": result.chosen_rewards.sum(),
            "rejected_reward": result.rejected_rewards.sum(),
            "chosen_logp_per_token": per_token[:count].sum(),
            "rejected_logp_per_token": per_token[count:].sum(),
            "tokens": lengths.sum(),
        }
        return result.loss * count, {name: value.double() for name, value in statistics.items()}


def both_sides(pairs: Sequence[PairIds]) -> list[Example]:
    """All chosen replies, then all rejected ones, each with its prompt."""
    chosen: list[Example] = [(pair.prompt, pair.chosen) for pair in pairs]
    return chosen + [(pair.prompt, pair.rejected) for pair in pairs]
