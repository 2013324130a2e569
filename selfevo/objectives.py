"""What training minimises: the mean of a loss over items, SFT or DPO + gamma * SFT. The one loop is in ``train.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfevo.lora import disable_adapters
from selfevo.losses import dpo_sft_loss
from selfevo.models.transformer import Transformer
from selfevo.scoring import Example, response_logps
from selfevo.trie import Ids, as_ids, pack


class Objective(Protocol):
    """Items to train on; ``groups`` names the dialogue of each, so that relatives can be scheduled together."""

    @property
    def groups(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def sequences(self, index: int) -> list[Ids]:
        """The token sequences of one item, which stay in one pack."""
        ...

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over some items, to differentiate, and statistics summed over them."""
        ...


@dataclass(frozen=True)
class SFTObjective:
    """Mean over replies of the mean negative log-probability of each reply's tokens, stop id included."""

    examples: Sequence[Example]
    groups: Sequence[str]
    max_tokens: int

    def __len__(self) -> int:
        return len(self.examples)

    def sequences(self, index: int) -> list[Ids]:
        prompt, response = self.examples[index]
        return [as_ids([*prompt, *response])]

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        sums, lengths = response_logps(model, [self.examples[i] for i in indices], max_tokens=self.max_tokens)
        loss = -(sums / lengths).sum()
        return loss, {"loss": loss.item(), "tokens": float(lengths.sum())}


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
    max_tokens: int
    beta: float = 0.1
    gamma: float = 1.0

    def __len__(self) -> int:
        return len(self.pairs)

    def sequences(self, index: int) -> list[Ids]:
        pair = self.pairs[index]
        return [as_ids([*pair.prompt, *pair.chosen]), as_ids([*pair.prompt, *pair.rejected])]

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        count = len(indices)
        pairs = [self.pairs[i] for i in indices]
        sums, lengths = response_logps(model, both_sides(pairs), max_tokens=self.max_tokens)
        reference = self.reference[list(indices)].to(sums.device)
        chosen, rejected = sums[:count], sums[count:]
        result = dpo_sft_loss(
            chosen, rejected, reference[:, 0], reference[:, 1], lengths[:count], beta=self.beta, gamma=self.gamma
        )
        per_token = sums.detach() / lengths
        statistics = {
            "loss": result.loss.item() * count,
            "dpo": result.dpo.item() * count,
            "sft": result.sft.item() * count,
            "accuracy": float((result.chosen_rewards > result.rejected_rewards).sum()),
            "chosen_reward": float(result.chosen_rewards.sum()),
            "rejected_reward": float(result.rejected_rewards.sum()),
            "chosen_logp_per_token": float(per_token[:count].sum()),
            "rejected_logp_per_token": float(per_token[count:].sum()),
            "tokens": float(lengths.sum()),
        }
        return result.loss * count, statistics


def both_sides(pairs: Sequence[PairIds]) -> list[Example]:
    """All chosen replies, then all rejected ones, each with its prompt."""
    chosen: list[Example] = [(pair.prompt, pair.chosen) for pair in pairs]
    return chosen + [(pair.prompt, pair.rejected) for pair in pairs]


@torch.no_grad()
def reference_logps(model: Transformer, pairs: Sequence[PairIds], max_tokens: int) -> Tensor:
    """Log-probabilities of chosen and rejected replies under the frozen reference, the model with its trainable
    adapter disabled: (N, 2) float32 on the CPU."""
    items = [[as_ids([*pair.prompt, *pair.chosen]), as_ids([*pair.prompt, *pair.rejected])] for pair in pairs]
    result = torch.empty(len(pairs), 2)
    with disable_adapters(model):
        for members in pack(items, max_tokens):
            sums, _ = response_logps(model, both_sides([pairs[i] for i in members]), max_tokens=max_tokens)
            result[members] = sums.cpu().view(2, -1).T
    return result


def fingerprint(model: Transformer, pairs: Sequence[PairIds]) -> str:
    """Identifies the reference model and the pairs that log-probabilities were computed with.

    Large weights are sampled at a stride; the frozen adapters of earlier iterations, which are what changes between
    iterations, are taken whole.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith((".lora_A", ".lora_B")):
            continue
        flat = tensor.detach().flatten()
        if "frozen_" not in name:
            flat = flat[:: max(1, flat.numel() // 1024)]
        digest.update(name.encode() + flat.float().cpu().numpy().tobytes())
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
