"""The steps from logits to a token, in the order and meaning of transformers: penalty, temperature, top-k, top-p, draw.

Notation: R rows, V vocabulary, L ids already seen, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_TIES = 16  # scores beyond the k-th that are looked at in case they tie with it
_BLOCK, _LANES = 128, 8  # scores of which the maximum is taken first, see largest


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (Keskar et al. 2019), in place: logits (R, V), seen (R, L) ids of prompt and reply.

    Positive scores are divided, negative ones multiplied, once per distinct token: repeats in ``seen`` write one value.
    """
    scores = logits.gather(1, seen)
    return logits.scatter_(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def candidates(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Logits (R, V) -> probabilities and ids (R, C) of what may be drawn; what is filtered out has probability 0.

    Top-k keeps everything that ties with the k-th score. Top-p keeps the smallest set, likeliest first, whose mass
    reaches p. ``top_k`` 0 and ``top_p`` 1 switch the filters off. The vocabulary is sorted only without a top-k.
    """
    vocab = logits.shape[1]
    k = min(top_k, vocab) if top_k else vocab
    width = min(k + _TIES, vocab)
    scores, ids = largest(logits, width)
    while width < vocab and bool((scores[:, k - 1] == scores[:, -1]).any()):  # a tie that may go on; common in bfloat16
        width = min(2 * width, vocab)
        scores, ids = largest(logits, width)
    scores = scores.masked_fill(scores < scores[:, k - 1 : k], float("-inf"))
    probs = (scores / temperature).softmax(dim=1)
    if top_p < 1:
        mass_before = probs.cumsum(dim=1) - probs
        mass_before[:, 0] = 0.0  # at least one token stays
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
        probs = probs / probs.sum(dim=1, keepdim=True)
    return probs, ids


def largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row and their places, in falling order: (R, V) -> (R, width) twice.

    They lie in the ``width`` blocks of neighbours whose maxima are largest, and a maximum costs far less than a search:
    the other blocks are not looked at.
    """
    count = scores.shape[1] // _BLOCK
    if count < 4 * width:
        return scores.topk(width)
    blocks = scores[:, : count * _BLOCK].unflatten(1, (count, _BLOCK))
    chosen = blocks.amax(2).topk(width, sorted=False).indices
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    near, rest = blocks[rows, chosen].flatten(1), scores[:, count * _BLOCK :]
    if rest.shape[1]:
        near = torch.cat((near, rest), dim=1)
    found, places = _largest_of_few(near, width)
    block = places // _BLOCK  # those after the last are of the rest
    ids = chosen.gather(1, block.clamp(max=width - 1)) * _BLOCK + places % _BLOCK
    return found, torch.where(block < width, ids, places + (count - width) * _BLOCK)


def _largest_of_few(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same once more, the members of a block ``count`` places apart: maxima of few neighbours are slow."""
    count = scores.shape[1] // _LANES
    if count < 4 * width:
        return scores.topk(width)
    chosen = scores[:, : count * _LANES].unflatten(1, (_LANES, count)).amax(1).topk(width, sorted=False).indices
    lanes = count * torch.arange(_LANES, device=scores.device)
    rest = torch.arange(count * _LANES, scores.shape[1], device=scores.device).expand(len(scores), -1)
    places = torch.cat(((chosen[:, None] + lanes[:, None]).flatten(1), rest), dim=1)
    found, order = scores.gather(1, places).topk(width)
    return found, places.gather(1, order)


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
