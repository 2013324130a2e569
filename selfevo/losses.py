"""The preference losses, and the sequence log-probabilities that they are made of.

Notation: B sequences, T tokens of a sequence, V vocabulary, D hidden size, N rows (reply tokens, or preference pairs).
Log-probabilities are natural logarithms, hence at most 0, and are computed in float32 whatever the dtype of the model:
a bfloat16 sum of about -200 is rounded to whole numbers. float64 stays float64.

Equation numbers are those of Ye et al. 2025, "From Generic Empathy to Personalized Emotional Support".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from selfevo.kernels.elementwise import widen
from selfevo.kernels.head import check_targets, linear_logps

__all__ = ["DPOSFTLoss", "dpo_loss", "dpo_sft_loss", "linear_logps", "sequence_logps"]


class DPOSFTLoss(NamedTuple):
    """What :func:`dpo_sft_loss` returns."""

    loss: Tensor  # dpo + gamma * sft, scalar
    dpo: Tensor  # scalar
    sft: Tensor  # scalar, before gamma
    chosen_rewards: Tensor  # (N,) beta * (policy - reference), detached
    rejected_rewards: Tensor  # (N,) likewise


def dpo_sft_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_lengths: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
) -> DPOSFTLoss:
    """DPO plus supervision on the chosen replies (Eqs. 6 and 7), from four (N,) summed log-probabilities.

        loss = mean(-log sigmoid(beta * (D_chosen - D_rejected))) + gamma * mean(sft),   D = policy - reference

    Eq. 6 of the paper is misprinted; this is the standard DPO loss, which its text describes. ``sft`` is
    ``-policy_chosen`` (Eq. 7 as printed), or ``-policy_chosen / chosen_lengths`` (the mean over each reply's tokens) if
    the lengths (N,), in tokens, are given. Both are then averaged over pairs, so the loss of a batch is the mean of the
    losses of its pairs.

    Inputs are converted to float32 before any subtraction. The reference is a constant: no gradient flows into it.

    Raises ValueError for arguments that are empty, not (N,) or of different shapes, lengths below 1 (looked for on a
    CPU), beta <= 0 and gamma < 0.
    """
    named = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    if chosen_lengths is not None:
        named["chosen_lengths"] = chosen_lengths
    _check_pairs(named, beta, gamma)
    chosen, rejected = widen(policy_chosen), widen(policy_rejected)
    chosen_rewards = beta * (chosen - widen(reference_chosen.detach()))
    rejected_rewards = beta * (rejected - widen(reference_rejected.detach()))
    dpo = -F.logsigmoid(chosen_rewards - rejected_rewards).mean()
    sft = -(chosen if chosen_lengths is None else chosen / chosen_lengths.to(chosen)).mean()
    return DPOSFTLoss(dpo + gamma * sft, dpo, sft, chosen_rewards.detach(), rejected_rewards.detach())


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (Eq. 6), four (N,) summed log-probabilities -> the mean over pairs, a scalar.

    The equation and the errors are those of :func:`dpo_sft_loss`.
    """
    return dpo_sft_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta).dpo


def sequence_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Summed log-probability of each labelled sequence: (B, T, V), (B, T) -> (B,) float32.

    ``logits[:, t]`` predict ``labels[:, t + 1]``; the shift happens here. Positions labelled ``ignore_index`` do not
    count, and their logits get a zero gradient even if they are not finite. A sequence without labels sums to 0.

    Raises ValueError for mismatched shapes and, on a CPU, for labels outside the vocabulary.
    """
    if logits.dim() != 3 or labels.dim() != 2 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits (batch, seq, vocab) and labels (batch, seq), not {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    labels = labels[:, 1:]
    kept = labels != ignore_index
    targets = labels[kept]
    check_targets(targets, logits.shape[-1])
    # Selecting first keeps prompts and padding out of the float32 copy.
    token_logps = -F.cross_entropy(widen(logits[:, :-1][kept]), targets.long(), reduction="none")
    return token_logps.new_zeros(labels.shape).masked_scatter(kept, token_logps).sum(dim=1)


def _check_pairs(named: dict[str, Tensor], beta: float, gamma: float) -> None:
    shape = named["policy_chosen"].shape
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"policy_chosen must have shape (pairs,) with at least one pair, not {tuple(shape)}")
    for name, values in named.items():
        if values.shape != shape:
            raise ValueError(f"{name} must have the shape of policy_chosen, {tuple(shape)}, not {tuple(values.shape)}")
    lengths = named.get("chosen_lengths")
    on_cpu = lengths is not None and lengths.device.type == "cpu"  # a GPU is not waited for
    if lengths is not None and on_cpu and not bool((lengths >= 1).all()):
        raise ValueError("chosen_lengths must be at least 1: a reply has at least its stop id")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be positive, not {beta}")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must not be negative, not {gamma}")
