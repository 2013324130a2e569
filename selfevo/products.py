"""Matrix products in the forms that a processor runs fastest. Elsewhere they are PyTorch's own.

Notation: N rows, I and O input and output size, r a rank; of the output head R rows, D hidden size, V vocabulary. What
is said of times is of two threads of an Intel Xeon with AMX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDENED = 64  # rows; so few are widened faster than a float32 factor is split
_FROM_THE_RIGHT = 16  # rows; with so few, a product waits for its weights
HEAD_PART, HEAD_ROWS = 2048, 64  # rows of the head in one product and few hidden states, see head_logits


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@functools.cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in units of their own (AMX)."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return bool(capabilities.get("amx_tile"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O,) -> (..., O)."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if (wanted and torch.is_grad_enabled()) or not (_narrow(x) and _narrow(weight) and has_matrix_units()):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _linear(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In bfloat16. ``F.linear`` reads the weights of one row at half the memory's rate, those of a few at two thirds.
    With two threads it runs some shapes on one of them, those of not many more or fewer rows than columns."""
    count, size = len(rows), len(weight)
    if count == 1:
        return (torch.mv(weight, rows[0]) if bias is None else torch.addmv(bias, weight, rows[0]))[None]
    if count <= _FROM_THE_RIGHT:
        result = torch.mm(weight, rows.t()).t().contiguous()
        return result if bias is None else result.add_(bias)
    if torch.get_num_threads() != 2 or not 0.8 * size <= count < 2 * size:
        return F.linear(rows, weight, bias)
    parts = math.ceil(count / (0.75 * size))
    result = rows.new_empty(count, size)
    for own, room in zip(rows.chunk(parts), result.chunk(parts)):
        if bias is None:
            torch.mm(own, weight.t(), out=room)
        else:
            torch.addmm(bias, own, weight.t(), out=room)
    return result


def head_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Hidden states (R, D), head (V, D) -> logits (R, V) float32, written to the first rows of ``out``.

    On a processor the head comes in parts that the cache holds, as the left side of the product where that is faster:
    in float32, where threads would have nothing to share with few rows on that side, and with few rows where there are
    bfloat16 units. A single row is read at a third of the memory's rate there, so it goes twice; with these units, it
    is best read by the product with a vector.
    """
    rows, logits = len(hidden), out[: len(hidden)]
    if hidden.device.type != "cpu":
        return logits.copy_(F.linear(hidden, weight))
    units, narrow = has_matrix_units(), hidden.dtype != torch.float32
    if units and rows == 1:
        return logits.copy_(torch.mv(weight, hidden[0]))
    right = rows > HEAD_ROWS or not units if narrow else rows < 4 and units
    columns = (hidden if rows > 1 else hidden.repeat(2, 1)).t()  # a view: laid out anew it takes five times as long
    size = HEAD_PART * (8 if narrow and units else 1)
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        own = weight[part]
        logits[:, part] = F.linear(hidden, own) if right else torch.mm(own, columns).t()[:rows]
    return logits


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, of which one factor is wide and may be of 16 bits, and the other a narrow one of rank r, whose
    dtype the result has: what takes time is to read the wide one.

    On a processor, bfloat16 is read as it is. The float32 factor is split into two bfloat16 parts, and as a product of
    bfloat16 is rounded when it is written, a second one, which starts from the negative of the first, brings back what
    was lost: 16 bits are right, rather than 8.
    """
    if left.dtype == right.dtype:
        return left @ right
    # of the narrow factor, and the dimension its parts are put along
    side = int(right.dtype == torch.promote_types(left.dtype, right.dtype))
    wide, narrow = (left, right) if side else (right, left)
    if not _narrow(wide) or min(wide.shape) < _WIDENED:
        return left.to(narrow.dtype) @ right.to(narrow.dtype)
    parts = torch.cat(_split(narrow), dim=side)
    factors = (wide, parts) if side else (parts, wide)
    rounded = torch.mm(*factors)
    whole = torch.addmm(rounded, *factors, beta=-1) + rounded.to(narrow.dtype)
    high, low = whole.chunk(2, dim=side)
    return high + low


def add_product(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``target`` (N, O), overwritten, + ``left`` (N, r) ``right`` (r, O): the sum is rounded to its dtype once.

    On a processor a bfloat16 target is not widened: left and right are split, and their product is summed in float32.
    """
    if target.dtype == left.dtype:
        return target.addmm_(left, right)
    if not _narrow(target) or min(target.shape) < _WIDENED:
        return torch.addmm(target.to(left.dtype), left, right).to(target.dtype)
    (left_high, left_low), (right_high, right_low) = _split(left), _split(right)
    return target.addmm_(
        torch.cat((left_high, left_low, left_high), dim=1), torch.cat((right_high, right_high, right_low))
    )


def _narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum is x to 16 bits."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()
