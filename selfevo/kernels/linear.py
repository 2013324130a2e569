"""Matrix products in the forms that a processor runs fastest. Elsewhere they are PyTorch's own.

Notation: N rows, I and O input and output size, r a rank; of the output head R rows, D hidden size, V vocabulary. What
is said of times is of two threads of an Intel Xeon with AMX.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfevo.kernels.private_ops import has_matrix_units


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
