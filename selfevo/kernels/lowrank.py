"""A linear layer with a low-rank adapter as one differentiable step, exact in float32 beside bfloat16 activations.

Notation: N rows, I and O input and output size, R rank of the frozen factors, r that of the trainable ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfevo.kernels.linear import linear


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, frozen_a: Tensor, frozen_b: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """``W x + bias + frozen_b frozen_a x + b a x``: (..., I) -> (..., O) in the dtype of x and W.

    ``frozen_a`` (R, I), ``frozen_b`` (O, R), ``a`` (r, I) and ``b`` (O, r) share one dtype, float32 beside 16-bit
    weights. W x is rounded to its dtype, and so is the sum. A zero ``b`` adds exact zeros. The frozen factors get no
    gradient; x is kept for the backward pass in its own dtype. Differentiable once.
    """
    result: Tensor = _AdaptedLinear.apply(x, weight, bias, frozen_a, frozen_b, a, b)
    return result


class _AdaptedLinear(torch.autograd.Function):
    """Autograd alone would widen x and the gradient of the result for every layer, and pass over each a dozen times."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        frozen_a: Tensor,
        frozen_b: Tensor,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        all_a, all_b = torch.cat((frozen_a, a)), torch.cat((frozen_b, b), dim=1)
        narrow = product(rows, all_a.t())
        result = add_product(linear(rows, weight, bias), narrow, all_b.t())
        ctx.frozen = len(frozen_a)
        keeps_x = any(ctx.needs_input_grad[i] for i in (1, 5))
        ctx.save_for_backward(rows if keeps_x else None, weight, narrow[:, ctx.frozen :], all_a, all_b)
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, narrow, all_a, all_b = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, needs_a, needs_b = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_narrow = product(rows, all_b)
        grad_x = grad_a = None
        if needs_x:
            grad_x = add_product(linear(rows, weight.t()), grad_narrow, all_a).view(*grad.shape[:-1], weight.shape[1])
        if needs_a:
            grad_a = product(grad_narrow[:, ctx.frozen :].t(), x)
        grad_b = product(narrow.t(), rows).t() if needs_b else None
        grad_weight = rows.t() @ x if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, grad_a, grad_b


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, in float32 where one of them is float32 and the other of 16 bits."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return left.to(wide) @ right.to(wide)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``target`` (N, O) + ``left`` (N, r) ``right`` (r, O), rounded once to the dtype of target, which it may
    overwrite."""
    if target.dtype == left.dtype:
        return target.addmm_(left, right)
    return torch.addmm(target.to(left.dtype), left, right).to(target.dtype)
