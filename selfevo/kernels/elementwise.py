"""Normalisation, rotation and gating: a block's work between its matrix products, saving little.

On a CPU these steps are bound by memory. Autograd would keep three float32 copies for a norm and each factor of a
gate; here the backward pass starts from the inputs, which are kept once and in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfevo.kernels.private_ops import silu_backward_


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension: (..., D), (D,) -> (..., D).

    The division is in float32 and its result rounded to the dtype of x before the weight, as checkpoints were trained.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """And the inverses of the roots, (..., 1). A norm reads x once, where squares would be written first."""
    wide = widen(x)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return weight * (wide * inverse).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        normed = widen(x) * inverse
        grad_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0) if needs_weight else None
        if not needs_x:
            return None, grad_weight, None
        slope = widen(grad * weight)
        along = (slope * normed).mean(-1, keepdim=True)  # the part of the slope that only scales x
        grad_x = slope.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


def widen(x: Tensor) -> Tensor:
    """As float32, or float64 where it was already."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half form: x (B, H, T, E), cosines and sines (B, 1, T, E), constants."""
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin, 1)
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    result = x * cos
    first, second = x.chunk(2, dim=-1)
    low, high = result.chunk(2, dim=-1)
    half = sin[..., : first.shape[-1]]  # both halves of the tables are the same
    low.addcmul_(second, half, value=-sign)
    high.addcmul_(first, half, value=sign)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of one shape. Where no gradient is wanted, ``gate`` is overwritten: fresh memory costs more
    than the sums."""
    if not torch.is_grad_enabled():
        return F.silu(gate, inplace=True).mul_(up)
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = grad * up
        return silu_backward_(grad_gate, gate), grad_up
