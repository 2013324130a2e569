"""From logits to a token, in the order and meaning of transformers: penalty, temperature, top-k, top-p, draw.

Notation: R rows, V vocabulary, L ids already seen, C candidates. Logits are (V, R), a column for each row, as the
product of the head with hidden states is written fastest. Ids seen are (R, L), each once; where a row has fewer, it
repeats its first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from selfevo.kernels.elementwise import widen

_MASK = (1 << 64) - 1
_TIES = 16  # scores beyond the k-th that are looked at in case they tie with it
_COLDEST = 1e-5  # temperatures below are greedy: scores divided by them would overflow
_GROUP = 16  # scores of which the maximum is taken first, see topk_by_groups


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``temperature`` 0 is greedy, ``top_k`` 0, ``top_p`` 1 and penalty 1 switch a step off.

    In the settings of a run ``seed`` stays 0: every rollout has one derived from the run's.
    """

    temperature: Annotated[float, "sampling temperature; 0 is greedy"] = 0.9
    top_p: Annotated[float, "nucleus mass; 1 switches it off"] = 0.8
    top_k: Annotated[int, "candidates per token; 0 switches it off"] = 50
    repetition_penalty: Annotated[float, "repetition penalty over prompt and reply; 1 switches it off"] = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number, not negative: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]: {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative (0 switches it off): {self.top_k}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be a positive, finite number: {self.repetition_penalty}")

    def sample(self, logits: Tensor, seen: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, list[int]]:
        """Logits (V, R), overwritten, ids seen (R, L), both as ``logits_to_probs`` wants them, sequence keys and
        step numbers (R,) -> next ids (R,), on the device and as numbers. Of likeliest ids that tie, greedy takes the
        smallest."""
        greedy = self.temperature < _COLDEST
        temperature, top_k, top_p = (1.0, 1, 1.0) if greedy else (self.temperature, self.top_k, self.top_p)
        noise = uniform_noise(self.seed, keys, steps)
        if greedy:
            noise = torch.zeros_like(noise)
        attempts = _attempts(logits, seen, self.repetition_penalty, temperature, top_k, top_p)
        while True:
            probs, ids, trouble = next(attempts)
            tokens = draw(probs, ids, noise)
            *found, tied, broken = torch.cat((tokens, trouble)).tolist()  # the one time that a step waits for a GPU
            if not _fails(tied, broken):
                return tokens, found


def logits_to_probs(
    logits: Tensor, seen: Tensor | None = None, *, penalty: float = 1.0, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Logits (V, R), ids seen (R, L) -> probabilities and ids (R, C) of the candidates; all else has probability 0.
    Columns of logits beyond the rows of ids seen are padding.

    The repetition penalty (Keskar et al. 2019) divides positive scores of ids seen and multiplies negative ones, in
    float32; their places in ``logits`` are overwritten. Top-k keeps everything that ties with the k-th score. Top-p
    keeps the smallest set, likeliest first, whose mass reaches p. Penalty 1, ``top_k`` 0 and ``top_p`` 1 switch a step
    off. The vocabulary is sorted only without a top-k. Raises FloatingPointError for logits that are not finite.
    """
    if seen is None:
        seen, penalty = torch.zeros(logits.shape[1], 1, dtype=torch.int64, device=logits.device), 1.0
    attempts = _attempts(logits, seen, penalty, temperature, top_k, top_p)
    probs, ids, trouble = next(attempts)
    while _fails(*trouble.tolist()):
        probs, ids, trouble = next(attempts)
    return probs, ids


def _attempts(
    logits: Tensor, seen: Tensor, penalty: float, temperature: float, top_k: int, top_p: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Probabilities and ids of candidates, found among more and more of the largest scores, and what may be wrong with
    them, (2,) int64: that the k-th score ties with others that were not looked at, which is common in bfloat16, and
    that logits are not finite. The device is not waited for."""
    vocab = len(logits)
    k = min(top_k, vocab) if top_k else vocab
    penalised = None if penalty == 1 else _penalise(logits, seen, penalty)
    width = min(k + _TIES, vocab)
    while True:
        scores, ids = _topk(logits, seen, penalised, width)
        # Ids of probability 0, as banned ones, may tie as they like.
        tied = ((scores[:, k - 1] == scores[:, -1]) & (scores[:, -1] > -torch.inf)).any() & (width < vocab)
        broken = ~torch.isfinite(scores[:, 0]).all()  # NaN counts as the largest
        scores = scores.masked_fill(scores < scores[:, k - 1 : k], float("-inf"))
        probs = (scores / temperature).softmax(dim=1)
        if top_p < 1:
            mass_before = probs.cumsum(dim=1) - probs
            mass_before[:, 0] = 0.0  # at least one token stays
            probs = probs.masked_fill(mass_before >= top_p, 0.0)
            probs = probs / probs.sum(dim=1, keepdim=True)
        yield probs, ids, torch.stack((tied, broken)).long()
        width = min(2 * width, vocab)


def _fails(tied: int, broken: int) -> bool:
    """Whether to look at more scores. Raises FloatingPointError for logits that are not finite."""
    if broken:
        raise FloatingPointError("the model's logits are not finite: are its weights damaged, or the dtype too narrow?")
    return bool(tied)


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Moves the scores of ids seen out of the logits, where -inf takes their place: (R, L), with the penalty applied in
    float32, which the dtype of the logits may not hold."""
    places = seen * logits.shape[1] + torch.arange(len(seen), device=seen.device)[:, None]
    scores = widen(logits.view(-1)[places])
    logits.view(-1)[places] = -torch.inf  # on a CPU, scatter_ is slow in bfloat16
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores[:, 1:].masked_fill_(seen[:, 1:] == seen[:, :1], -torch.inf)
    return scores


def _topk(logits: Tensor, seen: Tensor, penalised: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest scores of each row and their ids, (R, width), penalised ones included."""
    scores, ids = (found[: len(seen)] for found in topk_by_groups(logits, width))
    if penalised is None:
        return scores, ids
    scores, order = torch.cat((scores, penalised), dim=1).topk(width)
    return scores, torch.cat((ids, seen), dim=1).gather(1, order)


def topk_by_groups(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each column and their places, in falling order: (V, R) -> (R, width) twice.

    Top-k in two passes: maxima of groups of 16 scores, top-k of the maxima (found the same way), top-k inside the
    winning groups. A maximum costs far less than a search, and the other groups are not searched.
    """
    count = len(scores) // _GROUP
    if count < 4 * width:
        return widen(scores.t().contiguous()).topk(width)
    groups = scores[: count * _GROUP].view(_GROUP, count, -1)
    _, winners = topk_by_groups(groups.amax(0), width)
    offsets = count * torch.arange(_GROUP, device=scores.device)
    rest = torch.arange(count * _GROUP, len(scores), device=scores.device).expand(len(winners), -1)
    places = torch.cat(((winners[:, None] + offsets[:, None]).flatten(1), rest), dim=1)
    found, order = widen(scores.t().gather(1, places)).topk(width)
    return found, places.gather(1, order)


def ban(logits: Tensor, banned: Sequence[Tensor | None]) -> None:
    """Gives ids the probability 0: logits (V, R or more), overwritten, and for each row its ids (N,)."""
    rows: dict[Tensor, list[int]] = {}  # rows that share a tensor, of which there are few
    for row, ids in enumerate(banned):
        if ids is not None:
            rows.setdefault(ids, []).append(row)
    for ids, members in rows.items():
        logits[ids.to(logits.device)[:, None], torch.tensor(members, device=logits.device)] = -torch.inf


def draw(probs: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
    """One id per row: probs and ids (R, C), noise (R,) uniform in [0, 1) -> (R,).

    The cumulative mass runs in the order of ids, not of scores, so a near-tie that rounds the other way in another
    batch does not change the draw.
    """
    ids, order = ids.sort(dim=1)
    mass = probs.gather(1, order).double().cumsum(dim=1)
    below = mass <= noise[:, None] * mass[:, -1:]
    choice = below.sum(dim=1, keepdim=True).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, choice)[:, 0]


def remember(seen: Tensor, places: Tensor, tokens: Tensor) -> None:
    """Writes tokens (R,) to their places (R,) among the ids seen (R, L), in place."""
    known = (seen == tokens[:, None]).any(dim=1)
    seen.scatter_(1, places[:, None], torch.where(known, seen[:, 0], tokens)[:, None])


def uniform_noise(seed: int, keys: Tensor, steps: Tensor) -> Tensor:
    """Counter-based noise: int64 keys and steps (R,) -> (R,) float64 in [0, 1), a function of these numbers."""
    state = _mix(_mix(_wrap(_mix_int(seed)) ^ keys) + steps)
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014); int64 products wrap around as wanted."""
    x = x + _wrap(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    return int(_mix(torch.tensor([_wrap(x & _MASK)], dtype=torch.int64))[0])


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(x: int) -> int:
    """The signed 64-bit number with these bits."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x
