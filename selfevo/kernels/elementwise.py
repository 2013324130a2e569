"""Normalisation, rotation and gating between the matrix products of a block.

Autograd alone would keep three float32 copies of the input of a norm, and each factor of a gate. The functions here
keep their inputs once, in their own dtype, and recompute the rest in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension: (..., D), (D,) -> (..., D).

    The quotient is computed in float32 and rounded to the dtype of x before it is multiplied by the weight, as in the
    models that checkpoints come from. Differentiable once.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and ``1 / sqrt(mean(x^2) + eps)`` (..., 1). ``vector_norm`` makes no tensor of squares."""
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
        radial = (slope * normed).mean(-1, keepdim=True)  # a change of the length of x does not change its quotient
        return slope.sub_(normed.mul_(radial)).mul_(inverse).to(x.dtype), grad_weight, None


def widen(x: Tensor) -> Tensor:
    """x as float32, or as float64 where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def all_finite(x: Tensor) -> bool:
    """Whether x, of any shape but empty, has neither NaN nor infinities; makes no tensor of the size of x."""
    return bool(torch.stack(x.aminmax()).isfinite().all())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half form: x (B, H, T, E), cosines and sines (B, 1, T, E), constants."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table[..., : first.shape[-1]] for table in (cos, sin))  # both halves of a table are the same
    return torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of one shape. Without gradients ``gate`` is overwritten. Differentiable once."""
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
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activation = F.silu(gate)
            (grad_gate,) = torch.autograd.grad(activation, gate, grad * up)
        return grad_gate, activation.detach().mul_(grad)
