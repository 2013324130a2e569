"""CPU matrix multiplication in the layouts that oneDNN runs fastest; on other devices PyTorch's own.

Notation: N rows, I and O input and output size.
"""

from __future__ import annotations

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

    Where no gradient is wanted, on a CPU, in float32 or in bfloat16 with matrix units, a single row is a matrix-vector
    product (``F.linear`` would read bfloat16 weights at half the memory's rate), and some dozens of rows go through an
    MLP with the weights as the left factor.
    """
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    narrow = x.dtype == weight.dtype == torch.bfloat16 and has_matrix_units()
    if gradient or x.device.type != "cpu" or not (narrow or x.dtype == weight.dtype == torch.float32):
        return F.linear(x, weight, bias)
    size, width = weight.shape
    rows = x.reshape(-1, width)
    if narrow and len(rows) == 1:
        result = torch.mv(weight, rows[0]) if bias is None else torch.addmv(bias, weight, rows[0])
    elif torch.is_inference_mode_enabled() and _weights_on_the_left(len(rows), size, width, narrow):
        result = torch.mm(weight, rows.t()).t()
        if bias is not None:
            result.add_(bias)
    else:
        return F.linear(x, weight, bias)
    return result.view(*x.shape[:-1], size)


def _weights_on_the_left(count: int, size: int, width: int, narrow: bool) -> bool:
    """Whether weights (size, width) are the left factor of a product with ``count`` rows: its result, laid out column
    by column, suits the products of an MLP, which pass it on, more than those around attention."""
    if narrow and count <= 16:
        return True
    return size != width and 16 <= count <= min(256 if narrow else 64, size / 4)
