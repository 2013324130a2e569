"""Matrix products in the layouts that are fastest on a CPU; on other devices PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEFT_ROWS = range(16, 65)  # rows that are multiplied with the weights on the left


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O,) -> (..., O), of any strides.

    In inference mode, on a CPU and in float32, 16 to 64 rows are multiplied with the weights as the left factor where
    input and output differ in size. The result is then laid out column by column, which suits the products of an MLP,
    each of which feeds the next, but not those around attention.
    """
    size, width = weight.shape
    rows = x.numel() // max(1, width)
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    suits = float32_on_cpu and size != width and rows in _LEFT_ROWS and 4 * rows <= size
    if not (suits and torch.is_inference_mode_enabled()):
        return F.linear(x, weight, bias)
    result = torch.mm(weight, x.reshape(rows, width).t()).t()
    if bias is not None:
        result.add_(bias)
    return result.view(*x.shape[:-1], size)
