"""Operators of PyTorch without a public name, each beside the public formula that stands in where it is missing.

Nothing else in the library calls a private operator, so this file is all that a new version of PyTorch can break.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


@functools.cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in units of their own (Intel AMX)."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return bool(capabilities.get("amx_tile"))


def attention_and_logsumexp(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention (B, K, T, E) of queries (B, K, T, E) to keys and values (B, K, S, E), and the log-sum-exps (B, K, T) of
    the scores, which the public function keeps to itself.

    ``bias``, added to the scores, broadcasts to (B, K, T, S). The operator takes for granted that the last dimension of
    each is contiguous.
    """
    operator = _operator("_scaled_dot_product_flash_attention_for_cpu")
    if operator is None or queries.device.type != "cpu":
        return attention_and_logsumexp_formula(queries, keys, values, bias)
    mixed, sums = operator(queries, keys, values, attn_mask=bias)
    return mixed, sums


def attention_and_logsumexp_formula(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attention_and_logsumexp` by public operations."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ keys.to(wide).transpose(-1, -2) * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ values.to(wide)).to(queries.dtype), scores.logsumexp(-1)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of the scores from that of their softmax over the last dimension; both of one shape and dtype."""
    operator: Callable[..., Tensor] | None = getattr(torch, "_softmax_backward_data", None)
    if operator is None:
        return softmax_backward_formula(grad, probabilities)
    return operator(grad, probabilities, -1, probabilities.dtype)


def softmax_backward_formula(grad: Tensor, probabilities: Tensor) -> Tensor:
    """:func:`softmax_backward` by public operations."""
    return probabilities * (grad - (grad * probabilities).sum(-1, keepdim=True))


def silu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of ``silu(x)``, written over ``grad``; both of one shape and dtype."""
    operator = _operator("silu_backward")
    if operator is None:
        return grad.copy_(silu_backward_formula(grad, x))
    result: Tensor = operator.grad_input(grad, x, grad_input=grad)
    return result


def silu_backward_formula(grad: Tensor, x: Tensor) -> Tensor:
    """:func:`silu_backward_` by public operations, as a new tensor."""
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


@functools.cache
def _operator(name: str) -> Any:
    """An ATen operator, or None where this version of PyTorch has none of that name."""
    try:
        return getattr(torch.ops.aten, name)
    except AttributeError:
        return None
