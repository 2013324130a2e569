"""The steps from logits to a token, in the order and meaning of transformers: penalty, temperature, top-k, top-p, draw.

Notation: R rows, V vocabulary, L ids already seen, C candidates. Logits are (V, R), a column for each row, as the
product of the head with hidden states is written fastest. Ids seen are (R, L), each once; where a row has fewer, it
repeats its first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_TIES = 16  # scores beyond the k-th that are looked at in case they tie with it
_LANES = 16  # scores of which the maximum is taken first, see largest


def remember(seen: Tensor, places: Tensor, tokens: Tensor) -> None:
    """Writes tokens (R,) to their places (R,) among the ids seen (R, L), in place."""
    known = (seen == tokens[:, None]).any(dim=1)
    seen.scatter_(1, places[:, None], torch.where(known, seen[:, 0], tokens)[:, None])


def candidates(
    logits: Tensor, seen: Tensor | None = None, *, penalty: float = 1.0, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Logits (V, R), ids seen (R, L) -> probabilities and ids (R, C) of what may be drawn; the rest has probability 0.
    Logits may have more columns than there are ids seen, which are left out.

    The repetition penalty (Keskar et al. 2019) divides positive scores of ids seen and multiplies negative ones, in
    float32; their places in ``logits`` are overwritten. Top-k keeps everything that ties with the k-th score. Top-p
    keeps the smallest set, likeliest first, whose mass reaches p. Penalty 1, ``top_k`` 0 and ``top_p`` 1 switch a step
    off. The vocabulary is sorted only without a top-k.
    """
    vocab = len(logits)
    k = min(top_k, vocab) if top_k else vocab
    if seen is None:
        seen, penalty = torch.zeros(logits.shape[1], 1, dtype=torch.int64, device=logits.device), 1.0
    aside = None if penalty == 1 else _set_aside(logits, seen, penalty)
    width = min(k + _TIES, vocab)
    scores, ids = _likeliest(logits, seen, aside, width)
    while width < vocab and bool((scores[:, k - 1] == scores[:, -1]).any()):  # a tie that may go on; common in bfloat16
        width = min(2 * width, vocab)
        scores, ids = _likeliest(logits, seen, aside, width)
    scores = scores.masked_fill(scores < scores[:, k - 1 : k], float("-inf"))
    probs = (scores / temperature).softmax(dim=1)
    if top_p < 1:
        mass_before = probs.cumsum(dim=1) - probs
        mass_before[:, 0] = 0.0  # at least one token stays
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
        probs = probs / probs.sum(dim=1, keepdim=True)
    return probs, ids


def _set_aside(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Takes the scores of ids seen out of the logits: (R, L), with the penalty, which their dtype may not hold."""
    places = seen * logits.shape[1] + torch.arange(len(seen), device=seen.device)[:, None]
    scores = _wide(logits.view(-1)[places])
    logits.view(-1)[places] = -torch.inf  # on a processor, scatter_ is slow in bfloat16
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores[:, 1:].masked_fill_(seen[:, 1:] == seen[:, :1], -torch.inf)
    return scores


def _likeliest(logits: Tensor, seen: Tensor, aside: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest scores of each row and their ids, (R, width), of logits and of what was set aside."""
    scores, ids = (found[: len(seen)] for found in largest(logits, width))
    if aside is None:
        return scores, ids
    scores, order = torch.cat((scores, aside), dim=1).topk(width)
    return scores, torch.cat((ids, seen), dim=1).gather(1, order)


def largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each column and their places, in falling order: (V, R) -> (R, width) twice.

    They lie in the ``width`` sets of sixteen scores whose maxima are largest, and a maximum costs far less than a
    search: the other sets are not looked at. The maxima are searched in the same way.

    A processor compares integers five times as fast as bfloat16, and the bits of positive numbers, read as integers,
    are in the order of these numbers. Of a set without a positive number that finds some negative one, which will do
    unless there are too few positive maxima.
    """
    count = len(scores) // _LANES
    if count < 4 * width:
        return _wide(scores.t().contiguous()).topk(width)
    sets = scores[: count * _LANES].view(_LANES, count, -1)
    by_bits = sets.dtype == torch.bfloat16 and sets.device.type == "cpu"
    maxima, chosen = largest(sets.view(torch.int16).amax(0).view(sets.dtype) if by_bits else sets.amax(0), width)
    if by_bits and bool((maxima[:, -1] < 0).any()):
        _, chosen = largest(sets.amax(0), width)
    lanes = count * torch.arange(_LANES, device=scores.device)
    rest = torch.arange(count * _LANES, len(scores), device=scores.device).expand(len(chosen), -1)
    places = torch.cat(((chosen[:, None] + lanes[:, None]).flatten(1), rest), dim=1)
    found, order = _wide(scores.t().gather(1, places)).topk(width)
    return found, places.gather(1, order)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
