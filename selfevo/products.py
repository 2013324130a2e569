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
_COLUMNS = 16  # of logits, of which there may be a multiple, see head_logits
_FEW = 4  # rows; with fewer, a product is no faster with the weights on the left


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
    """``F.linear``: (..., I), (O, I), (O,) -> (..., O), of any strides.

    With bfloat16 matrix units, ``F.linear`` reads the weights of a single row at half the memory's rate.
    """
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    units = x.dtype == weight.dtype == torch.bfloat16 and has_matrix_units()
    if gradient or x.device.type != "cpu" or not (units or x.dtype == weight.dtype == torch.float32):
        return F.linear(x, weight, bias)
    size, width = weight.shape
    if units and x.numel() == width:
        row = x.reshape(width)
        result = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    else:
        result = _linear(x.reshape(-1, width), weight, bias, units)
    return result.view(*x.shape[:-1], size)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, units: bool) -> Tensor:
    """In float32, or in bfloat16 by matrix units, where ``F.linear`` runs some shapes on one of two threads: those of
    not many more or fewer rows than columns."""
    (count, width), size = rows.shape, weight.shape[0]
    if torch.is_inference_mode_enabled() and _from_the_left(count, size, width, units):
        result = torch.mm(weight, rows.t()).t()
        return result if bias is None else result.add_(bias)
    if not units or torch.get_num_threads() != 2 or not 0.8 * size <= count < 2 * size:
        return F.linear(rows, weight, bias)
    parts = math.ceil(count / (0.75 * size))
    result = rows.new_empty(count, size)
    for own, room in zip(rows.chunk(parts), result.chunk(parts)):
        if bias is None:
            torch.mm(own, weight.t(), out=room)
        else:
            torch.addmm(bias, own, weight.t(), out=room)
    return result


def _from_the_left(count: int, size: int, width: int, units: bool) -> bool:
    """Whether weights (size, width) go on the left of a product with ``count`` rows: its result, laid out column by
    column, suits the products of an MLP, which pass it on, more than those around attention."""
    if units and count <= 16:
        return True
    return size != width and 16 <= count <= min(256 if units else 64, size / 4)


def logits_room(rows: int, weight: Tensor) -> Tensor:
    """What :func:`head_logits` needs for up to so many rows."""
    return weight.new_empty(len(weight) * math.ceil(rows / _COLUMNS) * _COLUMNS)


def head_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Hidden states (R, D), head (V, D) -> logits (V, R) of their dtype, written to the first numbers of ``out``, a
    :func:`logits_room`.

    With the head as the left factor, the product takes half the time in bfloat16, and four fifths in float32. There,
    many rows are filled up to a multiple of 16, which can save a quarter: columns from the R-th on mean nothing.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and len(hidden) > 3 * _COLUMNS:
        hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % _COLUMNS))
    logits = out[: len(weight) * len(hidden)].view(len(weight), -1)
    if hidden.device.type == "cpu" and len(hidden) < _FEW:
        return logits.copy_(linear(hidden, weight).t())
    return torch.mm(weight, hidden.t(), out=logits)


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
